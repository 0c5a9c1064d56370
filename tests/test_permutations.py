"""LLM answers: every malformation by hand, random garbage, and the replay of real responses."""

import gzip
import json
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import data_folder

from fastrank.data import read_ranked_run
from fastrank.data.permutations import POLICIES, STATUSES, apply_window, parse_permutation, window_starts


@pytest.mark.parametrize(
    ("response", "order", "status", "num_ranked"),
    [
        ("[2] > [1] > [3]", (1, 0, 2), "ok", 3),
        ("2] > [1] > [3]", (1, 0, 2), "ok", 3),  # the prompt had opened the bracket
        ("[2]>[1]>[3]\n", (1, 0, 2), "ok", 3),
        ("3, 1, 2", (2, 0, 1), "ok", 3),
        ("[3]", (2, 0, 1), "missing_documents", 1),
        ("[3] > [3]", (2, 0, 1), "missing_documents", 1),
        ("[3] > [1] > [3]", (2, 0, 1), "repetition", 2),
        ("[3] > [1] > [2] > [3]", (2, 0, 1), "repetition", 3),
        ("The order is [3] > [1] > [2].", (2, 0, 1), "wrong_format", 3),
        ("[3] > [4] > [1] > [2]", (2, 0, 1), "wrong_format", 3),
        ("[0] > [1]", (0, 1, 2), "wrong_format", 1),
        ("", (0, 1, 2), "wrong_format", 0),
        ("I cannot rank these.", (0, 1, 2), "wrong_format", 0),
        ("[" + "9" * 5000 + "] > [2]", (1, 0, 2), "wrong_format", 1),
        ("<think>[1] > [2] > [3]? No.</think>[3] > [2] > [1]", (2, 1, 0), "ok", 3),
        ("[３] > [①] > [²]", (2, 0, 1), "ok", 3),
        ("[٣] > [1] > [2]", (2, 0, 1), "ok", 3),
        ("[三] > [1]", (0, 1, 2), "wrong_format", 1),
        ("½ [2]", (1, 0, 2), "wrong_format", 1),
    ],
)
def test_responses(response, order, status, num_ranked):
    repaired = parse_permutation(response, 3)
    assert (repaired.order, repaired.status, repaired.num_ranked) == (order, status, num_ranked)
    dropped = parse_permutation(response, 3, policy="drop")
    assert dropped.order == (order if status == "ok" else None) and dropped.status == status
    tiers = parse_permutation(response, 3, policy="tier")
    assert tiers.order == order
    assert [label for label in tiers.labels() if label] == [
        tiers.labels()[position] for position in sorted(order[:num_ranked])
    ]


def test_labels():
    assert parse_permutation("[3] > [1]", 4).labels() == (3, 2, 4, 1)
    assert parse_permutation("[3] > [1]", 4, policy="tier").labels() == (3, 0, 4, 0)
    assert parse_permutation("[3] > [1]", 4, policy="drop").labels() is None


@given(
    st.one_of(st.text(), st.text(alphabet="[]> 0123456789,²①３٣x"), st.lists(st.integers(-3, 40)).map(str)),
    st.integers(0, 25),
    st.sampled_from(POLICIES),
)
def test_garbage_is_always_read(response, num_documents, policy):
    read = parse_permutation(response, num_documents, policy=policy)
    assert read.status in STATUSES and 0 <= read.num_ranked <= num_documents
    if read.order is None:
        assert policy == "drop" and read.status != "ok"
        return
    assert sorted(read.order) == list(range(num_documents))
    assert list(read.order[read.num_ranked :]) == sorted(read.order[read.num_ranked :])
    assert apply_window(range(num_documents + 5), 2, read)[2 : 2 + num_documents] == tuple(2 + i for i in read.order)


def test_windows_reach_the_head():
    assert window_starts(100) == (80, 70, 60, 50, 40, 30, 20, 10, 0)
    assert window_starts(95) == (75, 65, 55, 45, 35, 25, 15, 5, 0)
    assert window_starts(20) == window_starts(7) == window_starts(1) == (0,)
    assert window_starts(0) == ()
    assert window_starts(25, window=10, stride=10) == (15, 5, 0)
    for num_documents in range(1, 60):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                starts = window_starts(num_documents, window, stride)
                seen = {place for start in starts for place in range(start, min(start + window, num_documents))}
                assert starts[-1] == 0 and list(starts) == sorted(set(starts), reverse=True)
                assert seen == set(range(num_documents)) and starts[0] == max(0, num_documents - window)


def test_what_does_not_fit():
    assert apply_window("abcde", 1, (2, 0, 1)) == ("a", "d", "b", "c", "e")
    assert apply_window("abc", 0, parse_permutation("no", 3, policy="drop")) == ("a", "b", "c")
    for start, positions in ((-1, (0,)), (3, (0, 1, 2)), (0, (0, 0)), (0, (1, 2))):
        with pytest.raises(ValueError, match="do not permute a part of a list of 5"):
            apply_window("abcde", start, positions)
    with pytest.raises(ValueError, match="choose one of repair, drop, tier"):
        parse_permutation("[1]", 1, policy="keep")
    with pytest.raises(TypeError, match="must be a str, not NoneType"):
        parse_permutation(None, 1)
    for window, stride in ((0, 1), (5, 0), (5, 6)):
        with pytest.raises(ValueError, match="the stride at most the window"):
            window_starts(10, window, stride)


def test_replaying_real_responses_gives_the_published_rankings():
    """8,643 responses of five models, clean and malformed: every window shows the documents that the replay has there,
    and every list ends as the run that was published."""
    folder = data_folder() / "trec-dl"
    calls = defaultdict(list)
    with gzip.open(folder / "windows" / "listwise_windows.dl19.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            call = json.loads(line)
            calls[call["run"], call["qid"]].append(call)
    runs = {}
    statuses, num_calls = Counter(), 0
    for (run, qid), windows in calls.items():
        if run not in runs:
            retriever = run.split(".")[0]
            first = next((folder / "first_stage").glob(f"{retriever}.dl19.*run.gz"))
            runs[run] = read_ranked_run(first), read_ranked_run(folder / "llm_runs" / f"{run}.run.gz")
        first, final = runs[run]
        depth = len(final[qid].document_ids)
        order = _by_rank(first[qid])[:depth]
        for call in windows:
            start, shown = call["window_start"], tuple(call["docids"])
            assert order[start : start + len(shown)] == shown
            answer = parse_permutation(call["response"], len(shown))
            order = apply_window(order, start, answer)
            statuses[answer.status] += 1
            num_calls += 1
        assert order == _by_rank(final[qid]), (run, qid)
    assert num_calls == 8643 and len(runs) > 20
    assert set(statuses) == set(STATUSES)


def _by_rank(rows) -> tuple[str, ...]:
    return tuple(name for _, name in sorted(zip(rows.ranks, rows.document_ids, strict=True)))
