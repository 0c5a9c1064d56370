"""Scores by id in other files than TREC runs: read as runs, wrong ones named with their line."""

import gzip
import json

import pytest

from fastrank.data import DataError, RankingList, load_lists, read_ranked_run, read_run


def _write(path, text):
    path.write_text(text)
    return path


def test_colbert_scores(tmp_path):
    path = _write(tmp_path / "examples.json", '[7, [1, 0.5], ["b", 2], [3, 0.5]]\n["8", [1, -1]]\n')
    run = read_ranked_run(path)
    assert run["7"].document_ids == ["1", "b", "3"] and list(run["7"].scores) == [0.5, 2.0, 0.5]
    assert list(run["7"].ranks) == [2, 1, 3], "the score decides, earlier documents first"
    assert read_run(path) == {"7": {"1": 0.5, "b": 2.0, "3": 0.5}, "8": {"1": -1.0}}


def test_hofstaetter_scores(tmp_path):
    with gzip.open(tmp_path / "scores.tsv.gz", "wt") as file:
        file.write("5.5\t-1\tq\tx\ty\n5.5\t2\tq\tx\tz\n1\t0\tr\tx\ty\n")
    run = read_ranked_run(tmp_path / "scores.tsv.gz")
    assert run["q"].document_ids == ["x", "y", "z"] and list(run["q"].ranks) == [1, 3, 2]
    assert read_run(tmp_path / "scores.tsv.gz")["r"] == {"x": 1.0, "y": 0.0}


def test_hard_negatives(tmp_path):
    found = {"bm25": [{"pid": 2, "ce-score": -1.5}, {"pid": 3, "ce-score": 0}], "other": [{"pid": 2, "ce-score": -1.5}]}
    row = {"qid": 7, "pos": [{"pid": 1, "ce-score": 9}], "neg": found}
    run = read_ranked_run(_write(tmp_path / "negatives.jsonl", json.dumps(row) + "\n"))
    assert run["7"].document_ids == ["1", "2", "3"] and list(run["7"].ranks) == [1, 3, 2]


def test_triples_of_ids(tmp_path):
    run = read_run(_write(tmp_path / "qidpidtriples.tsv", "7\t1\t2\n7\t1\t3\n8\t2\t1\n"))
    assert run == {"7": {"1": 1.0, "2": 0.0, "3": 0.0}, "8": {"2": 1.0, "1": 0.0}}


def test_runs_of_ms_marco(tmp_path):
    run = read_ranked_run(_write(tmp_path / "run.tsv", "7\t10\t1\n7\t20\t2\n8\t5\t1\n"))
    assert run["7"].document_ids == ["10", "20"] and list(run["7"].ranks) == [1, 2]
    assert read_run(tmp_path / "run.tsv")["7"] == {"10": -1.0, "20": -2.0}
    with pytest.raises(DataError, match=r":2: the rank must be a whole number from 1, found '1\.5'"):
        read_run(_write(tmp_path / "odd.tsv", "7\t10\t1\n7\t20\t1.5\n"))
    assert read_run(_write(tmp_path / "scores", '[7, ["\\ud800", 1.0]]\n')) == {"7": {"\ufffd": 1.0}}


@pytest.mark.parametrize("names", [("qid", "docno"), ("query_id", "doc_id"), ("qid", "docid")])
def test_parquet(tmp_path, names):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [{names[0]: 7, names[1]: d, "score": s, "rank": r} for d, s, r in (("x", 9.0, 2), ("y", 8.5, 1))]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "run.parquet")
    run = read_ranked_run(tmp_path / "run.parquet")
    assert list(run["7"].ranks) == [2, 1] and list(run["7"].scores) == [9.0, 8.5]
    (tmp_path / "queries.tsv").write_text("7\tq\n")
    (tmp_path / "documents.tsv").write_text("x\ta\ny\tb\n")
    source = {"queries": tmp_path / "queries.tsv", "documents": tmp_path / "documents.tsv"}
    (ranking,) = load_lists(source | {"run": tmp_path / "run.parquet", "targets": "rank"}, seed=0)
    assert ranking == RankingList("q", ("b", "a"), (2.0, 1.0), "7", ("y", "x"))
    for row in rows:
        del row["rank"]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "run.parquet")
    assert list(read_ranked_run(tmp_path / "run.parquet")["7"].ranks) == [1, 2]
    for change, sentence in (
        ({"score": None}, "row has none of the columns score"),
        ({"score": float("nan")}, "score must be a finite number"),
        ({"score": "x"}, "score must be a finite number"),
        ({"rank": -1}, "rank must be a whole number"),
        ({"rank": float("nan")}, "rank must be a whole number"),
        ({"rank": float("inf")}, "rank must be a whole number"),
        ({"rank": "first"}, "rank must be a whole number"),
        ({"rank": [1]}, "rank must be a whole number"),
        ({names[1]: "y"}, "document 'y' comes twice"),
    ):
        first = rows[1] if names[1] in change else rows[1] | change  # a column holds values of one type
        write_table(pyarrow.Table.from_pylist([first, rows[0] | change]), tmp_path / "run.parquet")
        with pytest.raises(DataError, match=sentence):
            read_ranked_run(tmp_path / "run.parquet")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"qid": [], "docid": [], "score": []}, "holds no row"),
        ({"qid": ["7", "7"], "docid": ["x", "y"], "score": [1, 2], "rank": [4, None]}, ":1: query '7' has a rank here"),
        ({"qid": ["7"], "docid": ["x"], "score": [1], "rank": [2**63]}, ":1: the rank must be a whole number"),
        ({"qid": [b"\xff"], "docid": ["x"], "score": [1]}, "not a readable parquet file"),
    ],
)
def test_parquet_files_that_are_no_runs(tmp_path, columns, sentence):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    if columns.get("rank") == [2**63]:
        columns = columns | {"rank": pyarrow.array([2**63], pyarrow.uint64())}
    table = pyarrow.table(columns)
    if columns["qid"] == [b"\xff"]:
        table = table.set_column(0, "qid", table["qid"].combine_chunks().view(pyarrow.string()))
    write_table(table, tmp_path / "run.parquet")
    with pytest.raises(DataError, match=sentence):
        read_ranked_run(tmp_path / "run.parquet")


