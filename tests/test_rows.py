"""Rows of other tools, read and written: every shape, round trips, and what does not fit."""

import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_data import data_folder

from fastrank.__main__ import main
from fastrank.data import DataError, RankingList, load_lists, read_lists, read_rows, read_run, write_rows
from fastrank.data.rows import SHAPES, WRITERS

LABELLED = RankingList("q", ("a", "b", "c"), (2.0, 0.0, 1.0))
NAMED = RankingList("q", ("a", "b", "c"), (3.0, 2.0, 1.0), "7", ("x", "y", "z"))
BINARY = RankingList("q", ("a", "b", "c"), (1.0, 0.0, 0.0))
CANDIDATES = [
    {"docid": "x", "score": 9.0, "doc": {"segment": "a", "url": "u", "title": ""}},
    {"docid": "y", "score": 9.0, "doc": {"contents": "b"}},
    {"docid": "z", "score": 1.0, "doc": "c"},
]
PROMPT = (
    "I will provide you with 3 passages, ...\n\n[1] a\n[2] b\n[3] c\nSearch Query: q.\nRank the 3 passages above ..."
)
CALL = {"prompt": PROMPT, "response": "[1] > [3] > [2]"}
# shape, rows, the lists that they are
EXAMPLES = {
    "history": (
        "history",
        [{"query": {"text": "q", "qid": 7}, "invocations_history": [CALL]}],
        [RankingList("q", ("a", "b", "c"), (3.0, 1.0, 2.0), "7")],
    ),
    "history in rank_llm's results": (
        "history",
        [{"query": {"text": "q", "qid": 7}, "candidates": CANDIDATES[::-1], "ranking_exec_summary": [CALL]}],
        [RankingList("q", ("c", "b", "a"), (2.0, 1.0, 3.0), "7", ("z", "y", "x"))],
    ),
    "prompts": ("prompts", [CALL], [RankingList("q", ("a", "b", "c"), (3.0, 1.0, 2.0))]),
    "rank_llm": ("rank_llm", [{"query": {"text": "q", "qid": 7}, "candidates": CANDIDATES}], [NAMED]),
    "rank_llm with a title": (
        "rank_llm",
        [{"query": "q", "candidates": [{"docid": 1, "doc": {"text": "a", "title": "T"}}], "invocations_history": []}],
        [RankingList("q", ("T a",), (1.0,), None, ("1",))],
    ),
    "hits": (
        "hits",
        [{"query": "q", "hits": [{"qid": 7, "docid": d, "content": t} for d, t in zip("xyz", "abc", strict=True)]}],
        [NAMED],
    ),
    "rankgpt": (
        "rankgpt",
        [
            {
                "query_id": "7",
                "query": "q",
                "positive_passages": [{"docid": "y", "text": "b"}],
                "retrieved_passages": [
                    {"docid": "y", "text": "b", "rank": 2},
                    {"docid": "x", "text": "a", "rank": 1},
                ],
            }
        ],
        [RankingList("q", ("a", "b"), (0.0, 1.0), "7", ("x", "y"))],
    ),
    "flag_embedding": ("flag_embedding", [{"query": "q", "pos": ["a"], "neg": ["b", "c"]}], [BINARY]),
    "flag_embedding with scores": (
        "flag_embedding",
        [{"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [2], "neg_scores": [0, 1]}],
        [LABELLED],
    ),
    "columns": ("columns", [{"query": "q", "docs": ["a", "b", "c"], "labels": [2, 0, 1]}], [LABELLED]),
    "columns with scores": ("columns", [{"query": "q", "docs": ["a", "b", "c"], "scores": [2, 0, 1]}], [LABELLED]),
    "evaluator": ("evaluator", [{"query": "q", "positive": ["a"], "negative": ["b", "c"]}], [BINARY]),
    "evaluator with documents": (
        "evaluator",
        [{"query": "q", "positive": ["a"], "documents": ["b", "a", "c"]}],
        [BINARY],
    ),
    "lists": ("lists", [{"query": "q", "documents": ["a", "b", "c"], "labels": [2, 0, 1]}], [LABELLED]),
    "named_pairs by score": (
        "named_pairs",
        [
            {"query_id": 7, "doc_id": d, "query": "q", "text": t, "score": s}
            for d, t, s in zip("xyz", "abc", (3, 2, 1), strict=True)
        ],
        [NAMED],
    ),
    "named_pairs by rank": (
        "named_pairs",
        [
            {"query_id": 7, "doc_id": d, "query": "q", "text": t, "rank": r, "score": 0}
            for d, t, r in zip("xyz", "abc", (1, 2, 3), strict=True)
        ],
        [NAMED],
    ),
    "named_pairs by relevance": (
        "named_pairs",
        [
            {"query_id": 7, "doc_id": d, "query": "q", "text": t, "rank": 5, "relevance": r}
            for d, t, r in zip("xyz", "abc", (3, 2, 1), strict=True)
        ],
        [NAMED],
    ),
    "triplet": ("triplet", [{"anchor": "q", "positive": "a", "negative": "b"}], [RankingList("q", ("a", "b"), (1, 0))]),
    "n-tuple": ("triplet", [{"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c"}], [BINARY]),
    "n-tuple with scores": (
        "triplet",
        [{"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c", "score": [2, 0, 1]}],
        [LABELLED],
    ),
    "pairs": (
        "pairs",
        [
            {"query": "q", "answer": "a", "label": 1},
            {"query": "q", "answer": "b", "label": 0},
            {"query": "r", "answer": "a", "label": 0.5},
        ],
        [RankingList("q", ("a", "b"), (1, 0)), RankingList("r", ("a",), (0.5,))],
    ),
    "rankgpt without ids": (
        "rankgpt",
        [
            {
                "query": "q",
                "positive_passages": [{"text": "a"}, {"text": "c"}],
                "retrieved_passages": [{"text": "a"}, {"text": "b"}],
            }
        ],
        [RankingList("q", ("a", "b", "c"), (1.0, 0.0, 1.0))],
    ),
    "rankgpt with a number for an id": (
        "rankgpt",
        [
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "text": "a"}],
                "retrieved_passages": [{"docid": 1, "text": "a"}, {"docid": 2, "text": "b"}],
            }
        ],
        [RankingList("q", ("a", "b"), (1.0, 0.0), None, ("1", "2"))],
    ),
    "flag_embedding with ids": (
        "flag_embedding",
        [{"query_id": 7, "query": "q", "pos": ["a"], "neg": ["b"], "pos_id": ["x"], "neg_id": ["y"]}],
        [RankingList("q", ("a", "b"), (1.0, 0.0), "7", ("x", "y"))],
    ),
    "columns with ids": (
        "columns",
        [{"query_id": 7, "query": "q", "docs": ["a", "b"], "doc_ids": ["x", "y"], "labels": [1, 0]}],
        [RankingList("q", ("a", "b"), (1.0, 0.0), "7", ("x", "y"))],
    ),
    "hits with an id of their own": (
        "hits",
        [{"qid": 7, "query": "q", "hits": [{"docid": "x", "content": "a"}]}],
        [RankingList("q", ("a",), (1.0,), "7", ("x",))],
    ),
    "triplet with a margin": (
        "triplet",
        [{"query": "q", "positive": "a", "negative": "b", "score": 3.5}],
        [RankingList("q", ("a", "b"), (3.5, 0.0))],
    ),
    "named_pairs, judged in part": (
        "named_pairs",
        [
            {"query_id": i, "doc_id": d, "query": "q", "text": t} | more
            for i, d, t, more in ((7, "x", "a", {"relevance": 2}), ("7", "y", "b", {}))
        ],
        [RankingList("q", ("a", "b"), (2.0, 0.0), "7", ("x", "y"))],
    ),
    "triplet with other keys": (
        "triplet",
        [{"query": "q", "positive": "a", "negative": "b", "negative_id": "D17", "negative_score": 0.3}],
        [RankingList("q", ("a", "b"), (1.0, 0.0))],
    ),
    "rankgpt with a key of its own": (
        "rankgpt",
        [{"query": "q", "answer": "42", "policy": "x", "retrieved_passages": [{"docid": "x", "text": "a"}]}],
        [RankingList("q", ("a",), (0.0,), None, ("x",))],
    ),
    "pairs with scores": ("pairs", [{"question": "q", "passage": "a", "score": 1}], [RankingList("q", ("a",), (1,))]),
}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes(tmp_path, name):
    shape, rows, lists = EXAMPLES[name]
    path = _write(tmp_path / "rows.jsonl", rows)
    assert list(read_rows(path)) == lists
    assert list(read_rows(path, shape)) == lists
    assert load_lists(path, seed=0) == lists, "training reads them, too"
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    assert list(read_rows(tmp_path / "rows.json")) == lists, "as an array"
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert list(read_rows(tmp_path / "rows.jsonl.gz")) == lists


