"""Which backend runs an operation here, and why not the others.

An operation is a folder of fastrank/kernels, a backend a file in it. `auto` takes the first of BACKENDS that refuses
neither the device nor the dtype of the tensor, and never moves a tensor; an explicit backend that is refused raises.
With TRITON_INTERPRET=1 the gpu backend also takes CPU tensors, where it is asked for by name.
"""

import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import warnings
from types import ModuleType

import torch
from torch import Tensor

from fastrank import kernels

BACKENDS = ("cpu", "gpu", "varlen", "flash_attn", "reference")  # in the order in which `auto` asks
OPS = tuple(sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg))
DEVICE_TYPES = {"cpu": "cpu", "gpu": "cuda", "varlen": "cuda", "flash_attn": "cuda"}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "gpu": (torch.float32, torch.bfloat16, torch.float16),
    "varlen": (torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
}
# What an operation that is not one of hidden states takes instead.
DTYPES_OF_OPS = {("linear", "cpu"): (torch.float32,), ("listwise", "cpu"): (torch.float32,)}
KINDS = {"cpu": "C++", "gpu": "GPU", "varlen": "torch.nn.attention.varlen", "flash_attn": "flash-attn"}
# What a backend must be able to import, and what to say where it cannot.
NEEDS = {
    "cpu": (
        "fastrank._cpu",
        "The C++ extension fastrank._cpu is not built: install a C++ compiler and run `pip install -e .` in the "
        "checkout.",
    ),
    "gpu": ("triton", "Triton is not installed: pip install 'fastrank[gpu]'."),
    "varlen": ("torch.nn.attention.varlen", "This torch has no torch.nn.attention.varlen."),
    "flash_attn": ("flash_attn", "flash-attn is not installed."),
}
OPTIONAL = ("varlen", "flash_attn")  # other people's kernels, for some operations
UNTESTED = OPTIONAL  # nobody has run these here so far
PROBED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_warned: set[str | tuple[str, str]] = set()


class BackendRefused(RuntimeError, ValueError):
    """An explicitly chosen backend cannot run this operation on this tensor."""


@functools.cache
def _kernel(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"fastrank.kernels.{op}.{backend}")


def _has_file(op: str, backend: str) -> bool:
    return importlib.util.find_spec(f"fastrank.kernels.{op}.{backend}") is not None


def _is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _standing_refusals(
    op: str, backend: str, device_type: str, dtype: torch.dtype, interpreted: bool = False
) -> tuple[str, ...]:
    if backend == "reference":
        return ()
    if not _has_file(op, backend):
        return (f"fastrank has no {KINDS[backend]} kernel for {op}.",)
    sentences = []
    module, absence = NEEDS[backend]
    if importlib.util.find_spec(module) is None:
        sentences.append(absence)
    if device_type not in (DEVICE_TYPES[backend], "cpu" if interpreted and backend == "gpu" else None):
        sentences.append(
            f"The {backend} backend runs on {DEVICE_TYPES[backend]} tensors, not on {device_type} tensors."
        )
    dtypes = DTYPES_OF_OPS.get((op, backend), DTYPES[backend])
    if dtype not in dtypes:
        known = ", ".join(map(_name, dtypes))
        sentences.append(f"The {backend} backend computes in {known}, not in {_name(dtype)}.")
    return tuple(sentences)


def refusals(op: str, backend: str, tensor: Tensor) -> list[str]:
    """Why `backend` cannot run `op` on `tensor`, in sentences; an empty list means that it can.

    op: a name of OPS. backend: a name of BACKENDS. tensor: the operation's first argument; its device, its dtype and,
    where a kernel has limits, its shape are looked at.
    """
    sentences = _standing_refusals(op, backend, tensor.device.type, tensor.dtype, _is_interpreted())
    if sentences or backend == "reference":
        return list(sentences)
    limits = getattr(_kernel(op, backend), "refusals", None)
    return [] if limits is None else limits(tensor)


_choices: dict[tuple, ModuleType] = {}


def choose(op: str, backend: str, tensor: Tensor) -> ModuleType:
    """The module fastrank.kernels.<op>.<backend> that runs `op` on `tensor`.

    backend: a name of BACKENDS, or "auto", which means the environment variable FASTRANK_BACKEND where it is set, else
    the first backend without a refusal. Raises BackendRefused, or ValueError for an unknown name.
    """
    # A model asks the same hundreds of times a second; kernels refuse devices, dtypes and last dimensions.
    asked = op, backend, tensor.device.type, tensor.dtype, tensor.shape[-1:], os.environ.get("FASTRANK_BACKEND")
    asked = *asked, _is_interpreted()
    if asked not in _choices:
        found = _find(op, backend, tensor)
        if found in (*UNTESTED, "reference"):
            return _kernel(op, found)  # with a warning where nobody asked for it
        _choices[asked] = _kernel(op, found)
    return _choices[asked]


