"""TREC runs, read and written, and what else says how a ranker ordered or scored documents, by id.

A line that does not fit raises DataError with file, line number and what was expected; no line is dropped. TREC columns
are cut at ASCII white space, so that ids may hold any other character.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastrank.data import scored_ids
from fastrank.data.files import DataError, decode, expand_path, read_lines, write_aside
from fastrank.data.formats import Path, column, whole_number

_UNRANKED = -1
RUN_LINE = "query-id Q0 document-id rank score tag"


@dataclass(slots=True)
class RankedQuery:
    """The rows of one query of a run in file order: document ids, rank column, score column, line numbers."""

    document_ids: list[str] = field(default_factory=list)
    ranks: array = field(default_factory=lambda: array("q"))
    scores: array = field(default_factory=lambda: array("d"))
    lines: array = field(default_factory=lambda: array("q"))


def read_ranked_run(path: Path) -> dict[str, RankedQuery]:
    """Read a run with both its rank and its score column: {query id: RankedQuery}, rows in file order.

    path: a TREC run, or one of the files of fastrank.data.scored_ids, told by its name (.parquet) and its first line;
    without a rank column documents are ranked by score. A document that comes again for its query is an error, but in
    pairs and triples, where it must have the score that it had.
    Raises DataError for a wrong number of columns, a rank that is no whole number from 0, a score that is not finite,
    or a document that comes twice for one query.
    """
    path = expand_path(path)
    run: dict[str, RankedQuery] = {}
    places: dict[str, dict[str, int]] = {}
    unranked: set[str] = set()
    for line, query_id, document_id, score, rank in _read_scored(path):
        query = run.get(query_id)
        if query is None:
            query = run[query_id] = RankedQuery()
            places[query_id] = {}
        known = places[query_id].setdefault(document_id, len(query.lines))
        if known < len(query.lines):
            if rank == scored_ids.PAIRED and query.scores[known] == score:
                continue
            raise DataError(
                f"document {document_id!r} comes twice for query {query_id!r}; it was on line {query.lines[known]}",
                path,
                line,
            )
        if rank is None or rank == scored_ids.PAIRED:
            unranked.add(query_id)
            rank = _UNRANKED
        query.document_ids.append(document_id)
        query.ranks.append(rank)
        query.scores.append(score)
        query.lines.append(line)
    if not run:
        raise DataError("the file holds no row", path)
    for query_id in unranked:
        query = run[query_id]
        line = next((line for line, rank in zip(query.lines, query.ranks, strict=True) if rank != _UNRANKED), None)
        if line is not None:
            raise DataError(f"query {query_id!r} has a rank here and rows without one", path, line)
        for rank, place in enumerate(sorted(range(len(query.scores)), key=lambda i: -query.scores[i]), start=1):
            query.ranks[place] = rank
    return run


def _read_scored(path: str) -> Iterator[scored_ids.Scored]:
    if path.lower().endswith(scored_ids.PARQUET):
        yield from scored_ids.from_parquet(path)
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
        elif kind in ("hofstaetter", "triples"):
            read = scored_ids.from_triple if kind == "triples" else scored_ids.from_hofstaetter
            yield from read(fields, path, line)
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
    return "triples" if len(fields) == 3 else "hofstaetter" if scored_ids.is_hofstaetter(fields) else "trec"


_RUN_COLUMNS = {
    "trec": (6, RUN_LINE),
    "hofstaetter": (5, "score score query-id document-id document-id"),
    "triples": (3, "query-id document-id document-id"),
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
