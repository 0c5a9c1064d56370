"""The memory of training on a large run: python benchmarks/large_run.py [--num_queries 500000] [--folder FOLDER].

Writes a run of 100 rows a query (500,000 queries: 1.8 GB) and one of 500 queries, trains 20 steps on each in a process
of its own, with nothing in the cache, and prints one JSON object: MB of each run and the most MiB that a process held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from fastrank.train import TrainConfig, train
from fastrank.train.demo import base_weights

NUM_DOCUMENTS, DEPTH, NUM_QUERIES_OF_SMALL = 100_000, 100, 500


def write_files(folder: Path, num_queries: int) -> None:
    rng = random.Random(0)
    documents = (f"{i}\tpassage number {i} about {i % 97} things\n" for i in range(NUM_DOCUMENTS))
    (folder / "documents.tsv").write_text("".join(documents))
    (folder / "queries.tsv").write_text("".join(f"{query}\tquery {query}\n" for query in range(num_queries)))
    tails = [f"\t{rank}\t{DEPTH - rank}.000000\tteacher\n" for rank in range(1, DEPTH + 1)]
    with open(folder / "a.run", "w", encoding="utf-8") as file:
        for query in range(num_queries):
            first = rng.randrange(NUM_DOCUMENTS - DEPTH)
            file.writelines(f"{query}\t0\t{first + i}{tail}" for i, tail in enumerate(tails))


def train_here(folder: Path) -> None:
    source = {name: str(folder / f"{name}.tsv") for name in ("queries", "documents")} | {"run": str(folder / "a.run")}
    config = TrainConfig(
        model=str(base_weights()),
        train_data=source | {"targets": "rank", "sampling": "random", "sample_size": 8},
        output_dir=str(folder / "trained"),
        loss="ranknet",
        per_device_train_batch_size=4,
        max_steps=20,
        max_query_tokens=24,
        max_document_tokens=64,
        freeze_layers=5,
    )
    train(config, quiet=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_queries", type=int, default=500_000)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary one")
    parser.add_argument("--train_here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_here is not None:
        return train_here(options.train_here)
    found = {}
    for name, num_queries in (("small", NUM_QUERIES_OF_SMALL), ("large", options.num_queries)):
        with tempfile.TemporaryDirectory(dir=options.folder) as made:
            folder = Path(made)
            write_files(folder, num_queries)
            command = [sys.executable, __file__, "--train_here", made]
            environment = os.environ | {"FASTRANK_CACHE": str(folder / "cache")}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            size = os.path.getsize(folder / "a.run")
            found[name] = {"run_mb": round(size / 1e6, 1), "peak_mib": round(float(done.stdout.split()[-1]))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
