"""Rows with texts in them, as other tools write them, in; RankingLists out; and back.

The one idea: every shape of a row becomes the mapping {query, documents, labels} that fastrank's own lists have, which
one function checks. A shape is told by its keys. Rows of single pairs are gathered by query, so they must stand
together. Files are read row by row: JSON lines, a JSON array, tab separated columns or parquet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastrank.data.files import DataError, clean_text, decode, expand_path, name_of, read_lines, write_aside
from fastrank.data.formats import Path, has_tabs, parse_json_object, ranking_list_from, write_lists
from fastrank.data.ranking_list import RankingList
from fastrank.data.runs import write_run
from fastrank.data.scored_ids import PARQUET, read_parquet_rows

Row = Mapping[str, object]
TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")  # of a document, as rank_llm looks for them
QUERY_KEYS = ("query", "anchor", "question")
PAIR_TEXT_KEYS = ("passage", "document", "answer", "text", "positive")
TRIPLE_COLUMNS = ("query", "positive", "negative")
TOP1000_COLUMNS = ("query_id", "doc_id", "query", "text")


def read_rows(path: Path, shape: str | None = None, *, permutations: Path | None = None) -> Iterator[RankingList]:
    """Reads ranking lists of any shape in SHAPES, one after the other.

    Arguments:
        path: JSON lines or an array of objects, .tsv of 3 columns (query, relevant text, other text) or 4 (MS MARCO's
            top1000: query id, document id, query, text), each plain or .gz; or .parquet. "-" = standard input.
        shape: a name in SHAPES; default: told by the keys of the first row.
        permutations: for `rankgpt`: a JSON array with one answer ("[3] > [1] > ...") a row, repaired where needed.

    Labels are those of the row; the scores of FlagEmbedding's teacher; 1 and 0 for what is named relevant or not; or,
    where a row is only an order (rank_llm, rankgpt's permutations), n for its first document down to 1.
    Raises DataError, with file and row, for a row of another shape and for a query whose pairs do not stand together.
    """
    path = path if path == "-" else expand_path(path)
    name = name_of(path)
    if shape is not None and shape not in SHAPES:
        raise DataError(f"there is no shape {shape!r} of rows; known are {', '.join(SHAPES)}", name)
    rows = _read(path)
    try:
        number, first = next(rows)
    except StopIteration:
        raise DataError("the file holds no row", name) from None
    chosen = SHAPES[shape] if shape else _recognise(first, name, number)
    rows = itertools.chain([(number, first)], rows)
    if permutations is not None:
        if chosen is not SHAPES["rankgpt"]:
            raise DataError("permutations go with rows of the shape rankgpt alone", name)
        rows = _with_answers(rows, expand_path(permutations), name)
    rows = _fitting(rows, chosen, name)
    for number, row in rows if chosen.key is None else _gathered(rows, chosen, name):
        try:
            mapping = chosen.read(row)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"expected a row with {chosen.expected}: {reason}", name, number) from None
        yield ranking_list_from(mapping, name, number)


@dataclass(frozen=True)
class Shape:
    """How rows look: which fit, what is expected of them in words, and what they are as a fastrank list.

    key: for rows of single pairs, the key that pairs of one query share; `read` then takes {"pairs": [rows]}.
    """

    fits: Callable[[Row], bool]
    expected: str
    read: Callable[[Row], dict]
    key: Callable[[Row], object] | None = None


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row for key in keys)


def _first(row: Row, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def _document(text: object, name: object = None, title: object = None) -> dict:
    document = {"text": text} | ({"title": title} if title else {})
    return document if name is None else document | {"id": name}


def _array(row: Row, key: str) -> list:
    """The list of this key, [] where there is none: list() would cut a text into its characters."""
    values = row.get(key)
    if values is None:
        return []
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{key!r} must be an array, not {type(values).__name__}")
    return list(values)


def _by_order(count: int) -> list[float]:
    return [float(count - place) for place in range(count)]


def _rank_llm(row: Row) -> dict:
    query = row["query"]
    documents = []
    for candidate in row["candidates"]:
        content = candidate["doc"]
        content = {"text": content} if isinstance(content, str) else content
        key = _first(content, TEXT_KEYS)
        if key is None:
            raise ValueError(f"a document has none of {', '.join(TEXT_KEYS)}")
        documents.append(_document(content[key], candidate.get("docid"), content.get("title")))
    named = {"query": query} if isinstance(query, str) else {"query": query["text"], "query_id": query.get("qid")}
    return named | {"documents": documents, "labels": _by_order(len(documents))}


def _hits(row: Row) -> dict:
    documents = [_document(hit["content"], hit.get("docid")) for hit in row["hits"]]
    query_id = next((hit["qid"] for hit in row["hits"] if hit.get("qid") is not None), None)
    labels = _by_order(len(documents))
    return {"query": row["query"], "query_id": query_id, "documents": documents, "labels": labels}


def _rankgpt(row: Row) -> dict:
    retrieved = sorted(row["retrieved_passages"], key=lambda one: one.get("rank", 0))
    documents = [_document(one["text"], one.get("docid"), one.get("title")) for one in retrieved]
    relevant = {one.get("docid") for one in row.get("positive_passages") or ()}
    labels = [float(one.get("docid") in relevant) for one in retrieved]
    if "answer" in row:
        # Here, so that reading other shapes does not need the parser.
        from fastrank.data.permutations import parse_permutation

        order = parse_permutation(row["answer"], len(documents)).order
        labels = [0.0] * len(documents)
        for label, place in zip(_by_order(len(documents)), order, strict=True):
            labels[place] = label
    return {"query": row["query"], "query_id": row.get("query_id"), "documents": documents, "labels": labels}


def _flag_embedding(row: Row) -> dict:
    positive, negative = _array(row, "pos"), _array(row, "neg")
    scores = row.get("pos_scores"), row.get("neg_scores")
    if scores[0] is not None and (scores[1] is not None or not negative):
        labels = [*scores[0], *(scores[1] or ())]
    else:
        labels = [1.0] * len(positive) + [0.0] * len(negative)
    return {"query": row["query"], "documents": positive + negative, "labels": labels}


def _columns(row: Row) -> dict:
    labels = row["labels"] if row.get("labels") is not None else row.get("scores")
    return {"query": row["query"], "documents": _array(row, "docs"), "labels": labels}


def _evaluator(row: Row) -> dict:
    positive = _array(row, "positive")
    others = _array(row, "negative") + _array(row, "documents")
    documents = [*positive, *(text for text in others if text not in set(positive))]
    labels = [float(place < len(positive)) for place in range(len(documents))]
    return {"query": row["query"], "documents": documents, "labels": labels}


def _triplet(row: Row) -> dict:
    negatives = [row[key] for key in row if key == "negative" or key.startswith("negative_")]
    documents = [row["positive"]]
    for one in negatives:
        documents += one if isinstance(one, (list, tuple)) else [one]
    labels = [1.0] + [0.0] * (len(documents) - 1)
    for key in ("scores", "score", "labels", "label"):
        if isinstance(row.get(key), (list, tuple)):
            labels = list(row[key])
            break
    return {"query": row[_first(row, QUERY_KEYS)], "documents": documents, "labels": labels}


def _pairs(row: Row) -> dict:
    pairs = row["pairs"]
    documents, labels = [], []
    for pair in pairs:
        documents.append(pair[_first(pair, PAIR_TEXT_KEYS)])
        labels.append(pair["label"] if pair.get("label") is not None else pair["score"])
    return {"query": pairs[0][_first(pairs[0], QUERY_KEYS)], "documents": documents, "labels": labels}


def _named_pairs(row: Row) -> dict:
    pairs = row["pairs"]
    documents = [_document(pair["text"], pair["doc_id"]) for pair in pairs]
    if any(pair.get("relevance") is not None for pair in pairs):
        labels = [float(pair.get("relevance") or 0) for pair in pairs]
    elif all(pair.get("rank") is not None for pair in pairs):
        last = max(int(pair["rank"]) for pair in pairs)
        labels = [float(last - int(pair["rank"]) + 1) for pair in pairs]
    elif all(pair.get("score") is not None for pair in pairs):
        labels = [float(pair["score"]) for pair in pairs]
    else:
        labels = None
    first = pairs[0]
    return {"query": first["query"], "query_id": first["query_id"], "documents": documents, "labels": labels}


def _is_triplet(row: Row) -> bool:
    has_negative = any(key == "negative" or key.startswith("negative_") for key in row)
    return _first(row, QUERY_KEYS) is not None and isinstance(row.get("positive"), str) and has_negative


def _is_pair(row: Row) -> bool:
    labelled = row.get("label") is not None or row.get("score") is not None
    return _first(row, QUERY_KEYS) is not None and _first(row, PAIR_TEXT_KEYS) is not None and labelled


# In the order in which they are tried.
SHAPES: dict[str, Shape] = {
    "rank_llm": Shape(_has("query", "candidates"), "query {text, qid} and candidates [{docid, doc}, ...]", _rank_llm),
    "hits": Shape(_has("query", "hits"), "query and hits [{qid, docid, content}, ...]", _hits),
    "rankgpt": Shape(
        _has("query", "retrieved_passages"), "query and retrieved_passages [{docid, text, rank}, ...]", _rankgpt
    ),
    "flag_embedding": Shape(
        _has("query", "pos"), "query, pos and neg, perhaps pos_scores and neg_scores", _flag_embedding
    ),
    "columns": Shape(_has("query", "docs"), "query, docs and labels or scores", _columns),
    "evaluator": Shape(
        lambda row: "query" in row and isinstance(row.get("positive"), (list, tuple)),
        "query, positive [...] and negative [...] or documents [...]",
        _evaluator,
    ),
    "lists": Shape(_has("query", "documents"), "query, documents and perhaps labels", dict),
    "named_pairs": Shape(
        _has("query_id", "doc_id", "query", "text"),
        "query_id, doc_id, query, text and perhaps relevance, rank or score",
        _named_pairs,
        lambda row: row.get("query_id"),
    ),
    "triplet": Shape(_is_triplet, "query, positive and negative (or negative_1, negative_2, ...)", _triplet),
    "pairs": Shape(
        _is_pair,
        f"query, one of {', '.join(PAIR_TEXT_KEYS)}, and label or score",
        _pairs,
        lambda row: row.get(_first(row, QUERY_KEYS) or "query"),
    ),
}


def _recognise(row: Row, name: str, number: int) -> Shape:
    for shape in SHAPES.values():
        if shape.fits(row):
            return shape
    raise DataError(f"no shape of rows is known with {_keys(row)}; known are {', '.join(SHAPES)}", name, number)


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row)) or "none")


def _read(path: str) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers: lines of a text file, else places from 1."""
    lower = path.lower()
    if lower.endswith(PARQUET):
        yield from read_parquet_rows(path)
        return
    name = name_of(path)
    lines = read_lines(path, "JSON objects or tab separated columns")
    first = next(lines)
    number, raw = first
    if raw.lstrip().startswith(b"["):
        for place, row in enumerate(_parse_array(itertools.chain([first], lines), name), start=1):
            if not isinstance(row, dict):
                raise DataError(f"row {place} must be a JSON object, not {type(row).__name__}", name, place)
            yield place, row
        return
    has_columns = has_tabs(path)
    if has_columns is None:
        has_columns = not raw.lstrip().startswith(b"{")
    width = len(raw.split(b"\t"))
    for number, raw in itertools.chain([first], lines):
        if not has_columns:
            yield number, parse_json_object(raw, name, number)
            continue
        fields = decode(raw, name, number).split("\t")
        if len(fields) != width or width not in (3, 4):
            wanted = width if width in (3, 4) else "3 (query, relevant text, other text) or 4 (top1000)"
            raise DataError(f"expected {wanted} columns, found {len(fields)}", name, number)
        yield number, dict(zip(TRIPLE_COLUMNS if width == 3 else TOP1000_COLUMNS, fields, strict=True))


def _parse_array(lines: Iterable[tuple[int, bytes]], name: str) -> object:
    """The JSON value that all lines together are."""
    try:
        return json.loads(decode(b"\n".join(raw for _, raw in lines), name, 1))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a valid JSON array: {error}", name, 1) from None


def _with_answers(rows: Iterator[tuple[int, Row]], path: str, name: str) -> Iterator[tuple[int, Row]]:
    answers = _parse_array(read_lines(path, "a JSON array of answers"), path)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError("expected a JSON array of strings", path)
    missing = object()
    for row, answer in itertools.zip_longest(rows, answers, fillvalue=missing):
        if row is missing or answer is missing:
            raise DataError(f"{name} and {path} have not the same number of rows and answers", name)
        yield row[0], {**row[1], "answer": answer}


def _fitting(rows: Iterator[tuple[int, Row]], shape: Shape, name: str) -> Iterator[tuple[int, Row]]:
    for number, row in rows:
        if not shape.fits(row):
            raise DataError(f"expected a row with {shape.expected}, found {_keys(row)}", name, number)
        yield number, row


def _gathered(rows: Iterator[tuple[int, Row]], shape: Shape, name: str) -> Iterator[tuple[int, Row]]:
    """{"pairs": [...]} for each run of rows with one key."""
    seen: set[object] = set()

    def key(numbered: tuple[int, Row]) -> object:
        number, row = numbered
        found = shape.key(row)
        if not isinstance(found, (str, int)):
            raise DataError(f"a query must be a string, not {type(found).__name__}", name, number)
        return found

    for query, group in itertools.groupby(rows, key):
        group = list(group)
        if query in seen:
            raise DataError(f"the query {str(query)[:60]!r} comes again; sort the rows by query", name, group[0][0])
        seen.add(query)
        yield group[0][0], {"pairs": [row for _, row in group]}


def write_rows(path: Path, lists: Iterable[RankingList], shape: str) -> None:
    """Writes ranking lists in a shape of WRITERS, gzip where the path ends in .gz; it appears whole or not at all.

    What a shape cannot say is left out: ids (columns, flag_embedding), labels but for their order (rank_llm, run).
    Raises DataError for an unknown shape, and for lists that lack what it needs: labels, or ids for a run.
    """
    if shape not in WRITERS:
        raise DataError(f"there is no shape {shape!r} to write; known are {', '.join(WRITERS)}")
    WRITERS[shape](expand_path(path), lists)


def _labels(ranking: RankingList, path: str) -> tuple[float, ...]:
    if ranking.labels is None:
        raise DataError(f"the list of query {ranking.query[:60]!r} has no labels, which this shape needs", path)
    return ranking.labels


def _require_ids(ranking: RankingList, path: str) -> None:
    if ranking.query_id is None or ranking.document_ids is None:
        raise DataError(f"the list of query {ranking.query[:60]!r} has no ids, which this shape needs", path)


def _best_first(ranking: RankingList, path: str) -> list[int]:
    labels = _labels(ranking, path)
    return sorted(range(len(ranking)), key=lambda place: -labels[place])


def _writer(to_row: Callable[[RankingList, str], Iterable[dict]]) -> Callable[[str, Iterable[RankingList]], None]:
    def write(path: str, lists: Iterable[RankingList]) -> None:
        with write_aside(path) as file:
            for ranking in lists:
                for row in to_row(ranking, path):
                    file.write(clean_text(json.dumps(row, ensure_ascii=False)) + "\n")

    return write


def _columns_row(ranking: RankingList, path: str) -> Iterator[dict]:
    labels = list(_labels(ranking, path))
    yield {"query": ranking.query, "docs": list(ranking.documents), "labels": labels}


def _flag_embedding_row(ranking: RankingList, path: str) -> Iterator[dict]:
    labels = _labels(ranking, path)
    sides: dict[bool, list[int]] = {True: [], False: []}
    for place, label in enumerate(labels):
        sides[label > 0].append(place)
    yield {
        "query": ranking.query,
        "pos": [ranking.documents[place] for place in sides[True]],
        "neg": [ranking.documents[place] for place in sides[False]],
        "pos_scores": [labels[place] for place in sides[True]],
        "neg_scores": [labels[place] for place in sides[False]],
    }


def _rank_llm_row(ranking: RankingList, path: str) -> Iterator[dict]:
    order = _best_first(ranking, path)
    ids = ranking.document_ids or tuple(map(str, range(len(ranking))))
    yield {
        "query": {"text": ranking.query, "qid": ranking.query_id},
        "candidates": [
            {"docid": ids[place], "score": float(len(order) - rank), "doc": {"text": ranking.documents[place]}}
            for rank, place in enumerate(order)
        ],
    }


def _named_pairs_row(ranking: RankingList, path: str) -> Iterator[dict]:
    _require_ids(ranking, path)
    for text, name, label in zip(ranking.documents, ranking.document_ids, _labels(ranking, path), strict=True):
        row = {"query_id": ranking.query_id, "doc_id": name, "query": ranking.query, "text": text}
        yield row | {"score": label}


def _write_as_run(path: str, lists: Iterable[RankingList]) -> None:
    run = {}
    for ranking in lists:
        _require_ids(ranking, path)
        if ranking.query_id in run:
            raise DataError(f"two lists have the query id {ranking.query_id!r}", path)
        run[ranking.query_id] = [
            (ranking.document_ids[place], float(ranking.labels[place])) for place in _best_first(ranking, path)
        ]
    write_run(path, run)


WRITERS: dict[str, Callable[[str, Iterable[RankingList]], None]] = {
    "lists": write_lists,
    "columns": _writer(_columns_row),
    "flag_embedding": _writer(_flag_embedding_row),
    "rank_llm": _writer(_rank_llm_row),
    "named_pairs": _writer(_named_pairs_row),
    "run": _write_as_run,
}
