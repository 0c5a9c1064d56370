"""Training under torchrun on two processes: the steps, measures and files of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import assert_equal_weights, checkpoint, make_config, make_lists, weights  # noqa: F401

from fastrank.train import read_stages, train, train_stages
from fastrank.train.processes import Processes
from fastrank.train.state import save_state

SCRIPT = """
import sys, json
sys.path.insert(0, {tests!r})
from test_train import make_config, make_lists
from fastrank.train import train
for name, keys in json.loads(sys.argv[3]).items():
    train(make_config(sys.argv[1], f"{{sys.argv[2]}}/{{name}}", eval_data=make_lists(5, seed=1), **keys))
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def user_loss(scores, labels, list_offsets):
    """Of the whole step: no sum over lists gives it."""
    return ((scores - labels) ** 2).mean().sqrt()


def _launch(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


RUNS = {
    "ranknet": {"loss": "ranknet", "eval_steps": 3, "max_batch_tokens": 300},
    # 20 lists, 19 a step: in the last step of an epoch one process has no list.
    "adr_mse": {"loss": "adr_mse", "per_device_train_batch_size": 19, "num_train_epochs": 2},
    "user_loss": {"loss": "test_processes.user_loss", "per_device_train_batch_size": 19, "max_batch_tokens": 200},
}


def test_two_processes_take_the_steps_of_one(checkpoint, tmp_path):  # noqa: F811
    # Without gradient (the bias of keys) Adam makes steps of rounding noise; this epsilon keeps them small.
    runs = {name: {"dropout": 0.0, "adam_epsilon": 1e-4} | keys for name, keys in RUNS.items()}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = _launch(str(script), str(checkpoint), str(tmp_path / "two"), json.dumps(runs))
    assert done.returncode == 0, done.stderr
    printed = []
    for name, keys in runs.items():
        folders = tmp_path / "one" / name, tmp_path / "two" / name
        train(make_config(checkpoint, folders[0], eval_data=make_lists(5, seed=1), **keys), quiet=True)
        assert_equal_weights(*folders, tolerance=2e-5)
        one, two = map(_records, folders)
        printed += two
        for left, right in zip(one, two, strict=True):
            assert left.keys() == right.keys() and left["step"] == right["step"]
            for key in left.keys() & {"loss", "ndcg_at_10"}:
                assert right[key] == pytest.approx(left[key], rel=1e-5, abs=1e-6)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert list(map(json.loads, lines)) == printed, "one process prints"
    assert "2 processes on cpu" in done.stderr


AGREE = """
import os
from fastrank.train.processes import Processes
processes = Processes("cpu")
processes.agree({"steps": 3})
try:
    processes.agree({"steps": 3, "their data": processes.rank})
except ValueError as error:
    print(error)
"""


def test_processes_that_differ(tmp_path):
    (tmp_path / "script.py").write_text(AGREE)
    done = _launch(str(tmp_path / "script.py"))
    assert done.stdout.count("The processes differ in their data (0, 1): give all of them the same files") == 2


def test_torchrun_ends_with_the_users_error(tmp_path):
    command = "-m", "fastrank.train", "--model", str(tmp_path / "none"), "--train_data", str(tmp_path / "none.jsonl")
    done = _launch(*command, "--output_dir", str(tmp_path / "out"))
    assert done.returncode != 0
    last = "\n".join(done.stderr.splitlines()[-12:])
    assert "none.jsonl" in last and "Error" in last, done.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "must be whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    ],
)
def test_variables_that_torchrun_does_not_set_so(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        Processes()


def test_a_rank_alone_means_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    alone = Processes()
    assert alone.is_first and alone.share([1, 2, 3]) == [1, 2, 3]


class _Stop(Exception):
    pass


def _save_and_stop(folder, model, optimizer, progress):
    save_state(folder, model, optimizer, progress)
    if progress.step == 2:
        raise _Stop


def test_two_processes_go_on_where_one_stopped(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    keys = {"dropout": 0.0, "adam_epsilon": 1e-4, "save_steps": 1}
    one = train(make_config(checkpoint, tmp_path / "one", eval_data=make_lists(5, seed=1), **keys), quiet=True)
    monkeypatch.setattr("fastrank.train.loop.save_state", _save_and_stop)
    with pytest.raises(_Stop):
        train(make_config(checkpoint, tmp_path / "two" / "a", eval_data=make_lists(5, seed=1), **keys), quiet=True)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = _launch(str(script), str(checkpoint), str(tmp_path / "two"), json.dumps({"a": keys | {"resume": True}}))
    assert done.returncode == 0 and "resumed after step 2" in done.stderr
    assert [record["step"] for record in _records(tmp_path / "two" / "a")] == list(range(6))
    assert_equal_weights(one, tmp_path / "two" / "a", tolerance=2e-5)


def test_stages_and_resuming(checkpoint, tmp_path):  # noqa: F811
    from fastrank.data import write_lists

    write_lists(tmp_path / "lists.jsonl", make_lists(20))
    configuration = {
        "model": str(checkpoint),
        "train_data": str(tmp_path / "lists.jsonl"),
        "output_dir": str(tmp_path / "two"),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_length": 48,
        "dropout": 0.0,
        "adam_epsilon": 1e-4,
        "save_steps": 1,
        "stages": [{"max_steps": 2}, {"max_steps": 3, "loss": "lce"}],
    }
    one = train_stages(read_stages(configuration | {"output_dir": str(tmp_path / "one")}), quiet=True)
    (tmp_path / "stages.yaml").write_text(json.dumps(configuration))
    command = ["-m", "fastrank.train", str(tmp_path / "stages.yaml")]
    assert _launch(*command).returncode == 0
    assert_equal_weights(one, tmp_path / "two" / "2", tolerance=2e-5)
    before = weights(tmp_path / "two" / "2")
    done = _launch(*command, "--resume")
    assert done.returncode == 0 and "resumed after step 3" in done.stderr
    assert all((before[name] == value).all() for name, value in weights(tmp_path / "two" / "2").items())
