"""A linear layer's weights, frozen for inference: float32 as they are, bf16, or int8 with a scale for each block of a
column.

Columns are output features, as everywhere here. int8 weights are symmetric and need no zero point; a block's scale is
set by its largest pair of neighbours, since AVX2 adds two products of a byte and a weight in 16 bits: so the same
integers, and the same sums of them, serve every processor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.int8: "int8"}  # by the dtype of weights
BLOCK = 64  # neighbours along the depth that share a scale
PAIR_STEPS = 127  # of the largest |w| + |w neighbour| in a block; rounding adds at most 1


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """Weights and bias of x W^T + b.

    Attributes:
        weight: (columns, depth) float32 or bf16; or int8 (columns, blocks, block), the last block filled up with zeros.
        bias: (columns,) float32.
        depth: How many values a row of x has.
        scales: (columns, blocks) float32, what one step of an int8 weight is worth; None for others.
        packed: What a backend has made of them, by instruction set.

    Once they are packed, release() gives back the memory of `weight`, which is a meta tensor then.
    """

    weight: Tensor
    bias: Tensor
    depth: int
    scales: Tensor | None = None
    packed: dict[str, tuple] = field(default_factory=dict, repr=False, compare=False)

    @property
    def columns(self) -> int:
        return self.weight.shape[0]

    @property
    def precision(self) -> str:
        return PRECISIONS[self.weight.dtype]

    def as_bf16(self) -> LinearWeights:
        """What a product of bf16 takes for them; int8 weights as they are, but for the rounding of their scales'
        multiples."""
        if self.scales is None:
            return LinearWeights(self.weight.bfloat16(), self.bias, self.depth)
        weight = (self.weight * self.scales[..., None]).flatten(1)[:, : self.depth]
        return LinearWeights(weight.bfloat16(), self.bias, self.depth)

    def release(self) -> None:
        object.__setattr__(self, "weight", self.weight.to("meta"))

    def require_weight(self) -> None:
        """Raises a RuntimeError where the weight was released."""
        if self.weight.is_meta:
            raise RuntimeError(
                f"These weights are packed for {' and '.join(self.packed)} alone: load the model again after a change "
                "of FASTRANK_CPU_ISA or of the backend."
            )


def restore(weight: Tensor, bias: Tensor, scales: Tensor, depth: int) -> LinearWeights:
    """int8 weights that freeze() made before; raises ValueError for what it cannot have made."""
    shape = (len(bias), -(-depth // BLOCK), BLOCK)
    if (
        weight.dtype != torch.int8
        or weight.shape != shape
        or scales.dtype != torch.float32
        or scales.shape != shape[:2]
    ):
        raise ValueError(
            f"int8 weights must be {shape} int8 with scales {shape[:2]} float32, not {tuple(weight.shape)} "
            f"{weight.dtype} with {tuple(scales.shape)} {scales.dtype}."
        )
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError("The scales of int8 weights must be finite and not negative.")
    if weight.flatten(1)[:, depth:].any():
        raise ValueError("What fills int8 weights up to whole blocks must be zero.")
    if weight.numel() and weight.int().abs().unflatten(2, (-1, 2)).sum(3).max() > PAIR_STEPS + 1:
        raise ValueError(f"Neighbouring int8 weights must not be larger than {PAIR_STEPS + 1} together.")
    return LinearWeights(weight, bias, depth, scales)


def freeze(weight: Tensor, bias: Tensor, precision: str, *, copy: bool = True) -> LinearWeights:
    """Weights of this precision ("float32", "bf16" or "int8"). weight: (columns, depth) and bias: (columns,), both
    float32 and at least 1 x 1. copy=False lets float32 weights share memory with those given, for a caller that gives
    them up.

    Raises ValueError for others, and for weights that are not finite or too large, which int8 could not say.
    """
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or not weight.numel() or weight.is_meta:
        raise ValueError(
            f"A linear layer has weights (columns, depth) and a bias (columns,), not {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}{' without values' * weight.is_meta}."
        )
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"Weights are frozen from float32, not from {weight.dtype} with a bias of {bias.dtype}.")
    weight, bias = weight.detach(), bias.detach().clone()
    columns, depth = weight.shape
    if precision == "float32":
        return LinearWeights(weight.clone() if copy else weight, bias, depth)
    if precision == "bf16":
        return LinearWeights(weight.bfloat16(), bias, depth)
    if precision != "int8":
        raise ValueError(f"Weights can be frozen as {', '.join(PRECISIONS.values())}, not as {precision!r}.")
    if not weight.isfinite().all():
        raise ValueError("Weights that are NaN or infinite cannot be quantised to int8.")
    blocks = functional.pad(weight, (0, -depth % BLOCK)).view(columns, -1, BLOCK)
    scales = (blocks.abs().unflatten(2, (-1, 2)).sum(3).amax(2) / PAIR_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    if not scales.isfinite().all():
        raise ValueError("Weights whose sums pass float32 cannot be quantised to int8.")
    steps = (blocks / scales[..., None]).round()
    return LinearWeights(steps.to(torch.int8), bias, depth, scales)
