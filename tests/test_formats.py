"""Readers take real files and hard ones, name file and line of every flaw, and read back what the writers wrote."""

import gzip
import json
import math
import random

import numpy as np
import pytest
from real_data import data_folder

from fastrank.data import (
    DataError,
    RankingList,
    read_documents,
    read_lists,
    read_qrels,
    read_queries,
    read_ranked_run,
    read_run,
    write_lists,
    write_qrels,
    write_run,
)
from fastrank.data.runs import by_score

HARD_TEXTS = [
    "emoji 👩‍👩‍👧 and 🤖",
    "שלום עולם \u202eabc\u202c مرحبا",
    "a NUL \0 inside",
    "line\u2028separators\u0085and\x0b\x0c\x1c",
    "combining e\u0301, ﬁ, ﷺ",
    "tab\tand\nnewline\rand\r\n",
    '"quotes" \\ back',
    "",
    " ",
    "x" * 1_000_000,
]


def _write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_every_real_run_is_read_whole():
    runs = sorted(data_folder().glob("trec-dl/first_stage/*.run.gz"))
    runs += sorted(data_folder().glob("rank-distillm-run/*.run.gz"))
    runs += sorted(data_folder().glob("trec-dl/setwise_runs/*flan-t5-xxl*.run.gz"))
    assert len(runs) > 30
    for path in runs:
        rows = [line.split() for line in gzip.open(path, "rt", encoding="utf-8")]
        ranked = read_ranked_run(path)
        assert sum(len(query.document_ids) for query in ranked.values()) == len(rows)
        for position in (0, len(rows) // 2, len(rows) - 1):
            query_id, _, document_id, rank, score, _ = rows[position]
            query = ranked[query_id]
            i = query.document_ids.index(document_id)
            assert (query.ranks[i], query.scores[i], query.lines[i]) == (int(rank), float(score), position + 1)
    assert read_run(path)[query_id][document_id] == float(score)


def test_real_texts_and_judgments():
    root = data_folder()
    assert len(read_queries(root / "scifact/queries.train.tsv")) == 809
    assert read_queries(root / "trec-dl/queries.dl19.tsv")["264014"] == "how long is life cycle of flea"
    assert sum(map(len, read_qrels(root / "scifact/qrels.train.trec").values())) == 919
    assert sum(map(len, read_qrels(root / "cranfield/qrels.trec").values())) == 1837
    abstracts = read_documents(root / "scifact/corpus.jsonl.gz")
    assert len(abstracts) == 5183
    assert abstracts["4983"].startswith(
        "Microstructural development of human newborn cerebral white matter assessed in vivo by diffusion tensor "
        "magnetic resonance imaging. Alterations of the architecture"
    )
    cranfield = read_documents(root / "cranfield/corpus.jsonl.gz")
    assert len(cranfield) == 1400 and cranfield["471"] == ""
    passages = read_documents(root / "trec-dl/passages.msmarco-v1.dl19-dl20.jsonl.gz", wanted={"1000485", "nobody"})
    assert list(passages) == ["1000485"] and passages["1000485"].startswith("Pseudobulbar palsy is")


def test_judgments_in_three_columns_without_a_header_are_refused():
    with pytest.raises(DataError, match=r"cranqrel:1: expected 4 columns \(query-id iteration .* found 3"):
        read_qrels(data_folder() / "cranfield/cranqrel")


def test_run_columns_may_be_cut_by_any_white_space(tmp_path):
    # A no-break space is no cut: ids may hold it.
    run = _write(tmp_path / "run", "1\tQ0  a\u00a0b \t 1 2e1\ttag\r\n\n  2 0 ü 0 -.5 x  \n1 Q0 c 2 -0 t")
    assert read_run(run) == {"1": {"a\u00a0b": 20.0, "c": 0.0}, "2": {"ü": -0.5}}
    assert list(read_ranked_run(run)["1"].lines) == [1, 4]


def test_qrels_of_trec_and_of_beir(tmp_path):
    assert read_qrels(_write(tmp_path / "a", "1 0 x 2\n1\t0\ty\t-1\n1 0 x 2\n")) == {"1": {"x": 2, "y": -1}}
    beir = _write(tmp_path / "b.gz", "query-id\tcorpus-id\tscore\n1\tx\t2\n")
    assert read_qrels(beir) == {"1": {"x": 2}}


@pytest.mark.parametrize("key", ["_id", "qid", "query_id", "id"])
@pytest.mark.parametrize("text_key", ["text", "query"])
def test_queries_as_json_lines(tmp_path, key, text_key):
    rows = [{key: "a b", text_key: "eins"}, {key: 7, text_key: "\ud83d\ude00 \ud800", "metadata": None}]
    path = _write(tmp_path / "queries", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_queries(path) == {"a b": "eins", "7": "😀 \ufffd"}


def test_documents_join_title_and_text(tmp_path):
    rows = [
        {"_id": "1", "title": "T", "text": "t"},
        {"docid": "2", "text": "t"},
        {"id": 3, "title": "", "text": "t"},
        {"doc_id": "4", "title": "T", "text": ""},
        {"id": "5", "content": "c", "title": None},
    ]
    path = _write(tmp_path / "d.jsonl.gz", "\n".join(map(json.dumps, rows)))
    assert read_documents(path) == {"1": "T t", "2": "t", "3": "t", "4": "T", "5": "c"}
    for name in ("c.tsv", "c.tsv.gz"):
        assert read_documents(_write(tmp_path / name, '{1}\t{"a": 1}\n2\t\n')) == {"{1}": '{"a": 1}', "2": ""}


def test_escaped_lone_surrogates_in_lists(tmp_path):
    line = r'{"query": "\ud800\ud83d\ude00", "documents": ["a\udfff", "\u0000"], "query_id": "\udc00"}'
    assert read_lists(_write(tmp_path / "l", line)) == [RankingList("\ufffd😀", ["a\ufffd", "\0"], None, "\ufffd")]


def test_lists_of_strings_and_of_objects(tmp_path):
    rows = [
        {"query": "q", "documents": ["a", "b"], "labels": [1, 0], "query_id": 5},
        {"query": "q", "documents": [{"docid": "x", "title": "T", "text": "a"}, {"id": 2, "content": "b"}]},
        {"query": "q", "documents": [{"text": "a"}, "b"], "labels": None, "qid": "y"},
        {"query": "q", "documents": [], "labels": []},
        {"query": "q", "documents": ["a"], "labels": [float("inf")], "more": {}},
    ]
    path = _write(tmp_path / "lists.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_lists(path) == [
        RankingList("q", ["a", "b"], [1, 0], "5"),
        RankingList("q", ["T a", "b"], None, None, ["x", "2"]),
        RankingList("q", ["a", "b"], None, "y"),
        RankingList("q", [], []),
        RankingList("q", ["a"], [math.inf]),
    ]


GOOD_RUN, GOOD_LIST = "1 Q0 a 1 2.5 t\n", '{"query": "q", "documents": ["a", "b"], "labels": [1, 0]}\n'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1 Q0 b 2 1.5", "expected 6 columns (query-id Q0 document-id rank score tag), found 5"),
        ("1 Q0 b 2 1.5 t t", "expected 6 columns (query-id Q0 document-id rank score tag), found 7"),
        ("1 Q0 b 2.0 1.5 t", "the rank must be a whole number from 0, found '2.0'"),
        ("1 Q0 b -1 1.5 t", "the rank must be a whole number from 0, found '-1'"),
        ("1 Q0 b 1_0 1.5 t", "the rank must be a whole number from 0, found '1_0'"),
        ("1 Q0 b 99999999999999999999 1.5 t", "the rank must be a whole number from 0, found '99999999999999999999'"),
        ("1 Q0 b 2 high t", "the score must be a finite number, found 'high'"),
        ("1 Q0 b 2 nan t", "the score must be a finite number, found 'nan'"),
        ("1 Q0 b 2 -inf t", "the score must be a finite number, found '-inf'"),
        ("1 Q0 b 2 1_5 t", "the score must be a finite number, found '1_5'"),
        ("1 Q0 a 2 1.5 t", "document 'a' comes twice for query '1'; it was on line 1"),
        (b"1 Q0 b\xff 2 1.5 t", "byte 2 of the line (0xff) is not valid UTF-8; save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["bad.run", "bad.run.gz"])
def test_bad_run_lines(tmp_path, name, line, sentence):
    line = line if isinstance(line, bytes) else line.encode()
    path = _write(tmp_path / name, GOOD_RUN.encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_run(path)
    assert str(caught.value) == f"{path}:3: {sentence}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("1 0 a\n", "1: expected 4 columns (query-id iteration document-id grade), found 3"),
        ("1 0 a 1\n1 0 b 1 1\n", "2: expected 4 columns (query-id iteration document-id grade), found 5"),
        ("1 0 a 1\n1 0 b yes\n", "2: the grade must be a whole number, found 'yes'"),
        ("1 0 a 1\n1 0 b nan\n", "2: the grade must be a whole number, found 'nan'"),
        ("1 0 a 0.5\n", "1: the grade must be a whole number, found '0.5'"),
        ("1 0 a 1\n1 0 a 2\n", "2: document 'a' is judged twice for query '1', 1 and 2"),
        ("query-id\tcorpus-id\tscore\n1 0 a 1\n", "2: expected 3 columns (query-id corpus-id score), found 4"),
        ("query-id\tcorpus-id\tscore\n", " the file holds a header and no judgment"),
        ("", " the file is empty; expected lines of query-id iteration document-id grade"),
    ],
)
def test_bad_qrels(tmp_path, content, sentence):
    path = _write(tmp_path / "qrels", content)
    with pytest.raises(DataError) as caught:
        read_qrels(path)
    assert str(caught.value) == f"{path}:{sentence}"


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("q.tsv", "b", "expected 2 columns (query id TAB text), found 1"),
        ("q.tsv", "b\tc\td", "expected 2 columns (query id TAB text), found 3"),
        ("q.tsv", " \tc", "the query id before the tab is empty"),
        ("q.tsv", "1\tagain", "the query id '1' comes twice"),
        ("q.tsv", b"b\t\xe2\x82", "byte 3 of the line (0xe2) is not valid UTF-8; save the file as UTF-8"),
        ("q.jsonl", "{'_id': 1}", "not valid JSON at column 2: Expecting property name enclosed in double quotes"),
        ("q.jsonl", '{"_id": "2", "text": "cut', "not valid JSON at column 22: Unterminated string starting at"),
        ("q.jsonl", '["2", "b"]', "expected a JSON object, found list"),
        ("q.jsonl", '{"text": "b"}', "the query has no id; expected one of _id, qid, query_id, id"),
        ("q.jsonl", '{"_id": 1.5, "text": "b"}', "'_id' of the query must be a string or a whole number, found 1.5"),
        ("q.jsonl", '{"_id": "", "text": "b"}', "'_id' of the query must be a string or a whole number, found ''"),
        ("q.jsonl", '{"_id": true, "text": "b"}', "'_id' of the query must be a string or a whole number, found True"),
        ("q.jsonl", '{"_id": "2"}', "the query has no text; expected one of text, query"),
        ("q.jsonl", '{"_id": "2", "text": null}', "'text' of the query must be a string, not NoneType"),
        ("q.jsonl", '{"_id": "1", "text": "b"}', "the query id '1' comes twice"),
    ],
)
def test_bad_query_lines(tmp_path, name, line, sentence):
    good = b"1\tone\n" if name.endswith(".tsv") else b'{"_id": "1", "text": "one"}\n'
    line = line if isinstance(line, bytes) else line.encode()
    path = _write(tmp_path / name, good + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_queries(path)
    assert str(caught.value) == f"{path}:2: {sentence}"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"_id": "2", "title": "T"}',
            "the document has no text; expected one of text, content, page_content, passage",
        ),
        ('{"_id": "2", "title": 4, "text": "b"}', "'title' of the document must be a string, not int"),
        ('{"_id": "1", "text": "b"}', "the document id '1' comes twice"),
        ("[" * 100_000, "not usable JSON: maximum recursion depth exceeded"),
        ('{"_id": ' + "9" * 5000 + "}", "not usable JSON: Exceeds the limit"),
    ],
)
def test_bad_document_lines(tmp_path, line, sentence):
    path = _write(tmp_path / "d.jsonl", '{"_id": "1", "text": "a"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:2: {sentence}")


def test_documents_that_are_not_wanted_are_checked_all_the_same(tmp_path):
    path = _write(tmp_path / "d.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2"}\n')
    with pytest.raises(DataError, match="2: the document has no text"):
        read_documents(path, wanted={"1"})


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"query": "q", "pos": ["a"], "neg": []}', "the key 'documents' is missing; found 'query', 'pos', 'neg'"),
        ("{}", "the key 'query' is missing; found none"),
        ('{"query": null, "documents": []}', "'query' must be a string, not NoneType"),
        ('{"query": "q", "documents": "a"}', "'documents' must be an array, not str"),
        ('{"query": "q", "documents": {"a": 1}}', "'documents' must be an array, not dict"),
        ('{"query": "q", "documents": [null]}', "document 0 must be a string or an object with a text, not NoneType"),
        (
            '{"query": "q", "documents": ["a", {"id": 1}]}',
            "the document 1 has no text; expected one of text, content, page_content, passage",
        ),
        ('{"query": "q", "documents": ["a", {"text": 1}]}', "'text' of the document 1 must be a string, not int"),
        (
            '{"query": "q", "documents": [{"text": "a"}, {"id": [], "text": "a"}]}',
            "'id' of the document 1 must be a string or a whole number, found []",
        ),
        (
            '{"query": "q", "documents": [{"text": "a"}, {"id": 1, "text": "a"}]}',
            "1 of 2 documents have an id; give all of them one, or none",
        ),
        (
            '{"query": "q", "documents": [{"id": "1", "text": "a"}, {"id": 1, "text": "b"}]}',
            "the document id '1' comes twice in one list",
        ),
        ('{"query": "q", "documents": ["a"], "labels": [1, 2]}', "2 labels for 1 documents: one each is needed"),
        ('{"query": "q", "documents": ["a"], "labels": 1}', "labels must be a sequence, not int"),
        ('{"query": "q", "documents": ["a"], "labels": ["1"]}', "label 0 must be a number, not str"),
        ('{"query": "q", "documents": ["a"], "labels": [NaN]}', "label 0 is NaN: leave the label out or give a number"),
        ('{"query": "q", "documents": ["a"], "labels": [1' + "0" * 400 + "]}", "label 0 is too large for a float"),
        ('{"query": "q", "documents": ["a"], "query_id": {}}', "query_id must be a string or a whole number, found {}"),
    ],
)
def test_bad_list_lines(tmp_path, line, sentence):
    path = _write(tmp_path / "lists.jsonl", GOOD_LIST + line + "\n" + GOOD_LIST)
    with pytest.raises(DataError) as caught:
        read_lists(path)
    assert str(caught.value) == f"{path}:2: {sentence}"


