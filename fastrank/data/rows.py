"""Rows with texts in them, as other tools write them, in; RankingLists out; and back.

The one idea: every shape of a row becomes the mapping {query, documents, labels} that fastrank's own lists have, which
one function checks. A shape is told by its keys. Rows of single pairs are gathered by query, so they must stand
together. Files are read row by row: JSON lines, tab separated columns or parquet, or a data set of the hub; a JSON
array, and objects of several lines each, are read whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastrank.data.files import DataError, clean_text, decode, expand_path, name_of, read_lines, write_aside
from fastrank.data.formats import Path, has_tabs, parse_json_object, ranking_list_from, write_lists
from fastrank.data.histories import Replayed, query_key, read_window, replay
from fastrank.data.permutations import parse_permutation
from fastrank.data.ranking_list import RankingList
from fastrank.data.runs import write_run
from fastrank.data.scored_ids import is_table, read_table

Row = Mapping[str, object]
TEXT_KEYS = ("text", "segment", "contents", "content", "body", "passage")  # of a document, as rank_llm looks for them
QUERY_ID_KEYS = ("query_id", "qid")
QUERY_KEYS = ("query", "anchor", "question")
PAIR_TEXT_KEYS = ("passage", "document", "answer", "text", "positive")
_NEGATIVE = re.compile("negative(_[0-9]+)?")
HISTORY_KEYS = ("invocations_history", "ranking_exec_summary")  # rank_llm's name for it today, and the one before
_ANSWER = "fastrank: answer"  # what _with_answers adds to a row
_WINDOWS = "fastrank: windows"  # of a mapping whose labels are an LLM's answers, still to be replayed
_SEPARATORS = re.compile(r"[\s,]*")  # between JSON values in one file
TRIPLE_COLUMNS = ("query", "positive", "negative")
TOP1000_COLUMNS = ("query_id", "doc_id", "query", "text")


def read_rows(
    path: Path,
    shape: str | None = None,
    *,
    permutations: Path | None = None,
    policy: str = "repair",
    counts: Counter[str] | None = None,
) -> Iterator[RankingList]:
    """Reads ranking lists of any shape in SHAPES, one after the other.

    Arguments:
        path: JSON lines or an array of objects, .tsv of 3 columns (query, relevant text, other text) or 4 (MS MARCO's
            top1000: query id, document id, query, text), each plain or .gz; or .parquet; or a data set of the Hugging
            Face hub, `hub:owner/name?config=triplet&split=train`, as catalogue.read_hub_rows takes it. "-" = standard
            input.
        shape: a name in SHAPES; default: told by the keys of the first row.
        permutations: an LLM's answers, which then make the labels. For `rankgpt` a JSON array with one answer ("[3] >
            [1] > ...") a row; for other rows rank_llm's history of the same queries, told by id or else by text, which
            ranks their documents with the texts and the ids that they have there.
        policy: of parse_permutation, for answers that are not well formed; a row with an answer that is dropped gives a
            list without documents.
        counts: receives how many answers had each of parse_permutation's statuses, and how many no row asked for.

    Labels are those of the row; the scores of FlagEmbedding's teacher; 1 and 0 for what is named relevant or not; or,
    where a row is only an order (rank_llm, rankgpt's permutations), n for its first document down to 1.

    Histories (`history`; `prompts` in rank_llm's first form) hold prompts and raw responses, which are read anew with
    parse_permutation, window after window, whatever order rank_llm made of them; where candidates lie beside, these are
    the documents, and else the passages as the prompts show them, in the order before the first answer. Candidates
    without any answer keep their order, unless the policy is "drop".
    Raises DataError, with file and row, for a row of another shape, for a query whose pairs do not stand together and
    for windows that do not follow from each other.
    """
    path = path if path == "-" else expand_path(path)
    name = name_of(path)
    counts = Counter() if counts is None else counts
    if shape is not None and shape not in SHAPES:
        raise DataError(f"there is no shape {shape!r} of rows; known are {', '.join(SHAPES)}", name)
    chosen, rows = _with_shape(_read(path), shape, name)
    if permutations is None and policy != "repair" and chosen not in _ANSWERED:
        raise DataError(f"the policy {policy!r} needs rows with answers, or permutations, which it is about", name)
    histories = None
    if permutations is not None:
        if chosen in _ANSWERED:
            raise DataError("permutations do not go with rows that hold answers themselves", name)
        permutations = expand_path(permutations)
        if chosen is SHAPES["rankgpt"]:
            rows = _with_answers(rows, permutations, policy, counts, name)
        else:
            histories = _Histories(permutations, policy)
    for number, mapping in _mappings(rows, chosen, name):
        windows = mapping.get(_WINDOWS)
        ranking = ranking_list_from(mapping, name, number)
        try:
            if histories is not None:
                ranking = histories.rank(ranking, counts)
            elif windows:
                replayed = replay(windows, policy)
                counts.update(replayed.counts)
                ranking = _ranked(ranking, replayed)
            elif windows is not None:
                counts["missing, so that candidates keep their order"] += 1
                if policy == "drop":
                    ranking = RankingList(ranking.query, (), (), ranking.query_id)
        except ValueError as error:
            raise DataError(str(error), name, number) from None
        yield ranking
    if histories is not None and (num_unused := histories.num_unused()):
        counts["of queries that no row has"] += num_unused


def _with_shape(
    rows: Iterator[tuple[int, Row]], shape: str | None, name: str
) -> tuple[Shape, Iterator[tuple[int, Row]]]:
    try:
        number, first = next(rows)
    except StopIteration:
        raise DataError("the file holds no row", name) from None
    return SHAPES[shape] if shape else _recognise(first, name, number), itertools.chain([(number, first)], rows)


def _mappings(rows: Iterator[tuple[int, Row]], shape: Shape, name: str) -> Iterator[tuple[int, dict]]:
    read = _read_each(rows, shape, name)
    return read if shape.gather is None else _gathered(read, shape, name)


def _ranked(ranking: RankingList, replayed: Replayed) -> RankingList:
    """The list with labels from the answers; it has the documents of the prompts where it has none of its own."""
    if replayed.ranks is None:
        return RankingList(ranking.query, (), (), ranking.query_id)
    if not ranking.documents:
        texts = tuple(map(clean_text, replayed.texts))
        return RankingList(ranking.query, texts, replayed.labels(), ranking.query_id)
    return dataclasses.replace(ranking, labels=replayed.labels_among(ranking.documents))


class _Histories:
    """What the answers of a history file make of its queries, by query id and by text: held in memory, with the
    passages of its prompts."""

    def __init__(self, path: str, policy: str) -> None:
        self._path = path
        self._by_id: dict[str, Replayed] = {}
        self._by_text: dict[str, Replayed | None] = {}  # None: queries of several ids have this text
        self._unused: dict[int, Replayed] = {}
        shape, rows = _with_shape(_read(path), None, path)
        if shape not in _ANSWERED:
            raise DataError("expected rank_llm's history of prompts and responses", path)
        for number, mapping in _mappings(rows, shape, path):
            query = ranking_list_from(mapping | {"documents": (), "labels": None}, path, number)
            text = query_key(query.query)
            if query.query_id in self._by_id or (query.query_id is None and text in self._by_text):
                raise DataError(f"the query {query.query_id or query.query[:60]!r} comes twice", path, number)
            if not mapping[_WINDOWS]:
                continue
            try:
                replayed = replay(mapping[_WINDOWS], policy)
            except ValueError as error:
                raise DataError(str(error), path, number) from None
            if query.query_id is not None:
                self._by_id[query.query_id] = replayed
            self._by_text[text] = None if text in self._by_text else replayed
            self._unused[id(replayed)] = replayed

    def rank(self, ranking: RankingList, counts: Counter[str]) -> RankingList:
        text = query_key(ranking.query)
        replayed = self._by_id.get(ranking.query_id) or self._by_text.get(text)
        if replayed is None:
            found = "several answers" if text in self._by_text else "no answer"
            raise ValueError(f"{self._path} has {found} for the query {ranking.query_id or ranking.query[:60]!r}")
        if self._unused.pop(id(replayed), None):
            counts.update(replayed.counts)
        try:
            return _ranked(ranking, replayed)
        except ValueError as error:
            raise ValueError(f"{error}, in {self._path}") from None

    def num_unused(self) -> int:
        return sum(replayed.counts.total() for replayed in self._unused.values())


def _read_each(rows: Iterator[tuple[int, Row]], shape: Shape, name: str) -> Iterator[tuple[int, dict]]:
    for number, row in rows:
        if not shape.fits(row):
            raise DataError(f"expected a row with {shape.expected}, found {_keys(row)}", name, number)
        try:
            mapping = shape.read(row)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"expected a row with {shape.expected}: {reason}", name, number) from None
        yield number, mapping


@dataclass(frozen=True)
class Shape:
    """How rows look: which fit, what is expected of them in words, and what they are as a fastrank list.

    gather: for rows of single pairs, what makes one list of the `read` pairs that follow each other and have the same
    "key"; the list is not empty.
    """

    fits: Callable[[Row], bool]
    expected: str
    read: Callable[[Row], dict]
    gather: Callable[[Sequence[dict]], dict] | None = None


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


def _query_id(row: Row) -> object:
    return row[key] if (key := _first(row, QUERY_ID_KEYS)) else None


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key!r} must be a string, not {type(value).__name__}")
    return value


def _with_ids(texts: list, row: Row, key: str) -> list:
    """Documents with the ids of the row's array of this key, where it has one."""
    if row.get(key) is None:
        return texts
    ids = _array(row, key)
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} {key} for {len(texts)} documents")
    return [_document(text, name) for text, name in zip(texts, ids, strict=True)]


def _by_order(count: int) -> list[float]:
    return [float(count - place) for place in range(count)]


def _rank_llm(row: Row) -> dict:
    documents = []
    for candidate in row["candidates"]:
        content = candidate["doc"]
        content = {"text": content} if isinstance(content, str) else content
        key = _first(content, TEXT_KEYS)
        if key is None:
            raise ValueError(f"a document has none of {', '.join(TEXT_KEYS)}")
        documents.append(_document(content[key], candidate.get("docid"), content.get("title")))
    return _rank_llm_query(row) | {"documents": documents, "labels": _by_order(len(documents))}


def _rank_llm_query(row: Row) -> dict:
    query = row["query"]
    if isinstance(query, str):
        return {"query": query}
    if not isinstance(query, Mapping):
        raise TypeError(f"'query' must be a string or an object, not {type(query).__name__}")
    return {"query": query["text"], "query_id": query.get("qid")}


def _history(row: Row) -> dict:
    read = _rank_llm(row) if "candidates" in row else _rank_llm_query(row) | {"documents": []}
    windows = []
    for place, call in enumerate(row[_first(row, HISTORY_KEYS)], start=1):
        try:
            windows.append(read_window(call))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"call {place}: {reason}") from None
    return read | {_WINDOWS: windows}


