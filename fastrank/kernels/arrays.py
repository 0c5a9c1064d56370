"""Tensors as the arrays that the C++ kernels take."""

import numpy as np
import torch
from torch import Tensor


def array_of(tensor: Tensor | None) -> np.ndarray | None:
    """The memory of a CPU tensor, of any strides; bf16, which numpy has not, as the int16 of its bits."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
