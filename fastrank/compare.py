"""Several runs and their judgments in, one table out: means, paired tests against one of them, means over corpora.

Queries are measured by fastrank.evaluate. The test is the paired two-sided t-test over queries, its p-values corrected
by Holm's method over the systems, measure by measure. Over corpora (as TIREx groups its tasks) the queries of a corpus
are pooled first; then each corpus counts once, in an arithmetic and a geometric mean.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from fastrank.command_line import OneSentenceParser, with_underscores
from fastrank.data import read_qrels, read_run
from fastrank.data.files import expand_path
from fastrank.evaluate import DEFAULT_MEASURES, evaluate

SIGNIFICANT = 0.05
PerQuery = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One system and one measure.

    Attributes:
        means: of each corpus, in order; a single one where there are no corpora.
        arithmetic, geometric: means of those; the geometric one is 0 where one of them is.
        p: of the paired t-test with the system that is compared against, over all queries; None for that system
            itself, and where fewer than two queries are there.
        p_holm: the same after Holm's correction over the systems.
    """

    system: str
    measure: str
    means: dict[str, float]
    arithmetic: float
    geometric: float
    p: float | None = None
    p_holm: float | None = None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests after Holm's step-down correction (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def paired_p(values: Sequence[float], others: Sequence[float]) -> float | None:
    """The p-value of the two-sided paired t-test; 1 where no pair differs, None for fewer than two pairs."""
    from scipy.stats import ttest_rel

    differences = np.subtract(values, others)
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    if differences.std() <= 1e-12 * abs(differences.mean()):
        return 0.0  # all differ by the same
    return float(ttest_rel(values, others).pvalue)


def compare(corpora: Mapping[str, Mapping[str, PerQuery]], measure: str, *, against: str | None = None) -> list[Row]:
    """The rows of one measure's table, systems in their order.

    Arguments:
        corpora: {corpus: {system: {query id: value}}}; every corpus has the same systems, and they the same queries.
        measure: its name, for the rows.
        against: the system that the others are tested against; default: no test.

    Raises ValueError where systems or queries differ, for a corpus without queries and for an unknown `against`.
    """
    if not corpora:
        raise ValueError("there is no corpus to compare on")
    systems = list(next(iter(corpora.values())))
    for corpus, of_systems in corpora.items():
        if sorted(of_systems) != sorted(systems):
            raise ValueError(f"corpus {corpus!r} has the systems {', '.join(of_systems)}, not {', '.join(systems)}")
        queries = [set(values) for values in of_systems.values()]
        if not queries or not queries[0] or any(one != queries[0] for one in queries):
            raise ValueError(f"corpus {corpus!r}: the systems must be measured on the same queries, at least one")
    if against is not None and against not in systems:
        raise ValueError(f"there is no system {against!r} to compare against; there are {', '.join(systems)}")

    def pooled(system: str) -> list[float]:
        return [of_systems[system][query] for of_systems in corpora.values() for query in of_systems[systems[0]]]

    others = [system for system in systems if against is not None and system != against]
    p_values = {system: paired_p(pooled(system), pooled(against)) for system in others}
    tested = [system for system, p in p_values.items() if p is not None]
    corrected = dict(zip(tested, holm([p_values[system] for system in tested]), strict=True))
    rows = []
    for system in systems:
        means = {corpus: float(np.mean(list(values[system].values()))) for corpus, values in corpora.items()}
        numbers = list(means.values())
        geometric = math.exp(np.mean(np.log(numbers))) if min(numbers) > 0 else 0.0
        rows.append(
            Row(
                system,
                measure,
                means,
                float(np.mean(numbers)),
                geometric,
                p_values.get(system),
                corrected.get(system),
            )
        )
    return rows


def read_corpora(path: str | Path) -> dict[str, list[dict]]:
    """A YAML file {corpus: [{qrels: file, runs: {system: file}}, ...]}; files stand relative to it.

    They may hold ~ and $FASTRANK_DATA. Raises ValueError that names what is of another form or comes twice.
    """
    path = Path(path)
    try:
        read = _read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    form = "{corpus: [{qrels: file, runs: {system: file}}, ...]}"
    if not isinstance(read, dict) or not read:
        raise ValueError(f"{path} must hold {form}")
    for corpus, tasks in read.items():
        for task in tasks if isinstance(tasks, list) and tasks else [None]:
            if (
                not isinstance(task, dict)
                or set(task) != {"qrels", "runs"}
                or not isinstance(task["runs"], dict)
                or not all(isinstance(file, str) for file in (task["qrels"], *task["runs"].values()))
            ):
                raise ValueError(f"{path}, corpus {corpus!r}: a task must be {{qrels: file, runs: {{system: file}}}}")
    return {
        str(corpus): [
            {
                "qrels": path.parent / expand_path(task["qrels"]),
                "runs": {str(system): path.parent / expand_path(file) for system, file in task["runs"].items()},
            }
            for task in tasks
        ]
        for corpus, tasks in read.items()
    }


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error and does not hide the first."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len({str(key) for key in mapping}) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key comes twice in this mapping", node.start_mark)
        return mapping