def _is_history(row: Row) -> bool:
    key = _first(row, HISTORY_KEYS)
    return "query" in row and key is not None and isinstance(row[key], list)


def _prompt(row: Row) -> dict:
    window = read_window(row)
    if not window.query:
        raise ValueError("the prompt does not say 'Search Query: ...', by which rows of one query are told")
    return {"key": query_key(window.query), "query": window.query, "window": window}


def _gather_prompts(prompts: Sequence[dict]) -> dict:
    return {"query": prompts[0]["query"], "documents": [], _WINDOWS: [prompt["window"] for prompt in prompts]}


def _hits(row: Row) -> dict:
    documents = [_document(hit["content"], hit.get("docid")) for hit in row["hits"]]
    query_ids = {str(hit["qid"]) for hit in row["hits"] if hit.get("qid") is not None}
    if len(query_ids) > 1:
        raise ValueError(f"its hits have the query ids {', '.join(sorted(query_ids))}")
    query_id = _query_id(row)
    query_id = next(iter(query_ids), None) if query_id is None else query_id
    labels = _by_order(len(documents))
    return {"query": row["query"], "query_id": query_id, "documents": documents, "labels": labels}


def _rankgpt(row: Row) -> dict:
    retrieved = sorted(row["retrieved_passages"], key=lambda one: one.get("rank", 0))
    if _ANSWER in row:
        answer, policy, counts = row[_ANSWER]
        permutation = parse_permutation(answer, len(retrieved), policy=policy)
        counts[permutation.status] += 1
        labels = permutation.labels()
        if labels is None:
            retrieved, labels = [], []
    else:
        relevant = {_name_of_passage(one): one for one in row.get("positive_passages") or ()}
        labels = [float(_name_of_passage(one) in relevant) for one in retrieved]
        found = {_name_of_passage(one) for one in retrieved}
        missing = [one for name, one in relevant.items() if name not in found]
        retrieved, labels = retrieved + missing, labels + [1.0] * len(missing)
    documents = [_document(one["text"], one.get("docid"), one.get("title")) for one in retrieved]
    return {"query": row["query"], "query_id": _query_id(row), "documents": documents, "labels": labels}


