"""TREC runs, read and written, and what else says how a ranker ordered or scored documents, by id.

A line that does not fit raises DataError with file, line number and what was expected; no line is dropped. TREC columns
are cut at ASCII white space, so that ids may hold any other character.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastrank.data import scored_ids
from fastrank.data.catalogue import hub_state, is_named
from fastrank.data.files import DataError, decode, expand_path, read_lines, write_aside
from fastrank.data.formats import Path, column, whole_number
from fastrank.data.store import open_store

_UNRANKED = -2  # beside scored_ids.PAIRED
RUN_LINE = "query-id Q0 document-id rank score tag"


@dataclass(slots=True)
class RankedQuery:
    """The rows of one query of a run in file order: document ids, rank column, score column, line numbers."""

    document_ids: list[str] = field(default_factory=list)
    ranks: array = field(default_factory=lambda: array("q"))
    scores: array = field(default_factory=lambda: array("d"))
    lines: array = field(default_factory=lambda: array("q"))


class RankedRun(Mapping[str, RankedQuery]):
    """A run with both its rank and its score column, by query id in the file's order, rows of a query likewise.

    Queries are read when they are asked for and not kept, so that a run of any size takes little memory, as long as
    the rows of a query stand together (of one whose rows do not, each piece costs some hundred bytes). Reading one
    raises DataError for a document that comes twice (but in pairs and triples with the score that it had), and for a
    rank on some of its rows only.

    path: a TREC run, or one of the files of fastrank.data.scored_ids, told by its name (.parquet) and its first line,
    or ids on the hub (`hub:owner/name?config=rankzephyr-colbert`); without a rank column documents are ranked by score.
    Raises DataError for a wrong number of columns, a rank that is no whole number from 0 or a score that is not finite.
    """

    def __init__(self, path: Path):
        self.path = expand_path(path)
        self._store = open_store(
            self.path,
            f"run{hub_state(self.path)}",
            lambda: map(_pack, _blocks(self.path)),
            is_fixed=is_named(self.path),
        )
        if not len(self._store):
            raise DataError("the file holds no row", self.path)
        self._repeated = self._store.repeated()

    @property
    def digest(self) -> bytes:
        """Changes with any row."""
        return self._store.digest

    def __len__(self) -> int:
        return len(self._store) - len(self._repeated)

    def __iter__(self) -> Iterator[str]:
        return (query_id for query_id, _ in self.each())

    def each(self) -> Iterator[tuple[str, RankedQuery]]:
        """All queries with their rows; items() would look every one of them up."""
        repeated = set(self._repeated)
        in_pieces = {self._store.record(place)[0] for place in repeated}
        for place in range(len(self._store)):
            if place in repeated:
                continue
            query_id, raw = self._store.record(place)
            yield query_id, self[query_id] if query_id in in_pieces else _joined(query_id, [_unpack(raw)], self.path)

    def __contains__(self, query_id: object) -> bool:
        return isinstance(query_id, str) and bool(self._store.find([query_id])[0] >= 0)

    def __getitem__(self, query_id: str) -> RankedQuery:
        places = self._store.find_all(query_id)
        if not places:
            raise KeyError(query_id)
        return _joined(query_id, [_unpack(self._store.record(place)[1]) for place in places], self.path)


def read_ranked_run(path: Path) -> dict[str, RankedQuery]:
    """Read a run with both its rank and its score column into memory: {query id: RankedQuery}; see RankedRun."""
    return dict(RankedRun(path).each())


def _blocks(path: str) -> Iterator[tuple[str, RankedQuery]]:
    """The rows that follow each other and have one query; where no rank is known it is one of the two constants."""
    last: str | None = None
    block = RankedQuery()
    for line, query_id, document_id, score, rank in _read_scored(path):
        if query_id != last:
            if last is not None:
                yield last, block
            last, block = query_id, RankedQuery()
        block.document_ids.append(document_id)
        block.ranks.append(_UNRANKED if rank is None else rank)
        block.scores.append(score)
        block.lines.append(line)
    if last is not None:
        yield last, block


def _pack(block: tuple[str, RankedQuery]) -> tuple[str, bytes]:
    query_id, query = block
    numbers = b"".join(one.tobytes() for one in (query.ranks, query.scores, query.lines))
    count, ids = len(query.lines), "\n".join(query.document_ids)
    if ids.count("\n") != count - 1:  # only JSON and parquet can hold such an id
        count, ids = -count, json.dumps(query.document_ids)
    return query_id, count.to_bytes(8, "little", signed=True) + numbers + ids.encode()


def _unpack(raw: bytes) -> RankedQuery:
    count = int.from_bytes(raw[:8], "little", signed=True)
    is_json, count = count < 0, abs(count)
    query = RankedQuery()
    for number, numbers in enumerate((query.ranks, query.scores, query.lines)):
        numbers.frombytes(raw[8 + 8 * count * number : 8 + 8 * count * (number + 1)])
    ids = raw[8 + 24 * count :].decode()
    query.document_ids = json.loads(ids) if is_json else ids.split("\n")
    return query


def _joined(query_id: str, blocks: Sequence[RankedQuery], path: str) -> RankedQuery:
    """One query's blocks as one, checked, with ranks by score where the file has none."""
    query = blocks[0]
    for block in blocks[1:]:
        query.document_ids += block.document_ids
        for numbers, more in ((query.ranks, block.ranks), (query.scores, block.scores), (query.lines, block.lines)):
            numbers.extend(more)
    if len(set(query.document_ids)) < len(query.document_ids):
        query = _without_repeated(query_id, query, path)
    if min(query.ranks) < 0:
        if max(query.ranks) >= 0:
            line = next(line for line, rank in zip(query.lines, query.ranks, strict=True) if rank >= 0)
            raise DataError(f"query {query_id!r} has a rank here and rows without one", path, line)
        for rank, place in enumerate(sorted(range(len(query.scores)), key=lambda i: -query.scores[i]), start=1):
            query.ranks[place] = rank
    return query


