"""Files become lists with the right labels; what is left out is counted, what is unknown is an error with its line."""

import gzip
import json

import pytest
from real_data import data_folder

from fastrank.data import (
    DataError,
    DataSource,
    RankingList,
    load_data,
    load_lists,
    read_documents,
    read_qrels,
    read_ranked_run,
    read_run,
    write_lists,
)
from fastrank.evaluate import evaluate, run_from_scores


@pytest.fixture
def files(tmp_path):
    """Four queries over documents a to f; query 3 has no judgment, query 4 no candidate."""
    (tmp_path / "queries.tsv").write_text("1\tone\n2\ttwo\n3\tthree\n4\tfour\n")
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"_id": x, "text": x.upper()}) + "\n" for x in "abcdef")
    )
    # Neither the scores nor the order of the lines agree with the ranks: the ranks are what counts.
    (tmp_path / "run").write_text(
        "1 0 c 3 9 t\n1 0 a 1 9 t\n1 0 b 2 10 t\n2 0 d 1 1 t\n2 0 e 2 0.5 t\n3 0 f 1 1 t\n1 0 d 4 -2 t\n"
    )
    (tmp_path / "qrels").write_text("1 0 b 2\n1 0 d 1\n1 0 e 3\n1 0 zz 1\n1 0 f 0\n2 0 d 0\n2 0 e -1\n4 0 a 1\n")
    return {
        "queries": str(tmp_path / "queries.tsv"),
        "documents": str(tmp_path / "documents.jsonl"),
        "run": str(tmp_path / "run"),
        "qrels": str(tmp_path / "qrels"),
    }


def test_relevance(files):
    data = load_data(files, seed=0)
    assert data.candidates == [
        RankingList("one", list("ABCD"), [0, 2, 0, 1], "1", list("abcd")),
        RankingList("two", list("DE"), [0, -1], "2", list("de")),
    ]
    assert data.keys == ["1", "2"]
    assert data.qrels == {name: read_qrels(files["qrels"])[name] for name in ("1", "2", "4")}
    assert data.report.left_out["queries without judgments"] == 1
    assert data.report.left_out["queries without candidates"] == 1
    assert str(data.report) == (
        "2 lists with 6 documents; left out: 1 queries without judgments, 1 queries without candidates"
    )
    assert load_lists(DataSource(**files), seed=5) == data.candidates


def test_rank_and_score_targets(files):
    ranks = load_lists({**files, "targets": "rank"}, seed=0)
    assert [(r.query_id, r.document_ids, r.labels) for r in ranks] == [
        ("1", tuple("abcd"), (4, 3, 2, 1)),
        ("2", tuple("de"), (2, 1)),
        ("3", ("f",), (1,)),
    ]
    assert load_lists({**files, "targets": "rank", "depth": 3, "qrels": None}, seed=0)[:2] == [
        RankingList("one", list("ABC"), [3, 2, 1], "1", list("abc")),
        RankingList("two", list("DE"), [3, 2], "2", list("de")),
    ]
    assert [r.labels for r in load_lists({**files, "targets": "score"}, seed=0)] == [(9, 10, 9, -2), (1, 0.5), (1,)]


def test_ranks_from_zero_and_tied_ranks(files, tmp_path):
    (tmp_path / "run").write_text("1 0 a 0 3 t\n1 0 b 1 2 t\n1 0 c 1 2 t\n1 0 d 3 1 t\n")
    (ranking,) = load_lists({**files, "targets": "rank", "depth": 3}, seed=0)
    assert (ranking.document_ids, ranking.labels) == (("a", "b", "c"), (3, 2, 2))


def test_the_depth_of_another_run(files, tmp_path):
    (tmp_path / "first").write_text("1 0 d 0 9 t\n1 0 f 1 8 t\n1 0 b 2 7 t\n1 0 a 3 6 t\n2 0 a 1 1 t\n")
    data = load_data({**files, "targets": "rank", "depth": 3, "depth_run": str(tmp_path / "first")}, seed=0)
    assert data.candidates == [RankingList("one", ["B", "D"], [3, 2], "1", ["b", "d"])]
    assert data.report.left_out["candidates below the depth"] == 5
    assert data.report.left_out["queries without candidates"] == 3


