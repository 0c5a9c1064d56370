"""The layers of an encoder in one call of C++ (csrc/encoder.hpp), where the processor multiplies bf16 in matrix units:
every thread takes whole pairs through all layers, so that what lies between two products stays in its cache.

What is computed is what fastrank.ops would, one operation after the other. Where products are of bf16, q, k, v, the
probabilities and what attention gives are rounded to it, too, as in a model whose products are bf16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank import _cpu
from fastrank.kernels.linear.cpu import pack
from fastrank.kernels.linear.weights import LinearWeights

Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps
# qkv, attention_output and the norm after it; up, down and the norm after them
LayerWeights = tuple[LinearWeights, LinearWeights, Norm, LinearWeights, LinearWeights, Norm]


def runs() -> bool:
    """Whether the instruction set in use has this kernel."""
    return _cpu.encodes_layers()


def takes(head_dim: int) -> bool:
    """Whether it knows heads of this size."""
    return head_dim % 32 == 0 and 32 <= head_dim <= 128


def encode(
    x: Tensor,
    offsets: Tensor,
    num_heads: int,
    layers: Sequence[LayerWeights],
    activation: str,
    query: LinearWeights,
    key_value: LinearWeights,
) -> Tensor:
    """Takes x (tokens, hidden) float32 through the layers, in place, and returns the attention of each pair's first
    token by the last layer's query and key_value, (pairs, hidden). offsets: int32 (pairs + 1,); every pair has a
    token."""
    attended = torch.empty(len(offsets) - 1, x.shape[1])
    _cpu.encoder_forward(
        x.numpy(),
        offsets.numpy(),
        num_heads,
        (x.shape[1] // num_heads) ** -0.5,
        [tuple(pack(one) if isinstance(one, LinearWeights) else _norm(one) for one in layer) for layer in layers],
        activation,
        pack(query),
        pack(key_value),
        attended.numpy(),
        torch.get_num_threads(),
    )
    return attended


def _norm(norm: Norm) -> tuple:
    return norm[0].detach().numpy(), norm[1].detach().numpy(), float(norm[2])
