"""RankingList keeps what it is given, and refuses what no later step could use."""

import math

import numpy as np
import pytest

from fastrank.data import RankingList
from fastrank.data.ranking_list import list_keys


def test_iterables_become_tuples_of_plain_values():
    ranking = RankingList("q", iter(["a", "b"]), np.array([1, 0], np.float32), "7", ["x", "y"])
    assert ranking == RankingList("q", ("a", "b"), (1.0, 0.0), "7", ("x", "y"))
    assert [type(label) for label in ranking.labels] == [float, float]
    assert len(ranking) == 2 and hash(ranking) == hash(RankingList("q", ("a", "b"), (1, 0), "7", ("x", "y")))


def test_no_documents_and_infinite_labels_are_fine():
    assert len(RankingList("", ())) == 0
    assert RankingList("q", ["a", "b"], [math.inf, -math.inf]).labels == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ((None, ["a"]), TypeError, "the query must be a string, not NoneType"),
        (("q", ["a", None]), TypeError, "document 1 must be a string, not NoneType"),
        (("q", ["a", b"b"]), TypeError, "document 1 must be a string, not bytes"),
        (("q", "abc"), TypeError, "documents must be a sequence, not str"),
        (("q", 5), TypeError, "documents must be a sequence, not int"),
        (("q", ["a"], [1, 0]), ValueError, "2 labels for 1 documents: one each is needed"),
        (("q", ["a", "b"], [1, math.nan]), ValueError, "label 1 is NaN"),
        (("q", ["a"], ["1"]), TypeError, "label 0 must be a number, not str"),
        (("q", ["a"], [True]), TypeError, "label 0 must be a number, not bool"),
        (("q", ["a"], [None]), TypeError, "label 0 must be a number, not NoneType"),
        (("q", ["a"], [10**400]), ValueError, "label 0 is too large"),
        (("q", ["a"], [1], 3), TypeError, "query_id must be a string, not int"),
        (("q", ["a"], [1], "3", ["x", "y"]), ValueError, "2 document_ids for 1 documents"),
        (("q", ["a", "b"], None, None, ["x", 4]), TypeError, "document id 1 must be a string, not int"),
        (("q", ["a", "b"], None, None, ["x", "x"]), ValueError, "the document id 'x' comes twice"),
    ],
)
def test_refusals(arguments, kind, sentence):
    with pytest.raises(kind, match=sentence):
        RankingList(*arguments)


def test_take_keeps_labels_and_ids_with_their_documents():
    ranking = RankingList("q", "abc".upper().__iter__(), [3, 2, 1], "7", ["x", "y", "z"])
    assert ranking.take([2, 0]) == RankingList("q", ("C", "A"), (1.0, 3.0), "7", ("z", "x"))
    assert RankingList("q", ["a", "b"]).take([1]) == RankingList("q", ["b"])


def test_list_keys_are_all_different():
    names = ["a", None, "a", "a#2", "a", "1", None]
    keys = list_keys([RankingList("q", (), None, name) for name in names])
    assert keys == ["a", "1", "a#2", "a#2#2", "a#3", "1#2", "6"]
    # A list keeps its name when a list of another query is put before it: draws depend on the name.
    assert list_keys([RankingList("q", (), None, name) for name in ["z", "a", "a"]])[1:] == ["a", "a#2"]