def _name_of_passage(passage: Row) -> str:
    return str(passage["docid"]) if passage.get("docid") is not None else passage["text"]


def _flag_embedding(row: Row) -> dict:
    documents, labels = [], []
    has_scores = row.get("pos_scores") is not None or row.get("neg_scores") is not None
    for side, label in (("pos", 1.0), ("neg", 0.0)):
        texts, scores = _array(row, side), _array(row, f"{side}_scores") if has_scores else None
        if scores is not None and len(scores) != len(texts):
            raise ValueError(f"{len(scores)} {side}_scores for {len(texts)} {side}")
        documents += _with_ids(texts, row, f"{side}_id")
        labels += [label] * len(texts) if scores is None else scores
    return {"query": row["query"], "query_id": _query_id(row), "documents": documents, "labels": labels}


def _columns(row: Row) -> dict:
    labels = row["labels"] if row.get("labels") is not None else row.get("scores")
    documents = _with_ids(_array(row, "docs"), row, "doc_ids")
    return {"query": row["query"], "query_id": _query_id(row), "documents": documents, "labels": labels}


def _evaluator(row: Row) -> dict:
    positive = _array(row, "positive")
    others = _array(row, "negative") + _array(row, "documents")
    known = set(positive)
    documents = [*positive, *(text for text in others if text not in known)]  # all of them may be listed again
    labels = [float(place < len(positive)) for place in range(len(documents))]
    return {"query": row["query"], "query_id": _query_id(row), "documents": documents, "labels": labels}


