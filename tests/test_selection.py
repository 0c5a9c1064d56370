"""Lists chosen by the model: each way chooses others, by its formula, and a resumed run keeps its choice."""

import json
import math

import numpy as np
import pytest
from test_train import assert_equal_weights, checkpoint, make_config, make_lists  # noqa: F401

from fastrank import Reranker
from fastrank.data import RankingList
from fastrank.train import TrainConfig, train
from fastrank.train.feed import Feed
from fastrank.train.loop import RUN_FILES
from fastrank.train.selection import FILE, difficulty, energy, gap

LISTS = [
    RankingList("q", ["a", "b", "c"], [2, 1, 0]),
    RankingList("q", ["a", "b", "c"], [0, 1, float("inf")]),
    RankingList("q", ["a", "b", "c"], [1, 1, 1]),
]


def _score(lists):
    """The query helps the first list and harms the second."""
    return [np.array([3.0, 1.0, 0.0] if one.query else [0.5, 0.5, 0.5], np.float32) for one in lists]


def test_gap():
    best = 2 + 1 / math.log2(3)
    worst = 1 / math.log2(3) + 2 / math.log2(4)
    assert gap(LISTS, _score) == pytest.approx([0, 1 - worst / best, 0])


def test_difficulty():
    def mean(*margins):
        return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)

    expected = [mean(2, 3, 1) / math.log(2), -mean(-2, -3, -1) / math.log(2), 0]
    assert difficulty(LISTS, _score) == pytest.approx(expected)


def test_energy():
    assert energy(LISTS, _score) == pytest.approx([-math.log(math.e**3 + math.e + 1)] * 3)


def _chosen(folder):
    return json.loads((folder / FILE).read_text())["lists"]


def test_each_way_changes_what_is_drawn(checkpoint, tmp_path):  # noqa: F811
    chosen = {}
    for way in ("gap", "difficulty", "energy"):
        folder = tmp_path / way
        train(make_config(checkpoint, folder, select_by=way, select_share=0.3, num_train_epochs=2), quiet=True)
        stored = json.loads((folder / FILE).read_text())
        assert len(stored["lists"]) == 6 and len(stored["values"]) == 20
        least = min(stored["values"][i] for i in stored["lists"])
        assert all(value <= least for i, value in enumerate(stored["values"]) if i not in stored["lists"])
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps[-1] == 4, "two epochs of 6 lists, 4 a step"
        chosen[way] = stored["lists"]
    assert len({tuple(lists) for lists in chosen.values()}) == 3
    reranker = Reranker(checkpoint, max_length=48, activation="none")
    scores = reranker.score_lists(make_lists(20))
    energies = [-float(np.logaddexp.reduce(one)) for one in scores]
    assert chosen["energy"] == sorted(sorted(range(20), key=lambda i: -energies[i])[:6])


def test_the_feed_shows_what_was_chosen():
    feed = Feed(make_lists(10), lists_per_step=2, seed=3)
    feed.step(0)
    feed.choose([7, 1, 4])
    assert feed.steps_per_epoch == 2
    for epoch in range(3):
        seen = [one.query_id for step in (0, 1) for one in feed.step(2 * epoch + step)]
        assert sorted(seen) == ["q1", "q4", "q7"]


def test_a_resumed_run_keeps_its_choice(checkpoint, tmp_path):  # noqa: F811
    keys = {"select_by": "gap", "select_share": 0.5, "save_steps": 1, "num_train_epochs": 3}
    whole = train(make_config(checkpoint, tmp_path / "whole", **keys), quiet=True)
    folder = tmp_path / "killed"
    train(make_config(checkpoint, folder, **keys), quiet=True)
    stored = (folder / FILE).read_bytes()
    train(make_config(checkpoint, folder, **keys, resume=True), quiet=True)
    assert (folder / FILE).read_bytes() == stored and FILE in RUN_FILES
    assert_equal_weights(whole, folder)
    train(make_config(checkpoint, folder, overwrite=True, num_train_epochs=1), quiet=True)
    assert not (folder / FILE).exists()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [({"select_by": "gaps"}, "choose one of gap, difficulty, energy"), ({"select_share": 0}, "select_share=0")],
)
def test_unusable_keys(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(model="a", train_data="b", output_dir="c", **keys)