@pytest.mark.parametrize("read", [read_run, read_qrels, read_queries, read_documents, read_lists])
def test_missing_empty_and_truncated_files(tmp_path, read):
    with pytest.raises(DataError, match=r"absent: no such file$"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="empty: the file is empty; expected lines of "):
        read(_write(tmp_path / "empty", ""))
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"1 Q0 a 1 1 t\n")[:-9])
    with pytest.raises(DataError, match=r"cut\.gz:\d+: the gzip file ends early|cut\.gz:1: "):
        read(cut)


def test_lists_round_trip_with_hard_texts(tmp_path):
    lists = [
        RankingList(text, [text, "b"], [1.5, -math.inf], f"id {i}", [text[:50] + "a", "b"])
        for i, text in enumerate(HARD_TEXTS)
    ]
    lists += [RankingList("q", [], []), RankingList("q", HARD_TEXTS)]
    for name in ("lists.jsonl", "lists.jsonl.gz"):
        write_lists(tmp_path / name, lists)
        assert read_lists(tmp_path / name) == lists
    write_lists(tmp_path / "s.jsonl", [RankingList("q\ud800", ["\udfff", "😀"], None, "\ud800", ["\udc00", "1"])])
    assert read_lists(tmp_path / "s.jsonl") == [
        RankingList("q\ufffd", ["\ufffd", "😀"], None, "\ufffd", ["\ufffd", "1"])
    ]


