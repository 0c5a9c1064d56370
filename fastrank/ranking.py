"""What a caller gives and gets: documents of any usual kind in, a Ranking with the same objects out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_KEYS = ("text", "content", "page_content")
ID_KEYS = ("id", "_id", "docid", "doc_id")


@dataclass(frozen=True, slots=True, init=False)
class RankedDocument:
    """One document of a Ranking.

    Arguments:
        index: its place in the caller's list, from 0.
        score: higher is better.
        document: the caller's object, untouched.
        id: the first of its `id`, `_id`, `docid`, `doc_id` that is not None, else None.
    """

    index: int
    score: float
    document: Any
    id: Any = None

    def __init__(self, index: int, score: float, document: Any, id: Any = None):
        # Each by its slot, which takes half as long as what dataclasses write for frozen ones.
        _set_index(self, index)
        _set_score(self, score)
        _set_document(self, document)
        _set_id(self, id)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary with the four attributes."""
        return {"index": self.index, "score": self.score, "id": self.id, "document": self.document}


_set_index, _set_score, _set_document, _set_id = (
    getattr(RankedDocument, name).__set__ for name in ("index", "score", "document", "id")
)


class Ranking(Sequence[RankedDocument]):
    """The documents of one query, best first; equal scores in the caller's order.

    Arguments:
        query: the query text.
        documents: its RankedDocuments in order.
    """

    def __init__(self, query: str, documents: Iterable[RankedDocument]):
        self.query = query
        self._documents = tuple(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, place):
        return Ranking(self.query, self._documents[place]) if isinstance(place, slice) else self._documents[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranking) and (self.query, self._documents) == (other.query, other._documents)

    __hash__ = None

    def __repr__(self) -> str:
        shown = ", ".join(f"{item.index}: {item.score:.4g}" for item in self._documents[:5])
        return f"Ranking({self.query!r}, {{{shown}{', ...' if len(self) > 5 else ''}}})"


def document_text(document: Any, where: Callable[[], str]) -> str:
    """The text of a str, of a mapping with `text` or `content`, or of an object with `.text` or `.page_content`.

    Arguments:
        document: the caller's object.
        where: its name, in the TypeError for anything without a text.
    """
    if isinstance(document, str):
        return document
    found = _first_of(document, TEXT_KEYS)
    if isinstance(found, str):
        return found
    if found is not None:
        raise TypeError(f"{where()} has {describe(found)} for its text, not a str.")
    raise TypeError(
        f"{where()} is {describe(document)} without a text: give a str, a mapping with 'text' or 'content', or an "
        "object with .text or .page_content."
    )


def document_id(document: Any) -> Any:
    """The first of `id`, `_id`, `docid`, `doc_id` of a mapping or an object that is not None, else None."""
    return None if isinstance(document, str) else _first_of(document, ID_KEYS)


def describe(value: Any) -> str:
    """What kind of thing a value is, for errors."""
    return "None" if value is None else f"a {type(value).__name__}"


def _first_of(document: Any, keys: Sequence[str]) -> Any:
    """The first of these keys of a mapping, or attributes of an object, that is not None, else None."""
    if isinstance(document, (dict, Mapping)):  # a dict is known sooner than another Mapping
        return next((value for key in keys if (value := document.get(key)) is not None), None)
    return next((value for key in keys if (value := getattr(document, key, None)) is not None), None)
