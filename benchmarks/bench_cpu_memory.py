"""The memory of a process that loads a checkpoint and re-ranks with it: the most it ever held (resident), each engine
in a process of its own, which this file is, too: `python bench_cpu_memory.py <contender> <pairs> <folder>`."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import engines
import pytest
from bench_cpu_engine import MAX_LENGTH, PEERS, scores_of
from timing import CLOCK, Comparison, Contender, resident_bytes
from workloads import checkpoint, ranking_lists

import fastrank

NAMES = [
    "fastrank float32",
    "fastrank bf16",
    "fastrank int8",
    "transformers float32",
    "ONNX Runtime float32",
    "ONNX Runtime int8",
    "OpenVINO float32",
]
BATCH_SIZE = 16  # of the engines that pad
SHAPE = "MiniLM-L6"


def measure_here(name: str, num_pairs: int, folder: Path) -> dict[str, float]:
    """Loads and re-ranks in this process. Returns its resident memory in MiB: after the imports, and at its peak."""
    engine, dtype = name.rsplit(" ", 1)
    lists = ranking_lists(-(-num_pairs // 100), 100)[1]
    lists = (lists * (-(-num_pairs // (100 * len(lists)))))[: num_pairs // 100]
    before = resident_bytes("VmRSS")
    if engine == "fastrank":
        scores = scores_of(fastrank.Reranker(folder, dtype=dtype, max_length=MAX_LENGTH), lists)
    else:
        scores = PEERS[engine][0](folder, dtype, MAX_LENGTH).scores(lists, BATCH_SIZE)
    assert len(scores) == num_pairs
    return {"imported": before / 2**20, "peak": resident_bytes("VmHWM") / 2**20}


@functools.cache
def comparison(full: bool) -> Comparison:
    folder = checkpoint(SHAPE)
    engines.OnnxRuntime(folder, "int8", MAX_LENGTH)  # writes the files that the processes will read
    num_pairs = 10_000 if full else 300
    found: dict[str, dict[str, float]] = {}

    def run(name: str):
        command = [sys.executable, __file__, name, str(num_pairs), str(folder)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            return finished.stderr.strip().split("\n")[-1]
        found[name] = json.loads(finished.stdout.strip().split("\n")[-1])
        return None

    contenders = [
        Contender(
            name,
            functools.partial(run, name),
            num_pairs,
            ours=name.startswith("fastrank"),
            check=lambda sentence: sentence,
        )
        for name in NAMES
    ]
    compared = Comparison(f"Memory of a process that re-ranks {num_pairs} pairs, {SHAPE}", "pairs", contenders)
    compared.measure(1)
    compared.notes += ["peak resident MiB, of which Python, torch and the texts take the first number"]
    compared.notes += [f"{name}: {one['imported']:.0f}, {one['peak']:.0f}" for name, one in found.items()]
    return compared


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=CLOCK)
def bench_cpu_memory(name, benchmark, full):
    compared = comparison(full)
    benchmark.group = compared.title
    compared.hand_over(name, benchmark)


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