def test_several_teachers_make_a_list_each(files, tmp_path):
    (tmp_path / "second").write_text("2 0 e 1 1 t\n1 0 b 1 1 t\n")
    data = load_data({**files, "run": [files["run"], str(tmp_path / "second")], "targets": "rank"}, seed=0)
    assert [(key, r.document_ids) for key, r in zip(data.keys, data.candidates, strict=True)] == [
        ("1", tuple("abcd")),
        ("2", ("d", "e")),
        ("3", ("f",)),
        ("2#2", ("e",)),
        ("1#2", ("b",)),
    ]
    assert data.qrels["1#2"] == data.qrels["1"] and data.report.left_out["queries without candidates"] == 1


def test_judgments_stay_with_their_lists(files):
    row = {"query": "which", "documents": ["good", "bad"], "labels": [1, 0], "query_id": "4"}
    data = load_data([row, files], seed=0)
    assert data.keys == ["4", "1", "2"] and "4" not in data.qrels
    assert data.qrels["4#2"] == {"a": 1}, "query 4 of the files, which has no candidate"
    assert data.candidates != [5] * 3


def test_relevant_documents_are_added(files):
    data = load_data({**files, "add_judged": True, "depth": 2}, seed=0)
    assert data.candidates[0] == RankingList("one", list("ABDE"), [0, 2, 1, 3], "1", list("abde"))
    assert data.candidates[1].document_ids == ("d", "e")
    assert data.report.notes["relevant documents added"] == 2
    assert data.report.left_out["relevant documents without a text"] == 1


def test_likely_false_negatives_are_left_out(files, tmp_path):
    (tmp_path / "run").write_text("1 0 a 1 9 t\n1 0 c 2 8 t\n1 0 b 3 8 t\n1 0 f 4 7.5 t\n1 0 d 5 7 t\n2 0 a 1 9 t\n")
    (tmp_path / "qrels").write_text("1 0 b 2\n1 0 f 0\n2 0 e 1\n")
    data = load_data({**files, "false_negative_margin": 0.5}, seed=0)
    assert [(one.document_ids, one.labels) for one in data.candidates] == [
        (("b", "f", "d"), (2, 0, 0)),
        (("a",), (0,)),
    ], "what is judged stays, and where no relevant candidate is, all"
    assert data.report.left_out["likely false negatives"] == 2
    assert load_data({**files, "false_negative_margin": 1.0}, seed=0).candidates[0].document_ids == ("b", "f")
    for change, sentence in (({"targets": "rank"}, "needs targets 'relevance'"), ({}, "must be a finite number")):
        margin = 1 if change else float("nan")
        with pytest.raises(DataError, match=f"false_negative_margin {sentence}"):
            load_data({**files, **change, "false_negative_margin": margin}, seed=0)


def test_answers_of_an_llm(tmp_path):
    passages = [{"docid": name, "text": name.upper()} for name in "abc"]
    rows = [{"query": f"q{i}", "retrieved_passages": passages} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "answers.json").write_text(json.dumps(["[3] > [1] > [2]", "[2]", "no"]))
    source = {"lists": tmp_path / "rows.jsonl", "permutations": tmp_path / "answers.json"}
    found = {
        policy: [one.labels for one in load_data(source | {"permutation_policy": policy}, seed=0).candidates]
        for policy in ("repair", "drop", "tier")
    }
    assert found == {
        "repair": [(2, 1, 3), (2, 3, 1), (3, 2, 1)],
        "drop": [(2, 1, 3)],
        "tier": [(2, 1, 3), (0, 3, 0), (0, 0, 0)],
    }
    report = load_data(source, seed=0).report
    assert report.notes["answers ok"] == report.notes["answers missing_documents"] == 1
    assert str(load_data(source, seed=0).report).endswith("1 answers missing_documents, 1 answers wrong_format")
    for wrong, sentence in (
        ({"lists": source["lists"], "permutation_policy": "drop"}, "needs rows with answers, or permutations"),
        (
            {"run": "a", "queries": "b", "documents": "c", "targets": "rank", "permutation_policy": "drop"},
            "needs lists",
        ),
        ({"run": "a", "queries": "b", "documents": "c", "targets": "rank", "permutations": "d"}, "go with lists"),
        (source | {"permutation_policy": "tiers"}, "the nearest is 'tier'"),
    ):
        with pytest.raises(DataError, match=sentence):
            load_data(wrong, seed=0)


