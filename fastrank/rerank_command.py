"""The `rerank` verb: a TREC run with its queries and documents, or JSON lines of lists, in; the same re-ranked, out.

Lists are read, scored and (as JSON lines) written in blocks, so that a file of any length needs little memory. Texts
are read as in training: a document's title goes before its text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastrank.command_line import OneSentenceParser, with_underscores
from fastrank.data import DataError, read_documents, read_queries, read_ranked_run, write_run
from fastrank.data.files import clean_text, expand_path, read_lines, write_aside
from fastrank.data.formats import parse_json_object, ranking_list_from
from fastrank.ranking import ID_KEYS, Ranking

if TYPE_CHECKING:
    from fastrank.reranker import Reranker

BLOCK_DOCUMENTS = 1024  # documents that are scored together; also what lies in memory at once
OPTIONS = (
    "device",
    "dtype",
    "max_length",
    "max_query_tokens",
    "max_document_tokens",
    "max_batch_tokens",
    "num_threads",
)
LIST_LINE = '{"query": ..., "documents": [...]}'


def rerank_command(argv: Sequence[str]) -> int:
    """Runs `fastrank rerank`; returns the exit status, 2 after one sentence on stderr for bad input."""
    try:
        options = _parse(with_underscores(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"fastrank rerank: {message}", file=sys.stderr)
            _run(options)
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"fastrank rerank: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    import huggingface_hub
    import transformers

    from fastrank.reranker import Reranker

    for library in (huggingface_hub, transformers):
        library.logging.set_verbosity_error()  # their retries and hints would surround the one sentence of an error
    # What is wrong with the files shows before the model is loaded.
    _check_output(options.output)
    blocks = _lists_of_run(options) if options.run else None
    model_options = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    reranker = Reranker(options.model, activation=options.activation, **model_options)
    if blocks is None:
        _rerank_lines(reranker, options)
    else:
        run: dict[str, list[tuple[str, float]]] = {}
        for block in blocks:
            for (query_id, _, ids, _), ranking in zip(block, _rank(reranker, block, options), strict=True):
                run[query_id] = [(ids[item.index], item.score) for item in ranking]
            if sys.stderr.isatty():
                print(f"\r{len(run)} queries re-ranked", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        with _output_file(options.output) as path:
            write_run(path, run, tag=options.tag)
    if reranker.num_truncated:
        print(f"{reranker.num_truncated} pairs were cut to the token limits.", file=sys.stderr)


def _rank(reranker: Reranker, block: Sequence[tuple], options: argparse.Namespace) -> list[Ranking]:
    queries, documents = [row[1] for row in block], [row[3] for row in block]
    return reranker.rank(queries, documents, top_k=options.top_k)


def _lists_of_run(options: argparse.Namespace) -> Iterator[list[tuple[str, str, list[str], list[str]]]]:
    """Blocks of (query id, query, document ids, documents), in the run's order; all ids are checked at once."""
    path = expand_path(options.run)
    run, queries = read_ranked_run(path), read_queries(options.queries)
    for query_id, rows in run.items():
        if query_id not in queries:
            raise DataError(f"the query {query_id!r} is not in {options.queries}", path, rows.lines[0])
    places = {
        query_id: sorted(range(len(rows.ranks)), key=rows.ranks.__getitem__)[: options.depth]
        for query_id, rows in run.items()
    }
    wanted = {run[query_id].document_ids[i] for query_id, kept in places.items() for i in kept}
    documents = read_documents(options.documents, wanted=wanted)
    for query_id, kept in places.items():
        for i in kept:
            if (document := run[query_id].document_ids[i]) not in documents:
                raise DataError(
                    f"the document {document!r} is not in {options.documents}", path, run[query_id].lines[i]
                )

    def rows() -> Iterator[tuple[str, str, list[str], list[str]]]:
        for query_id, kept in places.items():
            ids = [run[query_id].document_ids[i] for i in kept]
            yield query_id, queries[query_id], ids, [documents[document] for document in ids]

    return _blocks(rows())


def _rerank_lines(reranker: Reranker, options: argparse.Namespace) -> None:
    with _output_stream(options.output) as output:
        for block in _blocks(_read_rows(options.input)):
            for (row, _, ids, _), ranking in zip(block, _rank(reranker, block, options), strict=True):
                results = [
                    {"index": item.index, "score": item.score}
                    | ({} if ids[item.index] is None else {"id": ids[item.index]})
                    for item in ranking
                ]
                kept = {key: row[key] for key in ("query_id", "qid", "query") if key in row}
                text = json.dumps(kept | {"results": results}, ensure_ascii=False)
                # A lone surrogate of an id leaves as the JSON escape that it came as.
                print(text.encode("utf-8", "backslashreplace").decode(), file=output)
            output.flush()


