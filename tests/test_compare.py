"""Tables over runs: means, the paired test and its correction, corpora, and files that are not as they should be."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import data_folder
from scipy import stats

from fastrank.__main__ import main
from fastrank.compare import as_csv, as_markdown, compare, holm, paired_p
from fastrank.data import read_qrels, read_run
from fastrank.evaluate import evaluate

QRELS = "q1 0 a 2\nq1 0 b 1\nq2 0 c 1\nq3 0 a 1\n"
RUNS = {
    "good": "q1 Q0 a 1 3 x\nq1 Q0 b 2 2 x\nq2 Q0 c 1 1 x\nq3 Q0 b 1 9 x\nq3 Q0 a 2 8 x\n",
    "bad": "q1 Q0 z 1 3 x\nq1 Q0 b 2 2 x\nq2 Q0 d 1 1 x\n",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "qrels.txt").write_text(QRELS)
    for name, text in RUNS.items():
        (tmp_path / f"{name}.run").write_text(text)
    return tmp_path


def test_holm():
    # Worked by hand: 4 * .005, 3 * .01, 2 * .03, and .04 raised to what stands before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_steps_reject(p_values):
    """The steps as Holm wrote them: the smallest p against level / n, the next against level / (n - 1), and so on."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[place] * (len(p_values) - rank) >= level:
                break
            rejected.add(place)
        assert {i for i, p in enumerate(corrected) if p < level} == rejected


def test_paired_test():
    rng = np.random.default_rng(0)
    values, others = rng.random(30), rng.random(30)
    differences = values - others
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(30))
    assert paired_p(values, others) == pytest.approx(2 * stats.t.sf(abs(t), 29))
    assert paired_p(values, values) == 1.0
    assert paired_p([0.5, 0.5, 0.75], [0.25, 0.25, 0.5]) == 0.0
    assert paired_p([1.0], [0.0]) is None and paired_p([], []) is None


def test_means_over_corpora():
    corpora = {
        "one": {"a": {"1": 0.2, "2": 0.4}, "b": {"2": 0.5, "1": 0.1}},
        "two": {"a": {"1": 0.9}, "b": {"1": 0.0}},
    }
    a, b = compare(corpora, "nDCG@10", against="a")
    assert a.means == pytest.approx({"one": 0.3, "two": 0.9})
    assert a.arithmetic == pytest.approx(0.6) and a.geometric == pytest.approx(math.sqrt(0.27))
    assert b.arithmetic == pytest.approx(0.15) and b.geometric == 0.0
    assert a.p is None and a.p_holm is None
    assert b.p == b.p_holm == pytest.approx(stats.ttest_rel([0.1, 0.5, 0.0], [0.2, 0.4, 0.9]).pvalue)


@pytest.mark.parametrize(
    ("corpora", "sentence"),
    [
        ({}, "no corpus"),
        ({"one": {"a": {"1": 0.5}}, "two": {"b": {"1": 0.5}}}, "corpus 'two' has the systems b, not a"),
        ({"one": {"a": {"1": 0.5}, "b": {"2": 0.5}}}, "must be measured on the same queries"),
        ({"one": {"a": {}}}, "at least one"),
        ({"one": {"a": {"1": 0.5}}}, "no system 'z' to compare against; there are a"),
    ],
)
def test_what_cannot_be_compared(corpora, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(corpora, "nDCG@10", against="z")


def _command(files, *more):
    runs = [f"{name}={files / name}.run" for name in RUNS]
    return main(["compare", "--qrels", str(files / "qrels.txt"), "--runs", *runs, *more])


def test_command(files, capsys):
    assert _command(files, "--measures", "nDCG@10", "RR@10", "--against", "bad", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["system"], row["measure"]) for row in rows] == [
        (system, measure) for measure in ("nDCG@10", "RR@10") for system in RUNS
    ]
    for row in rows:
        run = read_run(files / f"{row['system']}.run")
        mean = evaluate(run, read_qrels(files / "qrels.txt"), [row["measure"]])[row["measure"]]
        assert row["means"] == {"all": pytest.approx(mean)} and row["arithmetic"] == pytest.approx(mean)
    good = [1.0, 1.0, 0.5]
    assert rows[2]["p"] == pytest.approx(stats.ttest_rel(good, [0.5, 0.0, 0.0]).pvalue)

    assert _command(files, "--measures", "nDCG@10", "RR@10", "--format", "csv") == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["system"], row["measure"], float(row["all"])) for row in read] == [
        (row["system"], row["measure"], pytest.approx(row["arithmetic"])) for row in rows
    ]

    assert _command(files) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "| nDCG@10 | mean |" and lines[1] == "|---|---:|" and len(lines) == 4