def test_bm25_word(files, tmp_path):
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"_id": str(i), "text": f"one {'two ' * i}"}) + "\n" for i in range(5))
    )
    (tmp_path / "qrels").write_text("1 0 0 1\n2 0 0 1\n3 0 3 1\n")
    data = load_data({**files, "run": "bm25", "depth": 3}, seed=0)
    assert [(r.query_id, len(r)) for r in data.candidates] == [("1", 3), ("2", 3)]
    assert data.candidates[0].document_ids[0] == "0" and "0" not in data.candidates[1].document_ids
    assert data.report.left_out["queries without candidates"] == 1 and data.qrels["3"] == {"3": 1}
    assert load_lists({**files, "run": "bm25", "depth": 3, "targets": "rank"}, seed=0)[0].labels == (3, 2, 1)


def test_single_relevant_counts_what_it_skips(files):
    data = load_data({**files, "sampling": "single_relevant", "sample_size": 8}, seed=0)
    assert data.keys == ["1"]
    assert data.report.left_out["lists without a relevant document"] == 1
    assert data.report.notes["lists shorter than sample_size"] == 1
    assert str(data.report).endswith(
        "1 lists without a relevant document, 1 queries without candidates; note: 1 lists shorter than sample_size"
    )
    data = load_data({**files, "sampling": "single_relevant", "sample_size": 2}, seed=3)
    draws = [data.draw(0, epoch=epoch) for epoch in range(60)]
    assert all(len(draw) == 2 and sum(label > 0 for label in draw.labels) == 1 for draw in draws)
    assert len({draw.document_ids for draw in draws}) == 4
    assert [data.draw(0, epoch=epoch) for epoch in reversed(range(60))] == draws[::-1]
    again = load_data({**files, "sampling": "single_relevant", "sample_size": 2}, seed=3)
    assert [again.draw(0, epoch=epoch) for epoch in range(60)] == draws
    assert load_lists({**files, "sampling": "single_relevant", "sample_size": 2}, seed=3) == [draws[0]]
    other = load_data({**files, "sampling": "single_relevant", "sample_size": 2}, seed=4)
    assert [other.draw(0, epoch=epoch) for epoch in range(60)] != draws


def test_lists_files_rows_and_mixtures(files, tmp_path):
    rows = [RankingList("q1", ["a", "b"], [1, 0]), RankingList("q2", ["c"], [0], "7")]
    path = tmp_path / "lists.jsonl.gz"
    write_lists(path, rows)
    as_dicts = [
        {"query": "q1", "documents": ["a", "b"], "labels": [1, 0]},
        {"query": "q2", "documents": ["c"], "labels": [0], "query_id": 7},
    ]
    for source in (path, str(path), {"lists": path}, DataSource(lists=path), rows, as_dicts, [path], iter(rows)):
        assert load_lists(source, seed=0) == rows
    mixed = load_data([*rows, str(path), files, {"lists": str(path), "sampling": "top", "sample_size": 1}], seed=0)
    assert mixed.keys == ["0", "7", "2", "7#2", "1", "2#2", "6", "7#3"]
    assert [len(ranking) for ranking in mixed.draw_all()] == [2, 1, 2, 1, 4, 2, 1, 1]
    assert set(mixed.qrels) == {"1", "2#2", "4"}


