"""LayerNorm(x + residual) in C++ (csrc/layer_norm.cpp), on CPU tensors of float32 or bf16, computed in float32.

Saved for the backward are the inputs, the mean and the inverse deviation of each row; x + residual is added up again
there.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu
from fastrank.kernels.arrays import array_of
from fastrank.kernels.layer_norm.reference import sum_vectors


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    weight, bias = weight.float(), bias.float()
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        return _LayerNorm.apply(x, residual, weight, bias, eps)
    return _forward(x, residual, weight, bias, eps, None, None)


def embedding_norm(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    padding: tuple[int | None, int | None],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tables, weight, bias)):
        return layer_norm(*sum_vectors(ids, tables, padding), weight, bias, eps).to(dtype)
    written = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    out = torch.empty(len(ids[0]), len(weight), dtype=written)
    vectors, scale = [_array(one.float()) for one in tables], (_array(weight.float()), _array(bias.float()))
    _cpu.embedding_norm_forward(
        [_array(one) for one in ids], vectors, *scale, eps, array_of(out), torch.get_num_threads()
    )
    return out.to(dtype)


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else array_of(tensor.contiguous())


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    means: Tensor | None,
    inverse_deviations: Tensor | None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    arrays = map(_array, (x, residual, weight, bias))
    _cpu.layer_norm_forward(
        *arrays, eps, array_of(out), _array(means), _array(inverse_deviations), torch.get_num_threads()
    )
    return out


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        statistics = [torch.empty(len(x), dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(x, residual, weight, *statistics)
        return _forward(x, residual, weight, bias, eps, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, residual, weight, *statistics = ctx.saved_tensors
        x_needed, residual_needed, weight_needed, bias_needed, _ = ctx.needs_input_grad
        dx = torch.empty(x.shape, dtype=x.dtype)
        dweight, dbias = (
            torch.empty(weight.shape, dtype=torch.float32) if weight_needed or bias_needed else None for _ in range(2)
        )
        inputs = map(_array, (dout, x, residual, weight, *statistics))
        _cpu.layer_norm_backward(*inputs, *map(_array, (dx, dweight, dbias)), torch.get_num_threads())
        return (
            dx if x_needed else None,
            dx if residual_needed else None,
            dweight if weight_needed else None,
            dbias if bias_needed else None,
            None,
        )