def _triplet(row: Row) -> dict:
    negatives = [row[key] for key in row if _NEGATIVE.fullmatch(key)]
    documents = [row["positive"]]
    for one in negatives:
        documents += one if isinstance(one, (list, tuple)) else [one]
    labels = [1.0] + [0.0] * (len(documents) - 1)
    key = _first(row, ("scores", "score", "labels", "label", "margin"))
    if key is not None and isinstance(row[key], (list, tuple)):
        labels = list(row[key])
    elif key is not None:  # MarginMSE's: how far the teacher scores the one document above the other
        if len(documents) != 2:
            raise ValueError(f"one {key} for {len(documents)} documents")
        labels = [row[key], 0.0]
    query = row[_first(row, QUERY_KEYS)]
    return {"query": query, "query_id": _query_id(row), "documents": documents, "labels": labels}


def _pair(row: Row) -> dict:
    query_key, text_key = _first(row, QUERY_KEYS), _first(row, PAIR_TEXT_KEYS)
    query = _text(row[query_key], query_key)
    label = row["label"] if row.get("label") is not None else row["score"]
    return {"key": query, "query": query, "document": _text(row[text_key], text_key), "label": label}


def _gather_pairs(pairs: Sequence[dict]) -> dict:
    return {
        "query": pairs[0]["query"],
        "documents": [pair["document"] for pair in pairs],
        "labels": [pair["label"] for pair in pairs],
    }


def _named_pair(row: Row) -> dict:
    if isinstance(row["query_id"], bool) or not isinstance(row["query_id"], (str, int)):
        raise TypeError(f"'query_id' must be a string or a whole number, found {row['query_id']!r}")
    pair = {"key": str(row["query_id"]), "query": _text(row["query"], "query")}
    pair |= {"document": _document(_text(row["text"], "text"), row["doc_id"])}
    for key in ("relevance", "rank", "score"):
        value = row.get(key)
        if value is not None:
            if isinstance(value, (bool, str)) or not math.isfinite(value):
                raise ValueError(f"{key!r} must be a finite number, found {value!r}")
            if key == "rank" and value % 1:
                raise ValueError(f"'rank' must be a whole number, found {value!r}")
            pair[key] = float(value)
    return pair


def _gather_named_pairs(pairs: Sequence[dict]) -> dict:
    if any(pair["query"] != pairs[0]["query"] for pair in pairs):
        raise ValueError(f"the query id {pairs[0]['key']!r} has two texts")
    known = next((key for key in ("relevance", "rank", "score") if any(key in pair for pair in pairs)), None)
    if known is None:
        labels = None
    elif known == "relevance":  # what nobody judged is not relevant, as everywhere
        labels = [pair.get(known, 0.0) for pair in pairs]
    else:
        if not all(known in pair for pair in pairs):
            raise ValueError(f"some pairs of the query {pairs[0]['key']!r} have a {known} and some have none")
        last = max(pair[known] for pair in pairs)
        labels = [last - pair[known] + 1 if known == "rank" else pair[known] for pair in pairs]
    documents = [pair["document"] for pair in pairs]
    return {"query": pairs[0]["query"], "query_id": pairs[0]["key"], "documents": documents, "labels": labels}


