"""Whether a model ranks in a lower precision as it does in a higher one: Kendall's tau over lists of made-up pairs.

Pairs of random tokens stand in for texts, since a model that is loaded brings none. Documents repeat from none to all
of their query's tokens, in order, among others: that moves what a trained model calls relevant, so that the scores of a
list spread, and their order is more than noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrank.packing import Pairs
from fastrank.tokens import PairTokenizer

NUM_QUERIES, NUM_DOCUMENTS = 8, 16
QUERY_TOKENS = 4, 12  # from, to
DOCUMENT_TOKENS = 16, 160


def made_up_lists(tokenizer: PairTokenizer) -> list[Pairs]:
    """NUM_QUERIES lists of NUM_DOCUMENTS pairs each, the same every time for a tokenizer."""
    rng = np.random.default_rng(0)
    words = tokenizer.word_ids
    lists = []
    for _ in range(NUM_QUERIES):
        query = rng.choice(words, rng.integers(*QUERY_TOKENS, endpoint=True))
        queries, documents = [], []
        for share in np.linspace(0, 1, NUM_DOCUMENTS):
            # As long as the tokenizer leaves them: it cuts nothing, and counts nothing as cut.
            size = rng.integers(*DOCUMENT_TOKENS, endpoint=True)
            num_query, num_document = map(int, tokenizer.kept_tokens(len(query), size))
            document = rng.choice(words, num_document)
            repeated = min(round(share * num_query), num_document)
            start = rng.integers(num_document - repeated + 1)
            document[start : start + repeated] = query[:repeated]
            queries.append(query[:num_query])
            documents.append(document)
        lists.append(tokenizer.pairs(queries, documents))
    return lists


def kendall_tau(scores: Sequence[float], others: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings of the same documents: 1 for the same order, -1 for the opposite one; 0 where
    either has nothing but ties, or a NaN."""
    signs = [np.sign(np.subtract.outer(one, one)) for one in (np.asarray(scores), np.asarray(others))]
    pairs = np.triu_indices(len(signs[0]), 1)
    one, other = (sign[pairs] for sign in signs)
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size > 0 else 0.0
