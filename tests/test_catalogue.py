"""Ids of ir_datasets and names on the hub in place of files, and run files that name their data."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from fastrank.__main__ import main
from fastrank.data import (
    DataError,
    RankingList,
    load_data,
    read_documents,
    read_qrels,
    read_queries,
    read_ranked_run,
    read_rows,
)
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


TRIPLETS = [{"query": q, "positive": f"{q} a", "negative": f"{q} b"} for q in "qr"]
PAIRS = [{"query": "q", "document": text, "label": label} for text, label in (("a", 0.5), ("b", 2.0))]


@pytest.fixture(scope="module")
def on_hub(tmp_path_factory):
    """Folders as data sets lie on the hub: parquet with two configurations, JSON lines with two splits."""
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("hub")
    configs = {
        "triplet": TRIPLETS,
        "queries": [{"query_id": 7, "query": "q"}],
        "corpus": [{"passage_id": i, "passage": text} for i, text in enumerate("abc")],
        "teacher": [{"query_id": 7, "doc_ids": [2, 0]}],
        "list": [{"query_id": 7, "query": "q", "docs": ["a", "b"], "doc_ids": ["x", "y"], "labels": [1, 0]}],
    }
    lines = ["---", "configs:"]
    for name, rows in configs.items():
        (folder / "configs" / name).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "configs" / name / "train-0.parquet")
        lines += [f"- config_name: {name}", f"  data_files: [{{split: train, path: {name}/train-*.parquet}}]"]
    (folder / "configs" / "README.md").write_text("\n".join([*lines, "---", ""]))
    (folder / "splits").mkdir()
    for split, rows in (("train", PAIRS), ("test", [PAIRS[1]])):
        (folder / "splits" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_of_the_hub(on_hub, tmp_path, monkeypatch):
    triplets = [RankingList(q, (f"{q} a", f"{q} b"), (1, 0)) for q in "qr"]
    assert list(read_rows(f"hub:{on_hub}/configs?config=triplet")) == triplets
    monkeypatch.setenv("HOME", str(on_hub))
    assert list(read_rows("hub:~/configs?config=triplet")) == triplets
    assert list(read_rows(f"hub:{on_hub}/splits?split=test")) == [RankingList("q", ("b",), (2.0,))]
    assert list(read_rows(f"hub:{on_hub}/splits")) == [RankingList("q", ("a", "b"), (0.5, 2.0))]
    named = RankingList("q", ("a", "b"), (1, 0), "7", ("x", "y"))
    assert list(read_rows(f"hub:{on_hub}/configs?config=list&split=train")) == [named]
    out = tmp_path / "out.jsonl"
    assert main(["convert", "--input", f"hub:{on_hub}/splits", "--to", "lists", "--output", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_texts_and_runs_of_the_hub(on_hub, tmp_path):
    """As sentence-transformers/msmarco has them: queries, passages and a teacher's order by id."""
    hub = {config: f"hub:{on_hub}/configs?config={config}" for config in ("queries", "corpus", "teacher")}
    assert read_queries(hub["queries"]) == {"7": "q"}
    assert read_documents(hub["corpus"], wanted={"1"}) == {"1": "b"}
    source = {"queries": hub["queries"], "documents": hub["corpus"], "run": hub["teacher"], "targets": "rank"}
    expected = [RankingList("q", ("c", "a"), (2, 1), "7", ("2", "0"))]
    for _ in range(2):
        assert load_data(source | {"depth": 2}, seed=0).candidates == expected
    assert len(list((tmp_path / "cache").glob("*.store"))) == 3
    with pytest.raises(DataError, match=r"hub:.*:1: the query has no text"):
        read_queries(hub["teacher"])
    with pytest.raises(DataError, match=r"hub:.*:1: the row has none of the columns doc_id"):
        read_ranked_run(hub["queries"])


def test_the_hub_is_read_once(on_hub, tmp_path, monkeypatch):
    """Into the cache, whatever its size; again only where a local folder's files change."""
    folder = tmp_path / "copy"
    shutil.copytree(on_hub / "splits", folder)
    source = {"lists": f"hub:{folder}?split=train"}
    assert [one.labels for one in load_data(source, seed=0).candidates] == [(0.5, 2.0)]
    assert len(list((tmp_path / "cache").glob("*.store"))) == 1
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)
        assert load_data(source, seed=0).candidates[0].documents == ("a", "b")
    (folder / "train.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    assert load_data(source, seed=0).candidates[0].documents == ("a",)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("configs", "cannot be read: Config name is missing"),
        ("configs?config=other", "'other' not found"),
        ("splits?split=dev", "Bad split: dev"),
        ("nothing", "Couldn't find any data"),
        ("splits?part=1", r"expected hub:owner/name\?config=.*, found 'part'"),
        ("splits?split=", r"expected hub:owner/name"),
    ],
)
def test_what_the_hub_does_not_have(on_hub, name, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        load_data(f"hub:{on_hub}/{name}", seed=0)
    assert "\n" not in str(caught.value)


def test_rows_of_the_hub_that_do_not_fit(on_hub, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "foo": 1}\n')
    with pytest.raises(DataError, match=r"hub:.*:1: no shape of rows is known with the keys 'query', 'foo'"):
        list(read_rows(f"hub:{tmp_path}"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        list(read_rows(f"hub:{on_hub}/splits"))


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "refused"])
def test_a_hub_that_gives_nothing_is_one_sentence(tmp_path, offline):
    """A process of its own, as the hub's client reads the environment once; refused by a server on this machine."""
    pytest.importorskip("datasets")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        found = subprocess.run(
            [sys.executable, "-m", "fastrank", "convert", "--input", "hub:no/such", "--to", "lists", "--output", "out"],
            env=os.environ | {"HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            cwd=tmp_path,
            timeout=120,
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert found.returncode == 2 and not (tmp_path / "out").exists()
    assert found.stderr.splitlines()[-1].startswith("fastrank convert: hub:no/such: cannot be read: ")
    assert "Traceback" not in found.stderr
