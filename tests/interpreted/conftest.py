"""Every nth test, where INTERPRETED_PART says so (0/2: the first, the third ...); and an interpreter that is three
times as fast as triton's own, and rounds to fp8 as GPUs do."""

import dataclasses
import os

from fp8_accuracy import convert_as_gpus_do
from triton import language as tl
from triton.runtime import interpreter


def pytest_collection_modifyitems(items):
    part, parts = map(int, os.environ.get("INTERPRETED_PART", "0/1").split("/"))
    items[:] = items[part::parts]


def call(function, *arguments, **keywords):
    """What a kernel calls. Triton makes `tl` interpretable at each launch, and again at each call, which takes most of
    the time; only `tl.core`, which triton's own library of functions goes by, needs it once more, and keeps it."""
    if id(function.fn.__globals__) not in _KNOWN:
        _KNOWN.add(id(function.fn.__globals__))
        if any(value is tl.core for value in function.fn.__globals__.values()):
            interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **keywords)


_KNOWN: set[int] = set()
interpreter.InterpretedFunction.__call__ = call
# Every sum of integers was taken twice, the second time in 64 bits; compiled kernels do not, either.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
convert_as_gpus_do()
