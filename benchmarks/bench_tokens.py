"""From strings to the token ids of pairs on the CPU: fastrank's C++ WordPiece against Hugging Face's tokenizers, with
the same number of threads. Ids are first compared with transformers'."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from timing import CLOCK, Comparison, Contender
from transformers import AutoTokenizer
from workloads import checkpoint, ranking_lists

from fastrank.tokens import PairTokenizer, find_unique

MAX_LENGTH = 512
NAMES = ["fastrank cpu", "fastrank reference", "tokenizers", "transformers"]


def joined(tokenizer: PairTokenizer, queries, documents) -> list[np.ndarray]:
    """As the Reranker does it: every query and every document once, then the pairs."""
    query_of, unique = find_unique(queries)
    of_queries = tokenizer.encode_together(unique)
    enough = tokenizer.enough_tokens(int(of_queries.lengths.max()))
    of_documents = tokenizer.encode_together(documents, enough=enough)
    return [ids for ids, _ in tokenizer.join(of_queries, query_of, of_documents, np.arange(len(documents)))]


@functools.cache
def comparison(full: bool) -> Comparison:
    folder = checkpoint("MiniLM-L6")
    source, lists = ranking_lists(43 if full else 20, 100)
    queries = [one.query for one in lists for _ in one.documents]
    documents = [text for one in lists for text in one.documents]
    theirs = AutoTokenizer.from_pretrained(folder)
    pairwise = functools.partial(theirs, queries, documents, truncation="longest_first", max_length=MAX_LENGTH)
    expected = pairwise()["input_ids"]

    rust = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    rust.no_padding()
    rust.enable_truncation(MAX_LENGTH, strategy="longest_first")
    pairs = list(zip(queries, documents, strict=True))

    def check(found) -> str | None:
        wrong = sum(list(ids) != right for ids, right in zip(found, expected, strict=True))
        return f"{wrong} pairs have other ids" if wrong else None

    def contender(name, run, **more) -> Contender:
        return Contender(name, run, len(pairs), check=check, **more)

    contenders = [
        contender(
            f"fastrank {backend}",
            functools.partial(
                joined, PairTokenizer.load(folder, max_length=MAX_LENGTH, backend=backend), queries, documents
            ),
            ours=backend == "cpu",
        )
        for backend in ("cpu", "reference")
    ]
    contenders.append(contender("tokenizers", lambda: [one.ids for one in rust.encode_batch_fast(pairs)]))
    contenders.append(contender("transformers", lambda: pairwise()["input_ids"]))
    tokens = sum(map(len, expected))
    notes = [
        f"{len(pairs)} pairs of {source}, {tokens / len(pairs):.0f} tokens each, {torch.get_num_threads()} threads",
        "fastrank tokenizes a query once for its list; its reference is tokenizers, used the same way",
    ]
    return Comparison("From strings to token ids, WordPiece", "pairs", contenders, notes).measure(7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=CLOCK)
def bench_tokens(name, benchmark, full):
    compared = comparison(full)
    benchmark.group = compared.title
    compared.hand_over(name, benchmark)
