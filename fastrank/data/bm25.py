"""BM25 candidates from bm25s: queries and documents in, a run out.

Lucene's BM25 over lower-cased words of two letters and more, English stop words removed, no stemming, float32 scores.
Only documents that share a word with the query are returned. Equal scores are ordered as trec_eval orders them, so that
rank, depth and evaluation agree and every run of the same input gives the same candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np


def bm25_run(
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    depth: int,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    exclude: Mapping[str, Collection[str]] | None = None,
) -> dict[str, dict[str, float]]:
    """Rank `documents` for every query by BM25: {query id: {document id: score}}, best first, at most `depth` each.

    queries, documents: {id: text}. depth: candidates per query, from 1.
    k1, b: term-frequency saturation and length normalisation.
    exclude: {query id: document ids that are no candidates for it}, such as the document that the query was made from.
    A query without a known word gets an empty mapping. Equal scores: the later document id first.
    Raises ValueError for a depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; BM25 needs room for at least 1 candidate per query")
    import bm25s

    def words(texts: Collection[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    document_words = words(documents.values())
    vocabulary = {word for text in document_words for word in text}
    if not vocabulary:
        return {query_id: {} for query_id in queries}
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(document_words, show_progress=False)
    # Positions in order of falling id: a stable sort by score then breaks ties as trec_eval does.
    ids = np.array(list(documents), dtype=object)
    by_falling_id = np.argsort(ids)[::-1]
    position = {document_id: i for i, document_id in enumerate(ids[by_falling_id].tolist())}
    run: dict[str, dict[str, float]] = {}
    for query_id, query_words in zip(queries, words(queries.values()), strict=True):
        known = [word for word in query_words if word in vocabulary]
        if not known:
            run[query_id] = {}
            continue
        scores = index.get_scores(known)[by_falling_id]
        for document_id in (exclude or {}).get(query_id, ()):
            if document_id in position:
                scores[position[document_id]] = 0
        best = _top(scores, depth)
        run[query_id] = dict(zip(ids[by_falling_id[best]].tolist(), scores[best].tolist(), strict=True))
    return run


def _top(scores: np.ndarray, depth: int) -> np.ndarray:
    """Positions of the `depth` highest positive scores, best first, equal scores by position."""
    least = 0.0
    if depth < len(scores):
        least = np.partition(scores, len(scores) - depth)[len(scores) - depth]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:depth]