def test_qrels_round_trip(tmp_path):
    qrels = {"1": {"a": 3, "b\u00a0c": -1}, "ü": {"a": 0}}
    write_qrels(tmp_path / "q.gz", qrels)
    assert read_qrels(tmp_path / "q.gz") == qrels
    with pytest.raises(ValueError, match=r"the grade 0\.5 of document 'a' is not a whole number"):
        write_qrels(tmp_path / "q.gz", {"1": {"a": 0.5}})
    assert read_qrels(tmp_path / "q.gz") == qrels


def _order_of(path, query_id="1"):
    """The documents as any evaluator that compares float32 scores must order them: scores fall strictly."""
    query = read_ranked_run(path)[query_id]
    scores = np.array(query.scores, np.float32)
    assert (np.diff(scores) < 0).all() and np.isfinite(scores).all()
    assert list(query.ranks) == list(range(1, len(scores) + 1))
    return query.document_ids


def test_written_scores_fall_strictly(tmp_path):
    path = tmp_path / "out.run"
    cases = [
        {"a": 0.0, "b": 0.0, "c": -0.0, "d": 1e-45, "e": -1e-60},
        {"a": 1.0, "b": 1.0 + 1e-12, "c": 1.0 - 1e-12, "d": 1.0},
        {f"d{i}": 7.25 for i in range(1000)},
        {"z": 1e300, "y": 1e299, "a": 3e38, "b": -3e38, "c": 16777216.0, "d": 16777217.0, "e": 16777218.0},
    ]
    rng = random.Random(1)
    for _ in range(50):
        values = [rng.choice([rng.gauss(0, 1), round(rng.random(), 1), 1e-40 * rng.random()]) for _ in range(40)]
        cases.append({f"d{rng.random()}": value for value in values})
    for scores in cases:
        write_run(path, {"1": scores})
        assert _order_of(path) == [document_id for document_id, _ in by_score(scores)]
        write_run(path, {"1": by_score(scores)})
        assert _order_of(path) == [document_id for document_id, _ in by_score(scores)]


