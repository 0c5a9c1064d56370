"""DataSources and Python rows in; LoadedData out: candidate lists with labels, from which every epoch draws.

Nothing goes missing in silence: what is left out or added is counted in a LoadReport, and an id without a text is an
error with file and line. Ranks come from the run's rank column, as teachers often re-use first-stage scores.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrank.data.bm25 import bm25_run
from fastrank.data.files import DataError, expand_path
from fastrank.data.formats import (
    ranking_list_from,
    read_documents,
    read_qrels,
    read_queries,
)
from fastrank.data.ranking_list import RankingList, list_keys
from fastrank.data.rows import read_rows
from fastrank.data.runs import RankedQuery, read_ranked_run
from fastrank.data.sampling import draw_sample, has_relevant
from fastrank.data.sources import BM25, DataSource

_BM25_DEPTH = 100


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

    candidates: every list in full. keys: one name per list, all different, made from the query ids.
    qrels: {key: {document id: grade}}, all that is judged for the lists that came with judgments, candidates or not;
    judged queries that got no candidates are in it under their id, so that a measure counts them as 0.
    report: what was left out and added.
    """

    candidates: list[RankingList]
    keys: list[str]
    qrels: dict[str, dict[str, int]]
    report: LoadReport
    seed: int
    samplings: list[tuple[str, int | None]] = field(repr=False)

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
    Raises DataError for anything that cannot be used, and where no list is left.
    """
    report = LoadReport()
    lists: list[RankingList] = []
    samplings: list[tuple[str, int | None]] = []
    judgments: list[dict[str, int] | None] = []
    unranked: dict[str, dict[str, int]] = {}
    for part in _parts(source):
        if isinstance(part, RankingList):
            found = [(part, None)]
            sampling, size = "all", None
        else:
            sampling, size = part.sampling, part.sample_size
            found = _from_rows(part, report) if part.lists is not None else _from_runs(part, report, unranked)
        for ranking, judged in found:
            if not ranking.documents:
                report.left_out["lists without documents"] += 1
            elif sampling == "single_relevant" and not has_relevant(ranking):
                report.left_out["lists without a relevant document"] += 1
            else:
                lists.append(ranking)
                judgments.append(judged)
                samplings.append((sampling, size))
                report.notes["lists shorter than sample_size"] += size is not None and len(ranking) < size
    report.num_lists = len(lists)
    report.num_documents = sum(map(len, lists))
    if not lists:
        raise DataError(f"no list is left to use: {report}")
    keys = list_keys(lists)
    qrels = {key: judged for key, judged in zip(keys, judgments, strict=True) if judged is not None}
    for query_id, judged in unranked.items():
        qrels.setdefault(query_id, judged)
    return LoadedData(lists, keys, qrels, report, seed, samplings)


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


def _from_rows(source: DataSource, report: LoadReport) -> Iterator[tuple[RankingList, None]]:
    for ranking in read_rows(source.lists):
        if not source.has_query(ranking.query if ranking.query_id is None else ranking.query_id):
            report.left_out["lists outside queries_part"] += 1
            continue
        if source.sampling == "single_relevant" and ranking.labels is None:
            raise DataError(
                f"sampling 'single_relevant' needs labels, and the list of query {ranking.query[:60]!r} has none",
                expand_path(source.lists),
            )
        yield ranking, None


def _from_runs(
    source: DataSource, report: LoadReport, unranked: dict[str, dict[str, int]]
) -> Iterator[tuple[RankingList, dict[str, int] | None]]:
    """One list per run and query; `unranked` receives the judged queries that no run has candidates for."""
    texts = read_queries(source.queries)
    queries = {query_id: text for query_id, text in texts.items() if source.has_query(query_id)}
    report.left_out["queries outside queries_part"] += len(texts) - len(queries)
    qrels = None if source.qrels is None else read_qrels(source.qrels)
    if source.targets == "relevance":
        judged = {query_id: text for query_id, text in queries.items() if query_id in qrels}
        report.left_out["queries without judgments"] += len(queries) - len(judged)
        queries = judged
    documents = read_documents(source.documents) if BM25 in source.runs else None
    first_stage = None if source.depth_run is None else read_ranked_run(source.depth_run)
    runs = [_read_candidates(source, run, first_stage, texts, queries, documents, report) for run in source.runs]
    if documents is None:
        wanted = {document_id for _, run in runs for query in run.values() for document_id in query.document_ids}
        if source.add_judged:
            wanted.update(*(qrels[query_id] for query_id in queries))
        documents = read_documents(source.documents, wanted=wanted)
    for query_id in queries:
        if not any(query_id in run for _, run in runs):
            report.left_out["queries without candidates"] += 1
            if qrels is not None and query_id in qrels:
                unranked[query_id] = qrels[query_id]
    for path, run in runs:
        for query_id, candidates in run.items():
            grades = None if qrels is None else qrels.get(query_id)
            _check_texts(candidates, documents, path, source)
            labels = _labels(source, candidates, grades)
            ids = list(candidates.document_ids)
            if source.add_judged:
                for document_id in _missing_relevant(ids, grades, documents, report):
                    ids.append(document_id)
                    labels.append(float(grades[document_id]))
            yield (
                RankingList(
                    query=queries[query_id],
                    documents=tuple(documents[document_id] for document_id in ids),
                    labels=tuple(labels),
                    query_id=query_id,
                    document_ids=tuple(ids),
                ),
                grades,
            )


def _read_candidates(
    source: DataSource,
    run: str | os.PathLike[str],
    first_stage: Mapping[str, RankedQuery] | None,
    texts: Mapping[str, str],
    queries: Mapping[str, str],
    documents: Mapping[str, str] | None,
    report: LoadReport,
) -> tuple[str, dict[str, RankedQuery]]:
    """The candidates of the wanted queries down to the depth, in order of rank, and the name of their file."""
    if run == BM25:
        ranked = _as_ranked(bm25_run(queries, documents, source.depth or _BM25_DEPTH))
        path = "BM25"
    else:
        path = expand_path(run)
        ranked = read_ranked_run(path)
    for query_id, query in ranked.items():
        if query_id not in texts:
            raise DataError(f"query {query_id!r} has no text in {source.queries}", path, query.lines[0])
    ranks_matter = source.targets == "rank" or source.depth is not None or source.sampling == "top"
    kept: dict[str, RankedQuery] = {}
    for query_id, query in ranked.items():
        if query_id not in queries:
            continue
        if ranks_matter and len(query.ranks) > 1 and min(query.ranks) == max(query.ranks):
            raise DataError(
                f"all {len(query.ranks)} documents of query {query_id!r} have rank {query.ranks[0]}, so there is no "
                f"order to cut or to learn from; number the rank column",
                path,
                query.lines[0],
            )
        cut = _cut(query, source.depth, None if first_stage is None else first_stage.get(query_id, RankedQuery()))
        report.left_out["candidates below the depth"] += len(query.document_ids) - len(cut.document_ids)
        if cut.document_ids:
            kept[query_id] = cut
    return path, kept


def _as_ranked(run: Mapping[str, Mapping[str, float]]) -> dict[str, RankedQuery]:
    ranked: dict[str, RankedQuery] = {}
    for query_id, scores in run.items():
        query = RankedQuery(list(scores))
        query.ranks.extend(range(1, len(scores) + 1))
        query.scores.extend(scores.values())
        query.lines.extend([0] * len(scores))
        if scores:
            ranked[query_id] = query
    return ranked


def _cut(query: RankedQuery, depth: int | None, first_stage: RankedQuery | None) -> RankedQuery:
    """The rows within the depth by rank, numbered from 1; renumbered where a first-stage run made the cut."""
    ranks = _from_one(query)
    if first_stage is not None:
        first_ranks = zip(first_stage.document_ids, _from_one(first_stage), strict=True)
        inside = {document_id for document_id, rank in first_ranks if rank <= depth}
        rows = [i for i, document_id in enumerate(query.document_ids) if document_id in inside]
    else:
        rows = [i for i, rank in enumerate(ranks) if depth is None or rank <= depth]
    rows.sort(key=ranks.__getitem__)
    cut = RankedQuery([query.document_ids[i] for i in rows])
    cut.scores.extend(query.scores[i] for i in rows)
    cut.lines.extend(query.lines[i] for i in rows)
    cut.ranks.extend(ranks[i] for i in rows)
    if first_stage is not None:
        # Tied ranks stay tied: each takes the place of the first of them.
        for place in range(len(rows)):
            tied = place > 0 and ranks[rows[place]] == ranks[rows[place - 1]]
            cut.ranks[place] = cut.ranks[place - 1] if tied else place + 1
    return cut


def _from_one(query: RankedQuery) -> list[int]:
    """The rank column; where it counts from 0 it is moved by one."""
    shift = 1 if query.ranks and min(query.ranks) == 0 else 0
    return [rank + shift for rank in query.ranks]


def _labels(source: DataSource, candidates: RankedQuery, grades: Mapping[str, int] | None) -> list[float]:
    if source.targets == "relevance":
        return [float(grades.get(document_id, 0)) for document_id in candidates.document_ids]
    if source.targets == "score":
        return list(candidates.scores)
    # Without a depth of its own a list is as deep as its last rank.
    depth = max(source.depth or 0, max(candidates.ranks))
    return [float(depth - rank + 1) for rank in candidates.ranks]


def _check_texts(candidates: RankedQuery, documents: Mapping[str, str], path: str, source: DataSource) -> None:
    for document_id, line in zip(candidates.document_ids, candidates.lines, strict=True):
        if document_id not in documents:
            raise DataError(f"document {document_id!r} has no text in {source.documents}", path, line)


def _missing_relevant(
    candidate_ids: list[str], grades: Mapping[str, int], documents: Mapping[str, str], report: LoadReport
) -> list[str]:
    candidates = set(candidate_ids)
    relevant = [name for name, grade in grades.items() if grade > 0 and name not in candidates]
    missing = [name for name in relevant if name in documents]
    report.notes["relevant documents added"] += len(missing)
    report.left_out["relevant documents without a text"] += len(relevant) - len(missing)
    return missing
