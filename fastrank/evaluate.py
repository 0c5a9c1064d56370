"""A run and its judgments in, measures out; the `evaluate` verb.

The measures are ir_measures', so numbers agree with trec_eval's. Documents are ordered here, before any measure sees
them, as trec_eval orders them, so that all measures judge the same ranking whichever library computes them.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastrank.command_line import OneSentenceParser, with_underscores
from fastrank.data import RankingList, read_qrels, read_run
from fastrank.data.ranking_list import list_keys

MAX_GRADE = 2**20  # trec_eval keeps a counter for every grade up to the highest
DEFAULT_MEASURES = ("nDCG@10",)


def evaluate(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Iterable[str] = DEFAULT_MEASURES,
    *,
    per_query: bool = False,
) -> dict[str, Any]:
    """Measure a run against judgments: {measure: mean over the judged queries}.

    run: {query id: {document id: score}}; the order of its documents is by score, highest first, scores compared as
    float32 and equal ones by document id, later ids first: exactly what trec_eval does.
    qrels: {query id: {document id: grade}}, whole numbers; documents without a grade count as not relevant.
    measures: names as ir_measures reads them, such as nDCG@10, AP(rel=2), RR@10, R@100.
    per_query: return {query id: {measure: value}} instead, in the order of `qrels`.
    A judged query that the run lacks counts as 0; queries of the run that nobody judged are left out; a query without a
    relevant document counts as 0, as ir_measures has it. An empty run gives zeros.
    Raises ValueError for an unknown or incomplete measure, a NaN score, a grade that is no whole number, no judgments,
    and a run that shares no query with the judgments.
    """
    parsed = {name: _parse_measure(name) for name in measures}
    if not parsed:
        raise ValueError("no measure is given; name at least one, such as nDCG@10")
    judged = [query_id for query_id, grades in qrels.items() if grades]
    if not judged:
        raise ValueError("there are no judgments to measure against")
    if run and not any(query_id in run for query_id in judged):
        raise ValueError(
            f"none of the run's {len(run)} queries is judged (run: {next(iter(run))!r} ..., "
            f"judgments: {judged[0]!r} ...); do the two belong together?"
        )
    # Plain numbers stand for the ids from here: ties are settled, and no id can upset the C code of trec_eval.
    plain_run: dict[str, dict[str, float]] = {}
    plain_qrels: dict[str, dict[str, int]] = {}
    for number, query_id in enumerate(judged):
        ordered = _ordered(query_id, run.get(query_id, {}))
        names = {document_id: str(i) for i, document_id in enumerate(ordered)}
        plain_run[str(number)] = {name: float(len(names) - i) for i, name in enumerate(names.values())}
        plain_qrels[str(number)] = {
            names.setdefault(document_id, str(len(names))): _whole_grade(query_id, document_id, grade)
            for document_id, grade in qrels[query_id].items()
        }
    import ir_measures

    try:
        result = ir_measures.calc(list(parsed.values()), plain_qrels, plain_run)
    except Exception as error:
        # Each measure has a library of its own behind it, with errors of its own kind.
        reason = " ".join(str(error).split())
        raise ValueError(f"{', '.join(parsed)} cannot be computed here: {reason}") from error
    if not per_query:
        return {name: float(result.aggregated[measure]) for name, measure in parsed.items()}
    values = {(metric.query_id, metric.measure): float(metric.value) for metric in result.per_query}
    return {
        query_id: {name: values.get((str(number), measure), 0.0) for name, measure in parsed.items()}
        for number, query_id in enumerate(judged)
    }


def run_from_scores(
    lists: Sequence[RankingList], scores: Sequence[Sequence[float]], keys: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Turn the scores of ranking lists into a run: {key of the list: {document id: score}}.

    lists: the scored lists. scores: per list, one score per document.
    keys: one name per list, all different; default: its query id, or its place in `lists` where it has none.
    Documents without ids are named by their place in the list. Raises ValueError for lengths that differ, a NaN score
    and a key that comes twice.
    """
    if len(scores) != len(lists):
        raise ValueError(f"{len(scores)} rows of scores for {len(lists)} lists: one each is needed")
    names = list_keys(lists) if keys is None else list(keys)
    run: dict[str, dict[str, float]] = {}
    for name, ranking, row in zip(names, lists, scores, strict=True):
        if name in run:
            raise ValueError(f"two lists have the key {name!r}")
        if len(row) != len(ranking):
            raise ValueError(f"list {name!r}: {len(row)} scores for {len(ranking)} documents")
        run[name] = {
            document_id: _not_nan(name, document_id, score)
            for document_id, score in zip(_document_ids(ranking), row, strict=True)
        }
    return run


