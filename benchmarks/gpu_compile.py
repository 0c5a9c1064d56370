"""Compiles Triton kernels into triton's cache on disk, in as many processes as there are cores, before anything runs.

A launch then finds them there: what it would compile one after the other, for minutes, takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from fastrank import backend
from fastrank.kernels.configuration import Configuration, Table

OPTIONS = ("num_warps", "num_stages", "max_registers")
Job = tuple[str, str, Mapping[str, int]]  # operation, name of a configuration, what is changed of it


def table(op: str) -> Table:
    return importlib.import_module(f"fastrank.kernels.{op}.gpu").CONFIGURATIONS


def all_jobs() -> list[Job]:
    """Every configuration of this GPU as it is."""
    found = torch.cuda.get_device_capability()
    ops = [op for op in backend.OPS if importlib.util.find_spec(f"fastrank.kernels.{op}.gpu") is not None]
    return [(op, name, {}) for op in ops for name, one in table(op).items() if one.least_capability <= found]


def changed(configuration: Configuration, changes: Mapping[str, int]) -> Configuration:
    """A configuration with other options or compile-time values."""
    numbers = {key: value for key, value in changes.items() if key in OPTIONS}
    constants = {key: value for key, value in changes.items() if key not in numbers}
    return replace(configuration, constants={**configuration.constants, **constants}, **numbers)


def compile_all(jobs: Iterable[Job]) -> Iterator[str]:
    """Compiles; yields a line for each that cannot be."""
    jobs = list(jobs)
    count = max(1, min(len(jobs), (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(_compile_some, [jobs[i::count] for i in range(count)]):
            yield from lines


def _compile_some(jobs: list[Job]) -> list[str]:
    lines = []
    for op, name, changes in jobs:
        one = changed(table(op)[name], changes)
        # The same arguments as a launch, as far as the compiler looks at them.
        arguments = [
            torch.empty(16, dtype=kind, device="cuda") if isinstance(kind, torch.dtype) else kind(2)
            for _, kind, _ in one.checks
        ]
        try:
            keywords = one.keywords(torch.cuda.get_device_capability())
            one.kernel.run(*arguments, grid=(1,), warmup=True, **keywords)
        except Exception as error:
            lines.append(f"{op} {name} {dict(changes)}: {type(error).__name__}: {error}"[:300])
    return lines
