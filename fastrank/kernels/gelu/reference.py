"""GELU(x + bias) in plain PyTorch: the definition that every kernel is measured against."""

from torch import Tensor
from torch.nn import functional


def bias_gelu(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    return functional.gelu(x + bias, approximate="tanh" if tanh_form else "none").to(x.dtype)
