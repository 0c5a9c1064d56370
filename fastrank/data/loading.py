"""DataSources and Python rows in; LoadedData out: candidate lists with labels, from which every epoch draws.

Nothing goes missing in silence: what is left out or added is counted in a LoadReport, and an id without a text is an
error with file and line. Ranks come from the run's rank column, as teachers often re-use first-stage scores.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastrank.data.candidates import Candidates, GivenLists, Part, RowLists, RunLists, Texts
from fastrank.data.files import DataError
from fastrank.data.formats import open_documents, open_queries, ranking_list_from, read_qrels
from fastrank.data.ranking_list import RankingList, keys_of
from fastrank.data.runs import RankedRun
from fastrank.data.sampling import draw_sample
from fastrank.data.sources import DataSource


@dataclass
class LoadReport:
    """What became of the data: str() is one line for people.

    num_lists, num_documents: what can be drawn from. left_out: {what: how many} that is not among them.
    notes: {what: how many} that was changed or is worth knowing.
    """

    num_lists: int = 0
    num_documents: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.num_lists:,} lists with {self.num_documents:,} documents"
        for name, counts in (("left out", self.left_out), ("note", self.notes)):
            said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
            text += f"; {name}: {said}" if said else ""
        return text


@dataclass(frozen=True)
class LoadedData:
    """Candidate lists, ready to be drawn from.

    candidates: every list in full, read when it is asked for. keys: one name per list, all different, made from the
    query ids.
    qrels: {key: {document id: grade}}, all that is judged for the lists that came with judgments, candidates or not;
    judged queries that got no candidates are in it under their id, so that a measure counts them as 0.
    report: what was left out and added. fingerprint: changes with any text, label or name that lists are made from.
    unlabelled: the key of the first list without labels.
    """

    candidates: Sequence[RankingList]
    keys: list[str]
    qrels: dict[str, dict[str, int]]
    report: LoadReport
    seed: int
    samplings: list[tuple[str, int | None]] = field(repr=False)
    fingerprint: str
    unlabelled: str | None

    def __len__(self) -> int:
        return len(self.candidates)

    def draw(self, index: int, *, epoch: int) -> RankingList:
        """The documents that list `index` shows in `epoch` (from 0); depends on nothing but them and the seed."""
        sampling, size = self.samplings[index]
        ranking, key = self.candidates[index], self.keys[index]
        return draw_sample(ranking, sampling, size, seed=self.seed, epoch=epoch, key=key)

    def draw_all(self, *, epoch: int = 0) -> list[RankingList]:
        """draw() for every list, in order."""
        return [self.draw(index, epoch=epoch) for index in range(len(self))]


def load_lists(source: Any, *, seed: int) -> list[RankingList]:
    """Read data into ranking lists, each as the first epoch draws it (in full, unless the source names a sampling).

    source, seed and errors as in load_data.
    """
    return load_data(source, seed=seed).draw_all()


def load_data(source: Any, *, seed: int) -> LoadedData:
    """Read data for training or evaluation.

    source: a path of JSON lines; a DataSource or a mapping with its fields; rows, each a RankingList or a mapping
    {query, documents, labels}; or a list of any of these. seed: of the draws.
    Large files are kept on disk, in a form that is made once (fastrank.data.store), and read again as lists are drawn.
    Raises DataError for anything that cannot be used, and where no list is left.
    """
    report = LoadReport()
    digest = hashlib.blake2b(digest_size=16)
    candidates = Candidates()
    query_ids: list[str | None] = []
    samplings: list[tuple[str, int | None]] = []
    judgments: list[Mapping[str, int] | None] = []
    unranked: dict[str, Mapping[str, int]] = {}
    unlabelled: int | None = None
    for part in _parts(source):
        drawn = sampling, size = ("all", None) if isinstance(part, RankingList) else (part.sampling, part.sample_size)
        for lists in _open(part, report, unranked):
            for number, found in lists.scan(digest.update):
                if not found.num_documents:
                    report.left_out["lists without documents"] += 1
                    continue
                if sampling == "single_relevant" and max(found.labels, default=0) <= 0:
                    report.left_out["lists without a relevant document"] += 1
                    continue
                if found.labels is None and unlabelled is None:
                    unlabelled = len(candidates)
                candidates.append(lists, number)
                query_ids.append(found.query_id)
                judgments.append(found.grades)
                samplings.append(drawn)
                report.num_documents += found.num_documents
                report.notes["lists shorter than sample_size"] += size is not None and found.num_documents < size
    report.num_lists = len(candidates)
    if not candidates:
        raise DataError(f"no list is left to use: {report}")
    keys = keys_of(query_ids)
    qrels = {key: judged for key, judged in zip(keys, judgments, strict=True) if judged is not None}
    missing = [query_id for query_id in unranked if query_id not in qrels]
    for key, query_id in zip(keys_of([*keys, *missing])[len(keys) :], missing, strict=True):
        qrels[key] = unranked[query_id]
    return LoadedData(
        candidates,
        keys,
        qrels,
        report,
        seed,
        samplings,
        fingerprint=digest.hexdigest(),
        unlabelled=None if unlabelled is None else keys[unlabelled],
    )


def _parts(source: Any, place: str = "") -> Iterator[DataSource | RankingList]:
    if isinstance(source, DataSource | RankingList):
        yield source
    elif isinstance(source, str | os.PathLike):
        yield DataSource(lists=source)
    elif isinstance(source, Mapping):
        if "query" in source:
            yield ranking_list_from(source, place or None)
            return
        try:
            yield DataSource.from_mapping(source)
        except DataError as error:
            raise DataError(str(error), place or None) from None
    elif isinstance(source, Iterable) and not place:
        for number, part in enumerate(source):
            yield from _parts(part, f"data[{number}]")
    else:
        raise DataError(
            f"expected a path, a data source or a row with query and documents, found {type(source).__name__}",
            place or None,
        )


def _open(part: DataSource | RankingList, report: LoadReport, unranked: dict[str, Mapping[str, int]]) -> Iterator[Part]:
    """The part's lists, one Part a run; when all were scanned, `unranked` receives the judged queries without one."""

    def leave_out(what: str, count: int) -> None:
        report.left_out[what] += count

    def note(what: str, count: int) -> None:
        report.notes[what] += count

    if isinstance(part, RankingList):
        yield GivenLists([part])
        return
    if part.lists is not None:
        yield RowLists(part, leave_out, note)
        return
    queries = open_queries(part.queries)
    qrels = None if part.qrels is None else read_qrels(part.qrels)
    for query_id, _ in queries:
        if not part.has_query(query_id):
            report.left_out["queries outside queries_part"] += 1
        elif part.targets == "relevance" and query_id not in qrels:
            report.left_out["queries without judgments"] += 1
    texts = Texts(part, queries, open_documents(part.documents), qrels)
    first_stage = None if part.depth_run is None else RankedRun(part.depth_run)
    for run in part.runs:
        yield RunLists(texts, run, first_stage, leave_out, note)
    for place in np.flatnonzero(~texts.has_list).tolist():
        query_id = queries.record(place)[0]
        if texts.is_used(query_id):
            report.left_out["queries without candidates"] += 1
            if qrels is not None and query_id in qrels:
                unranked[query_id] = qrels[query_id]
