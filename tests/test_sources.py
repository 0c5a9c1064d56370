"""A DataSource takes exactly the fields that go together, and says in a sentence which do not."""

import itertools

import pytest

from fastrank.data import DataError, DataSource
from fastrank.data.sampling import query_share

RUN = {"queries": "q", "documents": "d", "run": "r", "qrels": "j"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"querys": "q"}, "unknown key 'querys' in a data source; the nearest known one is 'queries'"),
        ({"samplesize": 5}, "unknown key 'samplesize' in a data source; the nearest known one is 'sample_size'"),
        ({3: 4}, "unknown key 3 in a data source"),
        ({}, "the data source lacks queries and documents and run; give lists, or queries, documents and run"),
        ({"queries": "q", "run": "r"}, "the data source lacks documents"),
        ({**RUN, "run": []}, "the data source lacks run"),
        ({**RUN, "run": ["a", 3]}, "run must be a path, several paths or bm25"),
        ({**RUN, "run": 3}, "run must be a path, several paths or bm25, not 3"),
        ({**RUN, "queries": 3}, "queries must be a path, not 3"),
        ({"lists": ["a"]}, r"lists must be a path, not \['a'\]"),
        ({"lists": "a", "qrels": "j"}, "qrels does not go with lists"),
        ({"lists": "a", "depth": 5}, "depth does not go with lists"),
        ({"lists": "a", "targets": "rank"}, "targets does not go with lists"),
        ({**RUN, "qrels": None}, "targets 'relevance' needs qrels; give them, or set targets to rank or score"),
        ({**RUN, "targets": "ranks"}, r"targets 'ranks' is not known; .* \(the nearest is 'rank'\)"),
        (
            {**RUN, "sampling": "single"},
            "sampling 'single' is not known; choose one of all, top, random, .* nearest is 'single_relevant'",
        ),
        ({**RUN, "sampling": "top"}, "sampling 'top' needs sample_size"),
        ({**RUN, "sample_size": 8}, "sampling 'all' takes no sample_size"),
        ({**RUN, "sampling": "single_relevant", "sample_size": 1}, "sample_size must be a whole number from 2, not 1"),
        ({**RUN, "sampling": "top", "sample_size": True}, "sample_size must be a whole number from 1, not True"),
        ({**RUN, "depth": 0}, "depth must be a whole number from 1, not 0"),
        ({**RUN, "depth": "100"}, "depth must be a whole number from 1, not '100'"),
        ({**RUN, "split_seed": None}, "split_seed must be a whole number, not None"),
        ({**RUN, "depth_run": "r"}, "depth_run needs depth"),
        ({**RUN, "add_judged": "yes"}, "add_judged must be true or false, not 'yes'"),
        ({**RUN, "add_judged": True, "targets": "rank"}, "add_judged needs targets 'relevance'"),
        (
            {**RUN, "sampling": "single_relevant", "sample_size": 8, "targets": "score"},
            "sampling 'single_relevant' needs targets 'relevance', not 'score'",
        ),
        *(
            ({**RUN, "queries_part": part}, "queries_part must be two numbers 0 <= from < to <= 1")
            for part in (
                [0.5],
                [0, 1.5],
                [0.5, 0.5],
                [0.7, 0.2],
                [-0.1, 1],
                "ab",
                0.5,
                [0, "1"],
                [False, True],
                [0, 0.5, 1],
            )
        ),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(DataError, match=sentence):
        DataSource.from_mapping(fields)


def test_what_goes_together():
    assert DataSource.from_mapping({**RUN, "run": ["a", "b"]}).runs == ("a", "b")
    assert DataSource(**RUN).runs == ("r",)
    DataSource(lists="a", sampling="single_relevant", sample_size=8, queries_part=(0, 1))
    DataSource(queries="q", documents="d", run="bm25", targets="rank", depth=5, depth_run="f")


def test_parts_cover_every_query_once():
    names = [f"query {i}" for i in range(3000)]
    cuts = [0, 0.1, 0.25, 0.75, 0.9, 1]
    for split_seed in (0, 7):
        parts = [
            {n for n in names if DataSource(lists="a", queries_part=[a, b], split_seed=split_seed).has_query(n)}
            for a, b in itertools.pairwise(cuts)
        ]
        assert sum(map(len, parts)) == 3000 and set().union(*parts) == set(names)
        for part, (a, b) in zip(parts, itertools.pairwise(cuts), strict=True):
            assert abs(len(part) - 3000 * (b - a)) < 120
    assert all(DataSource(lists="a").has_query(name) for name in names)
    halves = [DataSource(lists="a", queries_part=[0, 0.5], split_seed=split_seed) for split_seed in (0, 7)]
    assert 1300 < sum(halves[0].has_query(name) != halves[1].has_query(name) for name in names) < 1700
    # A query that lies on a cut belongs to the part that begins there.
    share = query_share("q", 0)
    assert DataSource(lists="a", queries_part=[share, 1]).has_query("q")
    assert not DataSource(lists="a", queries_part=[0, share]).has_query("q")