def _find(op: str, backend: str, tensor: Tensor) -> str:
    """The backend that choose() takes."""
    origin = ""
    if backend == "auto":
        backend = os.environ.get("FASTRANK_BACKEND") or "auto"
        origin = " (from the environment variable FASTRANK_BACKEND)"
        if backend in OPTIONAL and not _has_file(op, backend):
            backend = "auto"  # they know attention alone; the rest of a model runs beside them
    if backend == "auto":
        for candidate in BACKENDS[:-1]:
            if tensor.device.type == DEVICE_TYPES[candidate] and not refusals(op, candidate, tensor):
                if candidate in UNTESTED:
                    _warn_of_untested(op, candidate, tensor)
                return candidate
        _warn_of_reference(op, tensor)
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"There is no backend {backend!r}{origin}; known are auto, {', '.join(BACKENDS)}.")
    if sentences := refusals(op, backend, tensor):
        raise BackendRefused(f"The backend {backend!r}{origin} cannot run {op}: {' '.join(sentences)}")
    return backend


def _warn_of_untested(op: str, backend: str, tensor: Tensor) -> None:
    if (op, backend) in _warned:
        return
    _warned.add((op, backend))
    reason = " ".join(refusals(op, "gpu", tensor))
    warnings.warn(f"{op} runs by {KINDS[backend]}, which nobody has tested here. {reason}", stacklevel=5)


def _warn_of_reference(op: str, tensor: Tensor) -> None:
    if op in _warned:
        return
    _warned.add(op)
    asked = [name for name in BACKENDS[:-1] if name not in OPTIONAL or _has_file(op, name)]
    reasons = " ".join(f"{name}: {' '.join(refusals(op, name, tensor))}" for name in asked)
    warnings.warn(f"{op} runs in plain PyTorch, which is slow. {reasons}", stacklevel=5)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))


def table() -> list[dict]:
    """One row for each operation and backend: op, backend, runs, dtypes (names that it takes on its own device),
    refusals. Backends of OPTIONAL have no row beside operations that they do not know."""
    rows = []
    for op in OPS:
        for backend in BACKENDS:
            if backend in OPTIONAL and not _has_file(op, backend):
                continue
            device_type = DEVICE_TYPES.get(backend, "cpu")
            answers = {_name(dtype): _standing_refusals(op, backend, device_type, dtype) for dtype in PROBED_DTYPES}
            dtypes = [name for name, sentences in answers.items() if not sentences]
            reasons = [] if dtypes else list(answers[_name(DTYPES[backend][0])])
            if device_type == "cuda" and not torch.cuda.is_available():
                reasons.append("torch finds no CUDA device here.")
            rows.append({"op": op, "backend": backend, "runs": not reasons, "dtypes": dtypes, "refusals": reasons})
    return rows


def machine() -> dict:
    """The machine as the kernels see it: instruction_set (None without the extension), instruction_sets,
    multiplies_bf16 (whether the set in use has an instruction for it), amx (whether it has matrix units for it),
    num_threads, torch."""
    facts = {"instruction_set": None, "instruction_sets": [], "multiplies_bf16": False, "amx": False}
    facts["num_threads"] = torch.get_num_threads()
    if importlib.util.find_spec("fastrank._cpu") is not None:
        from fastrank import _cpu

        facts |= {"instruction_set": _cpu.isa(), "instruction_sets": _cpu.supported_isas()}
        facts |= {"multiplies_bf16": _cpu.multiplies_bf16(), "amx": _cpu.multiplies_in_tiles()}
    return facts | {"torch": torch.__version__}


def backends_command(argv: list[str]) -> int:
    """Prints the table of backends (`--json`: as one JSON object) and returns the exit status."""
    usage = "usage: python -m fastrank backends [--json]"
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    if unknown := [argument for argument in argv if argument != "--json"]:
        print(f"backends takes no argument but --json, not {' '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        facts = machine()
    except ValueError as error:  # FASTRANK_CPU_ISA names what this processor lacks
        print(f"fastrank backends: {error}", file=sys.stderr)
        return 2
    if argv:
        print(json.dumps({"machine": facts, "backends": table()}))
        return 0
    offered = f" (this processor offers {', '.join(facts['instruction_sets'])})" if facts["instruction_sets"] else ""
    instruction_set = facts["instruction_set"] or "none"
    bf16 = "a bf16 instruction" if facts["multiplies_bf16"] else "no bf16 instruction"
    bf16 = "matrix units (AMX) for bf16" if facts["amx"] else bf16
    print(f"instruction set {instruction_set}{offered}, {bf16}, {facts['num_threads']} threads, torch {facts['torch']}")
    rows = [("operation", "backend", "runs", "")]
    for row in table():
        note = ", ".join(row["dtypes"]) if row["runs"] else " ".join(row["refusals"])
        note += " (untested)" * (row["backend"] in UNTESTED)
        rows.append((row["op"], row["backend"], "yes" if row["runs"] else "no", note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0