def _without_repeated(query_id: str, query: RankedQuery, path: str) -> RankedQuery:
    first: dict[str, int] = {}
    for place, (document_id, line) in enumerate(zip(query.document_ids, query.lines, strict=True)):
        known = first.setdefault(document_id, place)
        may_repeat = query.ranks[place] == scored_ids.PAIRED and query.scores[known] == query.scores[place]
        if known < place and not may_repeat:
            raise DataError(
                f"document {document_id!r} comes twice for query {query_id!r}; it was on line {query.lines[known]}",
                path,
                line,
            )
    kept = RankedQuery([query.document_ids[place] for place in first.values()])
    for numbers, all_of_it in ((kept.ranks, query.ranks), (kept.scores, query.scores), (kept.lines, query.lines)):
        numbers.extend(all_of_it[place] for place in first.values())
    return kept


def _read_scored(path: str) -> Iterator[scored_ids.Scored]:
    if scored_ids.is_table(path):
        yield from scored_ids.from_table(path)
        return
    kind = None
    for line, raw in read_lines(path, RUN_LINE):
        fields = raw.split()
        kind = kind or _kind_of_run(raw, fields)
        columns, form = _RUN_COLUMNS.get(kind, (None, ""))
        if columns is not None and len(fields) != columns:
            raise DataError(f"expected {columns} columns ({form}), found {len(fields)}", path, line)
        if kind == "colbert":
            yield from scored_ids.from_colbert(raw, path, line)
        elif kind == "hard negatives":
            yield from scored_ids.from_hard_negatives(raw, path, line)
        elif kind in _READERS:
            yield from _READERS[kind](fields, path, line)
        else:
            yield (
                line,
                decode(fields[0], path, line),
                decode(fields[2], path, line),
                scored_ids.score_of(fields[4], path, line),
                whole_number(fields[3], "rank", path, line, minimum=0),
            )


def _kind_of_run(raw: bytes, fields: Sequence[bytes]) -> str:
    if raw.lstrip().startswith((b"[", b"{")):
        return "colbert" if raw.lstrip().startswith(b"[") else "hard negatives"
    if len(fields) == 3:  # a run begins with rank 1, a triple with document 1 once in millions
        return "ranked ids" if fields[2] == b"1" else "triples"
    return "hofstaetter" if scored_ids.is_hofstaetter(fields) else "trec"


_RUN_COLUMNS = {
    "trec": (6, RUN_LINE),
    "hofstaetter": (5, "score score query-id document-id document-id"),
    "triples": (3, "query-id document-id document-id"),
    "ranked ids": (3, "query-id document-id rank"),
}
_READERS = {
    "hofstaetter": scored_ids.from_hofstaetter,
    "triples": scored_ids.from_triple,
    "ranked ids": scored_ids.from_ranked_ids,
}


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Read a TREC run as {query id: {document id: score}}; errors as in read_ranked_run."""
    return {
        query_id: dict(zip(query.document_ids, query.scores, strict=True))
        for query_id, query in read_ranked_run(path).items()
    }


def write_run(path: Path, run: Mapping[str, Mapping[str, float]], *, tag: str = "fastrank") -> None:
    """Write {query id: {document id: score}} as a TREC run, best first, ties by document id (later ids first).

    Scores in the file fall strictly, also where they tie or differ by less than a float32 holds, which is what
    trec_eval compares: a score that would not be below the one before it is set to the next float32 under that.
    A run read back therefore keeps its order whatever breaks the ties. For another order of ties give each query a
    sequence of (document id, score) pairs, best first, in place of the mapping.
    path: gzip where it ends in .gz; written aside and renamed. Raises ValueError for a NaN or infinite score, an id
    that is empty or has white space in it, and scores that are not in descending order in a sequence.
    """
    tag = column(tag, "tag")
    with write_aside(expand_path(path)) as file:
        for query_id, scores in run.items():
            query_column = column(query_id, "query id")
            for rank, (document_id, score) in enumerate(_falling(query_id, scores), start=1):
                document_column = column(document_id, "document id")
                file.write(f"{query_column} Q0 {document_column} {rank} {score} {tag}\n")


def by_score(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Pairs (document id, score) as trec_eval ranks them: best first, equal scores by id, later ids first."""
    return sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)


def _falling(query_id: str, scores: Mapping[str, float] | Sequence) -> Iterator[tuple[str, str]]:
    pairs = by_score(scores) if isinstance(scores, Mapping) else scores
    previous: float | None = None
    written = np.float32(np.inf)
    for document_id, score in pairs:
        if previous is not None and score > previous:
            raise ValueError(f"query {query_id!r}: document {document_id!r} scores above the one before it")
        with np.errstate(over="ignore"):
            value = np.float32(score)
            if not value < written:
                value = np.nextafter(written, np.float32(-np.inf))
        if not (np.isfinite(value) and math.isfinite(score)):
            raise ValueError(f"query {query_id!r}, document {document_id!r}: the score {score} cannot be written")
        previous, written = score, value
        yield document_id, str(value)
