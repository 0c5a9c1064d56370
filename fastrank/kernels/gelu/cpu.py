"""GELU(x + bias) in C++ (csrc/gelu.cpp), float32 on CPU tensors.

Saved for the backward is x, the matrix product's own output; sum and derivative are computed again there.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu


def bias_gelu(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    return _BiasGelu.apply(x, bias, tanh_form)


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx, x, bias, tanh_form):
        x, bias = x.detach().contiguous(), bias.detach().contiguous()
        out = torch.empty_like(x)
        _cpu.gelu_forward(x.numpy(), bias.numpy(), tanh_form, out.numpy(), torch.get_num_threads())
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
        arrays = [tensor.numpy() for tensor in (dout.contiguous(), dx)]
        written = None if dbias is None else dbias.numpy()
        _cpu.gelu_backward(x.numpy(), bias.numpy(), ctx.tanh_form, *arrays, written, torch.get_num_threads())
        return dx if x_needed else None, dbias, None