def _read_yaml(text: str) -> object:
    return yaml.load(text, _UniqueKeys)  # a SafeLoader: plain values only


def measure_corpora(
    corpora: Mapping[str, Sequence[Mapping]], measures: Sequence[str]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{measure: {corpus: {system: {query: value}}}}, a corpus's tasks pooled: a query is named by its task, too."""
    found: dict = {measure: {corpus: {} for corpus in corpora} for measure in measures}
    for corpus, tasks in corpora.items():
        for number, task in enumerate(tasks):
            qrels = read_qrels(task["qrels"])
            for system, file in task["runs"].items():
                values = evaluate(read_run(file), qrels, measures, per_query=True)
                for measure in measures:
                    of_system = found[measure][corpus].setdefault(system, {})
                    of_system.update({f"{number} {query}": one[measure] for query, one in values.items()})
    return found


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of one measure: a star marks p < .05 after the correction."""
    corpora = list(rows[0].means)
    several = len(corpora) > 1
    titles = [rows[0].measure, *(corpora if several else ["mean"]), *(["arithmetic", "geometric"] if several else [])]
    tested = any(row.p is not None for row in rows)
    titles += ["p (Holm)"] if tested else []
    titles = [title.replace("|", "\\|") for title in titles]
    lines = [" | ".join(titles), "|".join(["---", *["---:"] * (len(titles) - 1)])]
    for row in rows:
        numbers = [*row.means.values(), *([row.arithmetic, row.geometric] if several else [])]
        cells = [row.system.replace("|", "\\|"), *(f"{number:.3f}" for number in numbers)]
        if tested:
            star = "*" if row.p_holm is not None and row.p_holm < SIGNIFICANT else ""
            cells.append("" if row.p_holm is None else f"{row.p_holm:.3f}{star}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def as_csv(rows: Sequence[Row]) -> str:
    """One line a system and measure: system, measure, each corpus, arithmetic, geometric, p, p_holm."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "measure", *rows[0].means, "arithmetic", "geometric", "p", "p_holm"])
    for row in rows:
        writer.writerow(
            [row.system, row.measure, *row.means.values(), row.arithmetic, row.geometric, row.p, row.p_holm]
        )
    return out.getvalue().rstrip("\n")


def compare_command(argv: Sequence[str]) -> int:
    """Runs `fastrank compare`; returns the exit status, 2 after one sentence on stderr for bad input."""
    parser = OneSentenceParser(
        prog="fastrank compare",
        description="Compares runs: one table a measure, with paired t-tests (Holm's correction) against one of them.",
    )
    parser.add_argument("--runs", nargs="+", metavar="NAME=FILE", help="TREC runs; with --qrels")
    parser.add_argument("--qrels", help="TREC or BEIR judgments")
    parser.add_argument("--corpora", help="YAML {corpus: [{qrels: file, runs: {system: file}}, ...]}, in their place")
    parser.add_argument("--measures", nargs="+", default=list(DEFAULT_MEASURES), help="as in `fastrank evaluate`")
    parser.add_argument("--against", help="the system that the others are tested against")
    parser.add_argument("--format", choices=("markdown", "csv", "json"), default="markdown")
    try:
        options = parser.parse_args(with_underscores(argv))
        single = (options.runs is not None, options.qrels is not None)
        if single != (options.corpora is None,) * 2:
            parser.error("give --runs and --qrels, or --corpora")
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    try:
        corpora = read_corpora(options.corpora) if options.corpora else {"all": [_single_task(options)]}
        values = measure_corpora(corpora, options.measures)
        tables = [compare(values[measure], measure, against=options.against) for measure in options.measures]
    except (ValueError, OSError) as error:
        print(f"fastrank compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.format == "json":
        print(json.dumps([asdict(row) for rows in tables for row in rows], ensure_ascii=False))
    elif options.format == "csv":
        print(as_csv([row for rows in tables for row in rows]))
    else:
        print("\n\n".join(as_markdown(rows) for rows in tables))
    return 0


def _single_task(options) -> dict:
    runs = {}
    for word in options.runs:
        name, equals, file = word.partition("=")
        if not equals or not name or not file:
            raise ValueError(f"--runs takes NAME=FILE, not {word!r}")
        if name in runs:
            raise ValueError(f"two runs have the name {name!r}")
        runs[name] = file
    return {"qrels": options.qrels, "runs": runs}
