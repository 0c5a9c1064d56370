"""Candidate lists that are read when they are asked for: from a run with its texts, from rows of a file, from Python.

A part is one source's lists. It is scanned once, when everything in it is checked and counted; afterwards it builds the
list with a number again whenever a step draws it, so that only names stay in memory.
"""

from __future__ import annotations

import json
import math
import operator
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fastrank.data.bm25 import bm25_run
from fastrank.data.catalogue import hub_state, is_named
from fastrank.data.files import DataError, expand_path
from fastrank.data.formats import ranking_list_from, to_json
from fastrank.data.ranking_list import RankingList
from fastrank.data.rows import read_rows
from fastrank.data.runs import RankedQuery, RankedRun
from fastrank.data.sources import BM25, DataSource
from fastrank.data.store import Store, open_store

_BM25_DEPTH = 100
_ANSWERS = "answers"  # the record behind a file's lists that counts what their answers were; lists have no name
Count = Callable[[str, int], None]  # what, how many


class Scanned(NamedTuple):
    """What is known of a list after the scan: documents, labels (None: it has none), judgments, and its name if any."""

    num_documents: int
    labels: Sequence[float] | None
    grades: Mapping[str, int] | None
    query_id: str | None


class Part(Protocol):
    def scan(self, update: Callable[[bytes], None]) -> Iterator[tuple[int, Scanned]]:
        """Every list that is to be used, with its number; `update` receives what the lists hang on."""

    def read(self, number: int) -> RankingList: ...


class Candidates(Sequence[RankingList]):
    """The lists of several parts, in order; equal to any sequence of equal lists."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._places = array("q")  # part and number by turns

    def append(self, part: Part, number: int) -> None:
        if not self._parts or self._parts[-1] is not part:
            self._parts.append(part)
        self._places.extend((len(self._parts) - 1, number))

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._parts[self._places[2 * index]].read(self._places[2 * index + 1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None


class GivenLists:
    """Lists that are in memory."""

    def __init__(self, lists: Sequence[RankingList]) -> None:
        self._lists = lists

    def scan(self, update: Callable[[bytes], None]) -> Iterator[tuple[int, Scanned]]:
        for number, ranking in enumerate(self._lists):
            update(repr(ranking).encode("utf-8", "surrogatepass"))
            yield number, Scanned(len(ranking), ranking.labels, None, ranking.query_id)

    def read(self, number: int) -> RankingList:
        return self._lists[number]


class RowLists:
    """Rows of a file, in any shape that read_rows knows."""

    def __init__(self, source: DataSource, left_out: Count, note: Count) -> None:
        self._source, self._left_out, self._note = source, left_out, note
        path, kind, answers = expand_path(source.lists), "rows", source.permutations
        if answers is not None:
            answers = expand_path(answers)
            status = os.stat(answers) if os.path.exists(answers) else None
            changed = status and (status.st_size, status.st_mtime_ns)
            kind = f"rows {os.path.realpath(answers)} {changed}"

        def records() -> Iterator[tuple[str, bytes]]:
            counts: Counter[str] = Counter()
            policy = source.permutation_policy
            for one in read_rows(path, permutations=answers, policy=policy, counts=counts):
                yield "", to_json(one).encode()
            if counts:
                yield _ANSWERS, json.dumps(counts).encode()

        kind = f"{kind} {source.permutation_policy}{hub_state(path)}"
        self._store = open_store(path, kind, records, is_fixed=is_named(path))
        self._answers = int(self._store.find([_ANSWERS])[0])

    def scan(self, update: Callable[[bytes], None]) -> Iterator[tuple[int, Scanned]]:
        update(self._store.digest)
        if self._answers >= 0:
            for status, count in json.loads(self._store.record(self._answers)[1]).items():
                self._note(f"answers {status}", count)
        for number in range(len(self._store) - (self._answers >= 0)):
            ranking = self.read(number)
            if not self._source.has_query(ranking.query if ranking.query_id is None else ranking.query_id):
                self._left_out("lists outside queries_part", 1)
                continue
            if self._source.sampling == "single_relevant" and ranking.labels is None:
                raise DataError(
                    f"sampling 'single_relevant' needs labels, and the list of query {ranking.query[:60]!r} has none",
                    expand_path(self._source.lists),
                )
            update(number.to_bytes(8, "little"))
            yield number, Scanned(len(ranking), ranking.labels, None, ranking.query_id)

    def read(self, number: int) -> RankingList:
        return ranking_list_from(json.loads(self._store.record(number)[1]))


class Texts:
    """Queries, documents and judgments that the runs of one source share."""

    def __init__(self, source: DataSource, queries: Store, documents: Store, qrels: Mapping | None) -> None:
        self.source, self.queries, self.documents, self.qrels = source, queries, documents, qrels
        self.has_list = np.zeros(len(queries), bool)  # by the query's place
        self._twice = {documents.record(place)[0] for place in documents.repeated()}

    def is_used(self, query_id: str) -> bool:
        """Whether lists of the query are wanted, as far as the source's fields tell."""
        is_judged = self.source.targets != "relevance" or query_id in self.qrels
        return is_judged and self.source.has_query(query_id)

    def may_have(self, document_ids: Sequence[str]) -> np.ndarray:
        """Whether documents have a text, bool (documents,), but for names of one hash; refuses one that has two."""
        if self._twice and (twice := self._twice.intersection(document_ids)):
            raise DataError(f"the document id {min(twice)!r} comes twice", expand_path(self.source.documents))
        return self.documents.may_have(document_ids)

    def query(self, query_id: str) -> str:
        return self.queries.record(int(self.queries.find([query_id])[0]))[1].decode()


