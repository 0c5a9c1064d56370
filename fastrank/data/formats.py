"""Readers and writers of the files of the field: judgments, queries, documents, ranking lists.

In: a path, plain or gzip. Out: plain dictionaries by id, or RankingLists. A line that does not fit raises DataError
with file, line number and what was expected; nothing is guessed and no line is dropped. Blank lines are skipped.
TREC columns are cut at ASCII white space, so that ids may hold any other character.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fastrank.data import catalogue
from fastrank.data.files import DataError, clean_text, decode, expand_path, name_of, read_lines, write_aside
from fastrank.data.ranking_list import RankingList
from fastrank.data.scored_ids import is_table, read_table
from fastrank.data.store import Store, open_store

Path = str | os.PathLike[str]

QUERY_ID_KEYS = ("_id", "qid", "query_id", "id")
QUERY_TEXT_KEYS = ("text", "query")
DOCUMENT_ID_KEYS = ("id", "_id", "docid", "doc_id", "passage_id")
DOCUMENT_TEXT_KEYS = ("text", "content", "page_content", "passage")
_QRELS_LINE = "query-id iteration document-id grade"
_BEIR_QRELS_HEADER = [b"query-id", b"corpus-id", b"score"]


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read relevance judgments as {query id: {document id: grade}}.

    path: TREC qrels of 4 columns, or BEIR's 3 columns under the header `query-id corpus-id score`; or
    `ir_datasets:ID` (fastrank.data.catalogue).
    Raises DataError for a wrong number of columns, a grade that is no whole number, or a document that is judged twice
    for one query with different grades.
    """
    path = expand_path(path)
    qrels: dict[str, dict[str, int]] = {}
    if catalogue.is_catalogued(path):
        for query_id, document_id, grade in catalogue.read_judgments(path):
            qrels.setdefault(query_id, {})[document_id] = grade
        return qrels
    columns, shape = 4, _QRELS_LINE
    for line, raw in read_lines(path, _QRELS_LINE):
        fields = raw.split()
        if line == 1 and fields == _BEIR_QRELS_HEADER:
            columns, shape = 3, "query-id corpus-id score"
            continue
        if len(fields) != columns:
            raise DataError(f"expected {columns} columns ({shape}), found {len(fields)}", path, line)
        query_id, document_id = (decode(fields[0], path, line), decode(fields[columns - 2], path, line))
        grade = whole_number(fields[columns - 1], "grade", path, line)
        known = qrels.setdefault(query_id, {}).setdefault(document_id, grade)
        if known != grade:
            raise DataError(
                f"document {document_id!r} is judged twice for query {query_id!r}, {known} and {grade}", path, line
            )
    if not qrels:
        raise DataError("the file holds a header and no judgment", path)
    return qrels


def read_queries(path: Path) -> dict[str, str]:
    """Read queries as {query id: text}.

    path: `id TAB text` lines, or JSON objects with an id (_id, qid, query_id, id) and a text (text, query); told by
    the name's ending (.tsv, .txt, .jsonl, .json, before .gz), else by the first character; or such rows in .parquet or
    on the hub (`hub:owner/name?config=queries`); or `ir_datasets:ID`.
    Raises DataError for a line of another shape or an id that comes twice.
    """
    path = expand_path(path)
    queries: dict[str, str] = {}
    for line, query_id, text in _read_texts(path, "query", QUERY_ID_KEYS, QUERY_TEXT_KEYS):
        if query_id in queries:
            raise DataError(f"the query id {query_id!r} comes twice", path, line)
        queries[query_id] = text
    return queries


def read_documents(path: Path, *, wanted: Collection[str] | None = None) -> dict[str, str]:
    """Read documents as {document id: text}; a title goes before its text, with one space between.

    path: JSON objects with an id (id, _id, docid, doc_id, passage_id), a text (text, content, passage) and perhaps a
    title, or `id TAB text` lines; these, and other files and names, told apart as in read_queries.
    wanted: keep only these ids (a set), so that a large collection does not fill the memory; every line is checked.
    Raises DataError for a line of another shape or a kept id that comes twice.
    """
    path = expand_path(path)
    documents: dict[str, str] = {}
    for line, document_id, text in _read_texts(path, "document", DOCUMENT_ID_KEYS, DOCUMENT_TEXT_KEYS):
        if wanted is not None and document_id not in wanted:
            continue
        if document_id in documents:
            raise DataError(f"the document id {document_id!r} comes twice", path, line)
        documents[document_id] = text
    return documents


