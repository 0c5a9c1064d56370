"""Training in several processes: what one of them knows of the others, as `torchrun` started them.

Every process holds the whole model and knows the whole step; it scores its share of the lists, and gradients are added
up. A loss is normalised over the step and not over a share, so that the sum is the gradient of one process alone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["Processes"]


class Processes:
    """The processes of one run; without torchrun there is only this one, and nothing is exchanged.

    Raises:
        ValueError: WORLD_SIZE says that there are several and the rest of torchrun's variables is missing or wrong.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not distributed.is_initialized():
            has_gpu = torch.cuda.is_available()
            if has_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("nccl" if has_gpu else "gloo")
            atexit.register(distributed.destroy_process_group)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def share(self, things: Sequence[Any]) -> Sequence[Any]:
        """This process's part: every count-th, so that neighbours of one length are spread."""
        return things[self.rank :: self.count]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up the gradients of all processes; a missing one, where a process had no list, counts as zero."""
        if self.count == 1:
            return
        learning = [one for one in parameters if one.requires_grad]
        for one in learning:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        # One message: the order of additions, and so the weights, are the same in every process.
        flat = torch.cat([one.grad.flatten() for one in learning])
        distributed.all_reduce(flat)
        for one, summed in zip(learning, flat.split([one.numel() for one in learning]), strict=True):
            one.grad.copy_(summed.view_as(one))

    def sum(self, value: Tensor) -> Tensor:
        """A scalar, added up."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value

    def gather(self, shares: Sequence[Any]) -> list[Any]:
        """What every process has for its share(things), in the order of `things`."""
        if self.count == 1:
            return list(shares)
        parts: list[list[Any]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(parts, list(shares))
        found: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            found[rank :: self.count] = part
        return found

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()
