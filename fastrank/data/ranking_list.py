"""RankingList: one query, its candidate documents and, where known, what they are worth.

The only noun that leaves `fastrank.data`: every file format, source and sampler ends in it, and the tokenizer, the
trainer and the evaluation begin with it. Lists are ragged: any number of documents, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankingList:
    """One query with its candidate documents.

    query: the query text.
    documents: the document texts; may be empty.
    labels: one number per document, higher is better, ±inf allowed, NaN not; None = unlabelled.
    query_id: the caller's name of the query.
    document_ids: one name per document, all different.
    Lists and other iterables are turned into tuples. Raises TypeError for a text that is not a string (with its
    position) and ValueError for lengths that differ, a NaN label or a document id that comes twice.
    """

    query: str
    documents: tuple[str, ...]
    labels: tuple[float, ...] | None = None
    query_id: str | None = None
    document_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.query, str):
            raise TypeError(f"the query must be a string, not {type(self.query).__name__}")
        _as_tuple(self, "documents")
        for position, document in enumerate(self.documents):
            if not isinstance(document, str):
                kind = type(document).__name__
                raise TypeError(f"document {position} must be a string, not {kind}")
        if self.query_id is not None and not isinstance(self.query_id, str):
            raise TypeError(f"query_id must be a string, not {type(self.query_id).__name__}")
        if self.labels is not None:
            _as_tuple(self, "labels")
            self._check_length("labels", self.labels)
            object.__setattr__(self, "labels", tuple(_number(x, i) for i, x in enumerate(self.labels)))
        if self.document_ids is not None:
            _as_tuple(self, "document_ids")
            self._check_length("document_ids", self.document_ids)
            seen: set[str] = set()
            for position, name in enumerate(self.document_ids):
                if not isinstance(name, str):
                    raise TypeError(f"document id {position} must be a string, not {type(name).__name__}")
                if name in seen:
                    raise ValueError(f"the document id {name!r} comes twice in one list")
                seen.add(name)

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, positions: Iterable[int]) -> RankingList:
        """The same query with only the documents at `positions` (0-based), in that order."""
        positions = tuple(positions)
        return RankingList(
            query=self.query,
            documents=tuple(self.documents[i] for i in positions),
            labels=None if self.labels is None else tuple(self.labels[i] for i in positions),
            query_id=self.query_id,
            document_ids=None if self.document_ids is None else tuple(self.document_ids[i] for i in positions),
        )

    def _check_length(self, name: str, values: tuple) -> None:
        if len(values) != len(self.documents):
            raise ValueError(f"{len(values)} {name} for {len(self.documents)} documents: one each is needed")


def _as_tuple(ranking_list: RankingList, name: str) -> None:
    values = getattr(ranking_list, name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, not {type(values).__name__}")
    object.__setattr__(ranking_list, name, tuple(values))


def _number(value: object, position: int) -> float:
    # bool is an int to Python, but True as a label is a mistake more often than a grade.
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"label {position} must be a number, not {type(value).__name__}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"label {position} must be a number, not {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"label {position} is too large for a float") from None
    if math.isnan(number):
        raise ValueError(f"label {position} is NaN: leave the label out or give a number")
    return number


def list_keys(lists: Iterable[RankingList]) -> list[str]:
    """One name per list, all different: its query id, or its place where it has none; #2, #3 ... added if taken."""
    return keys_of(ranking.query_id for ranking in lists)


def keys_of(query_ids: Iterable[str | None]) -> list[str]:
    """The keys of lists with these query ids, as in list_keys."""
    taken: set[str] = set()
    times: dict[str, int] = {}
    keys: list[str] = []
    for place, query_id in enumerate(query_ids):
        name = key = str(place) if query_id is None else query_id
        while key in taken:
            times[name] = times.get(name, 1) + 1
            key = f"{name}#{times[name]}"
        taken.add(key)
        keys.append(key)
    return keys
