"""BM25 candidates equal the formula written out, in trec_eval's order, the same in every process."""

import math
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from real_data import data_folder

from fastrank.data import read_documents, read_qrels, read_queries
from fastrank.data.bm25 import bm25_run
from fastrank.data.runs import by_score
from fastrank.evaluate import evaluate


def _bm25_by_hand(query, documents, k1, b):
    from bm25s.stopwords import STOPWORDS_EN

    def words(text):
        return [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in STOPWORDS_EN]

    counts = {name: Counter(words(text)) for name, text in documents.items()}
    average = sum(sum(count.values()) for count in counts.values()) / len(documents)
    scores = {}
    for name, count in counts.items():
        length = sum(count.values())
        for word in words(query):
            containing = sum(word in other for other in counts.values())
            if containing:
                idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                weight = count[word] / (count[word] + k1 * (1 - b + b * length / average))
                scores[name] = scores.get(name, 0.0) + idf * weight
    return {name: score for name, score in scores.items() if score > 0}


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4)])
def test_scores_equal_the_formula(k1, b):
    rng = random.Random(3)
    vocabulary = ["fox", "dog", "naïve", "東京都", "the", "a", "x", "Über", "tree", "cat"]
    documents = {str(i): " ".join(rng.choices(vocabulary, k=rng.randint(1, 12))) for i in range(60)}
    queries = {str(i): " ".join(rng.choices(vocabulary, k=rng.randint(1, 5))) for i in range(20)}
    run = bm25_run(queries, documents, 1000, k1=k1, b=b)
    for query_id, query in queries.items():
        expected = _bm25_by_hand(query, documents, k1, b)
        assert run[query_id].keys() == expected.keys()
        assert all(abs(run[query_id][name] - expected[name]) < 1e-5 for name in expected)


def test_ties_go_to_the_later_id_at_every_depth():
    documents = {name: "same words here" for name in ["9", "a", "10", "b", "Z"]} | {"m": "words words words"}
    whole = bm25_run({"q": "words"}, documents, 100)["q"]
    assert list(whole) == ["m", "b", "a", "Z", "9", "10"] == [name for name, _ in by_score(whole)]
    many = {f"{i * 37 % 1009:04}": "words " + "other " * (i % 4) for i in range(1000)}
    ranked = bm25_run({"q": "words"}, many, 800)["q"]
    assert list(ranked) == [name for name, _ in by_score(ranked)] and len(set(ranked.values())) == 4
    for depth in range(1, 7):
        assert list(bm25_run({"q": "words"}, documents, depth)["q"]) == list(whole)[:depth]


def test_nothing_in_common_nothing_found():
    documents = {"1": "cat", "2": "", "3": "the"}
    queries = {"a": "", "b": "the", "c": "dog", "d": "cat", "e": "\ud800 cat \0"}
    run = bm25_run(queries, documents, 10)
    assert {name: list(found) for name, found in run.items()} == {"a": [], "b": [], "c": [], "d": ["1"], "e": ["1"]}
    assert bm25_run(queries, {"1": "", "2": "the"}, 10) == {name: {} for name in queries}
    assert bm25_run(queries, {}, 10) == {name: {} for name in queries}
    assert bm25_run({}, documents, 10) == {}
    with pytest.raises(ValueError, match="depth is 0"):
        bm25_run(queries, documents, 0)


def test_excluded_documents_are_no_candidates():
    documents = {"1": "cat", "2": "cat cat", "3": "cat dog"}
    run = bm25_run({"a": "cat", "b": "cat"}, documents, 2, exclude={"a": ["2", "none"]})
    whole = list(bm25_run({"b": "cat"}, documents, 3)["b"])
    assert list(run["a"]) == [name for name in whole if name != "2"]
    assert list(run["b"]) == whole[:2]


def test_the_run_is_the_same_in_every_process():
    code = (
        "import random; from fastrank.data.bm25 import bm25_run; r = random.Random(0)\n"
        "t = lambda: ' '.join(''.join(r.choices('abc', k=3)) for _ in range(6))\n"
        "print(bm25_run({str(i): t() for i in range(9)}, {str(i): t() for i in range(99)}, 20))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("name", "queries", "qrels", "expected"),
    [
        ("scifact", "queries.train.tsv", "qrels.train.trec", {"nDCG@10": 0.6684, "R@100": 0.9050}),
        ("cranfield", "queries.tsv", "qrels.trec", {"nDCG@10": 0.5007, "R@100": 0.7314}),
    ],
)
def test_real_collections(name, queries, qrels, expected):
    folder = data_folder() / name
    run = bm25_run(read_queries(folder / queries), read_documents(folder / "corpus.jsonl.gz"), 100)
    assert evaluate(run, read_qrels(folder / qrels), list(expected)) == pytest.approx(expected, abs=5e-5)