def _is_triplet(row: Row) -> bool:
    has_negative = any(map(_NEGATIVE.fullmatch, row))
    return _first(row, QUERY_KEYS) is not None and isinstance(row.get("positive"), str) and has_negative


def _is_pair(row: Row) -> bool:
    labelled = row.get("label") is not None or row.get("score") is not None
    return _first(row, QUERY_KEYS) is not None and _first(row, PAIR_TEXT_KEYS) is not None and labelled


# In the order in which they are tried.
SHAPES: dict[str, Shape] = {
    "history": Shape(_is_history, f"query {{text, qid}} and {HISTORY_KEYS[0]} [{{prompt, response}}, ...]", _history),
    "prompts": Shape(_has("prompt", "response"), "prompt and response", _prompt, _gather_prompts),
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
        _named_pair,
        _gather_named_pairs,
    ),
    "triplet": Shape(_is_triplet, "query, positive and negative (or negative_1, negative_2, ...)", _triplet),
    "pairs": Shape(
        _is_pair,
        f"query, one of {', '.join(PAIR_TEXT_KEYS)}, and label or score",
        _pair,
        _gather_pairs,
    ),
}
_ANSWERED = (SHAPES["history"], SHAPES["prompts"])


def _recognise(row: Row, name: str, number: int) -> Shape:
    for shape in SHAPES.values():
        if shape.fits(row):
            return shape
    raise DataError(f"no shape of rows is known with {_keys(row)}; known are {', '.join(SHAPES)}", name, number)


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row)) or "none")


