"""A retrieval corpus that is on every machine: the documentation of the standard library, numpy and torch.

In: the installed sources, parsed and never imported. Out: `DemoCorpus`, three parts of ranking lists with
labels and judgments. A query is the summary sentence of a documentation string, its one relevant document
the rest of that string, its candidates the BM25 top 50 of its part's documents.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastrank.data.bm25 import bm25_run
from fastrank.data.ranking_list import RankingList

CANDIDATES = 50
TRAIN, DEVELOPMENT, TEST = "train", "development", "test"
# Shares of the documents. Each part is searched alone, so that no document is seen in two parts.
_DEVELOPMENT_PERCENT, _TEST_PERCENT = 15, 35
_QUERY_WORDS = (3, 32)
_MAX_QUERY_CHARACTERS = 240
_MIN_DOCUMENT_WORDS, _MAX_DOCUMENT_WORDS = 12, 400
# Folders without documentation worth searching: tests, generated code, vendored and private packages.
_SKIPPED_FOLDERS = {
    "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "pydoc_data",
    "encodings", "core",
}  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+")
_ROLE = re.compile(r":[\w:]+:`~?\.?([^`<]*?)\s*(?:<[^`]*>)?`")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RULER = re.compile(r"([-=~*^#_.])\1{3,}")
_FIELD = re.compile(r"(?<!\{)\{\w*\}(?!\})")
_SIGNATURE = re.compile(r"[\w.]+\s?\(")
_STOPS = ".:!? "
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?:](?=\s|$)")
_SKETCH_SIZE, _SKETCH_SHARED = 12, 7


@dataclass(frozen=True, slots=True)
class DemoPart:
    """One part of the corpus: its lists in BM25 order, and its judgments.

    lists: labelled 1 for the source document of the query and 0 for all others. A query whose source was not
        retrieved has a list of zeros, but its judgment is in `qrels`, so that it counts as missed.
    qrels: {query id: {document id: 1}}. bm25: {query id: {document id: score}}, best first.
    sources: the source document of each list, retrieved or not.
    """

    lists: tuple[RankingList, ...]
    qrels: dict[str, dict[str, int]]
    bm25: dict[str, dict[str, float]]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DemoCorpus:
    """The three parts; no document and no query stands in two of them."""

    train: DemoPart
    development: DemoPart
    test: DemoPart


def build_demo_corpus(
    *,
    num_development: int | None = None,
    num_test: int | None = None,
    num_candidates: int = CANDIDATES,
) -> DemoCorpus:
    """Read the installed documentation and return its ranking lists; the same on every call on one machine.

    num_development, num_test: keep only so many queries of that part (chosen by hash; all documents of the
        part stay searchable); None keeps all. num_candidates: length of a list (shorter in a tiny corpus).
    """
    entries = _deduplicate(map(_summarise, _documentation()))
    parts: dict[str, list[tuple[str, str, str]]] = {TRAIN: [], DEVELOPMENT: [], TEST: []}
    # By hash of the query, so that a sample of the first n is a fair one, and order never depends on a set.
    for key, query, document in sorted((_stable_hash(q), q, d) for q, d in entries):
        parts[_part_of(key)].append((key, query, document))
    return DemoCorpus(
        train=_search(parts[TRAIN], None, num_candidates),
        development=_search(parts[DEVELOPMENT], num_development, num_candidates),
        test=_search(parts[TEST], num_test, num_candidates),
    )


def _documentation() -> Iterator[str]:
    """Yield documentation strings in a fixed order; no module that is only read is ever imported."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for folder in (stdlib, _package_folder("numpy"), _package_folder("torch")):
        if folder is not None:
            for path in _python_files(folder):
                yield from _strings_in_source(path)
    yield from _strings_of_compiled_modules()


def _package_folder(package: str) -> Path | None:
    # For a top-level name find_spec reads no code of the package.
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _python_files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            if not entry.name.startswith(("_", "config-")) and entry.name not in _SKIPPED_FOLDERS:
                yield from _python_files(entry)
        elif entry.suffix == ".py":
            yield entry


def _strings_in_source(path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            # Invalid escapes in other people's sources would warn on every build.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return
    yield from _strings_in_block(tree)


def _strings_in_block(block: ast.AST) -> Iterator[str]:
    """Yield the documentation of a module or class and of its public members, in source order."""
    if isinstance(block, ast.Module | ast.ClassDef):
        yield ast.get_docstring(block) or ""
    for statement in ast.iter_child_nodes(block):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if statement.name.startswith("_") and not statement.name.startswith("__"):
                continue
            if isinstance(statement, ast.ClassDef):
                yield from _strings_in_block(statement)
            else:
                yield ast.get_docstring(statement) or ""
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.For):
            yield from _strings_in_block(statement)
        elif isinstance(statement, ast.Expr | ast.Assign) and isinstance(statement.value, ast.Call):
            # add_docstr(torch.abs, r"""...""".format(...)) and numpy's add_newdoc(place, name, "...").
            if "doc" in _called_name(statement.value):
                for argument in statement.value.args[1:]:
                    yield inspect.cleandoc(_literal_text(argument))


def _called_name(call: ast.Call) -> str:
    function = call.func
    return getattr(function, "id", getattr(function, "attr", ""))