def test_parts_of_lists_go_by_id_or_text(tmp_path):
    rows = [RankingList(f"text {i % 50}", ["a"], [1], None if i % 2 else f"id {i % 40}") for i in range(400)]
    write_lists(tmp_path / "l.jsonl", rows)
    parts = [
        load_data({"lists": str(tmp_path / "l.jsonl"), "queries_part": part}, seed=0) for part in ([0, 0.7], [0.7, 1])
    ]
    names = [{r.query_id or r.query for r in part.candidates} for part in parts]
    assert not names[0] & names[1] and len(names[0]) > len(names[1]) > 5
    assert sorted(map(len, parts)) == sorted([parts[1].report.left_out["lists outside queries_part"], len(parts[1])])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"run": "1 0 a 1 9 t\n1 0 x 2 8 t\n"}, "run:2: document 'x' has no text in .*documents"),
        ({"run": "1 0 a 1 9 t\n9 0 a 1 8 t\n"}, "run:2: query '9' has no text in .*queries"),
        ({"run": "1 0 a 1 9 t\n1 0 b 2 8\n"}, "run:2: expected 6 columns"),
        ({"qrels": "1 0 a x\n"}, "qrels:1: the grade must be a whole number"),
        (
            {"qrels": "9 0 a 1\n"},
            "no list is left to use: 0 lists with 0 documents; left out: 4 queries without judgments",
        ),
        ({"documents": '{"_id": "a"}\n'}, "documents:1: the document has no text"),
        ({"queries": "1\n"}, "queries:1: expected 2 columns"),
    ],
)
def test_flaws_in_the_files(files, tmp_path, change, sentence):
    for name, content in change.items():
        path = tmp_path / "changed" / name
        path.parent.mkdir()
        path.write_text(content)
        files[name] = str(path)
    with pytest.raises(DataError, match=sentence):
        load_data(files, seed=0)


def test_a_rank_column_without_an_order_is_refused_where_ranks_count(files, tmp_path):
    (tmp_path / "run").write_text("2 0 d 1 2 t\n1 0 a 0 9 t\n1 0 b 0 8 t\n")
    for fields in ({"targets": "rank"}, {"depth": 5}, {"sampling": "top", "sample_size": 1}):
        with pytest.raises(DataError, match="run:2: all 2 documents of query '1' have rank 0, so there is no order"):
            load_data({**files, **fields}, seed=0)
    assert load_lists(files, seed=0)[1].document_ids == ("a", "b")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([], "no list is left to use: 0 lists with 0 documents"),
        (5, "expected a path, a data source or a row with query and documents, found int"),
        (None, "expected a path, a data source or a row with query and documents, found NoneType"),
        ([RankingList("q", ["a"]), 5], r"^data\[1\]: expected a path, .* found int"),
        ([["q", "d"]], r"^data\[0\]: expected a path, .* found list"),
        ([{"query": "q", "documents": ["a", None]}], r"^data\[0\]: document 1 must be a string or an object"),
        ([{"query": "q", "documents": ["a"], "labels": [1, 2]}], r"^data\[0\]: 2 labels for 1 documents"),
        ([{"query": "q"}], r"^data\[0\]: the key 'documents' is missing"),
        ({"query": "q"}, "^the key 'documents' is missing"),
        ([{"lists": "a", "depht": 3}], r"^data\[0\]: unknown key 'depht' .* nearest known one is 'depth'"),
        ([{"query": "q", "documents": []}], "no list is left to use: .* left out: 1 lists without documents"),
        ("absent.jsonl", r"absent\.jsonl: no such file"),
    ],
)
def test_what_is_no_data(source, sentence):
    with pytest.raises(DataError, match=sentence):
        load_data(source, seed=0)


def test_single_relevant_needs_labels(tmp_path):
    write_lists(tmp_path / "l.jsonl", [RankingList("q", ["a"])])
    with pytest.raises(DataError, match=r"l\.jsonl: sampling 'single_relevant' needs labels, .* query 'q' has none"):
        load_data({"lists": str(tmp_path / "l.jsonl"), "sampling": "single_relevant", "sample_size": 2}, seed=0)


# The real collections, as the README's commands load them.


@pytest.fixture
def real(monkeypatch):
    monkeypatch.setenv("FASTRANK_DATA", str(data_folder()))
    dl, scifact = "$FASTRANK_DATA/trec-dl/", "${FASTRANK_DATA}/scifact/"
    return {
        "dl20": {
            "queries": dl + "queries.dl20.tsv",
            "documents": dl + "passages.msmarco-v1.dl19-dl20.jsonl.gz",
            "run": dl + "first_stage/BM25.dl20.run.gz",
            "qrels": dl + "qrels.dl20-passage.txt",
        },
        "scifact": {
            "queries": scifact + "queries.train.tsv",
            "documents": scifact + "corpus.jsonl.gz",
            "run": "bm25",
            "qrels": scifact + "qrels.train.trec",
            "depth": 100,
        },
    }


