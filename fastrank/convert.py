"""The `convert` verb: ranking lists of one tool's shape in, of another's out, list by list."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from fastrank.command_line import OneSentenceParser, with_underscores
from fastrank.data import DataSource, LoadedData, LoadReport, RankingList, load_data
from fastrank.data.permutations import POLICIES
from fastrank.data.rows import SHAPES, WRITERS, read_rows, write_rows
from fastrank.data.sources import TARGETS

_ONLY_WITH_RUN = {name: f"--{name}" for name in ("queries", "documents", "qrels", "depth", "targets")}
_ONLY_WITH_INPUT = {"shape": "--from", "permutations": "--permutations", "permutation_policy": "--permutation_policy"}


def convert_command(argv: Sequence[str]) -> int:
    """Runs `fastrank convert`; returns the exit status, 2 after one sentence on stderr for bad input."""
    parser = OneSentenceParser(
        prog="fastrank convert",
        description="Rewrites ranking lists: rows with texts (--input), or a TREC run with its queries and documents.",
    )
    flag = parser.add_argument
    flag("--input", help="JSON lines or array, .tsv, .parquet, hub:owner/name; - reads stdin")
    flag("--from", dest="shape", choices=tuple(SHAPES), help="shape of the rows; default: told by their keys")
    flag("--permutations", help="for rankgpt: a JSON array of answers; for other rows: rank_llm's history")
    flag("--permutation_policy", choices=POLICIES, help="for answers that are not well formed; default: repair")
    flag("--run", help="TREC run; with --queries, --documents and perhaps --qrels")
    flag("--queries")
    flag("--documents")
    flag("--qrels")
    flag("--depth", type=int, help="documents of the run that are kept for each query, by rank")
    flag("--targets", choices=TARGETS, help="labels of a run's documents; default: relevance with --qrels, else rank")
    flag("--output", required=True)
    flag("--to", required=True, choices=tuple(WRITERS))
    try:
        options = parser.parse_args(with_underscores(argv))
        if (options.input is None) == (options.run is None):
            parser.error("give either --input or --run (with --queries and --documents)")
        others = _ONLY_WITH_RUN if options.run is None else _ONLY_WITH_INPUT
        if idle := [name for name, flag in others.items() if getattr(options, name) is not None]:
            kind = "--input" if options.run is None else "--run"
            parser.error(f"{others[idle[0]]} does not go with {kind}")
        if options.output == "-":
            parser.error("--output must be a file; /dev/stdout prints")
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if options.run:
            loaded = _read_run(options)
            lists, report = loaded.candidates, loaded.report
        else:
            report = LoadReport()
            lists = _read_input(options, report)
        write_rows(options.output, lists, options.to)
    except (ValueError, OSError) as error:
        print(f"fastrank convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.output}: {report}", file=sys.stderr)
    return 0


def _read_input(options, report: LoadReport) -> Iterator[RankingList]:
    policy, answers = options.permutation_policy or "repair", Counter()
    for ranking in read_rows(
        options.input, options.shape, permutations=options.permutations, policy=policy, counts=answers
    ):
        if policy == "drop" and not ranking.documents:
            report.left_out["lists without documents"] += 1
            continue
        report.num_lists += 1
        report.num_documents += len(ranking)
        yield ranking
    report.notes.update({f"answers {status}": count for status, count in answers.items()})


def _read_run(options) -> LoadedData:
    source = DataSource(
        queries=options.queries,
        documents=options.documents,
        run=options.run,
        qrels=options.qrels,
        depth=options.depth,
        targets=options.targets or ("relevance" if options.qrels else "rank"),
    )
    return load_data(source, seed=0)
