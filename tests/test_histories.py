"""rank_llm's histories: prompts of every form, windows that slide and such that do not, and the replay of real ones."""

import gzip
import json
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import data_folder

from fastrank.__main__ import main
from fastrank.data import (
    DataError,
    RankingList,
    load_data,
    read_documents,
    read_queries,
    read_ranked_run,
    read_rows,
    store,
)
from fastrank.data.histories import Window, read_window, replay
from fastrank.data.permutations import POLICIES, STATUSES, apply_window, parse_permutation, window_starts


def _prompt(query, texts, num_words=300):
    body = "".join(f"[{i}] {' '.join(text.split()[:num_words])}\n" for i, text in enumerate(texts, start=1))
    announced = f"I will provide you with {len(texts)} passages, each indicated by a numerical identifier []."
    return (
        f"{announced} Rank them by the search query: {query}.\n\n{body}Search Query: {query}.\nRank the ... [2] > [1]."
    )


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [
    {"role": "system", "content": "You are RankGPT"},
    {"role": "user", "content": "I will provide you with 2 passages, each indicated by number identifier []."},
    {"role": "assistant", "content": "Okay, please provide the passages."},
    {"role": "user", "content": "[1] first one"},
    {"role": "assistant", "content": "Received passage [1]."},
    {"role": "user", "content": "[2] second"},
    {"role": "assistant", "content": "Received passage [2]."},
    {"role": "user", "content": "Search Query: a (1) b?.\nRank the 2 passages above ... e.g., [1] > [2]."},
]
EXAMPLE = [{"role": "user", "content": _prompt("x", "ab")}, {"role": "assistant", "content": "[1] > [2]"}]


@pytest.mark.parametrize(
    ("prompt", "response", "window"),
    [
        (_prompt("a (1) b?", ["first one", ""]), "[2] > [1]", Window("a (1) b?", ("first one", ""), "[2] > [1]")),
        (CHAT, "[2] > [1]", Window("a (1) b?", ("first one", "second"), "[2] > [1]")),
        (EXAMPLE + CHAT, "[2] > [1]", Window("a (1) b?", ("first one", "second"), "[2] > [1]")),
        (
            [{"role": "user", "content": "rank:\n[A] first one\n[B] A [B]\nSearch Query: q."}],
            "B] > [A]",
            Window("q", ("first one", "A [B]"), "[2] > [1]"),
        ),
        (
            "<|user|>\nGiven [querystart] q [queryend], rank.\n[1] a\n[2] b\nThe query: [querystart] q [queryend]",
            "<think>[1] first?</think>[rankstart] [2] > [1] [rankend]",
            Window("q", ("a", "b"), " [2] > [1] "),
        ),
        ("Query: q\n\n[1] a\n\n[2] b\n\n", "<answer>[1]</answer>", Window(None, ("a", "b"), "[1]")),
        ("[1] a\nBM25 score: 3.000\n[2] b\n[2] > [1]", "[1]", Window(None, ("a", "b"), "[1]")),
        (
            [{"text": f"Search Query: q Passage: [{i}] {t} Relevance Ranking: "} for i, t in ((1, "a b"), (2, ""))],
            "2 > 1",
            Window("q", ("a b", ""), "2 > 1"),
        ),
    ],
)
def test_prompts(prompt, response, window):
    assert read_window({"prompt": prompt, "response": response, "input_token_count": 7}) == window