def test_dl20_lists_measure_as_their_run(real):
    data = load_data(real["dl20"], seed=0)
    assert len(data) == 54 and all(len(ranking) == 100 for ranking in data.candidates)
    run = read_run(real["dl20"]["run"])
    scores = [[run[r.query_id][d] for d in r.document_ids] for r in data.candidates]
    measured = evaluate(run_from_scores(data.candidates, scores, data.keys), data.qrels)
    assert round(measured["nDCG@10"], 4) == 0.4796
    assert measured == pytest.approx(evaluate(run, read_qrels(real["dl20"]["qrels"])))


def test_scifact_parts_are_disjoint_and_whole(real):
    # The training seed must not move queries from one part to the other.
    parts = [
        load_data({**real["scifact"], "queries_part": part}, seed=seed)
        for part, seed in (([0, 0.75], 1), ([0.75, 1], 99))
    ]
    train, held_out = ({r.query_id for r in part.candidates} for part in parts)
    assert not train & held_out and len(train) + len(held_out) == 809 and 580 < len(train) < 635
    assert all(0 < len(r) <= 100 for part in parts for r in part.candidates)
    held = parts[1]
    run = run_from_scores(held.candidates, [range(len(r), 0, -1) for r in held.candidates], held.keys)
    assert 0.6 < evaluate(run, held.qrels)["nDCG@10"] < 0.73


def test_teacher_ranks_on_real_runs(real):
    folder = data_folder() / "trec-dl/llm_runs"
    teacher = folder / "BM25.dl20.rankvicuna-7b-aug.d100.20230912T184530.run.gz"
    source = {**real["dl20"], "run": str(teacher), "targets": "rank", "depth": 100}
    lists = load_lists(source, seed=0)
    raw = read_ranked_run(teacher)
    for ranking in lists:
        ranks = dict(zip(raw[ranking.query_id].document_ids, raw[ranking.query_id].ranks, strict=True))
        assert ranking.labels == tuple(101 - ranks[d] for d in ranking.document_ids) == tuple(range(100, 0, -1))
    shallow = load_data({**source, "depth": 20, "depth_run": real["dl20"]["run"]}, seed=0)
    first = read_ranked_run(real["dl20"]["run"])
    for ranking, deep in zip(shallow.candidates, lists, strict=True):
        inside = set(first[ranking.query_id].document_ids[:20])
        assert ranking.document_ids == tuple(d for d in deep.document_ids if d in inside)
        assert ranking.labels == tuple(range(20, 0, -1))


def test_first_stage_of_rank_distillm_on_real_data(real):
    """Depth 200, one relevant and seven others, relevant documents added: the sampling of the first training stage."""
    source = {**real["dl20"], "depth": 50, "add_judged": True, "sampling": "single_relevant", "sample_size": 8}
    data = load_data(source, seed=42)
    qrels = read_qrels(real["dl20"]["qrels"])
    for epoch in range(3):
        for ranking in data.draw_all(epoch=epoch):
            assert len(ranking) == 8 and sum(label > 0 for label in ranking.labels) == 1
            assert all(
                label == qrels[ranking.query_id].get(d, 0)
                for d, label in zip(ranking.document_ids, ranking.labels, strict=True)
            )
    texts = read_documents(real["dl20"]["documents"])
    without_text = 0
    for ranking in data.candidates:
        relevant = {d for d, grade in qrels[ranking.query_id].items() if grade > 0}
        assert relevant & texts.keys() <= set(ranking.document_ids)
        without_text += len(relevant - texts.keys())
    assert data.report.left_out["relevant documents without a text"] == without_text > 0


def test_a_collection_in_two_columns(files, tmp_path):
    files["documents"] = str(tmp_path / "collection.tsv.gz")
    with gzip.open(files["documents"], "wt") as file:
        file.writelines(f"{x}\t{x.upper()}\n" for x in "abcdef")
    assert load_lists(files, seed=0)[0].documents == tuple("ABCD")
