"""GELU(x + bias) in C++ (csrc/gelu.cpp), on CPU tensors of float32 or bf16, computed in float32.

Saved for the backward is x, the matrix product's own output; sum and derivative are computed again there.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu
from fastrank.kernels.arrays import array_of


def bias_gelu(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    return _BiasGelu.apply(x, bias.float(), tanh_form)


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx, x, bias, tanh_form):
        x, bias = x.detach().contiguous(), bias.detach().contiguous()
        out = torch.empty_like(x)
        _cpu.gelu_forward(array_of(x), array_of(bias), tanh_form, array_of(out), torch.get_num_threads())
        ctx.save_for_backward(x, bias)
        ctx.tanh_form = tanh_form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        x_needed, bias_needed, _ = ctx.needs_input_grad
        dx = torch.empty_like(x)
        dbias = torch.empty_like(bias) if bias_needed else None
        arrays = [array_of(tensor) for tensor in (dout.contiguous(), dx, dbias)]
        _cpu.gelu_backward(array_of(x), array_of(bias), ctx.tanh_form, *arrays, torch.get_num_threads())
        return dx if x_needed else None, dbias, None