def test_every_shape_has_an_example():
    assert {shape for shape, _, _ in EXAMPLES.values()} == set(SHAPES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_parquet(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    _, rows, lists = EXAMPLES[name]
    if "rank_llm" in name or "in part" in name:
        pytest.skip("a column of a table holds values of one type")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == lists


def test_a_broken_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_columns_of_ms_marco(tmp_path):
    (tmp_path / "triples.tsv").write_text("q\ta\tb\nr\tc\td\n")
    assert list(read_rows(tmp_path / "triples.tsv")) == [
        RankingList("q", ("a", "b"), (1, 0)),
        RankingList("r", ("c", "d"), (1, 0)),
    ]
    (tmp_path / "top1000.tsv").write_text("7\tx\tq\ta\n7\ty\tq\tb\n8\tx\tr\ta\n")
    assert list(read_rows(tmp_path / "top1000.tsv")) == [
        RankingList("q", ("a", "b"), None, "7", ("x", "y")),
        RankingList("r", ("a",), None, "8", ("x",)),
    ]
    (tmp_path / "bracket.tsv").write_text("[q] of\ta\tb\n")
    assert list(read_rows(tmp_path / "bracket.tsv")) == [RankingList("[q] of", ("a", "b"), (1, 0))]
    (tmp_path / "five.tsv").write_text("1\t2\t3\t4\t5\n")
    with pytest.raises(DataError, match=r"five\.tsv:1: expected 3 .* or 4 .* columns, found 5"):
        list(read_rows(tmp_path / "five.tsv"))
    (tmp_path / "mixed.tsv").write_text("q\ta\tb\nq\ta\n")
    with pytest.raises(DataError, match=r"mixed\.tsv:2: expected 3 columns, found 2"):
        list(read_rows(tmp_path / "mixed.tsv"))


def test_permutations_of_rankgpt(tmp_path):
    passages = [
        {"docid": name, "text": text, "rank": i} for i, (name, text) in enumerate(zip("xyz", "abc", strict=True))
    ]
    rows = [{"query_id": str(i), "query": "q", "retrieved_passages": passages} for i in range(3)]
    path = _write(tmp_path / "train.jsonl", rows)
    (tmp_path / "answers.json").write_text(json.dumps(["[3] > [1] > [2]", "[2] > [2]", "nonsense"]))
    orders = [one.labels for one in read_rows(path, permutations=tmp_path / "answers.json")]
    assert orders == [(2.0, 1.0, 3.0), (2.0, 3.0, 1.0), (3.0, 2.0, 1.0)]
    for answers, sentence in ((["[1]"], "not the same number"), ([1, 2, 3], "array of strings"), ("{", "array")):
        (tmp_path / "answers.json").write_text(answers if isinstance(answers, str) else json.dumps(answers))
        with pytest.raises(DataError, match=sentence):
            list(read_rows(path, permutations=tmp_path / "answers.json"))


WRONG = {
    "unknown keys": ([{"foo": 1}], r":1: no shape of rows is known with the keys 'foo'; known are history"),
    "another shape later": (
        [{"query": "q", "docs": ["a"], "labels": [1]}, {"query": "q", "pos": ["a"]}],
        r":2: expected a row with query, docs and labels or scores, found the keys 'query', 'pos'",
    ),
    "a document without a text": (
        [{"query": "q", "candidates": [{"docid": 1, "doc": {"url": "x"}}]}],
        r":1: expected a row with query .*: a document has none of text, segment",
    ),
    "a candidate without a document": (
        [{"query": "q", "candidates": [{"docid": 1}]}],
        r":1: expected .*: the key 'doc' is missing",
    ),
    "a number for a list": ([{"query": "q", "pos": 3}], r":1: expected a row with query, pos and neg"),
    "a text for a list": ([{"query": "q", "pos": "a text", "neg": ["b"]}], r":1: .*'pos' must be an array, not str"),
    "a text for documents": ([{"query": "q", "docs": "abc"}], r":1: .*'docs' must be an array, not str"),
    "a text for negatives": (
        [{"query": "q", "positive": ["a"], "negative": "bad one"}],
        r":1: .*'negative' must be an array, not str",
    ),
    "a rank without end": (
        [{"query_id": 1, "doc_id": 2, "query": "q", "text": "a", "rank": float("inf")}],
        r":1: expected a row with query_id",
    ),
    "labels of another length": ([{"query": "q", "docs": ["a"], "labels": [1, 2]}], r":1: 2 labels for 1 documents"),
    "a document twice": (
        [{"query": "q", "hits": [{"docid": "x", "content": "a"}] * 2}],
        r":1: the document id 'x' comes twice",
    ),
    "a query that comes again": (
        [{"query": q, "text": "a", "label": 1} for q in "qrq"],
        r":3: the query 'q' comes again; sort the rows by query",
    ),
    "scores for some pairs": (
        [
            {"query_id": 7, "doc_id": d, "query": "q", "text": "a"} | more
            for d, more in (("x", {"score": 1}), ("y", {}))
        ],
        r":1: in the rows from here on, some pairs of the query '7' have a score and some have none",
    ),
    "two texts of a query": (
        [{"query_id": 7, "doc_id": q, "query": q, "text": "a"} for q in "qr"],
        r":1: .*the query id '7' has two texts",
    ),
    "half a rank": (
        [{"query_id": 7, "doc_id": d, "query": "q", "text": "a", "rank": r} for d, r in (("x", 1), ("y", 1.5))],
        r":2: .*'rank' must be a whole number, found 1.5",
    ),
    "a pair that is wrong": (
        [{"query": "q", "text": t, "label": 1} for t in ("a", 3)],
        r":2: .*'text' must be a string, not int",
    ),
    "scores of one side": (
        [{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]}],
        r":1: .*: 0 neg_scores for 1 neg",
    ),
    "scores that are too many": (
        [{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1, 2], "neg_scores": []}],
        r":1: .*: 2 pos_scores for 1 pos",
    ),
    "ids that are too few": ([{"query": "q", "docs": ["a"], "doc_ids": []}], r":1: .*: 0 doc_ids for 1 documents"),
    "one margin for two negatives": (
        [{"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c", "score": 1}],
        r":1: .*: one score for 3 documents",
    ),
    "hits of two queries": (
        [{"query": "q", "hits": [{"qid": i, "docid": i, "content": "a"} for i in range(2)]}],
        r":1: .*: its hits have the query ids 0, 1",
    ),
    "a query that is no text": ([{"query": [1], "text": "a", "label": 1}], r":1: .*'query' must be a string, not list"),
    "no object": ([3], r":1: expected a JSON object, found int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(tmp_path, name):
    rows, sentence = WRONG[name]
    with pytest.raises(DataError, match=sentence):
        list(read_rows(_write(tmp_path / "rows.jsonl", rows)))


def test_files_that_are_no_rows(tmp_path):
    for text, sentence in (
        ("[1]", "row 1 must be"),
        ("[", "not a valid JSON array"),
        ("[]", "holds no row"),
        ("", "empty"),
    ):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match=sentence):
            list(read_rows(tmp_path / "rows.json"))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="no shape 'csv' of rows; known are history"):
        list(read_rows(tmp_path / "rows.json", "csv"))
    with pytest.raises(DataError, match="no shape 'csv' to write; known are lists"):
        write_rows(tmp_path / "x", [], "csv")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text("abcxyz0123", min_size=1, max_size=4)