@pytest.mark.parametrize(
    ("prompt", "response", "sentence"),
    [
        ("Query: q Document: a Relevant:", "true", "none of the forms"),
        ([{"text": "Query: q Document: a"}], "true", "none of the forms"),
        ([], "", "none of the forms"),
        (_prompt("q", "ab").replace("[2] b\n", ""), "[1]", "announces 2 passages and shows 1"),
        (3, "[1]", "must be a string or an array of messages, not int"),
        ([3], "[1]", "."),
        (_prompt("q", "ab"), None, "'response' must be a string, not NoneType"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, prompt, response, sentence):
    call = {"prompt": prompt, "response": response}
    with pytest.raises((TypeError, ValueError, KeyError), match=sentence):
        read_window(call)
    rows = [{"query": "q", "invocations_history": [{"prompt": _prompt("q", "ab"), "response": "[1]"}]}]
    path = _write(tmp_path / "h.jsonl", [*rows, {"query": "r", "invocations_history": [call]}])
    with pytest.raises(DataError, match=r"h\.jsonl:2: expected a row with query") as caught:
        list(read_rows(path))
    assert str(caught.value).count("\n") == 0


def _calls(order, windows, rng, texts=None, cut=None):
    """Windows with their answers, well formed or not, and the order that comes of them."""
    made = []
    for start, end in windows:
        size = len(order[start:end])
        numbers = rng.sample(range(1, size + 1), size)
        numbers = rng.choice([numbers, numbers, numbers[: size // 2], numbers + numbers[:1], []])
        response = " > ".join(f"[{number}]" for number in numbers)
        shown = [(texts or {}).get(one, one) for one in order[start:end]]
        if cut is not None:
            shown = [" ".join(text.split()[: rng.randint(*cut)]) for text in shown]
        made.append(Window("q", tuple(shown), response))
        order = apply_window(order, start, parse_permutation(response, size))
    return made, order


@settings(deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 2), st.booleans(), st.integers(0, 9999)
)
def test_sliding_windows_tell_their_list(num_documents, width, stride, num_passes, cut, seed):
    """Any width and stride, one pass or two, texts cut differently in each prompt: the list before and after."""
    rng = random.Random(seed)
    stride = min(stride, width)
    names = tuple(f"document {rng.random()} {'long ' * 9}{i}" for i in range(num_documents))
    windows, end = [], num_documents
    for start in window_starts(num_documents, width, stride):
        windows.append((start, max(end, start + 1)))
        end -= stride
    windows = [(start, min(end, start + width)) for start, end in windows] * num_passes
    calls, order = _calls(names, windows, rng, cut=(3, 12) if cut else None)
    read = replay(calls)
    assert [read.texts[i] for i in sorted(range(num_documents), key=read.ranks.__getitem__)] == [
        next(text for text in read.texts if name.startswith(text)) for name in order
    ]
    assert all(name.startswith(text) for name, text in zip(names, read.texts, strict=True))
    assert read.labels_among(names) == read.labels()
    shuffled = rng.sample(names, num_documents)
    assert dict(zip(shuffled, read.labels_among(shuffled), strict=True)) == dict(zip(names, read.labels(), strict=True))
    assert read.counts.total() == len(calls) and set(read.counts) <= set(STATUSES)


def test_policies():
    calls = [Window(None, ("c", "d"), "[2]"), Window(None, ("a", "b", "d"), "[3] > [1] > [2]")]
    read = replay(calls)
    assert (read.texts, read.labels()) == (("a", "b", "c", "d"), (3, 2, 1, 4))
    assert read.counts == {"missing_documents": 1, "ok": 1}
    assert read.labels_among(["x", "d", "c", "b", "a"]) == (1, 5, 2, 3, 4), "what no prompt shows comes last"
    tiers = replay(calls, "tier")
    assert tiers.labels() == (3, 2, 0, 4) and tiers.labels_among(["x", "d", "c", "b", "a"]) == (0, 5, 0, 3, 4)
    assert replay(calls, "drop").ranks is None and replay(calls[1:], "drop").labels() == (2, 1, 3)


def test_the_last_answer_about_a_document_counts():
    calls = [Window(None, ("b", "c"), "[2] > [1]"), Window(None, ("a", "c", "b"), "[2]")]
    read = replay(calls, "tier")
    assert (read.texts, read.named, read.labels()) == (("a", "b", "c"), (False, False, True), (0, 0, 3))


def test_of_two_cuts_the_longer_is_kept():
    calls = [Window(None, ("b", "c long text"), "[2] > [1]"), Window(None, ("a", "c", "b cut later"), "[1]")]
    assert replay(calls).texts == ("a", "b cut later", "c long text")


def test_windows_of_equal_texts_slide_from_the_tail():
    """Where a window fits in several places it is the last: sliding begins there."""
    calls = [Window(None, ("a", "a", "a", "a", "b"), ""), Window(None, ("a", "a"), "[2] > [1]")]
    assert replay(calls).ranks == (0, 1, 3, 2, 4)


def test_passages_that_are_cut_to_one_text():
    read = replay([Window(None, ("the cat", "the cat", "dog"), "[2] > [3] > [1]")])
    before = ["the cat sat", "the cat ran", "dog"]
    assert read.labels_among(before) == (1, 3, 2)
    after = [before[1], before[2], before[0]]
    assert read.labels_among(after) == (3, 2, 1)


def test_turns_of_the_assistant_are_no_passages():
    chat = [*CHAT[:5], {"role": "assistant", "content": "[2] not this"}, *CHAT[5:]]
    assert read_window({"prompt": chat, "response": "[1]"}).texts == ("first one", "second")
    parts = [{"role": "user", "content": [{"type": "text", "text": "[1] a\n[2] b"}, {"type": "image_url"}]}]
    assert read_window({"prompt": parts, "response": "[1]"}).texts == ("a", "b")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"query": "q", "invocations_history": ["x"]}, "call 1: expected an object with prompt and response, not str"),
        ({"query": "q", "invocations_history": [{"prompt": "x"}]}, "call 1: the key 'response' is missing"),
        ({"query": None, "invocations_history": []}, "'query' must be a string or an object, not NoneType"),
        (
            {"query": "q", "invocations_history": [{"prompt": [{"text": None}], "response": ""}]},
            "call 1: a prompt's text must be a string, not NoneType",
        ),
        (
            {"query": "q", "invocations_history": [{"prompt": [{"role": "user", "content": 3}], "response": ""}]},
            "call 1: a prompt's text must be a string, not int",
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_said(tmp_path, row, sentence):
    with pytest.raises(DataError, match=rf"h\.jsonl:1: .*{sentence}"):
        list(read_rows(_write(tmp_path / "h.jsonl", [row]), "history"))


def test_rows_without_an_answer(tmp_path):
    """Candidates without any call keep their order, and say so; every row of the file is a history nevertheless."""
    candidates = [{"docid": text, "doc": {"text": text}} for text in "AB"]
    calls = [{"prompt": _prompt("q", "AB"), "response": "[2] > [1]"}]
    rows = [{"query": f"q{i}", "candidates": candidates, "invocations_history": calls * i} for i in (0, 1)]
    for order in (rows, rows[::-1]):
        counts = Counter()
        read = {one.query: one.labels for one in read_rows(_write(tmp_path / "h.jsonl", order), counts=counts)}
        assert read == {"q0": (2, 1), "q1": (1, 2)}
        assert counts == {"ok": 1, "missing, so that candidates keep their order": 1}
    kept = [len(one) for one in read_rows(tmp_path / "h.jsonl", policy="drop")]
    assert kept == [2, 0]
    plain = _write(tmp_path / "rows.jsonl", [{"query": "q1", "candidates": candidates}])
    (ranked,) = read_rows(plain, permutations=tmp_path / "h.jsonl")
    assert ranked.labels == (1, 2), "a history with candidates of its own orders other rows, too"
    _write(plain, [{"query": "q0", "candidates": candidates}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*h\.jsonl has no answer for the query 'q0'"):
        list(read_rows(plain, permutations=tmp_path / "h.jsonl"))


def test_answers_are_told_by_id_before_text(tmp_path):
    def history(*queries):
        rows = [
            {"query": query, "invocations_history": [{"prompt": _prompt("q", "AB"), "response": response}]}
            for query, response in queries
        ]
        return _write(tmp_path / "h.jsonl", rows)

    two = history(({"qid": "1", "text": "q"}, "[2] > [1]"), ({"qid": "2", "text": "q"}, "[1] > [2]"))
    rows = [{"query_id": name, "query": "q", "docs": ["A", "B"], "labels": [0, 0]} for name in ("1", "2", "1")]
    counts = Counter()
    read = list(read_rows(_write(tmp_path / "a.jsonl", rows), permutations=two, counts=counts))
    assert [one.labels for one in read] == [(1, 2), (2, 1), (1, 2)]
    assert counts == {"ok": 2}, "an answer counts once, however many rows it orders"
    _write(tmp_path / "a.jsonl", [{"query": "q", "docs": ["A", "B"], "labels": [0, 0]}])
    with pytest.raises(DataError, match=r"h\.jsonl has several answers for the query 'q'"):
        list(read_rows(tmp_path / "a.jsonl", permutations=two))
    with pytest.raises(DataError, match=r"h\.jsonl:2: the query 'q' comes twice"):
        list(read_rows(tmp_path / "a.jsonl", permutations=history(("q", "[1]"), ("q", "[2]"))))


def test_stored_lists_are_those_of_these_answers_and_this_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "MAX_BYTES_IN_MEMORY", 0)
    calls = [{"prompt": _prompt("q", "AB"), "response": "[2]"}]
    history = _write(tmp_path / "h.jsonl", [{"query": "q", "invocations_history": calls}])
    rows = _write(tmp_path / "a.jsonl", [{"query": "q", "docs": ["A", "B"], "labels": [0, 0]}])
    source = {"lists": rows, "permutations": history}

    def labels(**more):
        return [one.labels for one in load_data(source | more, seed=0).candidates]

    assert labels() == [(1, 2)] and labels(permutation_policy="tier") == [(0, 2)]
    calls[0]["response"] = "[1] > [2]"
    _write(history, [{"query": "q", "invocations_history": calls}])
    assert labels() == [(2, 1)]


@pytest.mark.parametrize(
    "shown",
    [
        [("a", "b"), ("c", "a")],  # the best comes last in what follows, but for the order
        [("a", "b", "c"), ("c", "d", "a")],
        [("a", "b", "c"), ("b", "c")],
        [("a", "b"), ("b", "c")],
        [("c", "d", "e"), ("d", "e", "c")],
    ],
)
def test_windows_that_do_not_slide(tmp_path, shown):
    calls = [{"prompt": _prompt("q", texts), "response": "[2] > [1]"} for texts in shown]
    path = _write(tmp_path / "h.jsonl", [{"query": "q", "invocations_history": calls}])
    with pytest.raises(DataError, match=r"h\.jsonl:1: call 2 of the query shows documents that are no window"):
        list(read_rows(path))


def test_texts_that_are_alike():
    """Documents that begin as others do, twice the same, mended and titled."""
    texts = (
        "the cat",
        "the cat sat",
        "the cat",
        "«Ã©tÃ©» specificity of the meaning of nouns and verbs in a context of other words",
        "",
        "東京都の天気 2020",
    )
    read = replay(
        [
            Window(
                None,
                (
                    *texts[:3],
                    '"été" specificity of the meaning of nouns and verbs in a context of other',
                    "",
                    "東京都の天気",
                ),
                "[2] > [4] > [1] > [6] > [5] > [3]",
            )
        ]
    )
    whole = [
        *texts[:3],
        "Title: nouns Content: x",
        "«Ã©tÃ©» speciï¬\x81city of the meaning of nouns and verbs in a context of other words",
        "",
        "大阪の天気 2020",
        "東京都の天気 2020",
    ]
    assert read.labels_among(whole) == (6, 8, 3, 2, 7, 4, 1, 5)
    titled = replay([Window(None, ("Title: A b Content: c &amp; d", "e"), "[2] > [1]")])
    assert titled.labels_among(["e", "A b c & d e"]) == (2, 1)
    with pytest.raises(ValueError, match="no document begins as the passage 'e' of its prompts"):
        titled.labels_among(["A b c & d"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.lists(st.text("ab é", max_size=3), max_size=4), st.text("[]> 123é", max_size=12))))
def test_garbage_is_replayed_or_refused(calls):
    windows = [Window(None, tuple(texts), response) for texts, response in calls]
    for policy in POLICIES:
        try:
            read = replay(windows, policy)
        except ValueError as error:
            assert "no window of the order" in str(error)
            continue
        if read.ranks is None:
            assert policy == "drop" and set(read.counts) - {"ok"}
            continue
        assert sorted(read.ranks) == list(range(len(read.texts)))
        assert len(read.labels_among(read.texts[::-1])) == len(read.texts)


def test_files_as_rank_llm_writes_them(tmp_path):
    """JSON arrays, appended ones too, JSON lines, and the first form's objects with commas between."""
    rows = [
        {
            "query": {"text": f"q{i}", "qid": i},
            "invocations_history": [{"prompt": _prompt(f"q{i}", "ab"), "response": r}],
        }
        for i, r in enumerate(("[2] > [1]", "[1]"))
    ]
    lists = [RankingList("q0", tuple("ab"), (1, 2), "0"), RankingList("q1", tuple("ab"), (2, 1), "1")]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "appended.json").write_text("".join(json.dumps([row], indent=2) for row in rows))
    _write(tmp_path / "lines.jsonl", rows)
    for name in ("array.json", "appended.json", "lines.jsonl"):
        assert list(read_rows(tmp_path / name)) == lists
    calls = [call for row in rows for call in row["invocations_history"]]
    (tmp_path / "first.json").write_text("".join(json.dumps(call, indent=4) + ", " for call in calls))
    _write(tmp_path / "lines.json", calls)
    for name in ("first.json", "lines.json"):
        assert [(one.query, one.labels) for one in read_rows(tmp_path / name)] == [("q0", (1, 2)), ("q1", (2, 1))]
    (tmp_path / "cut.json").write_text((tmp_path / "first.json").read_text()[:-20])
    with pytest.raises(DataError, match=r"cut\.json:1: not a valid JSON array or objects"):
        list(read_rows(tmp_path / "cut.json"))
    _write(tmp_path / "again.json", calls + calls)
    with pytest.raises(DataError, match=r"again\.json:3: the query 'q0' comes again"):
        list(read_rows(tmp_path / "again.json"))
    _write(tmp_path / "unnamed.json", [{"prompt": "[1] a", "response": "[1]"}])
    with pytest.raises(DataError, match=r"unnamed\.json:1: .*does not say 'Search Query"):
        list(read_rows(tmp_path / "unnamed.json"))


def test_a_history_orders_rows(tmp_path, capsys):
    """By id or text, rows of any shape; counted in the report and in what convert says."""
    calls = {q: [{"prompt": _prompt(q, "AB"), "response": r}] for q, r in (("q0", "[2] > [1]"), ("q1", "[2]"))}
    history = tmp_path / "history.json"
    named = [{"query": {"text": "cut", "qid": q}, "invocations_history": calls[q]} for q in calls]
    history.write_text(json.dumps(named))
    candidates = [{"docid": text.lower(), "doc": {"text": text}} for text in "ABC"]
    rows = [{"query": {"text": f"text of {q}", "qid": q}, "candidates": candidates} for q in calls]
    source = {"lists": _write(tmp_path / "rows.jsonl", rows), "permutations": history}
    for _ in range(2):  # the second time from the store
        loaded = load_data(source, seed=0)
        assert [one.labels for one in loaded.candidates] == [(2, 3, 1), (2, 3, 1)]
        assert loaded.candidates[0].document_ids == ("a", "b", "c")
        assert loaded.report.notes == {
            "answers ok": 1,
            "answers missing_documents": 1,
            "lists shorter than sample_size": 0,
        }
    assert [one.labels for one in load_data(source | {"permutation_policy": "tier"}, seed=0).candidates] == [
        (2, 3, 0),
        (0, 3, 0),
    ]
    assert len(load_data(source | {"permutation_policy": "drop"}, seed=0)) == 1
    assert len(load_data({"lists": history, "permutation_policy": "drop"}, seed=0)) == 1
    arguments = [
        "convert",
        "--input",
        str(source["lists"]),
        "--permutations",
        str(history),
        "--permutation_policy",
        "drop",
    ]
    assert main([*arguments, "--to", "run", "--output", str(tmp_path / "out.run")]) == 0
    assert (tmp_path / "out.run").read_text().split()[:6] == ["q0", "Q0", "b", "1", "3.0", "fastrank"]
    said = (
        "1 lists with 3 documents; left out: 1 lists without documents; note: 1 answers ok, 1 answers missing_documents"
    )
    assert said in capsys.readouterr().err
    pairs = _write(
        tmp_path / "pairs.jsonl",
        [{"query_id": 9, "doc_id": text, "query": "q1?", "text": text} for text in "BA"],
    )
    first = _write(tmp_path / "first.json", [call for q in calls for call in calls[q]])
    counts = Counter()
    (ranked,) = read_rows(pairs, permutations=first, counts=counts)
    assert ranked == RankingList("q1?", tuple("BA"), (2, 1), "9", tuple("BA"))
    assert counts == {"missing_documents": 1, "of queries that no row has": 1}
    (tmp_path / "twice.json").write_text(json.dumps(named + named))
    for lists, answers, sentence in (
        (source["lists"], tmp_path / "rows.jsonl", r"rows\.jsonl: expected rank_llm's history"),
        (source["lists"], tmp_path / "twice.json", r"twice\.json:3: the query 'q0' comes twice"),
        (history, history, "do not go with rows that hold answers themselves"),
        (
            _write(tmp_path / "r.jsonl", [{"query": "r", "docs": ["A"], "labels": [1]}]),
            first,
            r"r\.jsonl:1: .*no answer",
        ),
        (
            _write(tmp_path / "a.jsonl", [{"query": "q0", "docs": ["A"], "labels": [1]}]),
            first,
            r"a\.jsonl:1: no document",
        ),
    ):
        with pytest.raises(DataError, match=sentence):
            list(read_rows(lists, permutations=answers))


def _requests(folder, retriever, path, depth=100):
    """The first stage's candidates as rank_llm's requests."""
    first = read_ranked_run(next((folder / "first_stage").glob(f"{retriever}.dl19.*run.gz")))
    texts = read_documents(folder / "passages.msmarco-v1.dl19-dl20.jsonl.gz")
    queries = read_queries(folder / "queries.dl19.tsv")
    rows = []
    for query_id, ranked in first.items():
        candidates = [{"docid": one, "doc": {"contents": texts[one]}} for one in _by_rank(ranked)[:depth]]
        rows.append({"query": {"text": queries[query_id], "qid": query_id}, "candidates": candidates})
    return _write(path, rows), texts


def _by_rank(rows):
    return tuple(name for _, name in sorted(zip(rows.ranks, rows.document_ids, strict=True)))


def _check_run(lists, run):
    assert len(lists) == 43
    for one in lists:
        order = sorted(range(len(one)), key=lambda place: -one.labels[place])
        assert tuple(one.document_ids[place] for place in order) == _by_rank(run[one.query_id])


def test_real_prompts_give_the_published_run(tmp_path):
    folder = data_folder() / "trec-dl"
    raw = folder / "raw" / "prompts_and_responses_BM25_dl19_rankvicuna_top20.json.gz"
    run = read_ranked_run(folder / "llm_runs" / "BM25.dl19.rankvicuna-7b-aug.d20.20230913T163944.run.gz")
    requests, texts = _requests(folder, "BM25", tmp_path / "requests.jsonl")
    counts = Counter()
    _check_run(list(read_rows(requests, permutations=raw, counts=counts)), run)
    assert counts == {"ok": 43}
    alone = load_data(raw, seed=0)
    assert [len(one) for one in alone.candidates] == [20] * 43 and alone.report.notes["answers ok"] == 43
    by_query = {query: query_id for query_id, query in read_queries(folder / "queries.dl19.tsv").items()}
    for one in alone.candidates:
        best = one.documents[one.labels.index(20)]
        assert best.split()[:3] == texts[_by_rank(run[by_query[one.query]])[0]].split()[:3]


@pytest.mark.parametrize(
    "name",
    [
        "BM25.dl19.vicuna-7b-v1.5-zeroshot.d100.20230819T145259",
        "SPLADE_P_P_ENSEMBLE_DISTIL.dl19.rankvicuna-7b-aug.d100.20230913T115832",
    ],
)
def test_real_responses_in_sliding_windows_give_the_published_run(tmp_path, name):
    """Prompts made of the real texts around the real responses, 9 windows a query, cut to 60 words."""
    folder = data_folder() / "trec-dl"
    run = read_ranked_run(folder / "llm_runs" / f"{name}.run.gz")
    requests, texts = _requests(folder, name.split(".")[0], tmp_path / "requests.jsonl")
    calls = defaultdict(list)
    with gzip.open(folder / "windows" / "listwise_windows.dl19.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            call = json.loads(line)
            if call["run"] == name:
                prompt = _prompt("q", [texts[one] for one in call["docids"]], num_words=60)
                calls[call["qid"]].append({"prompt": prompt, "response": call["response"]})
    rows = [{"query": {"text": "q", "qid": qid}, "invocations_history": calls[qid]} for qid in calls]
    history = _write(tmp_path / "history.jsonl", rows)
    counts = Counter()
    _check_run(list(read_rows(requests, permutations=history, counts=counts)), run)
    assert counts.total() == sum(map(len, calls.values()))
    assert [len(one) for one in read_rows(history)] == [100] * 43
