"""LayerNorm(x + residual) in C++ (csrc/layer_norm.cpp), float32 on CPU tensors.

Saved for the backward are the inputs, the mean and the inverse deviation of each row; x + residual is added up again
there.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _LayerNorm.apply(x, residual, weight, bias, eps)


def _array(tensor: Tensor | None):
    return None if tensor is None else tensor.detach().numpy()


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = torch.empty_like(x)
        statistics = [x.new_empty(len(x)) for _ in range(2)] if any(ctx.needs_input_grad) else [None, None]
        arrays = [_array(tensor) for tensor in (x, residual, weight, bias)]
        _cpu.layer_norm_forward(*arrays, eps, *map(_array, (out, *statistics)), torch.get_num_threads())
        ctx.save_for_backward(x, residual, weight, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, residual, weight, *statistics = ctx.saved_tensors
        x_needed, residual_needed, weight_needed, bias_needed, _ = ctx.needs_input_grad
        dx = torch.empty_like(x)
        dweight, dbias = (torch.empty_like(weight) if weight_needed or bias_needed else None for _ in range(2))
        inputs = [_array(tensor) for tensor in (dout.contiguous(), x, residual, weight, *statistics)]
        _cpu.layer_norm_backward(*inputs, *map(_array, (dx, dweight, dbias)), torch.get_num_threads())
        return (
            dx if x_needed else None,
            dx if residual_needed else None,
            dweight if weight_needed else None,
            dbias if bias_needed else None,
            None,
        )