def open_documents(path: Path) -> Store:
    """Documents as UTF-8 by id, in a store that holds a large file on disk; read and checked as in read_documents."""
    return _open_texts(path, "document", DOCUMENT_ID_KEYS, DOCUMENT_TEXT_KEYS)


def open_queries(path: Path) -> Store:
    """Queries as UTF-8 by id, as open_documents; DataError for an id that comes twice."""
    store = _open_texts(path, "query", QUERY_ID_KEYS, QUERY_TEXT_KEYS)
    if repeated := store.repeated():
        raise DataError(f"the query id {store.record(min(repeated))[0]!r} comes twice", expand_path(path))
    return store


def _open_texts(path: Path, noun: str, id_keys: Sequence[str], text_keys: Sequence[str]) -> Store:
    path = expand_path(path)

    def records() -> Iterator[tuple[str, bytes]]:
        return ((name, text.encode()) for _, name, text in _read_texts(path, noun, id_keys, text_keys))

    return open_store(path, noun + catalogue.hub_state(path), records, is_fixed=catalogue.is_named(path))


def read_lists(path: Path) -> list[RankingList]:
    """Read JSON lines {query, documents, labels} as RankingLists.

    path: the file; "-" = standard input. documents: strings, or objects with text or content, perhaps title and id;
    labels (optional): one number per document; query_id (optional). Other keys are left alone.
    Raises DataError for a line of another shape.
    """
    path = path if path == "-" else expand_path(path)
    name = name_of(path)
    expected = '{"query": ..., "documents": [...], "labels": [...]}'
    return [
        ranking_list_from(parse_json_object(raw, name, line), name, line) for line, raw in read_lines(path, expected)
    ]


