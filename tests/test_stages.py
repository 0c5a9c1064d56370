"""Several runs in one configuration: keys, the checkpoint that is handed on, resuming, and what is wrong."""

import pytest
import torch
import yaml
from nursery import Nursery, steps_logged
from safetensors.torch import load_file
from test_train import assert_equal_weights, checkpoint, make_config, make_lists  # noqa: F401

from fastrank.data import write_lists
from fastrank.train import TrainConfig, read_stages, train, train_stages
from fastrank.train.__main__ import main
from fastrank.train.state import STATE_FILE

COMMON = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_length": 48, "logging_steps": 1}


@pytest.fixture
def configuration(checkpoint, tmp_path):  # noqa: F811
    write_lists(tmp_path / "lists.jsonl", make_lists(20))
    return {
        **COMMON,
        "model": str(checkpoint),
        "train_data": str(tmp_path / "lists.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "stages": [
            {"name": "labels", "loss": "lce", "seed": 3},
            {"name": "teacher", "loss": "ranknet", "max_steps": 3, "loss_options": {"temperature": 2.0}},
        ],
    }


def test_stages_are_runs_one_after_the_other(configuration, checkpoint, tmp_path):  # noqa: F811
    folder = train_stages(read_stages(configuration), quiet=True)
    assert folder == tmp_path / "run" / "2-teacher"
    first = make_config(
        checkpoint, tmp_path / "first", train_data=configuration["train_data"], loss="lce", seed=3, max_steps=4
    )
    train(first, quiet=True)
    assert_equal_weights(tmp_path / "run" / "1-labels", tmp_path / "first")
    second = make_config(
        tmp_path / "first",
        tmp_path / "second",
        train_data=configuration["train_data"],
        loss="ranknet",
        loss_options={"temperature": 2.0},
        max_steps=3,
    )
    train(second, quiet=True)
    assert_equal_weights(folder, tmp_path / "second")


def test_keys_and_flags(configuration):
    flags = {"max_steps": (2, True), "loss_options": ({"temperature": 3.0}, False), "model": ("other", True)}
    one, two = read_stages(configuration, flags)
    assert (one.max_steps, two.max_steps) == (2, 2), "flags win in every stage"
    assert two.loss_options == {"temperature": 3.0} and (one.loss, two.loss) == ("lce", "ranknet")
    assert one.model == "other" and two.model == one.output_dir, "a model of the command line is the first one's"
    (single,) = read_stages({key: value for key, value in configuration.items() if key != "stages"})
    assert single == TrainConfig(**{key: value for key, value in configuration.items() if key != "stages"})
    configuration["stages"][1]["model"] = "own"
    assert read_stages(configuration)[1].model == "own"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": []}, "stages must be a list of mappings"),
        ({"stages": {"loss": "lce"}}, "stages must be a list of mappings"),
        ({"stages": ["lce"]}, "stages must be a list of mappings"),
        ({"output_dir": None}, "lacks output_dir beside stages"),
        ({"stages": [{"los": "lce"}]}, "stage 1: unknown key 'los'; the nearest known one is 'loss'"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stage a: names of stages must differ"),
        ({"stages": [{"name": "../a"}]}, "must differ and be names of folders"),
        ({"stages": [{"output_dir": "x"}]}, "stage 1: output_dir stands beside stages"),
        ({"stages": [{}, {"learning_rate": -1}]}, "learning_rate=-1.0: must not be negative"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_what_is_wrong_is_said(configuration, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_stages(configuration | change)


def test_the_command(configuration, tmp_path, capsys):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(configuration))
    assert main([str(path), "--print_config"]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [one["loss"] for one in printed] == ["lce", "ranknet"]
    assert main([str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count("20 lists, 4 a step") == 2 and "1-labels" in out and "2-teacher" in out
    assert not (tmp_path / "run").exists()
    assert main([str(path), "--max_steps", "1"]) == 0
    assert (tmp_path / "run" / "2-teacher" / "model.safetensors").exists()
    assert main([str(path), "--max_steps", "1"]) == 2
    assert "is not empty: go on with --resume" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text("stages: 3\nmodel: x")
    assert main([str(tmp_path / "wrong.yaml")]) == 2
    assert "stages must be a list" in capsys.readouterr().err


def test_twenty_kills_of_one_chain(configuration, tmp_path):
    """SIGKILL at 20 moments, in steps, in writing states and in writing checkpoints; two threads, dropout on."""
    configuration |= {"save_steps": 1, "num_threads": 2, "max_steps": 10}
    configuration["stages"][1]["max_steps"] = 10
    whole = train_stages(read_stages(configuration | {"output_dir": str(tmp_path / "whole")}), quiet=True)
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(configuration))

    def has(name):
        return lambda folder: (folder / name).exists()

    # Eight kills in the first steps of a stage, by turns between steps and while a state is written; two in its last.
    moments = [(step, has(STATE_FILE + ".writing") if step % 2 else lambda folder: True) for step in range(1, 9)]
    moments += [(9, has(".partial")), (9, has(".partial"))]
    with Nursery(tmp_path / "stages.yaml") as nursery:
        for folder in (tmp_path / "run" / "1-labels", tmp_path / "run" / "2-teacher"):
            for steps, is_there in moments:
                nursery.kill_when(
                    lambda folder=folder, steps=steps, is_there=is_there: (
                        steps_logged(folder) >= steps - 1 and is_there(folder)
                    ),
                    f"step {steps} of {folder.name}",
                )
        assert nursery.run() == 0
    assert_equal_weights(folder, whole)
    states = [load_file(one / STATE_FILE) for one in (whole, folder)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert main([str(tmp_path / "stages.yaml"), "--resume"]) == 0, "a chain that is done takes no step"
    assert_equal_weights(folder, whole)