class RunLists:
    """The lists of one run: candidates, labels and texts."""

    def __init__(
        self,
        texts: Texts,
        run: str | os.PathLike[str],
        first_stage: Mapping[str, RankedQuery] | None,
        left_out: Count,
        note: Count,
    ) -> None:
        self._texts, self._source, self._first_stage = texts, texts.source, first_stage
        self._left_out, self._note = left_out, note
        self._query_ids: list[str] = []
        if run == BM25:
            self._path = "BM25"
            queries = {name: text.decode() for name, text in texts.queries if texts.is_used(name)}
            documents = {name: text.decode() for name, text in texts.documents}
            self._run = _as_ranked(bm25_run(queries, documents, self._source.depth or _BM25_DEPTH))
            self._digest = b""
        else:
            self._run = RankedRun(run)
            self._path, self._digest = self._run.path, self._run.digest

    def scan(self, update: Callable[[bytes], None]) -> Iterator[tuple[int, Scanned]]:
        source, texts = self._source, self._texts
        for digest in (texts.queries.digest, texts.documents.digest, self._digest):
            update(digest)
        ranks_matter = source.targets == "rank" or source.depth is not None or source.sampling == "top"
        for query_id, query in self._run.each() if isinstance(self._run, RankedRun) else self._run.items():
            place = int(texts.queries.find([query_id])[0])
            if place < 0:
                message = f"query {query_id!r} has no text in {source.queries}"
                raise DataError(message, self._path, query.lines[0])
            if not texts.is_used(query_id):
                continue
            if ranks_matter and len(query.ranks) > 1 and min(query.ranks) == max(query.ranks):
                raise DataError(
                    f"all {len(query.ranks)} documents of query {query_id!r} have rank {query.ranks[0]}, so there is "
                    f"no order to cut or to learn from; number the rank column",
                    self._path,
                    query.lines[0],
                )
            candidates = self._cut(query_id, query)
            self._left_out("candidates below the depth", len(query.document_ids) - len(candidates.document_ids))
            whole, candidates = candidates, self._without_false_negatives(query_id, candidates)
            self._left_out("likely false negatives", len(whole.document_ids) - len(candidates.document_ids))
            if not candidates.document_ids:
                continue
            found = texts.may_have(candidates.document_ids)
            if not found.all():
                self._refuse(candidates, int(np.argmin(found)))
            texts.has_list[place] = True
            ids, labels = self._labelled(query_id, candidates)
            num_added = len(ids) - len(candidates.document_ids)
            self._note("relevant documents added", num_added)
            if source.add_judged:
                num_missing = len(self._missing_relevant(query_id, candidates.document_ids))
                self._left_out("relevant documents without a text", num_missing - num_added)
            update(repr((query_id, ids, labels)).encode("utf-8", "surrogatepass"))
            self._query_ids.append(query_id)
            grades = None if texts.qrels is None else texts.qrels.get(query_id)
            yield len(self._query_ids) - 1, Scanned(len(ids), labels, grades, query_id)

    def read(self, number: int) -> RankingList:
        query_id, texts = self._query_ids[number], self._texts
        candidates = self._without_false_negatives(query_id, self._cut(query_id, self._run[query_id]))
        ids, labels = self._labelled(query_id, candidates)
        places = texts.documents.find(ids).tolist()
        if min(places) < 0:  # two names of one hash, the one missing
            message = f"document {ids[places.index(-1)]!r} has no text in {self._source.documents}"
            raise DataError(message, self._path)
        return RankingList(
            query=texts.query(query_id),
            documents=tuple(texts.documents.record(place)[1].decode() for place in places),
            labels=tuple(labels),
            query_id=query_id,
            document_ids=tuple(ids),
        )

    def _refuse(self, candidates: RankedQuery, place: int) -> None:
        message = f"document {candidates.document_ids[place]!r} has no text in {self._source.documents}"
        raise DataError(message, self._path, candidates.lines[place])

    def _cut(self, query_id: str, query: RankedQuery) -> RankedQuery:
        """The candidates down to the depth, in order of rank."""
        first_stage = None
        if self._first_stage is not None:
            first_stage = self._first_stage[query_id] if query_id in self._first_stage else RankedQuery()
        return _cut(query, self._source.depth, first_stage)

    def _without_false_negatives(self, query_id: str, candidates: RankedQuery) -> RankedQuery:
        margin = self._source.false_negative_margin
        if margin is None:
            return candidates
        grades = self._texts.qrels[query_id]
        scored = list(zip(candidates.document_ids, candidates.scores, strict=True))
        best = max((score for name, score in scored if grades.get(name, 0) > 0), default=math.inf)
        return _rows(
            candidates, [i for i, (name, score) in enumerate(scored) if name in grades or score < best - margin]
        )

    def _labelled(self, query_id: str, candidates: RankedQuery) -> tuple[list[str], list[float]]:
        """Document ids and labels, the relevant documents that are added included."""
        grades = None if self._texts.qrels is None else self._texts.qrels.get(query_id)
        ids, labels = list(candidates.document_ids), _labels(self._source, candidates, grades)
        if self._source.add_judged:
            relevant = self._missing_relevant(query_id, ids)
            for document_id, found in zip(relevant, self._texts.may_have(relevant), strict=True):
                if found:
                    ids.append(document_id)
                    labels.append(float(grades[document_id]))
        return ids, labels

    def _missing_relevant(self, query_id: str, candidate_ids: Sequence[str]) -> list[str]:
        candidates = set(candidate_ids)
        grades = self._texts.qrels[query_id]
        return [name for name, grade in grades.items() if grade > 0 and name not in candidates]