def ranking_list_from(row: Mapping, path: object = None, line: int | None = None) -> RankingList:
    """Build a RankingList from a mapping {query, documents, labels?, query_id?}; DataError with `path` and `line`.

    Documents are strings or mappings as in read_lists; their ids are kept where every document has one.
    """
    if "query" not in row or "documents" not in row:
        missing = "query" if "query" not in row else "documents"
        found = ", ".join(map(repr, row)) or "none"
        raise DataError(f"the key {missing!r} is missing; found {found}", path, line)
    query_id = next((row[key] for key in ("query_id", "qid") if row.get(key) is not None), None)
    if not isinstance(row["query"], str):
        raise DataError(f"'query' must be a string, not {type(row['query']).__name__}", path, line)
    if isinstance(row["documents"], (str, bytes, Mapping)) or not isinstance(row["documents"], Iterable):
        raise DataError(f"'documents' must be an array, not {type(row['documents']).__name__}", path, line)
    texts: list[str] = []
    ids: list[str] = []
    for position, document in enumerate(row["documents"]):
        where = f"document {position}"
        if isinstance(document, str):
            texts.append(clean_text(document))
            continue
        if not isinstance(document, Mapping):
            raise DataError(
                f"{where} must be a string or an object with a text, not {type(document).__name__}", path, line
            )
        texts.append(_text_of(document, DOCUMENT_TEXT_KEYS, where, path, line))
        if any(document.get(key) is not None for key in DOCUMENT_ID_KEYS):
            ids.append(_id_of(document, DOCUMENT_ID_KEYS, where, path, line))
    if 0 < len(ids) < len(texts):
        raise DataError(f"{len(ids)} of {len(texts)} documents have an id; give all of them one, or none", path, line)
    try:
        return RankingList(
            query=clean_text(row["query"]),
            documents=tuple(texts),
            labels=row.get("labels"),
            query_id=None if query_id is None else _as_id(query_id, "query_id", path, line),
            document_ids=tuple(ids) if ids else None,
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(str(error), path, line) from None


def write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Write {query id: {document id: grade}} as TREC qrels; ValueError for an id that cannot stand in a column."""
    with write_aside(expand_path(path)) as file:
        for query_id, grades in qrels.items():
            query_column = column(query_id, "query id")
            for document_id, grade in grades.items():
                document_column = column(document_id, "document id")
                if isinstance(grade, bool) or grade != int(grade):
                    raise ValueError(f"the grade {grade!r} of document {document_id!r} is not a whole number")
                file.write(f"{query_column} 0 {document_column} {int(grade)}\n")


def write_lists(path: Path, lists: Iterable[RankingList]) -> None:
    """Write RankingLists as JSON lines that read_lists reads back equal (lone surrogates become U+FFFD)."""
    with write_aside(expand_path(path)) as file:
        for ranking in lists:
            file.write(to_json(ranking) + "\n")


def to_json(ranking: RankingList) -> str:
    """One line as write_lists writes it."""
    documents: list[object] = [clean_text(text) for text in ranking.documents]
    if ranking.document_ids is not None:
        documents = [
            {"id": clean_text(name), "text": text} for name, text in zip(ranking.document_ids, documents, strict=True)
        ]
    row: dict[str, object] = {"query": clean_text(ranking.query), "documents": documents}
    if ranking.query_id is not None:
        row = {"query_id": clean_text(ranking.query_id), **row}
    if ranking.labels is not None:
        row["labels"] = ranking.labels
    return json.dumps(row, ensure_ascii=False)


def parse_json_object(raw: bytes, path: object, line: int) -> dict:
    """The JSON object of one line; DataError where it is something else."""
    text = decode(raw, path, line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON at column {error.colno}: {error.msg}", path, line) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not usable JSON: {error}", path, line) from None
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {type(row).__name__}", path, line)
    return row


def _read_texts(
    path: str, noun: str, id_keys: Sequence[str], text_keys: Sequence[str]
) -> Iterator[tuple[int, str, str]]:
    if catalogue.is_catalogued(path):
        for place, (name, text) in enumerate(catalogue.read_texts(path, noun), start=1):
            yield place, clean_text(name), clean_text(text)
        return
    if is_table(path):
        for number, row in read_table(path):
            yield number, _id_of(row, id_keys, noun, path, number), _text_of(row, text_keys, noun, path, number)
        return
    tabs = has_tabs(path)
    expected = f"{noun} id TAB text" if tabs else f"JSON objects with {id_keys[0]!r} and {text_keys[0]!r}"
    for line, raw in read_lines(path, expected):
        if tabs is None:
            tabs = not raw.lstrip().startswith(b"{")
        if not tabs:
            row = parse_json_object(raw, path, line)
            yield (line, _id_of(row, id_keys, noun, path, line), _text_of(row, text_keys, noun, path, line))
            continue
        fields = decode(raw, path, line).split("\t")
        if len(fields) != 2:
            raise DataError(f"expected 2 columns ({noun} id TAB text), found {len(fields)}", path, line)
        if not fields[0].strip():
            raise DataError(f"the {noun} id before the tab is empty", path, line)
        yield line, fields[0].strip(), fields[1]


def has_tabs(path: str) -> bool | None:
    """Whether lines are columns and not JSON, by the file's name; None where the name says nothing."""
    name = path.lower().removesuffix(".gz")
    if name.endswith((".tsv", ".txt")):
        return True
    return False if name.endswith((".jsonl", ".json", ".ndjson")) else None


def _id_of(row: Mapping, keys: Sequence[str], noun: str, path: object, line: int | None) -> str:
    for key in keys:
        if row.get(key) is not None:
            return _as_id(row[key], f"{key!r} of the {noun}", path, line)
    raise DataError(f"the {noun} has no id; expected one of {', '.join(keys)}", path, line)


def _as_id(value: object, name: str, path: object, line: int | None) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{name} must be a string or a whole number, found {value!r}", path, line)
    return clean_text(str(value))


def _text_of(row: Mapping, keys: Sequence[str], noun: str, path: object, line: int | None) -> str:
    for key in keys:
        if key in row:
            text, title = row[key], row.get("title")
            if not isinstance(text, str):
                raise DataError(f"{key!r} of the {noun} must be a string, not {type(text).__name__}", path, line)
            if title is not None and not isinstance(title, str):
                raise DataError(f"'title' of the {noun} must be a string, not {type(title).__name__}", path, line)
            return clean_text(f"{title} {text}" if title and text else title or text)
    raise DataError(f"the {noun} has no text; expected one of {', '.join(keys)}", path, line)


def whole_number(raw: bytes, noun: str, path: str, line: int, minimum: int | None = None) -> int:
    try:
        # int() would read "1_000" as 1000.
        number = int(raw) if b"_" not in raw else None
    except ValueError:
        number = None
    if number is None or not -(2**63) <= number < 2**63 or (minimum is not None and number < minimum):
        from_where = "" if minimum is None else f" from {minimum}"
        shown = decode(raw, path, line)
        raise DataError(f"the {noun} must be a whole number{from_where}, found {shown!r}", path, line)
    return number


def column(text: str, noun: str) -> str:
    # Only what bytes.split() cuts at ends a column; other Unicode spaces may stand in an id.
    encoded = clean_text(text).encode()
    if encoded.split() != [encoded]:
        raise ValueError(f"the {noun} {text!r} is empty or has white space in it, which a TREC file cannot hold")
    return encoded.decode()
