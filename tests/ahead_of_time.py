"""Compiles Triton configurations for a GPU that is not there and reads what they need of one."""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrank.kernels.configuration import ALIGNMENT, Configuration

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what a program may have, by compute capability


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
    parts = *own, configuration.types, configuration.constants, configuration.options
    return hashlib.sha256(repr((triton.__version__, capability, *parts)).encode()).hexdigest()


def measure(configuration: Configuration, capability: int) -> Resources:
    """Compiles a configuration as its launch on a device of this compute capability does."""
    types = {**configuration.types, **dict.fromkeys(configuration.constants, "constexpr")}
    signature = {name: types[name] for name in configuration.kernel.arg_names}
    attributes = {(list(signature).index(name),): [["tt.divisibility", ALIGNMENT]] for name in configuration.aligned}
    compiled = triton.compile(
        ASTSource(configuration.kernel, signature, dict(configuration.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options=configuration.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(int(registers), int(stack), compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"])


def complaints(resources: Resources, capability: int) -> list[str]:
    """What is wrong with a configuration, in sentences."""
    found = []
    if resources.stack_bytes:
        found.append(f"{resources.stack_bytes} bytes of stack a thread: registers are spilled.")
    if resources.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{resources.shared_bytes} bytes of shared memory; there are {SHARED_BYTES[capability]}.")
    return found