def _as_ranked(run: Mapping[str, Mapping[str, float]]) -> dict[str, RankedQuery]:
    ranked: dict[str, RankedQuery] = {}
    for query_id, scores in run.items():
        query = RankedQuery(list(scores))
        query.ranks.extend(range(1, len(scores) + 1))
        query.scores.extend(scores.values())
        query.lines.extend([0] * len(scores))
        if scores:
            ranked[query_id] = query
    return ranked


def _cut(query: RankedQuery, depth: int | None, first_stage: RankedQuery | None) -> RankedQuery:
    """The rows within the depth by rank, numbered from 1; renumbered where a first-stage run made the cut."""
    ranks = _from_one(query)
    if first_stage is None and depth is None and all(map(operator.le, ranks, ranks[1:])) and min(query.ranks) > 0:
        return query
    if first_stage is not None:
        first_ranks = zip(first_stage.document_ids, _from_one(first_stage), strict=True)
        inside = {document_id for document_id, rank in first_ranks if rank <= depth}
        rows = [i for i, document_id in enumerate(query.document_ids) if document_id in inside]
    else:
        rows = [i for i, rank in enumerate(ranks) if depth is None or rank <= depth]
    rows.sort(key=ranks.__getitem__)
    cut = _rows(query, rows)
    cut.ranks[:] = array("q", (ranks[i] for i in rows))
    if first_stage is not None:
        # Tied ranks stay tied: each takes the place of the first of them.
        for place in range(len(rows)):
            tied = place > 0 and ranks[rows[place]] == ranks[rows[place - 1]]
            cut.ranks[place] = cut.ranks[place - 1] if tied else place + 1
    return cut


def _rows(query: RankedQuery, rows: Sequence[int]) -> RankedQuery:
    """Only these rows, in this order."""
    kept = RankedQuery([query.document_ids[i] for i in rows])
    for numbers, of_all in ((kept.ranks, query.ranks), (kept.scores, query.scores), (kept.lines, query.lines)):
        numbers.extend(of_all[i] for i in rows)
    return kept


def _from_one(query: RankedQuery) -> list[int]:
    """The rank column; where it counts from 0 it is moved by one."""
    shift = 1 if query.ranks and min(query.ranks) == 0 else 0
    return [rank + shift for rank in query.ranks]


def _labels(source: DataSource, candidates: RankedQuery, grades: Mapping[str, int] | None) -> list[float]:
    if source.targets == "relevance":
        return [float(grades.get(document_id, 0)) for document_id in candidates.document_ids]
    if source.targets == "score":
        return list(candidates.scores)
    # Without a depth of its own a list is as deep as its last rank.
    depth = max(source.depth or 0, max(candidates.ranks))
    return [float(depth - rank + 1) for rank in candidates.ranks]
