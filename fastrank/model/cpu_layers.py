"""The layers of a frozen encoder in one call, on a CPU with matrix units (AMX).

encoder.Layer defines what is computed; fastrank.kernels.encoder_cpu says what is rounded beside. The layers are not
called as modules: hooks on them or on what is in them do not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrank import ops
from fastrank.backend import choose, refusals

if TYPE_CHECKING:
    from fastrank.model.encoder import Layer, Norm


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether C++ kernels read and write what lies between the products in this dtype, one layer after another."""
    probe = torch.empty(0, 1, head_dim, dtype=dtype)
    return not any(refusals(op, "cpu", probe) for op in ("attention", "gelu", "layer_norm"))


def suits(layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether the layers can go this way."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not len(x) or layers[0].up.frozen is None:
        return False
    if any(not choose(op, "auto", x[:, :1]).__name__.endswith(".cpu") for op in ("linear", "attention")):
        return False
    from fastrank.kernels import encoder_cpu

    products = (one.frozen for layer in layers for one in layer.products())
    return (
        encoder_cpu.runs()
        and encoder_cpu.takes(layers[0].heads[1])
        and all(frozen is not None and frozen.precision == layers[0].up.frozen.precision for frozen in products)
    )


def infer(layers: Sequence[Layer], x: Tensor, offsets: Tensor) -> Tensor:
    """What the layers make of x, which is overwritten: the first tokens' vectors, (pairs, hidden). Raises ValueError
    for offsets that do not cut it."""
    from fastrank.kernels import encoder_cpu

    ops.check_offsets("offsets", offsets, x)
    *whole, last = layers
    weights = [
        (
            layer.qkv.frozen,
            layer.attention_output.frozen,
            _norm(layer.attention_norm),
            layer.up.frozen,
            layer.down.frozen,
            _norm(layer.norm),
        )
        for layer in whole
    ]
    x = x.contiguous()
    attended = encoder_cpu.encode(
        x, offsets.contiguous(), last.heads[0], weights, last.activation, last.query.frozen, last.key_value.frozen
    )
    return last.after_attention(attended, x.index_select(0, offsets[:-1]))


def _norm(norm: Norm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
