"""Compiles Triton configurations for a GPU that is not there and reads what they need of one.

The compiler takes minutes for all of them, so what it said lies in ahead_of_time.json, by kernel, configuration and
version of triton: python tests/ahead_of_time.py compiles what is new and writes it there.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrank import backend
from fastrank.kernels.configuration import ALIGNMENT, Configuration

RECORDS = Path(__file__).with_suffix(".json")
TABLES = {
    op: importlib.import_module(f"fastrank.kernels.{op}.gpu").CONFIGURATIONS
    for op in backend.OPS
    if importlib.util.find_spec(f"fastrank.kernels.{op}.gpu") is not None
}
Entry = tuple[str, str, int]  # operation, name of a configuration, compute capability
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what a program may have, by compute capability
# What a thread may spill where its registers are held below what the compiler would take: sixteen numbers, stored and
# loaded once a head. What it takes differs by its version (127 or 165 for one kernel), and measured on an H200 one
# program fewer at a time costs a third to a half, these spills nothing.
STACK_BYTES_OF_HELD = 64


@dataclass(frozen=True)
class Resources:
    """Registers and stack bytes (spilled registers and arrays) of a thread, shared memory of a program, and whether
    matrix products run on the matrix units of compute capability 9.0."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    uses_wgmma: bool = False


def key(configuration: Configuration, capability: int) -> str:
    """Changes with the kernel, whatever it calls, the configuration, the compute capability and triton."""
    own = configuration.kernel.cache_key, sorted(configuration.aligned)
    parts = *own, configuration.types, configuration.constants, configuration.options(divmod(capability, 10))
    return hashlib.sha256(repr((triton.__version__, capability, *parts)).encode()).hexdigest()


def measure(configuration: Configuration, capability: int) -> Resources:
    """Compiles a configuration as its launch on a device of this compute capability does."""
    types = {**configuration.types, **dict.fromkeys(configuration.constants, "constexpr")}
    signature = {name: types[name] for name in configuration.kernel.arg_names}
    attributes = {(list(signature).index(name),): [["tt.divisibility", ALIGNMENT]] for name in configuration.aligned}
    compiled = triton.compile(
        ASTSource(configuration.kernel, signature, dict(configuration.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options=configuration.options(divmod(capability, 10)),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(int(registers), int(stack), compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"])


def complaints(resources: Resources, capability: int, *, is_held: bool = False) -> list[str]:
    """What is wrong with a configuration, in sentences; is_held: it has max_registers there."""
    found = []
    if resources.stack_bytes > (STACK_BYTES_OF_HELD if is_held else 0):
        found.append(f"{resources.stack_bytes} bytes of stack a thread: registers are spilled.")
    if resources.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{resources.shared_bytes} bytes of shared memory; there are {SHARED_BYTES[capability]}.")
    return found


def key_of(entry: Entry) -> str:
    op, name, capability = entry
    return key(TABLES[op][name], capability)


def compile_entry(entry: Entry) -> Resources:
    """measure(), for another process."""
    op, name, capability = entry
    return measure(TABLES[op][name], capability)


@contextmanager
def compiling(entries: Iterable[Entry]) -> Iterable[dict[Entry, Future[Resources]]]:
    """Compiles them in as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield {entry: pool.submit(compile_entry, entry) for entry in entries}
        pool.shutdown(cancel_futures=True)


def read_records() -> dict[str, Resources]:
    return {name: Resources(*values) for name, values in json.loads(RECORDS.read_text()).items()}


def runs_on(configuration: Configuration, capability: int) -> bool:
    """Whether it is for devices of this compute capability, too."""
    return configuration.least_capability <= divmod(capability, 10)


def main() -> None:
    """Writes the records of what can be launched today, and of nothing else."""
    known = read_records() if RECORDS.exists() else {}
    entries = [
        (op, name, which)
        for (op, table), which in itertools.product(TABLES.items(), SHARED_BYTES)
        for name in table
        if runs_on(table[name], which)
    ]
    with compiling(one for one in entries if key_of(one) not in known) as running:
        records = {
            key_of(one): dataclasses.astuple(running[one].result() if one in running else known[key_of(one)])
            for one in entries
        }
    lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(records.items()))
    RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(running)} compiled, {len(records)} known: {RECORDS}")


if __name__ == "__main__":
    main()