def _read(path: str) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers: lines of a text file, else places from 1."""
    if is_table(path):
        yield from read_table(path)
        return
    name = name_of(path)
    lines = read_lines(path, "JSON objects or tab separated columns")
    first = next(lines)
    number, raw = first
    has_columns = has_tabs(path)
    if not has_columns and (raw.lstrip().startswith(b"[") or raw.strip() == b"{"):
        for place, row in enumerate(_parse_whole(itertools.chain([first], lines), name), start=1):
            if not isinstance(row, dict):
                raise DataError(f"row {place} must be a JSON object, not {type(row).__name__}", name, place)
            yield place, row
        return
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


def _parse_whole(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[object]:
    """What a JSON array holds, or several that were appended to one file; or objects that follow each other."""
    text = decode(b"\n".join(raw for _, raw in lines), name, 1)
    decoder = json.JSONDecoder()
    place = _SEPARATORS.match(text).end()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a valid JSON array or objects: {error}", name, 1) from None
        place = _SEPARATORS.match(text, place).end()
        yield from value if isinstance(value, list) else [value]


def _with_answers(
    rows: Iterator[tuple[int, Row]], path: str, policy: str, counts: Counter[str], name: str
) -> Iterator[tuple[int, Row]]:
    answers = list(_parse_whole(read_lines(path, "a JSON array of answers"), path))
    if not all(isinstance(answer, str) for answer in answers):
        raise DataError("expected a JSON array of strings", path)
    missing = object()
    for row, answer in itertools.zip_longest(rows, answers, fillvalue=missing):
        if row is missing or answer is missing:
            raise DataError(f"{name} and {path} have not the same number of rows and answers", name)
        yield row[0], {**row[1], _ANSWER: (answer, policy, counts)}


def _gathered(pairs: Iterator[tuple[int, dict]], shape: Shape, name: str) -> Iterator[tuple[int, dict]]:
    """The list that each run of pairs with one key makes, with the number of its first row."""
    seen: set[str] = set()
    for key, group in itertools.groupby(pairs, lambda numbered: numbered[1]["key"]):
        group = list(group)
        number = group[0][0]
        if key in seen:
            raise DataError(f"the query {key[:60]!r} comes again; sort the rows by query", name, number)
        seen.add(key)
        try:
            yield number, shape.gather([pair for _, pair in group])
        except ValueError as error:
            raise DataError(f"in the rows from here on, {error}", name, number) from None


def write_rows(path: Path, lists: Iterable[RankingList], shape: str) -> None:
    """Writes ranking lists in a shape of WRITERS, gzip where the path ends in .gz; it appears whole or not at all.

    What a shape cannot say is left out: labels but for their order (rank_llm, run; rankgpt also keeps whether they are
    above 0). Raises DataError for an unknown shape and for lists that lack what it needs or that it cannot tell apart:
    labels, which must be finite but in lists; and where rows are single pairs, ids, a document and a query id of its
    own.
    """
    if shape not in WRITERS:
        raise DataError(f"there is no shape {shape!r} to write; known are {', '.join(WRITERS)}")
    WRITERS[shape](expand_path(path), lists)


def _labels(ranking: RankingList, path: str) -> tuple[float, ...]:
    if ranking.labels is None:
        raise DataError(f"the list of query {ranking.query[:60]!r} has no labels, which this shape needs", path)
    if not all(map(math.isfinite, ranking.labels)):
        raise DataError(f"the list of query {ranking.query[:60]!r} has an infinite label, which JSON cannot hold", path)
    return ranking.labels


def _with_own_ids(lists: Iterable[RankingList], path: str) -> Iterator[RankingList]:
    """The lists, checked for rows of single pairs: those of one query must be all of its list."""
    seen: set[str] = set()
    for ranking in lists:
        if ranking.query_id is None or ranking.document_ids is None:
            raise DataError(f"the list of query {ranking.query[:60]!r} has no ids, which this shape needs", path)
        if not ranking.documents:
            raise DataError(f"the list of query {ranking.query[:60]!r} has no document to write", path)
        if ranking.query_id in seen:
            raise DataError(f"two lists have the query id {ranking.query_id!r}", path)
        seen.add(ranking.query_id)
        yield ranking


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
    row: dict = {"query": ranking.query, "docs": list(ranking.documents), "labels": list(_labels(ranking, path))}
    if ranking.query_id is not None:
        row["query_id"] = ranking.query_id
    if ranking.document_ids is not None:
        row["doc_ids"] = list(ranking.document_ids)
    yield row


def _flag_embedding_row(ranking: RankingList, path: str) -> Iterator[dict]:
    labels = _labels(ranking, path)
    row: dict = {"query": ranking.query}
    for side in ("pos", "neg"):
        places = [place for place, label in enumerate(labels) if (label > 0) == (side == "pos")]
        row |= {side: [ranking.documents[i] for i in places], f"{side}_scores": [labels[i] for i in places]}
        if ranking.document_ids is not None:
            row[f"{side}_id"] = [ranking.document_ids[i] for i in places]
    if ranking.query_id is not None:
        row["query_id"] = ranking.query_id
    yield row


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


def _rankgpt_row(ranking: RankingList, path: str) -> Iterator[dict]:
    order = _best_first(ranking, path)
    ids = ranking.document_ids or tuple(map(str, range(len(ranking))))
    passages = [
        {"docid": ids[place], "text": ranking.documents[place], "rank": rank}
        for rank, place in enumerate(order, start=1)
    ]
    positive = [passages[rank] for rank, place in enumerate(order) if ranking.labels[place] > 0]
    row: dict = {} if ranking.query_id is None else {"query_id": ranking.query_id}
    yield row | {"query": ranking.query, "positive_passages": positive, "retrieved_passages": passages}


def _named_pairs_row(ranking: RankingList, path: str) -> Iterator[dict]:
    for text, name, label in zip(ranking.documents, ranking.document_ids, _labels(ranking, path), strict=True):
        row = {"query_id": ranking.query_id, "doc_id": name, "query": ranking.query, "text": text}
        yield row | {"score": label}


def _write_as_named_pairs(path: str, lists: Iterable[RankingList]) -> None:
    _writer(_named_pairs_row)(path, _with_own_ids(lists, path))


def _write_as_run(path: str, lists: Iterable[RankingList]) -> None:
    run = {}
    for ranking in _with_own_ids(lists, path):
        order = _best_first(ranking, path)
        run[ranking.query_id] = [(ranking.document_ids[place], ranking.labels[place]) for place in order]
    try:
        write_run(path, run)
    except ValueError as error:
        raise DataError(str(error), path) from None


WRITERS: dict[str, Callable[[str, Iterable[RankingList]], None]] = {
    "lists": write_lists,
    "columns": _writer(_columns_row),
    "flag_embedding": _writer(_flag_embedding_row),
    "rank_llm": _writer(_rank_llm_row),
    "rankgpt": _writer(_rankgpt_row),
    "named_pairs": _write_as_named_pairs,
    "run": _write_as_run,
}
