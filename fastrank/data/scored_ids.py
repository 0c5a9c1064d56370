"""Files of query ids, document ids and scores that are no TREC runs, as runs.

Rank-DistiLLM's parquet has columns qid, docno, score and rank (or those names' usual variants), sentence-transformers'
lists query_id, doc_ids and labels, or the ids alone, best first, in parquet or on the hub; ColBERTv2's scores for
distillation are JSON lines [qid, [pid, score], ...], sentence-transformers' hard negatives JSON lines {qid, pos: [{pid,
ce-score}], neg: {system: [...]}}; Hofstaetter et al.'s scores are lines `score score qid pid pid`, MS MARCO's triples
`qid pid pid` (scores 1 and 0), a relevant document before another, and its runs `qid pid rank`, which begin with rank
1. Where there is no rank, the score decides, earlier rows first in a tie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from fastrank.data import catalogue
from fastrank.data.files import DataError, clean_text, decode

PARQUET = (".parquet", ".pq")
PARQUET_NAMES = {
    "query_id": ("query_id", "qid"),
    "document_id": ("doc_id", "docno", "docid"),
    "score": ("score",),
    "rank": ("rank",),
}
LIST_LABELS = ("labels", "scores")
Scored = tuple[int, str, str, float, int | None]  # line, query id, document id, score, rank
PAIRED = -1  # the rank of a row without one whose document may come again for its query


def is_table(path: str) -> bool:
    """Whether the file is parquet, or a data set of the hub."""
    return catalogue.is_on_hub(path) or path.lower().endswith(PARQUET)


def read_table(path: str) -> Iterator[tuple[int, dict]]:
    """Rows of what is_table, with their numbers from 1."""
    return catalogue.read_hub_rows(path) if catalogue.is_on_hub(path) else read_parquet_rows(path)


def read_parquet_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Rows of a parquet file with their numbers from 1, a few at a time; DataError for what cannot be read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("parquet files need the package pyarrow: pip install pyarrow", path) from None
    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except FileNotFoundError:
        raise DataError("no such file", path) from None
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not a readable parquet file: {error}", path) from None


def from_table(path: str) -> Iterator[Scored]:
    for number, row in read_table(path):
        if row.get("doc_ids") is not None:
            yield from _from_list(row, path, number)
            continue
        found = {}
        for name, columns in PARQUET_NAMES.items():
            found[name] = next((row[column] for column in columns if row.get(column) is not None), None)
            if found[name] is None and name != "rank":
                raise DataError(f"the row has none of the columns {', '.join(columns)}", path, number)
        rank = found["rank"]
        # A column with gaps may come as floats.
        if rank is not None and not (type(rank) in (int, float) and 0 <= rank < 2**63 and rank % 1 == 0):
            raise DataError(f"the rank must be a whole number from 0, found {rank!r}", path, number)
        yield (
            number,
            _id(found["query_id"], path, number),
            _id(found["document_id"], path, number),
            score_of(found["score"], path, number),
            None if rank is None else int(rank),
        )


def _from_list(row: dict, path: str, number: int) -> Iterator[Scored]:
    """The documents of a row {query_id, doc_ids, labels}; without labels their order is the rank."""
    query_id = _id(
        next((row[key] for key in PARQUET_NAMES["query_id"] if row.get(key) is not None), None), path, number
    )
    ids = row["doc_ids"]
    labels = next((row[key] for key in LIST_LABELS if row.get(key) is not None), None)
    if not isinstance(ids, list) or not (labels is None or (isinstance(labels, list) and len(labels) == len(ids))):
        raise DataError("expected query_id, doc_ids [...] and perhaps as many labels [...]", path, number)
    for place, document_id in enumerate(ids):
        score = float(len(ids) - place) if labels is None else score_of(labels[place], path, number)
        yield number, query_id, _id(document_id, path, number), score, place + 1 if labels is None else None


def from_colbert(raw: bytes, path: str, line: int) -> Iterator[Scored]:
    """The documents of one line [qid, [pid, score], ...]."""
    try:
        row = json.loads(decode(raw, path, line))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path, line) from None
    if not isinstance(row, list) or len(row) < 2 or not all(isinstance(one, list) and len(one) == 2 for one in row[1:]):
        raise DataError("expected [query id, [document id, score], ...]", path, line)
    query_id = _id(row[0], path, line)
    for document_id, score in row[1:]:
        yield line, query_id, _id(document_id, path, line), score_of(score, path, line), None


def from_hard_negatives(raw: bytes, path: str, line: int) -> Iterator[Scored]:
    """The documents of one line {qid, pos, neg}; one that several systems found comes once."""
    try:
        row = json.loads(decode(raw, path, line))
        found = [*row["pos"], *(one for system in row["neg"].values() for one in system)]
        query_id = _id(row["qid"], path, line)
        scored: dict[str, float] = {}
        for one in found:
            document_id, score = _id(one["pid"], path, line), score_of(one["ce-score"], path, line)
            if scored.setdefault(document_id, score) != score:
                message = f"document {document_id!r} has the scores {scored[document_id]} and {score}"
                raise DataError(message, path, line)
    except DataError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        form = "{qid, pos: [{pid, ce-score}], neg: {system: [{pid, ce-score}]}}"
        raise DataError(f"expected {form}", path, line) from None
    if not scored:
        raise DataError("the line has no document", path, line)
    for document_id, score in scored.items():
        yield line, query_id, document_id, score, None


def from_triple(fields: list[bytes], path: str, line: int) -> Iterator[Scored]:
    """The two documents of one line `qid pid pid`."""
    query_id = decode(fields[0], path, line)
    for score, document_id in zip((1.0, 0.0), fields[1:], strict=True):
        yield line, query_id, decode(document_id, path, line), score, PAIRED


def from_ranked_ids(fields: list[bytes], path: str, line: int) -> Iterator[Scored]:
    """The document of one line `qid pid rank`, MS MARCO's form of a run."""
    rank = score_of(fields[2], path, line)
    if rank < 1 or rank % 1:
        raise DataError(f"the rank must be a whole number from 1, found {decode(fields[2], path, line)!r}", path, line)
    yield line, decode(fields[0], path, line), decode(fields[1], path, line), -rank, int(rank)


def is_hofstaetter(fields: list[bytes]) -> bool:
    """Whether a line's columns are five and begin with two scores; `7 0 ...` is a TREC run that lacks a column."""
    try:
        return len(fields) == 5 and fields[1] != b"0" and all(math.isfinite(float(field)) for field in fields[:2])
    except ValueError:
        return False


def from_hofstaetter(fields: list[bytes], path: str, line: int) -> Iterator[Scored]:
    """The two documents of one line `score score qid pid pid`."""
    query_id = decode(fields[2], path, line)
    for score, document_id in zip(fields[:2], fields[3:], strict=True):
        yield line, query_id, decode(document_id, path, line), score_of(score, path, line), PAIRED


def _id(value: object, path: str, line: int) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"an id must be a string or a whole number, found {value!r}", path, line)
    return clean_text(str(value))


def score_of(value: object, path: str, line: int) -> float:
    """The finite number that a column (bytes) or a JSON value is; DataError for anything else."""
    try:
        # float() would read "1_000" as 1000.
        is_number = not isinstance(value, bool) and not (isinstance(value, bytes) and b"_" in value)
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(decode(value, path, line) if isinstance(value, bytes) else value)
        raise DataError(f"the score must be a finite number, found {shown[:60]}", path, line)
    return number
