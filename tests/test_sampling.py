"""Draws depend on seed, epoch and name alone, are fair, and are pinned: a resumed run sees the same."""

import math
import subprocess
import sys
from collections import Counter

import pytest

from fastrank.data import RankingList
from fastrank.data.sampling import draw_sample, has_relevant, query_share

RANKING = RankingList(
    "q", [f"d{i}" for i in range(12)], [1, 0, 0, 2, 0, -1, 0, 0, 1, 0, 0, 0], "7", [str(i) for i in range(12)]
)

PINNED_RANDOM = [("0", "3", "4", "10"), ("5", "9", "10", "11"), ("3", "6", "10", "11")]
PINNED_SINGLE = [("0", "4", "10", "11"), ("3", "5", "9", "11"), ("3", "6", "10", "11")]
PINNED_SHARE = 0.894298538319


def _ids(sampling, size, ranking=RANKING, seed=1, epoch=0, key="7"):
    return draw_sample(ranking, sampling, size, seed=seed, epoch=epoch, key=key).document_ids


def test_all_and_top():
    assert draw_sample(RANKING, "all", None, seed=1, epoch=0, key="7") is RANKING
    assert _ids("top", 3) == ("0", "1", "2")
    assert _ids("top", 12) == _ids("top", 50) == RANKING.document_ids


def test_draws_are_pinned():
    """These exact documents must come out for ever: a change here breaks the resumption of every run."""
    assert [_ids("random", 4, epoch=epoch) for epoch in range(3)] == PINNED_RANDOM
    assert [_ids("single_relevant", 4, epoch=epoch) for epoch in range(3)] == PINNED_SINGLE
    assert round(query_share("q1", 0), 12) == PINNED_SHARE


def test_draws_do_not_depend_on_the_process():
    code = (
        "from fastrank.data import RankingList; from fastrank.data.sampling import draw_sample\n"
        "r = RankingList('q', list('abcdefghijkl'), None, '7', '0 1 2 3 4 5 6 7 8 9 10 11'.split())\n"
        "print(draw_sample(r, 'random', 4, seed=1, epoch=2, key='7').document_ids)"
    )
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(PINNED_RANDOM[2])


def test_seed_epoch_and_key_each_change_the_draw():
    draws = {
        _ids("random", 6, seed=seed, epoch=epoch, key=key) for seed in (1, 2) for epoch in (0, 1) for key in ("7", "8")
    }
    assert len(draws) == 8
    # Neighbours that would spell alike when run together are still apart.
    assert _ids("random", 6, seed=1, epoch=11) != _ids("random", 6, seed=11, epoch=1)


def test_random_is_uniform_without_replacement():
    draws = [_ids("random", 4, epoch=epoch) for epoch in range(6000)]
    assert all(len(set(draw)) == 4 and sorted(draw, key=int) == list(draw) for draw in draws)
    counts = Counter(document_id for draw in draws for document_id in draw)
    pairs = Counter((a, b) for draw in draws for a in draw for b in draw if int(a) < int(b))
    # Five standard deviations of a binomial count around its mean.
    for count, probability in [(c, 4 / 12) for c in counts.values()] + [(c, 6 / 66) for c in pairs.values()]:
        assert abs(count - 6000 * probability) < 5 * (6000 * probability * (1 - probability)) ** 0.5
    assert len(counts) == 12 and len(pairs) == 66


def test_log_random_prefers_the_head():
    draws = [_ids("log_random", 1, epoch=epoch) for epoch in range(6000)]
    counts = Counter(draw[0] for draw in draws)
    weights = [1 / math.log(1 + place) for place in range(1, 13)]
    for place, weight in enumerate(weights):
        probability = weight / sum(weights)
        assert abs(counts[str(place)] - 6000 * probability) < 5 * (6000 * probability * (1 - probability)) ** 0.5
    assert len(set(_ids("log_random", 12))) == 12


@pytest.mark.parametrize("size", [1, 4, 5, 11, 12, 30])
def test_top_and_random(size):
    draws = [_ids("top_and_random", size, epoch=epoch) for epoch in range(400)]
    num_top = min(12, -(-size // 2))
    assert all(draw[:num_top] == RANKING.document_ids[:num_top] and len(draw) == min(size, 12) for draw in draws)
    rest = Counter(document_id for draw in draws for document_id in draw[num_top:])
    assert size == 1 or size >= 24 or set(rest) == set(RANKING.document_ids[num_top:])


def test_single_relevant_takes_one_relevant_and_any_others():
    draws = [_ids("single_relevant", 5, epoch=epoch) for epoch in range(6000)]
    relevant = Counter(document_id for draw in draws for document_id in draw if document_id in ("0", "3", "8"))
    others = Counter(document_id for draw in draws for document_id in draw if document_id not in ("0", "3", "8"))
    assert all(sum(document_id in ("0", "3", "8") for document_id in draw) == 1 for draw in draws)
    assert set(relevant) == {"0", "3", "8"} and len(others) == 9
    for count, probability in [(c, 1 / 3) for c in relevant.values()] + [(c, 4 / 9) for c in others.values()]:
        assert abs(count - 6000 * probability) < 5 * (6000 * probability * (1 - probability)) ** 0.5
    # The chosen relevant document says nothing about which others come along.
    together = Counter((draw_relevant(draw), "1" in draw) for draw in draws)
    shares = [together[(r, True)] / relevant[r] for r in ("0", "3", "8")]
    assert max(shares) - min(shares) < 0.1


def draw_relevant(draw):
    return next(document_id for document_id in draw if document_id in ("0", "3", "8"))


def test_short_lists_give_what_they_have():
    short = RankingList("q", ["a", "b", "c"], [0, 1, 1])
    assert len(draw_sample(short, "random", 8, seed=0, epoch=0, key="k")) == 3
    drawn = draw_sample(short, "single_relevant", 8, seed=0, epoch=0, key="k")
    assert drawn.labels == (0, 1) and drawn.documents[0] == "a"
    only = RankingList("q", ["a"], [1])
    assert draw_sample(only, "single_relevant", 2, seed=0, epoch=0, key="k") == only


def test_refusals():
    for ranking in (RankingList("q", ["a"], [0]), RankingList("q", ["a"]), RankingList("q", [], [])):
        assert not has_relevant(ranking)
        with pytest.raises(ValueError, match="list 'k' has no relevant document to draw"):
            draw_sample(ranking, "single_relevant", 2, seed=0, epoch=0, key="k")
    for sampling, size in (("best", 3), ("random", None)):
        with pytest.raises(ValueError, match="choose one of all, top, random, log_random, top_and_random, single"):
            draw_sample(RANKING, sampling, size, seed=0, epoch=0, key="k")


def test_shares_are_even_and_vary_with_the_seed():
    shares = [query_share(str(i), 0) for i in range(20000)]
    assert all(0 <= share < 1 for share in shares)
    for tenth in range(10):
        assert abs(sum(tenth / 10 <= share < (tenth + 1) / 10 for share in shares) - 2000) < 5 * 1800**0.5
    moved = sum((query_share(str(i), 0) < 0.5) != (query_share(str(i), 1) < 0.5) for i in range(2000))
    assert 850 < moved < 1150
    assert query_share("\ud800", 0) != query_share("\ufffd", 0)
