"""Ids of ir_datasets in place of files, and run files that name them."""

import sys

import pytest

from fastrank.data import DataError, RankingList, load_data, read_documents, read_qrels, read_queries
from fastrank.data.catalogue import named_by
from fastrank.data.sources import DataSource

ir_datasets = pytest.importorskip("ir_datasets")


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogue")
    (folder / "documents.tsv").write_text("a\tA\nb\tB\nc\tC\n")
    (folder / "queries.tsv").write_text("1\tone\n2\ttwo\n")
    (folder / "qrels").write_text("1 0 b 2\n2 0 c 1\n")
    made = ir_datasets.create_dataset(
        docs_tsv=str(folder / "documents.tsv"),
        queries_tsv=str(folder / "queries.tsv"),
        qrels_trec=str(folder / "qrels"),
    )
    ir_datasets.registry.register("fastrank-test/train", made)
    ir_datasets.registry.register("fastrank-test/documents", ir_datasets.create_dataset(docs_tsv=str(folder / "x")))
    return "fastrank-test/train"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))


def test_texts_and_judgments(registered):
    assert read_queries(f"ir_datasets:{registered}") == {"1": "one", "2": "two"}
    assert read_documents("ir_datasets:fastrank-test-train", wanted={"a", "c"}) == {"a": "A", "c": "C"}
    assert read_qrels(f"ir_datasets:{registered}") == {"1": {"b": 2}, "2": {"c": 1}}


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        (
            "__rankzephyr-colbert-10000-sampled-100__msmarco-passage-train-judged.run",
            "ir_datasets:msmarco-passage-train-judged",
        ),
        ("/data/__x__fastrank-test-train.run.gz", "ir_datasets:fastrank-test-train"),
        ("bm25.run", None),
        ("a__b.txt", None),
    ],
)
def test_names_of_runs(name, dataset):
    assert named_by(name) == dataset


def test_a_run_that_names_its_data(registered, tmp_path):
    path = tmp_path / "__teacher-first-2-sampled-2__fastrank-test-train.run"
    path.write_text("1 0 b 1 9 t\n1 0 a 2 8 t\n2 0 c 1 9 t\n")
    expected = [RankingList("one", ["B", "A"], (2, 1), "1", ["b", "a"]), RankingList("two", ["C"], (1,), "2", ["c"])]
    for _ in range(2):
        assert load_data({"run": str(path), "targets": "rank"}, seed=0).candidates == expected
    assert len(list((tmp_path / "cache").glob("*.store"))) == 2, "queries and documents are kept"
    judged = load_data({"run": [path], "qrels": f"ir_datasets:{registered}"}, seed=0)
    assert [one.labels for one in judged.candidates] == [(2, 0), (1,)]
    (tmp_path / "queries.tsv").write_text("1\teins\n2\tzwei\n")
    own = load_data({"run": str(path), "queries": tmp_path / "queries.tsv", "targets": "rank"}, seed=0)
    assert own.candidates[0].query == "eins" and own.candidates[0].documents == ("B", "A")


def test_what_is_not_there(registered, monkeypatch):
    with pytest.raises(DataError, match=r"ir_datasets:no/such: the id 'no/such' is none that it knows"):
        read_queries("ir_datasets:no/such")
    with pytest.raises(DataError, match="the data set has no query"):
        read_queries("ir_datasets:fastrank-test/documents")
    with pytest.raises(DataError, match="cannot be read"):
        read_documents("ir_datasets:fastrank-test/documents")
    with pytest.raises(DataError, match="lacks queries and documents"):
        DataSource(run="bm25.run", targets="rank")
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(DataError, match="pip install ir_datasets"):
        read_queries(f"ir_datasets:{registered}")