def test_lists_of_ids(tmp_path):
    """As sentence-transformers/msmarco has them: an order, or labels; one row a query."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "lists.parquet"
    for more, ranks, scores in (({}, [1, 2, 3], [3, 2, 1]), ({"labels": [0.5, 2.0, 1.0]}, [3, 1, 2], [0.5, 2, 1])):
        write_table(pyarrow.Table.from_pylist([{"query_id": 7, "doc_ids": [5, 6, 4]} | more]), path)
        run = read_ranked_run(path)["7"]
        assert (run.document_ids, list(run.ranks), list(run.scores)) == (["5", "6", "4"], ranks, scores)
    for row, sentence in (
        ({"query_id": 7, "doc_ids": [5], "labels": [1.0, 2.0]}, "perhaps as many labels"),
        ({"query_id": 7, "doc_ids": "abc"}, r"expected query_id, doc_ids \[...\]"),
        ({"doc_ids": [5]}, "an id must be a string or a whole number, found None"),
        ({"query_id": 7, "doc_ids": [5], "labels": [float("nan")]}, "must be a finite number"),
    ):
        write_table(pyarrow.Table.from_pylist([row]), path)
        with pytest.raises(DataError, match=rf"lists\.parquet:1: .*{sentence}"):
            read_ranked_run(path)


def test_missing_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="no such file"):
        read_ranked_run(tmp_path / "run.parquet")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[7]\n", r":1: expected \[query id"),
        ("[7, [1, 2]]\n[7, [1, 2], 3]\n", r":2: expected \[query id"),
        ("[7, [1, 2]\n", ":1: not valid JSON"),
        ('[7, [1, "a"]]\n', ":1: the score must be a finite number, found 'a'"),
        ("[7, [1, NaN]]\n", ":1: the score must be a finite number"),
        ("[true, [1, 2]]\n", ":1: an id must be a string or a whole number"),
        ("[7, [1, 2], [1, 3]]\n", ":1: document '1' comes twice"),
        ("1\t2\tq\tx\ty\n3\t2\tq\tx\tz\n", ":2: document 'x' comes twice"),
        ("1\t2\tq\tx\ty\n1\t2\tq\tx\n", ":2: expected 5 columns"),
        ("1\t2\tq\tx\ty\na\t2\tq\tx\tz\n", ":2: the score must be a finite number, found 'a'"),
        ("q\tQ0\tx\t1\t2\n", ":1: expected 6 columns"),
        ("7\t0\t31\t1\t2\n", ":1: expected 6 columns"),
        (f"q Q0 x 1 {'9' * 400} t\n", ":1: the score must be a finite number"),
        (f"[7, [1, {'9' * 400}]]\n", ":1: the score must be a finite number"),
        ('{"qid": 1, "pos": [], "neg": {}}\n', ":1: the line has no document"),
        (
            '{"qid": 1, "pos": [{"pid": 1, "ce-score": 2}], "neg": {"a": [{"pid": 1, "ce-score": 3}]}}\n',
            ":1: document '1' has the scores 2.0 and 3.0",
        ),
        ("7\t1\t2\n7\t2\t3\n", ":2: document '2' comes twice"),
        ("7\t1\t2\n7\t2\n", ":2: expected 3 columns"),
        ('{"qid": 1, "pos": []}\n', r":1: expected \{qid, pos"),
        ('{"qid": 1, "pos": 3, "neg": {}}\n', r":1: expected \{qid, pos"),
        ('{"qid": 1, "pos": [{"pid": 1, "ce-score": "x"}], "neg": {}}\n', ":1: the score must be a finite number"),
        ("{\n", r":1: expected \{qid, pos"),
    ],
)
def test_wrong_lines_are_named(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        read_ranked_run(_write(tmp_path / "run", text))