def _read_rows(path: str) -> Iterator[tuple[dict[str, Any], str, list[Any], Sequence[str]]]:
    """(the parsed line, its query, its documents' ids or None, their texts) of each line."""
    name = "<stdin>" if path == "-" else expand_path(path)
    for line, raw in read_lines(path if path == "-" else name, LIST_LINE):
        row = parse_json_object(raw, name, line)
        documents = row.get("documents")
        ids = []
        if isinstance(documents, list):
            # Ids only come back, so unlike in training some may lack and some may be equal.
            ids = [
                next((one[key] for key in ID_KEYS if one.get(key) is not None), None) if isinstance(one, dict) else None
                for one in documents
            ]
            documents = [
                {key: value for key, value in one.items() if key not in ID_KEYS} if isinstance(one, dict) else one
                for one in documents
            ]
        readable = {key: value for key, value in row.items() if key not in ("documents", "labels", "query_id", "qid")}
        ranking = ranking_list_from(readable | ({} if documents is None else {"documents": documents}), name, line)
        yield row | {"query": clean_text(row["query"])}, ranking.query, ids, ranking.documents


def _blocks(rows: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Runs of rows with at least BLOCK_DOCUMENTS documents together, the last one shorter."""
    rows = iter(rows)
    for first in rows:
        block, size = [first], len(first[3])
        while size < BLOCK_DOCUMENTS and (row := next(rows, None)) is not None:
            block.append(row)
            size += max(1, len(row[3]))
        yield block


def _check_output(path: str) -> None:
    """Refuses now what could not be written once all is scored."""
    if path == "-":
        return
    target = Path(expand_path(path))
    if target.is_dir():
        raise DataError("is a folder; --output must name a file", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise DataError(f"the folder {target.parent} cannot be written to", path)


@contextlib.contextmanager
def _output_stream(path: str) -> Iterator[TextIO]:
    if path != "-":
        with write_aside(expand_path(path)) as stream:
            yield stream
        return
    _use_utf8()
    yield sys.stdout


@contextlib.contextmanager
def _output_file(path: str) -> Iterator[str]:
    """A path to write to whose content ends up on stdout where `path` is "-"."""
    if path != "-":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "run"
        yield str(aside)
        _use_utf8()
        with open(aside, encoding="utf-8") as file:
            shutil.copyfileobj(file, sys.stdout)
        sys.stdout.flush()


def _use_utf8() -> None:
    # Under the C locale Python would write ASCII. A stream that replaces stdout in a test cannot be reconfigured.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _positive(word: str) -> int:
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1")
    return number


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneSentenceParser(
        prog="fastrank rerank",
        description="Re-ranks a TREC run (--run --queries --documents --output) or JSON lines (--input).",
    )
    flag = parser.add_argument
    flag("--model", help='folder, hub name or "demo"; default: cross-encoder/ms-marco-MiniLM-L6-v2')
    flag("--run", help="TREC run, plain or .gz")
    flag("--queries", help="id TAB text, or JSON lines")
    flag("--documents", help="JSON lines with an id and a text, or id TAB text")
    flag("--input", help=f"JSON lines {LIST_LINE}; - reads stdin")
    flag("--output", default="-", help="file, written when all is done (.gz where so named); default: - for stdout")
    flag("--top_k", type=_positive, help="documents written for each query; default: all")
    flag(
        "--depth", type=_positive, help="documents of the run that are re-ranked for each query, by rank; default: all"
    )
    flag("--activation", choices=("none", "sigmoid"), help="default: what the checkpoint's config says")
    flag("--tag", default="fastrank", help="last column of a written run")
    flag("--device")
    flag("--dtype")
    for name in OPTIONS[2:]:
        flag(f"--{name}", type=_positive)
    options = parser.parse_args(argv)
    if options.model is None:
        from fastrank.reranker import DEFAULT_MODEL

        options.model = DEFAULT_MODEL
    if (options.run is None) == (options.input is None):
        parser.error("give either --run (with --queries and --documents) or --input")
    needed = [f"--{name}" for name in ("queries", "documents") if options.run and getattr(options, name) is None]
    unused = [
        f"--{name}"
        for name in ("queries", "documents", "depth")
        if options.input and getattr(options, name) is not None
    ]
    if needed:
        parser.error(f"--run needs {' and '.join(needed)} too")
    if unused:
        parser.error(f"{' and '.join(unused)} belong{'s' if len(unused) == 1 else ''} to --run, not to --input")
    return options
