"""Measures equal trec_eval's on real runs; ties, absences and bad input do what the docstrings say."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from real_data import data_folder

from fastrank.data import RankingList, load_data, read_qrels, read_ranked_run, read_run
from fastrank.evaluate import evaluate, evaluate_command, qrels_from_labels, run_from_scores


def test_bm25_on_dl19_and_dl20():
    root = data_folder() / "trec-dl"
    for track, expected in (("dl19", 0.5058), ("dl20", 0.4796)):
        run, qrels = (
            read_run(root / f"first_stage/BM25.{track}.run.gz"),
            read_qrels(root / f"qrels.{track}-passage.txt"),
        )
        assert round(evaluate(run, qrels)["nDCG@10"], 4) == expected


def test_every_listed_run_has_its_listed_ndcg():
    """The list was made from the rank columns; the scores say the same wherever they do not tie."""
    root = data_folder() / "trec-dl"
    qrels = {track: read_qrels(root / f"qrels.{track}-passage.txt") for track in ("dl19", "dl20")}
    rows = list(csv.DictReader((root / "runs.tsv").open(), delimiter="\t"))
    checked, tied = 0, set()
    for row in rows:
        if row["ndcg@10"] in ("", "nan"):
            continue
        folder = "first_stage" if row["kind"] == "first_stage" else "llm_runs"
        ranked = read_ranked_run(root / folder / row["file"])
        by_rank = {q: dict(zip(r.document_ids, [-rank for rank in r.ranks], strict=True)) for q, r in ranked.items()}
        by_score = {q: dict(zip(r.document_ids, r.scores, strict=True)) for q, r in ranked.items()}
        assert round(evaluate(by_rank, qrels[row["track"]])["nDCG@10"], 4) == float(row["ndcg@10"]), row["file"]
        if round(evaluate(by_score, qrels[row["track"]])["nDCG@10"], 4) != float(row["ndcg@10"]):
            tied.add(row["file"])
        checked += 1
    assert checked == 83
    assert tied == {"REP_LLAMA.dl19.run.gz", "REP_LLAMA.dl20.run.gz"}


def test_equal_to_ir_measures_on_the_same_files():
    import ir_measures

    root = data_folder() / "trec-dl"
    names = ["nDCG@10", "nDCG", "AP(rel=2)", "RR(rel=2)", "R(rel=2)@100", "P@5", "Judged@10", "Bpref"]
    run, qrels = read_run(root / "first_stage/REP_LLAMA.dl20.run.gz"), read_qrels(root / "qrels.dl20-passage.txt")
    parsed = {name: ir_measures.parse_measure(name) for name in names}
    theirs = ir_measures.calc_aggregate(list(parsed.values()), qrels, run)
    ours = evaluate(run, qrels, names)
    assert ours == pytest.approx({name: theirs[parsed[name]] for name in names})
    values = evaluate(run, qrels, names, per_query=True)
    assert list(values) == list(qrels)
    for name in names:
        assert np.mean([query[name] for query in values.values()]) == pytest.approx(ours[name])


def test_ties_go_to_the_later_id_in_float32():
    qrels = {"1": {"a": 1}}
    for scores in ({"a": 1.0, "b": 1.0}, {"b": 1.0, "a": 1.0}, {"a": 1.0 + 1e-12, "b": 1.0}):
        for name in ("RR", "RR@10", "nDCG@10", "P@1"):
            value = evaluate({"1": scores}, qrels, [name])[name]
            assert value == pytest.approx({"RR": 0.5, "RR@10": 0.5, "nDCG@10": 1 / math.log2(3), "P@1": 0}[name])
    assert evaluate({"1": {"a": 1.0, "B": 1.0, "10": 1.0}}, qrels, ["P@1"]) == {"P@1": 1.0}
    assert evaluate({"1": {"a": 1e300, "b": 1e299}}, {"1": {"b": 1}}, ["P@1"]) == {"P@1": 1.0}


def test_ids_may_hold_anything():
    """NUL would end a C string, and a lone surrogate in an id ends the process of trec_eval's bindings."""
    names = ["\0a", "\0b", "\ud800", "a b", "", "😀"]
    run = {"q\0": {name: float(-i) for i, name in enumerate(names)}, "\udfff": {"x": 1.0}}
    assert evaluate(run, {"q\0": {"\ud800": 1, "\0c": 1}, "\udfff": {"x": 1}}, ["RR"]) == {"RR": (1 / 3 + 1) / 2}


