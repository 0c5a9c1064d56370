"""Tables of Triton kernel configurations: the one way to launch a kernel.

A table says of each configuration what triton compiles: kernel, types of the arguments, compile-time values, warps,
stages. Kernels are not specialised on values or alignment, so what the ahead-of-time gate compiles from a table
(tests/ahead_of_time.py) is what a launch runs, and nothing else can be launched.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from triton import language as tl

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
NUMBERS = {int: "i32", float: "fp32"}


def kernel(function: Callable) -> Callable:
    """triton.jit without any specialisation on run-time arguments."""
    arguments = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    return triton.jit(function, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)


@dataclass(frozen=True)
class Configuration:
    """A kernel as triton compiles it.

    Attributes:
        kernel: What `kernel` made.
        types: Of each run-time argument, in order, such as {"scores_ptr": "*fp32", "num_lists": "i32"}.
        constants: The compile-time values.
        num_warps: Warps of 32 threads a program.
        num_stages: Depth of software pipelining.
    """

    kernel: Callable
    types: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, object]:
        # Fusing is asked for: triton 3.10 no longer does it by itself.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Table(dict[str, Configuration]):
    """Configurations by name."""

    def launch(self, name: str, num_programs: int, *arguments: Tensor | int | float) -> None:
        """Runs the configuration `name` in a grid of num_programs; tensors must be contiguous. KeyError for a name that
        is not in the table, TypeError for an argument of another type than the table says."""
        configuration = self[name]
        for (parameter, expected), argument in zip(configuration.types.items(), arguments, strict=True):
            given = POINTERS.get(argument.dtype) if isinstance(argument, Tensor) else NUMBERS.get(type(argument))
            if given != expected:
                raise TypeError(f"{name}: {parameter} must be {expected}, not {given}.")
        if num_programs:
            configuration.kernel[(num_programs,)](*arguments, **configuration.constants, **configuration.options)
