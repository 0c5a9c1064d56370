"""Who adds a weight's gradient to those of earlier passes: autograd, or the function that computes it.

Autograd adds tensors as large as the weight to .grad: of a product's gradient each number is written, then read again
with the sum so far, which is written: 16 bytes. A product that starts from the sum so far takes 8, and of a table of
vectors only the batch's rows. Megatron-LM calls it gradient accumulation fusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_in_place = ContextVar("in_place", default=False)


@contextmanager
def accumulate_in_place(wanted: bool = True) -> Iterator[None]:
    """Functions whose forward runs in here add gradients of large weights to .grad in their backward, if there is one
    and they can, and give autograd none of these: .grad must stay where it is until then, and torch.autograd.grad()
    needs allow_unused=True."""
    before = _in_place.set(wanted)
    try:
        yield
    finally:
        _in_place.reset(before)


def accumulator(weight: Tensor) -> Tensor | None:
    """To be called in a forward: what the backward adds this weight's gradient to; None where autograd gets it."""
    learns = weight.requires_grad and weight.is_leaf
    return weight.grad if _in_place.get() and learns and weight.dtype == torch.float32 else None
