"""What a killed run needs to go on: one safetensors file with weights, AdamW's moments and progress.

One file, written aside, synced and renamed: at every moment the folder holds a whole old state or a whole new one.
Order, sampling and dropout follow from (seed, step), so no generator has to be stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

__all__ = ["Progress", "load_state", "save_state"]

STATE_FILE = "resume.safetensors"


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps, and the sums since its last log line."""

    step: int = 0
    best_measure: float | None = None
    best_step: int | None = None
    lists_without_terms: int = 0
    pairs_truncated: int = 0
    data_fingerprint: str = ""
    loss_sum: float = 0.0
    pair_sum: int = 0
    second_sum: float = 0.0
    step_sum: int = 0

    def add(self, losses: Sequence[float], *, pairs: int, seconds: float) -> None:
        """One more step, and the losses that have become known since the last one."""
        for loss in losses:
            self.loss_sum += loss
        self.pair_sum += pairs
        self.second_sum += seconds
        self.step_sum += 1

    def take_means(self) -> dict[str, float]:
        """Mean loss and pairs a second since the last call."""
        means = {"loss": self.loss_sum / self.step_sum, "pairs_per_second": self.pair_sum / self.second_sum}
        self.loss_sum, self.pair_sum, self.second_sum, self.step_sum = 0.0, 0, 0.0, 0
        return means


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        for key, moment in optimizer.state.get(value, {}).items():
            tensors[f"{key}.{name}"] = moment.detach()
    aside = folder / (STATE_FILE + ".writing")
    save_file(
        {k: v.contiguous().cpu() for k, v in tensors.items()},
        aside,
        metadata={"progress": json.dumps(asdict(progress))},
    )
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, folder / STATE_FILE)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Puts a stored state into model and optimizer and returns its progress; None where there is none."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            stored = {key: file.get_tensor(key) for key in file.keys()}
        names = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in names.items():
                value.copy_(stored.pop(f"model.{name}"))
        for key, moment in stored.items():
            kind, name = key.split(".", 1)
            target = names[name]
            optimizer.state[target][kind] = moment.to(target.device)  # a fused AdamW counts its steps there, too
    except (SafetensorError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it or start anew with --overwrite.") from None
    return progress