@st.composite
def ranking_lists(draw):
    count = draw(st.integers(1, 5))
    return RankingList(
        draw(texts),
        tuple(draw(texts) for _ in range(count)),
        tuple(draw(st.floats(-100, 100, width=32)) for _ in range(count)),
        draw(names),
        tuple(draw(st.lists(names, min_size=count, max_size=count, unique=True))),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(lists=st.lists(ranking_lists(), min_size=1, max_size=3, unique_by=lambda one: one.query_id))
def test_round_trips(tmp_path, lists):
    path = tmp_path / "rows.jsonl"

    def back(shape):
        write_rows(path, lists, shape)
        return list(read_rows(path, shape))

    assert back("lists") == lists
    assert back("named_pairs") == lists
    assert back("columns") == lists
    for ranking, read in zip(lists, back("flag_embedding"), strict=True):
        assert read == ranking.take(sorted(range(len(ranking)), key=lambda i: ranking.labels[i] <= 0))
    best_first = [sorted(range(len(one)), key=lambda i, one=one: -one.labels[i]) for one in lists]
    for ranking, order, read in zip(lists, best_first, back("rank_llm"), strict=True):
        assert (read.query, read.query_id) == (ranking.query, ranking.query_id)
        assert read.document_ids == tuple(ranking.document_ids[i] for i in order)
        assert read.documents == tuple(ranking.documents[i] for i in order)
        assert list(read.labels) == sorted(set(read.labels), reverse=True)
    for ranking, order, read in zip(lists, best_first, back("rankgpt"), strict=True):
        labels = tuple(float(ranking.labels[i] > 0) for i in order)
        texts = tuple(ranking.documents[i] for i in order)
        assert read == RankingList(
            ranking.query, texts, labels, ranking.query_id, [ranking.document_ids[i] for i in order]
        )
    write_rows(path, lists, "run")
    run = read_run(path)
    for ranking, order in zip(lists, best_first, strict=True):
        assert list(run[ranking.query_id]) == [ranking.document_ids[i] for i in order]


@pytest.mark.parametrize("shape", [name for name in WRITERS if name != "lists"])
def test_lists_that_lack_what_is_written(tmp_path, shape):
    with pytest.raises(DataError, match=r"has no (labels|ids)"):
        write_rows(tmp_path / "x", [RankingList("q", ("a",))], shape)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("lists", "shape", "sentence"),
    [
        ([NAMED, NAMED], "named_pairs", "two lists have the query id '7'"),
        ([RankingList("q", (), (), "7", ())], "named_pairs", "'q' has no document to write"),
        ([RankingList("q", (), (), "7", ())], "run", "'q' has no document to write"),
        ([RankingList("q", ("a",), (1,), "7 8", ("x",))], "run", "/x: the query id '7 8' is empty or has white space"),
        ([RankingList("q", ("a",), (float("inf"),), "7", ("x",))], "run", "/x: .*infinite label"),
        ([RankingList("q", ("a",), (float("inf"),))], "columns", "/x: .*infinite label"),
    ],
)
def test_lists_that_cannot_be_told_apart_or_written(tmp_path, lists, shape, sentence):
    with pytest.raises(DataError, match=sentence):
        write_rows(tmp_path / "x", lists, shape)
    assert not (tmp_path / "x").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_garbage_is_named_with_its_place(tmp_path, data):
    """Rows of every shape with values of the wrong kind somewhere: a list, or an error that names the file."""
    shape, rows, _ = EXAMPLES[data.draw(st.sampled_from(sorted(EXAMPLES)))]
    rows = json.loads(json.dumps(rows))
    values = st.one_of(st.none(), st.integers(-3, 3), st.text(max_size=3), st.just([]), st.just({}), st.just([None, 3]))
    target, rng = rows, random.Random(data.draw(st.integers(0, 10_000)))
    while isinstance(target, (list, dict)) and target:
        place = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
        if rng.random() < 0.4 or not isinstance(target[place], (list, dict)):
            target[place] = data.draw(values)
            break
        target = target[place]
    path = _write(tmp_path / "rows.jsonl", rows)
    try:
        assert all(isinstance(one, RankingList) for one in read_rows(path, data.draw(st.sampled_from([None, shape]))))
    except DataError as error:
        assert error.path == str(path)


