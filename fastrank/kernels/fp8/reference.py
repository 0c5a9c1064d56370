"""Rows of numbers in fp8 (e4m3), in plain PyTorch: the definition that every kernel is measured against.

A row's scale makes its largest number the largest code, 448; a code times its row's scale is the number again, but for
rounding to three bits behind the point. Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
"""

import torch
from torch import Tensor

LARGEST = 448.0  # of the codes
LEAST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros, for example: one over it is finite


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scales = (x.abs().amax(1) / LARGEST).clamp(min=LEAST_SCALE)
    codes = (x / scales[:, None]).clamp(-LARGEST, LARGEST)  # division may round to a little above
    return codes.to(torch.float8_e4m3fn), scales


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers again, float32."""
    return codes.float() * scales[:, None]