def _literal_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Tuple) and len(node.elts) == 2:
        return _literal_text(node.elts[1])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal_text(node.left) + _literal_text(node.right)
    if isinstance(node, ast.Call) and _called_name(node) == "format":
        text = _literal_text(getattr(node.func, "value", node.func))
        return _FIELD.sub("", text).replace("{{", "{").replace("}}", "}")
    return ""


def _strings_of_compiled_modules() -> Iterator[str]:
    """Yield what has no Python source: the interpreter's own modules, numpy's ufuncs and generators."""
    import numpy

    # Modules compiled into the interpreter have no start-up code that prints or opens windows.
    for name in sorted(sys.builtin_module_names):
        try:
            module = importlib.import_module(name)
        except Exception:
            continue
        yield from _strings_of_members(module, depth=2)
    for _, value in sorted(vars(numpy).items()):
        if isinstance(value, numpy.ufunc):
            yield inspect.cleandoc(value.__doc__ or "")
    yield from _strings_of_members(numpy.random.Generator, depth=1)


def _strings_of_members(owner: object, depth: int) -> Iterator[str]:
    for name, value in sorted(vars(owner).items(), key=lambda item: item[0]):
        if name.startswith("_") and not name.startswith("__"):
            continue
        # Constants are left out: `__doc__` of a number is that of its class.
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value):
            text = getattr(value, "__doc__", None)
            if isinstance(text, str):
                yield inspect.cleandoc(text)
            if depth > 1 and inspect.isclass(value):
                yield from _strings_of_members(value, depth - 1)


def _summarise(text: str) -> tuple[str, str] | None:
    """Cut a documentation string into (query, document); None where there is too little of either."""
    lines = text.strip().splitlines()
    signature = ""
    if len(lines) > 1 and _SIGNATURE.match(lines[0]):
        signature = lines.pop(0)
        while lines and lines[0].strip() and signature.count("(") > signature.count(")"):
            signature += " " + lines.pop(0)
    opening, *body = re.split(r"\n\s*\n", "\n".join(lines).strip(), maxsplit=1)
    opening = _plain(opening)
    end = _SENTENCE_END.search(opening)
    summary = opening[: end.end()] if end else opening
    if len(summary) > _MAX_QUERY_CHARACTERS or not (_QUERY_WORDS[0] <= len(_words(summary)) <= _QUERY_WORDS[1]):
        return None
    rest = " ".join([_plain(signature), opening[len(summary) :], *map(_plain, body)])
    query = summary.rstrip(_STOPS)
    # Wherever it stands: some strings repeat their summary under "Description".
    while query.lower() in rest.lower():
        shorter = " ".join(re.sub(re.escape(query), " ", rest, flags=re.IGNORECASE).split())
        if shorter == rest:
            return None
        rest = shorter
    document = " ".join(rest.split()[:_MAX_DOCUMENT_WORDS]).lstrip(_STOPS)
    if len(_words(document)) < _MIN_DOCUMENT_WORDS:
        return None
    return query, document


def _plain(text: str) -> str:
    # A lone surrogate in a literal is legal Python and no legal text.
    text = _ROLE.sub(r"\1", _SURROGATE.sub("\ufffd", text)).replace("`", "")
    return " ".join(_RULER.sub(" ", text).split())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _deduplicate(entries: Iterable[tuple[str, str] | None]) -> list[tuple[str, str]]:
    """Keep the first of queries with the same words, and the first of nearly identical documents."""
    kept: list[tuple[str, str]] = []
    queries: set[tuple[str, ...]] = set()
    owners: dict[int, list[int]] = {}
    for entry in entries:
        if entry is None:
            continue
        query, document = entry
        query_key = tuple(sorted(set(_words(query))))
        sketch = _sketch(_words(document))
        shared = Counter(owner for value in sketch for owner in owners.get(value, ()))
        needed = min(_SKETCH_SHARED, len(sketch))
        if query_key in queries or any(count >= needed for count in shared.values()):
            continue
        queries.add(query_key)
        for value in sketch:
            owners.setdefault(value, []).append(len(kept))
        kept.append(entry)
    return kept


def _sketch(words: Sequence[str]) -> list[int]:
    """Return the smallest hashes of the 3-word shingles: texts that share most of them are near copies."""
    shingles = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return sorted(zlib.crc32(shingle.encode()) for shingle in shingles)[:_SKETCH_SIZE]


def _stable_hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()


def _part_of(key: str) -> str:
    # The low digits choose the part, the high ones the order, so the two do not depend on each other.
    percent = int(key[-6:], 16) % 100
    if percent < _TEST_PERCENT:
        return TEST
    return DEVELOPMENT if percent < _TEST_PERCENT + _DEVELOPMENT_PERCENT else TRAIN


def _search(entries: list[tuple[str, str, str]], num_queries: int | None, num_candidates: int) -> DemoPart:
    asked = entries if num_queries is None else entries[:num_queries]
    documents = {f"d{key}": document for key, _, document in entries}
    run = bm25_run({f"q{key}": query for key, query, _ in asked}, documents, num_candidates)
    lists = tuple(
        RankingList(
            query=query,
            documents=tuple(documents[document_id] for document_id in run[f"q{key}"]),
            labels=tuple(float(document_id == f"d{key}") for document_id in run[f"q{key}"]),
            query_id=f"q{key}",
            document_ids=tuple(run[f"q{key}"]),
        )
        for key, query, _ in asked
    )
    qrels = {f"q{key}": {f"d{key}": 1} for key, _, _ in asked}
    return DemoPart(lists, qrels, run, tuple(document for _, _, document in asked))