def test_absent_and_unjudged_queries():
    qrels = {"1": {"a": 1}, "2": {"a": 1}, "3": {"a": 0}, "4": {}}
    run = {"1": {"a": 1.0}, "9": {"a": 1.0}}
    assert evaluate(run, qrels, ["RR"]) == {"RR": pytest.approx(1 / 3)}
    assert evaluate(run, qrels, ["RR"], per_query=True) == {"1": {"RR": 1.0}, "2": {"RR": 0.0}, "3": {"RR": 0.0}}
    assert evaluate({}, qrels, ["RR", "nDCG@10"]) == {"RR": 0.0, "nDCG@10": 0.0}
    assert evaluate({"1": {}}, qrels, ["RR"]) == {"RR": 0.0}


def test_negative_grades_are_not_relevant():
    assert evaluate({"1": {"a": 2.0, "b": 1.0}}, {"1": {"a": -2, "b": 1}}, ["RR"]) == {"RR": 0.5}


@pytest.mark.parametrize(
    ("measure", "sentence"),
    [
        ("ndcg@10", "unknown measure 'ndcg@10'; the nearest known one is 'nDCG@10'"),
        ("Recal@5", "unknown measure 'Recal@5'; the nearest known one is 'Recall@5'"),
        ("nDCG@", "'nDCG@' is not written as a measure; examples are nDCG@10"),
        ("", "'' is not written as a measure"),
        ("__import__('os')", "is not written as a measure"),
        ("P", "the measure 'P' lacks its cutoff, as in P@10"),
        ("nDCG@0", "the measure 'nDCG@0' has a cutoff of 0; it must be from 1"),
        ("nDCG@4294967296", "has a cutoff of 4294967296; it must be from 1 to 2147483647"),
        ("nDCG@10.5", "the measure 'nDCG@10.5' does not fit: invalid param cutoff=10.5"),
        ("P(foo=1)@5", r"the measure 'P\(foo=1\)@5' does not fit: unsupported params found: \['foo'\]"),
        ("P(rel=0)@5", "cannot be computed here: Argument relevance_level should be positive"),
        ("alpha_nDCG@10", r"cannot be computed here: Unsupported measures .*pip install ir-measures\[pyndeval\]"),
    ],
)
def test_bad_measures(measure, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate({"1": {"a": 1.0}}, {"1": {"a": 1}}, [measure])


@pytest.mark.parametrize(
    ("run", "qrels", "sentence"),
    [
        ({"1": {"a": 1.0, "b": math.nan}}, {"1": {"a": 1}}, "query '1', document 'b': the score is NaN"),
        ({"1": {"a": 1.0}}, {"1": {"a": 0.5}}, "query '1', document 'a': the grade 0.5 is no whole number"),
        ({"1": {"a": 1.0}}, {"1": {"a": math.inf}}, "the grade inf is no whole number"),
        ({"1": {"a": 1.0}}, {"1": {"a": 2**40}}, "the grade 1099511627776 is no whole number"),
        ({"1": {"a": 1.0}}, {}, "there are no judgments to measure against"),
        ({"1": {"a": 1.0}}, {"1": {}}, "there are no judgments to measure against"),
        ({"1": {"a": 1.0}}, {"q1": {"a": 1}}, r"none of the run's 1 queries is judged \(run: '1' ..., judgments: 'q1'"),
    ],
)
def test_bad_runs_and_judgments(run, qrels, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(run, qrels)


def test_no_measure_is_refused():
    with pytest.raises(ValueError, match="no measure is given"):
        evaluate({"1": {"a": 1.0}}, {"1": {"a": 1}}, [])


def test_scores_of_lists_become_a_run():
    lists = [RankingList("q", ["a", "b"], [1, 0], "7", ["x", "y"]), RankingList("q", ["c"], [0], "7")]
    run = run_from_scores(lists, [np.array([0.5, 1.5], np.float32), [2]])
    assert run == {"7": {"x": 0.5, "y": 1.5}, "7#2": {"0": 2.0}}
    assert qrels_from_labels(lists) == {"7": {"x": 1, "y": 0}, "7#2": {"0": 0}}
    for rows, sentence in (
        ([[1, 2]], "1 rows of scores for 2 lists"),
        ([[1], [2]], "list '7': 1 scores for 2 documents"),
        ([[1, math.nan], [2]], "query '7', document 'y': the score is NaN"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_from_scores(lists, rows)
    with pytest.raises(ValueError, match="two lists have the key 'k'"):
        run_from_scores(lists, [[1, 2], [3]], ["k", "k"])
    with pytest.raises(ValueError, match="list '0' has no labels"):
        qrels_from_labels([RankingList("q", ["a"])])
    with pytest.raises(ValueError, match=r"the grade 0\.5 is no whole number"):
        qrels_from_labels([RankingList("q", ["a"], [0.5])])


def test_loaded_data_is_measured_against_all_that_is_judged(tmp_path):
    """The best document is no candidate and one query finds nothing: neither may flatter the number."""
    (tmp_path / "q.tsv").write_text("1\tone\n2\ttwo\n3\tthree\n")
    (tmp_path / "d.tsv").write_text("a\tA\nb\tB\nc\tC\n")
    (tmp_path / "run").write_text("1 0 a 1 2 t\n1 0 b 2 1 t\n3 0 c 1 1 t\n")
    (tmp_path / "qrels").write_text("1 0 c 3\n1 0 b 1\n2 0 a 1\n3 0 c 1\n")
    files = {"queries": "q.tsv", "documents": "d.tsv", "run": "run", "qrels": "qrels"}
    data = load_data({key: str(tmp_path / name) for key, name in files.items()}, seed=0)
    run = run_from_scores(data.candidates, [[1.0, 2.0], [0.0]], data.keys)
    measured = evaluate(run, data.qrels, ["nDCG@10", "RR"])
    same = evaluate({"1": {"a": 1.0, "b": 2.0}, "3": {"c": 0.0}}, read_qrels(tmp_path / "qrels"), ["nDCG@10", "RR"])
    ideal = 3 + 1 / math.log2(3)
    assert measured == same == {"nDCG@10": pytest.approx((1 / ideal + 0 + 1) / 3), "RR": pytest.approx(2 / 3)}


@pytest.fixture
def small_files(tmp_path):
    (tmp_path / "run").write_text("1 Q0 a 1 2 t\n1 Q0 b 2 1 t\n2 Q0 a 1 1 t\n")
    (tmp_path / "qrels").write_text("1 0 b 1\n2 0 a 1\n")
    return ["--run", str(tmp_path / "run"), "--qrels", str(tmp_path / "qrels")]


def test_command_prints_json(small_files, capsys):
    assert evaluate_command([*small_files, "--measures", "RR", "P@1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"RR": 0.75, "P@1": 0.5}
    for flag in ("--per_query", "--per-query"):
        assert evaluate_command([*small_files, "--measures", "RR", flag, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == {"RR": 0.75, "per_query": {"1": {"RR": 0.5}, "2": {"RR": 1.0}}}


def test_command_prints_a_table(small_files, capsys):
    assert evaluate_command([*small_files, "--measures", "RR", "nDCG@10"]) == 0
    assert capsys.readouterr().out == "RR       0.7500\nnDCG@10  0.8155\n"
    assert evaluate_command([*small_files, "--measures", "RR", "--per_query"]) == 0
    assert capsys.readouterr().out == "RR  1  0.5000\nRR  2  1.0000\nRR  all  0.7500\n"
    assert evaluate_command(["--help"]) == 0


def test_command_on_bad_input(small_files, tmp_path, capsys):
    (tmp_path / "bad").write_text("1 Q0 a 1 2 t\n1 Q0 b 2\n")
    cases = [
        (["--run", "absent", *small_files[2:]], "absent: no such file"),
        (["--run", str(tmp_path / "bad"), *small_files[2:]], "bad:2: expected 6 columns"),
        ([*small_files, "--measures", "ndcg@10"], "unknown measure 'ndcg@10'"),
        ([*small_files, "--measurs", "RR"], "unrecognized arguments: --measurs RR"),
        (small_files[:2], "the following arguments are required: --qrels"),
        (["--run", "$FASTRANK_DATA/x", *small_files[2:]], "FASTRANK_DATA is not set"),
    ]
    for argv, sentence in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("FASTRANK_DATA", raising=False)
            assert evaluate_command(argv) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and sentence in printed.err and printed.err.count("\n") == 1, printed.err


def test_importing_evaluate_and_data_is_light():
    code = (
        "import sys, fastrank.data, fastrank.evaluate\n"
        "print([m for m in ('torch', 'transformers', 'ir_measures', 'bm25s') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_junk_grades_are_not_relevant():
    run = {str(query): {f"d{i}": 20.0 - i for i in range(10)} for query in range(300)}
    junk = {query: dict.fromkeys(documents, -2) for query, documents in run.items()} | {"7": {"d3": 1, "d0": -2}}
    plain = {query: dict.fromkeys(documents, 0) for query, documents in run.items()} | {"7": {"d3": 1, "d0": 0}}
    assert evaluate(run, junk, ["nDCG@10", "RR@10"]) == evaluate(run, plain, ["nDCG@10", "RR@10"])
    with pytest.raises(ValueError, match="grade 2000000 is no whole number up to 1048576"):
        evaluate({"q": {"d": 1.0}}, {"q": {"d": 2_000_000}})
