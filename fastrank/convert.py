"""The `convert` verb: ranking lists of one tool's shape in, of another's out, list by list."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from fastrank.command_line import OneSentenceParser, with_underscores
from fastrank.data import DataSource, LoadedData, RankingList, load_data
from fastrank.data.rows import SHAPES, WRITERS, read_rows, write_rows
from fastrank.data.sources import TARGETS

_ONLY_WITH_RUN = {name: f"--{name}" for name in ("queries", "documents", "qrels", "depth", "targets")}
_ONLY_WITH_INPUT = {"shape": "--from", "permutations": "--permutations"}


def convert_command(argv: Sequence[str]) -> int:
    """Runs `fastrank convert`; returns the exit status, 2 after one sentence on stderr for bad input."""
    parser = OneSentenceParser(
        prog="fastrank convert",
        description="Rewrites ranking lists: rows with texts (--input), or a TREC run with its queries and documents.",
    )
    flag = parser.add_argument
    flag("--input", help="JSON lines or array, .tsv, .parquet; - reads stdin")
    flag("--from", dest="shape", choices=tuple(SHAPES), help="shape of the rows; default: told by their keys")
    flag("--permutations", help="for rankgpt: a JSON array of answers")
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
            lists, said = loaded.candidates, str(loaded.report)
        else:
            lists, said = read_rows(options.input, options.shape, permutations=options.permutations), ""
        count = _Count(lists)
        write_rows(options.output, count, options.to)
    except (ValueError, OSError) as error:
        print(f"fastrank convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.output}: {said or f'{count.lists:,} lists with {count.documents:,} documents'}", file=sys.stderr)
    return 0


class _Count:
    """Passes lists on and counts them."""

    def __init__(self, lists):
        self._source = lists
        self.lists = self.documents = 0

    def __iter__(self) -> Iterator[RankingList]:
        for ranking in self._source:
            self.lists += 1
            self.documents += len(ranking)
            yield ranking


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