def test_tables(files):
    corpora = {c: {s: {"1": 0.5, "2": 0.25 + 0.5 * (s == "x|y")} for s in ("x|y", "b")} for c in ("one", "two")}
    assert "| RR@10 | o\\|ne |" in as_markdown(compare({"o|ne": corpora["one"], "two": corpora["two"]}, "RR@10"))
    rows = compare(corpora, "RR@10", against="b")
    lines = as_markdown(rows).split("\n")
    assert lines[0] == "| RR@10 | one | two | arithmetic | geometric | p (Holm) |"
    assert lines[2].startswith("| x\\|y | 0.625 | 0.625 | 0.625 | 0.625 | 0.")
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [float(one["one"]) for one in read] == [0.625, 0.375]
    assert read[1]["p"] == "" and float(read[0]["p_holm"]) == rows[0].p_holm


def test_corpora_from_a_file(files, capsys):
    task = {"qrels": "qrels.txt", "runs": {name: f"{name}.run" for name in RUNS}}
    (files / "corpora.yaml").write_text(json.dumps({"first": [task], "second": [task, task]}))
    assert main(["compare", "--corpora", str(files / "corpora.yaml"), "--format", "json", "--against", "bad"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["means"]["first"] == pytest.approx(rows[0]["means"]["second"])
    # Three tasks of three queries: pooled, not averaged.
    run, qrels = read_run(files / "good.run"), read_qrels(files / "qrels.txt")
    good = [one["nDCG@10"] for one in evaluate(run, qrels, per_query=True).values()]
    bad = [one["nDCG@10"] for one in evaluate(read_run(files / "bad.run"), qrels, per_query=True).values()]
    assert rows[0]["p"] == pytest.approx(stats.ttest_rel(good * 3, bad * 3).pvalue)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runs", "a=good.run"], "give --runs and --qrels, or --corpora"),
        (["--qrels", "qrels.txt"], "give --runs and --qrels, or --corpora"),
        (["--corpora", "x.yaml", "--runs", "a=b", "--qrels", "c"], "give --runs and --qrels, or --corpora"),
        (["--qrels", "qrels.txt", "--runs", "good.run"], "NAME=FILE, not 'good.run'"),
        (["--qrels", "qrels.txt", "--runs", "a=good.run", "a=bad.run"], "two runs have the name 'a'"),
        (["--qrels", "qrels.txt", "--runs", "a=missing.run"], "missing.run"),
        (["--qrels", "qrels.txt", "--runs", "a=good.run", "--measures", "nDGC@10"], "unknown measure 'nDGC@10'"),
        (["--corpora", "missing.yaml"], "missing.yaml"),
        (["--corpora", "qrels.txt"], "must hold {corpus:"),
        (["--corpora", "x.yaml", "--runs", "a=b"], "give --runs and --qrels, or --corpora"),
        (["--corpora", "x.yaml", "--qrels", "c"], "give --runs and --qrels, or --corpora"),
        (["--corpora", "odd.yaml"], "corpus 'c': a task must be {qrels: file"),
        (["--corpora", "null.yaml"], "corpus 'c': a task must be {qrels: file"),
        (["--corpora", "twice.yaml"], "a key comes twice in this mapping"),
        (["--corpora", "deep.yaml"], "deep.yaml: "),
        (["--corpora", "data.yaml"], "FASTRANK_DATA is not set"),
    ],
)
def test_bad_input_is_one_sentence(files, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(files)
    monkeypatch.delenv("FASTRANK_DATA", raising=False)
    (files / "odd.yaml").write_text("c: [{qrels: qrels.txt}]")
    (files / "null.yaml").write_text("c: [{qrels: null, runs: {a: good.run}}]")
    (files / "twice.yaml").write_text("c: [{qrels: qrels.txt, runs: {a: good.run}}]\nc: []")
    (files / "deep.yaml").write_text("[" * 20_000)
    (files / "data.yaml").write_text("c: [{qrels: $FASTRANK_DATA/qrels.txt, runs: {a: good.run}}]")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_real_runs(capsys):
    folder = data_folder() / "trec-dl"
    names = {"bm25": folder / "first_stage" / "BM25.dl20.run.gz"}
    names["llm"] = sorted((folder / "llm_runs").glob("BM25.dl20.rankvicuna-7b-aug.d100*"))[0]
    qrels = str(folder / "qrels.dl20-passage.txt")
    arguments = [f"{name}={path}" for name, path in names.items()]
    assert main(["compare", "--qrels", qrels, "--runs", *arguments, "--against", "bm25", "--format", "json"]) == 0
    bm25, llm = json.loads(capsys.readouterr().out)
    assert bm25["arithmetic"] == pytest.approx(0.480, abs=5e-4) and llm["arithmetic"] > 0.6
    assert llm["p"] == llm["p_holm"] < 1e-4
