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

    Args:
        device: What the run trains on: cpu, cuda, or auto.

    Raises:
        ValueError: WORLD_SIZE and RANK, which torchrun sets, are no numbers that go together.
    """

    def __init__(self, device: str = "auto") -> None:
        given = {name: os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"))}
        if not all(value.isdecimal() for value in given.values()):
            raise ValueError(f"{given} must be whole numbers, as torchrun sets them.")
        self.count, self.rank = int(given["WORLD_SIZE"]), int(given["RANK"])
        if self.count <= 1:
            self.count, self.rank = 1, 0
        if self.rank >= self.count:
            raise ValueError(f"RANK is {self.rank}, but WORLD_SIZE is {self.count}: ranks count from 0.")
        if self.count > 1 and not distributed.is_initialized():
            has_gpu = device != "cpu" and torch.cuda.is_available()
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

    def agree(self, what: dict[str, Any]) -> None:
        """Raises ValueError where the processes differ in one of these things: they would train apart, or wait for
        ever."""
        if self.count == 1:
            return
        parts: list[dict[str, Any]] = [{} for _ in range(self.count)]
        distributed.all_gather_object(parts, what)
        different = [name for name in what if any(part[name] != what[name] for part in parts)]
        if different:
            name = different[0]
            values = ", ".join(str(part[name]) for part in parts)
            raise ValueError(f"The processes differ in {name} ({values}): give all of them the same files and folders.")

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()
