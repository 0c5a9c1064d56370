"""Data sets by name in place of a file: `ir_datasets:ID`, and `hub:owner/name` on the Hugging Face hub.

Texts and judgments come from ir_datasets, as `ir_datasets:msmarco-passage/train/judged`.
Rank-DistiLLM's runs name that id at the end of their file name, with dashes for slashes
(`__rankzephyr-colbert-10000-sampled-100__msmarco-passage-train-judged.run`), and it may be written so here, too.
Rows come from the hub, through the package datasets: lists with texts, texts by id, or the ids of a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastrank.data.files import DataError

PREFIX = "ir_datasets:"
HUB_PREFIX = "hub:"
HUB_OPTIONS = ("config", "split", "revision")
_NAMED_RUN = re.compile(r".*__([^_]+)\.(run|tsv|parquet|pq)(\.gz)?", re.IGNORECASE)


def is_catalogued(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(PREFIX)


def is_on_hub(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(HUB_PREFIX)


def is_named(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a name of either kind, and no file."""
    return is_catalogued(path) or is_on_hub(path)


def hub_state(path: str) -> str:
    """Changes with the files of a local folder that stands for a data set of the hub; "" for anything else."""
    if not is_on_hub(path):
        return ""
    folder = os.path.expanduser(path.removeprefix(HUB_PREFIX).partition("?")[0])
    files = sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    states = [
        (file, status.st_size, status.st_mtime_ns)
        for file, status in ((file, os.stat(file)) for file in files if os.path.exists(file))
    ]
    return f"{os.path.realpath(folder)} {states}" if states else ""


def named_by(run: str | os.PathLike[str]) -> str | None:
    """The data set that the run's file name ends in, by Rank-DistiLLM's convention; None where it follows another."""
    found = _NAMED_RUN.fullmatch(os.path.basename(os.fspath(run)))
    return None if found is None else PREFIX + found[1]


def read_texts(path: str, noun: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each `query` or `document`, as ir_datasets has it by default."""
    for one in _read(path, "queries_iter" if noun == "query" else "docs_iter", noun):
        yield (one.query_id if noun == "query" else one.doc_id), one.default_text()


def read_judgments(path: str) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, grade) of each judgment."""
    for one in _read(path, "qrels_iter", "judgment"):
        yield one.query_id, one.doc_id, one.relevance


def _read(path: str, method: str, noun: str) -> Iterator[Any]:
    read: Callable[[], Iterator[Any]] | None = getattr(_load(path), method, None)
    if read is None:
        raise DataError(f"the data set has no {noun}", path)
    try:
        yield from read()
    except Exception as error:  # what downloads and parsers raise
        raise DataError(f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}", path) from error


def _load(path: str) -> Any:
    try:
        import ir_datasets
    except ImportError:
        raise DataError("ids of ir_datasets need the package: pip install ir_datasets", path) from None
    name = path.removeprefix(PREFIX)
    known = list(ir_datasets.registry)
    dashed = [one for one in known if one.replace("/", "-") == name]
    if name not in known and len(dashed) != 1:
        what = f"may be any of {', '.join(dashed)}" if dashed else "is none that it knows"
        raise DataError(f"the id {name!r} {what}; write it with its slashes", path)
    return ir_datasets.load(name if name in known else dashed[0])


def read_hub_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Rows of a data set on the Hugging Face hub with their numbers from 1, streamed, so that few are held in memory.

    path: `hub:owner/name?config=triplet&split=train&revision=main`; config is needed where there are several, split is
    train by default. A local folder of data files may stand for owner/name. Raises DataError without the package
    datasets, for another option and for what the hub does not have or does not give.
    """
    name, _, query = path.removeprefix(HUB_PREFIX).partition("?")
    name = os.path.expanduser(name)
    options = {key: value for key, _, value in (part.partition("=") for part in query.split("&") if part)}
    unknown = [key for key in options if key not in HUB_OPTIONS]
    if not name or unknown or not all(options.values()):
        form = f"{HUB_PREFIX}owner/name?config=...&split=...&revision=..."
        raise DataError(f"expected {form}" + (f", found {unknown[0]!r}" if unknown else ""), path)
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("data sets of the hub need the package: pip install datasets", path) from None
    try:
        rows = load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
        yield from enumerate(rows, start=1)
    except Exception as error:  # what the network, the hub and parsers raise
        raise DataError(f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}", path) from error