def qrels_from_labels(lists: Sequence[RankingList], keys: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """The labels of ranking lists as judgments, with the same keys and document ids as run_from_scores.

    Raises ValueError for a list without labels and a label that is no whole number, since a grade must be one.
    """
    names = list_keys(lists) if keys is None else list(keys)
    qrels: dict[str, dict[str, int]] = {}
    for name, ranking in zip(names, lists, strict=True):
        if ranking.labels is None:
            raise ValueError(f"list {name!r} has no labels to measure against")
        qrels[name] = {
            document_id: _whole_grade(name, document_id, label)
            for document_id, label in zip(_document_ids(ranking), ranking.labels, strict=True)
        }
    return qrels


def evaluate_command(argv: Sequence[str]) -> int:
    """`fastrank evaluate`: print measures of a run file, return the exit status (2 with one sentence for bad input)."""
    parser = OneSentenceParser(prog="fastrank evaluate", description="Measure a TREC run against judgments.")
    parser.add_argument("--run", required=True, help="TREC run, plain or .gz; its scores decide, not its ranks")
    parser.add_argument("--qrels", required=True, help="TREC or BEIR judgments, plain or .gz")
    parser.add_argument(
        "--measures", nargs="+", default=list(DEFAULT_MEASURES), help="names as in ir_measures; default: nDCG@10"
    )
    parser.add_argument("--per_query", action="store_true", help="also print every query's values")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(with_underscores(argv))
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    try:
        names = options.measures
        run, qrels = read_run(options.run), read_qrels(options.qrels)
        means = evaluate(run, qrels, names)
        queries = evaluate(run, qrels, names, per_query=True) if options.per_query else None
    except ValueError as error:
        print(f"fastrank evaluate: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(means if queries is None else {**means, "per_query": queries}, ensure_ascii=False))
        return 0
    width = max(map(len, names))
    for query_id, values in (queries or {}).items():
        for name, value in values.items():
            print(f"{name:<{width}}  {query_id}  {value:.4f}")
    for name, value in means.items():
        print(f"{name:<{width}}  {'all  ' if queries else ''}{value:.4f}")
    return 0


def _parse_measure(name: str) -> Any:
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
    except NameError:
        bare = name.split("@")[0].split("(")[0]
        known: dict[str, str] = {}
        for spelling in ir_measures.measures.registry:
            known.setdefault(spelling.lower(), spelling)
        nearest = known[difflib.get_close_matches(bare.lower(), known, n=1, cutoff=0.0)[0]]
        raise ValueError(
            f"unknown measure {name!r}; the nearest known one is {name.replace(bare, nearest)!r}"
        ) from None
    except (ValueError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"{name!r} is not written as a measure; examples are nDCG@10, RR@10, AP(rel=2)") from None
    bare = name.split("@")[0].split("(")[0]
    try:
        measure.validate_params()
    except AssertionError as error:
        if "=<object" in str(error):
            lacking = str(error).removeprefix("invalid param ").split("=")[0]
            example = f"{bare}@10" if lacking == "cutoff" else f"{bare}({lacking}=1)"
            raise ValueError(f"the measure {name!r} lacks its {lacking}, as in {example}") from None
        raise ValueError(f"the measure {name!r} does not fit: {error}") from None
    cutoff = measure.params.get("cutoff", 1)
    # trec_eval ends the whole process on a cutoff of 0 and reads others as 32 bits.
    if not 1 <= cutoff < 2**31:
        raise ValueError(f"the measure {name!r} has a cutoff of {cutoff}; it must be from 1 to {2**31 - 1}")
    return measure


def _ordered(query_id: str, scores: Mapping[str, float]) -> list[str]:
    values = np.fromiter(scores.values(), np.float64, len(scores))
    if np.isnan(values).any():
        bad = list(scores)[int(np.flatnonzero(np.isnan(values))[0])]
        raise ValueError(f"query {query_id!r}, document {bad!r}: the score is NaN")
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32).tolist()
    pairs = sorted(zip(rounded, scores, strict=True), reverse=True)
    return [document_id for _, document_id in pairs]


def _document_ids(ranking: RankingList) -> Sequence[str]:
    return ranking.document_ids or [str(i) for i in range(len(ranking))]


def _not_nan(key: str, document_id: str, score: float) -> float:
    if math.isnan(score):
        raise ValueError(f"query {key!r}, document {document_id!r}: the score is NaN")
    return float(score)


def _whole_grade(query_id: str, document_id: str, grade: float) -> int:
    try:
        whole = int(grade)
    except (OverflowError, ValueError):
        whole = None
    if whole is None or whole != grade or abs(whole) > MAX_GRADE:
        raise ValueError(
            f"query {query_id!r}, document {document_id!r}: the grade {grade} is no whole number up to {MAX_GRADE}, "
            "which measures need"
        )
    # Junk, as some collections grade it, is judged and not relevant; trec_eval's C code takes its number for a place.
    return max(whole, 0)
