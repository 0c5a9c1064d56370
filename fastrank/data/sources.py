"""What to train and evaluate on, described: which files belong together, what the labels are, what is drawn.

In: keyword arguments or the mapping of a configuration. Out: a checked DataSource, which fastrank.data.loading reads.
Depths, rank targets and sampling follow Rank-DistiLLM (arXiv 2405.07920).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrank.data.catalogue import named_by
from fastrank.data.files import DataError
from fastrank.data.permutations import POLICIES
from fastrank.data.sampling import SAMPLINGS, query_share

TARGETS = ("relevance", "rank", "score")
BM25 = "bm25"
_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class DataSource:
    """Where ranking lists come from: either `lists`, or `queries`, `documents` and `run` (with `qrels` for relevance).

    Paths may hold ~ and $FASTRANK_DATA; files are plain or gzip.

    lists: JSON lines {query, documents, labels}, or rows of another tool's shape, or a data set of the Hugging Face hub
    (`hub:owner/name?config=triplet&split=train`), as read_rows reads them.
    permutations: an LLM's answers, which order the lists: with RankGPT's shape a JSON array, one answer a row; with
    others rank_llm's history of the same queries. Lists that are such a history need none.
    permutation_policy: what becomes of an answer that is not well formed, as in parse_permutation: `repair`, `drop` the
    list, or `tier`: documents that it left out share the last place. The report counts answers by their form.
    queries, documents: texts by id, as read_queries and read_documents read them. Default: the id of ir_datasets that
    the runs' file names end in, by Rank-DistiLLM's convention.
    run: a TREC run with the candidates, or other ids and scores as RankedRun reads them; several runs (teachers) give
    one list per run and query; `bm25` ranks all documents for every query.
    qrels: relevance judgments.
    depth: keep candidates whose rank in the run is at most this; default: all (for bm25: 100).
    depth_run: a first-stage run whose ranks decide the depth instead, so that one teacher run serves every depth; the
    teacher's ranks are renumbered among what is kept.
    targets: what the labels are: `relevance` = grades, 0 where nobody judged; `rank` = depth - rank + 1 from the run's
    rank column; `score` = the run's score column.
    sampling: documents an epoch sees of a list: all, top, random, log_random, top_and_random or single_relevant; see
    draw_sample.
    sample_size: how many; needed for all samplings but `all`.
    add_judged: relevant documents that are not among the candidates join the end of the list.
    false_negative_margin: with targets `relevance`, candidates that nobody judged are left out where the run scores
    them at most this much below its best relevant candidate, or above it: a teacher's run then tells which of them are
    likely to be relevant. Default: none is.
    queries_part: [from, to), the share of the queries to use, by a hash of the query id: [0, 0.75] and [0.75, 1] share
    no query and leave none out.
    split_seed: varies that hash; apart from the training seed, so that another seed never trains on held-out queries.
    Raises DataError for fields that do not go together.
    """

    lists: _Path | None = None
    permutations: _Path | None = None
    permutation_policy: str = "repair"
    queries: _Path | None = None
    documents: _Path | None = None
    run: _Path | Sequence[_Path] | None = None
    qrels: _Path | None = None
    depth: int | None = None
    depth_run: _Path | None = None
    targets: str = "relevance"
    sampling: str = "all"
    sample_size: int | None = None
    add_judged: bool = False
    false_negative_margin: float | None = None
    queries_part: Sequence[float] | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lists", "permutations", "queries", "documents", "qrels", "depth_run"):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise DataError(f"{name} must be a path, not {getattr(self, name)!r}")
        if self.lists is not None:
            for f in dataclasses.fields(self):
                if f.name in _ONLY_FOR_RUNS and getattr(self, f.name) != f.default:
                    raise DataError(f"{f.name} does not go with lists, whose rows hold documents and labels already")
        else:
            self._take_names_from_runs()
            missing = [name for name in ("queries", "documents", "run") if not getattr(self, name)]
            if missing:
                raise DataError(
                    f"the data source lacks {' and '.join(missing)}; give lists, or queries, documents and run"
                )
            if not isinstance(self.run, str | os.PathLike | Sequence) or not all(
                isinstance(run, str | os.PathLike) for run in self.runs
            ):
                raise DataError(f"run must be a path, several paths or bm25, not {self.run!r}")
        _choice("targets", self.targets, TARGETS)
        _choice("sampling", self.sampling, SAMPLINGS)
        _choice("permutation_policy", self.permutation_policy, POLICIES)
        if self.lists is None and self.permutation_policy != "repair":
            raise DataError("permutation_policy needs lists with answers, which it is about")
        if self.permutations is not None and self.lists is None:
            raise DataError("permutations go with lists, the rows that they order")
        _whole("depth", self.depth, 1)
        _whole("sample_size", self.sample_size, 2 if self.sampling == "single_relevant" else 1)
        _whole("split_seed", self.split_seed, None)
        if not isinstance(self.add_judged, bool):
            raise DataError(f"add_judged must be true or false, not {self.add_judged!r}")
        if (self.sampling == "all") != (self.sample_size is None):
            state = "needs" if self.sampling != "all" else "takes no"
            raise DataError(f"sampling {self.sampling!r} {state} sample_size")
        self._check_run_fields()
        if self.queries_part is not None:
            part = self.queries_part
            numbers = isinstance(part, Sequence) and all(
                isinstance(x, int | float) and not isinstance(x, bool) for x in part
            )
            if not numbers or len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
                raise DataError(f"queries_part must be two numbers 0 <= from < to <= 1, not {part!r}")

    def _check_run_fields(self) -> None:
        if self.lists is not None:
            return
        margin = self.false_negative_margin
        if margin is not None:
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
                raise DataError(f"false_negative_margin must be a finite number, not {margin!r}")
            if self.targets != "relevance":
                raise DataError(f"false_negative_margin needs targets 'relevance', not {self.targets!r}")
        if self.depth_run is not None and self.depth is None:
            raise DataError("depth_run needs depth, the rank in that run down to which candidates are kept")
        if self.targets == "relevance" and self.qrels is None:
            raise DataError("targets 'relevance' needs qrels; give them, or set targets to rank or score")
        if self.add_judged and self.targets != "relevance":
            raise DataError(f"add_judged needs targets 'relevance': an added document has no {self.targets}")
        if self.sampling == "single_relevant" and self.targets != "relevance":
            raise DataError(f"sampling 'single_relevant' needs targets 'relevance', not {self.targets!r}")

    def _take_names_from_runs(self) -> None:
        if not isinstance(self.run, str | os.PathLike | Sequence):
            return
        found = {named_by(run) if isinstance(run, str | os.PathLike) else None for run in self.runs}
        if len(found) == 1 and None not in found:
            for name in ("queries", "documents"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, *found)

    @property
    def runs(self) -> tuple[_Path, ...]:
        """The runs, one or several."""
        return (self.run,) if isinstance(self.run, str | os.PathLike) else tuple(self.run or ())

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> DataSource:
        """Build a source from plain keys; DataError names an unknown key and the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise DataError(f"unknown key {key!r} in a data source; the nearest known one is {near!r}")
        return cls(**mapping)

    def has_query(self, name: str) -> bool:
        """Whether the query of this id (or text, where it has none) lies in queries_part."""
        if self.queries_part is None:
            return True
        return self.queries_part[0] <= query_share(name, self.split_seed) < self.queries_part[1]


_ONLY_FOR_RUNS = ("queries", "documents", "run", "qrels", "depth", "depth_run", "targets", "add_judged",
                  "false_negative_margin")  # fmt: skip


def _choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
        raise DataError(f"{name} {value!r} is not known; choose one of {', '.join(known)} (the nearest is {near!r})")


def _whole(name: str, value: object, minimum: int | None) -> None:
    if value is None and minimum is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or (minimum is not None and value < minimum):
        from_where = "" if minimum is None else f" from {minimum}"
        raise DataError(f"{name} must be a whole number{from_where}, not {value!r}")