def test_float32_scores_without_ties_are_written_exactly(tmp_path):
    rng = random.Random(2)
    run = {str(q): {f"d{i}": float(np.float32(rng.gauss(0, 10))) for i in range(200)} for q in range(5)}
    write_run(tmp_path / "r.gz", run, tag="mine")
    back = read_run(tmp_path / "r.gz")
    assert {q: {d: float(np.float32(score)) for d, score in scores.items()} for q, scores in back.items()} == run
    assert gzip.open(tmp_path / "r.gz", "rt").readline().endswith(" mine\n")


def test_a_sequence_keeps_its_own_order_of_ties(tmp_path):
    path = tmp_path / "out.run"
    write_run(path, {"1": [("b", 2.0), ("a", 2.0), ("c", 2.0)]})
    assert _order_of(path) == ["b", "a", "c"]
    with pytest.raises(ValueError, match="query '1': document 'a' scores above the one before it"):
        write_run(path, {"1": [("b", 2.0), ("a", 2.5)]})
    assert _order_of(path) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"1": {"a": math.nan}}, "query '1', document 'a': the score nan cannot be written"),
        ({"1": {"a": math.inf}}, "query '1', document 'a': the score inf cannot be written"),
        ({"1": {"b": -1e300}}, "query '1', document 'b': the score -1e\\+300 cannot be written"),
        ({"1": {"a b": 1.0}}, "the document id 'a b' is empty or has white space in it"),
        ({"1": {"": 1.0}}, "the document id '' is empty"),
        ({"1\n": {"a": 1.0}}, r"the query id '1\\n' is empty or has white space"),
    ],
)
def test_what_a_run_cannot_hold(tmp_path, run, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_run(tmp_path / "out.run", run)
    assert not list(tmp_path.iterdir())


def test_equal_scores_are_ordered_by_later_id():
    assert by_score({"a": 1.0, "10": 1.0, "9": 1.0, "b": 2.0}) == [("b", 2.0), ("a", 1.0), ("9", 1.0), ("10", 1.0)]


@pytest.mark.parametrize("read", [read_run, read_qrels, read_queries, read_documents, read_lists])
def test_damaged_files_end_in_a_data_error_or_a_result(tmp_path, read):
    """Whatever is done to the bytes, a reader answers with a result or a DataError that names the file."""
    good = {
        read_run: "".join(f"{q} Q0 d{i} {i} {10 - i}.5 t\n" for q in range(3) for i in range(1, 5)),
        read_qrels: "".join(f"{q} 0 d{i} {i % 3}\n" for q in range(3) for i in range(4)),
        read_queries: "".join(json.dumps({"_id": str(i), "text": f"q{i}"}) + "\n" for i in range(6)),
        read_documents: "".join(f"{i}\tdocument {i} 😀\n" for i in range(6)),
        read_lists: GOOD_LIST * 5,
    }[read].encode()
    rng = random.Random(read.__name__)
    failures = 0
    for trial in range(400):
        data = bytearray(gzip.compress(good) if trial % 4 == 0 else good)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(4), rng.randrange(len(data))
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 9)]
            elif kind == 2:
                data[at:at] = rng.choice(
                    [b"\0", b"\n", b"\t", b" ", b"\xff", b'"', b"NaN", b"\xed\xa0\x80", b"\\ud800"]
                )
            else:
                data = data[: max(1, at)]
            if not data:
                data = bytearray(b"\n")
        path = tmp_path / f"case{trial}"
        path.write_bytes(data)
        try:
            read(path)
        except DataError as error:
            failures += 1
            assert str(error).startswith(f"{path}:") and len(error.sentence) > 10
    assert failures > 100