def test_real_files():
    examples = data_folder() / "flagembedding-examples"
    lists = list(read_rows(examples / "reranker_normal_examples.jsonl"))
    rows = [json.loads(line) for line in (examples / "reranker_normal_examples.jsonl").read_text().splitlines()]
    assert [one.query for one in lists] == [row["query"] for row in rows]
    assert [list(one.documents) for one in lists] == [row["pos"] + row["neg"] for row in rows]
    teacher = list(read_rows(data_folder() / "rag24-rankzephyr" / "RANK_ZEPHYR_RHO.researchy-dev_tiny_top100.jsonl.gz"))
    assert [len(one) for one in teacher] == [100, 100]
    assert teacher[0].labels == tuple(float(n) for n in range(100, 0, -1)) and teacher[0].query_id == "629869"


def test_convert(tmp_path, capsys):
    source = _write(tmp_path / "in.jsonl", EXAMPLES["rank_llm"][1])
    assert main(["convert", "--input", str(source), "--to", "lists", "--output", str(tmp_path / "out.jsonl.gz")]) == 0
    assert capsys.readouterr().err.endswith("out.jsonl.gz: 1 lists with 3 documents\n")
    assert read_lists(tmp_path / "out.jsonl.gz") == [NAMED]
    (tmp_path / "queries.tsv").write_text("7\tq\n")
    (tmp_path / "documents.tsv").write_text("x\ta\ny\tb\nz\tc\n")
    (tmp_path / "a.run").write_text("7 Q0 x 1 9 t\n7 Q0 y 2 9 t\n7 Q0 z 3 9 t\n")
    (tmp_path / "qrels").write_text("7 0 y 2\n")
    run = [
        "--run",
        f"{tmp_path}/a.run",
        "--queries",
        f"{tmp_path}/queries.tsv",
        "--documents",
        f"{tmp_path}/documents.tsv",
    ]
    to = ["--to", "lists", "--output", str(tmp_path / "run.jsonl")]
    assert main(["convert", *run, *to]) == 0
    assert read_lists(tmp_path / "run.jsonl") == [NAMED]
    assert main(["convert", *run, *to, "--qrels", str(tmp_path / "qrels"), "--depth", "2"]) == 0
    (judged,) = read_lists(tmp_path / "run.jsonl")
    assert judged.document_ids == ("x", "y") and judged.labels == (0.0, 2.0)
    assert capsys.readouterr().err.endswith("1 lists with 2 documents; left out: 1 candidates below the depth\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --input or --run"),
        (["--input", "a", "--run", "b"], "give either --input or --run"),
        (["--input", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--run", "missing.run"], "queries"),
        (["--input", "a", "--depth", "3"], "--depth does not go with --input"),
        (["--run", "a", "--from", "hits"], "--from does not go with --run"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments, "--to", "lists", "--output", "out.jsonl"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_stream_is_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--input", "a", "--to", "lists", "--output", "-"]) == 2
    assert "--output must be a file" in capsys.readouterr().err
