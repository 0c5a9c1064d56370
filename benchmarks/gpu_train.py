"""Training steps beside a padded bf16 loop with SDPA and sentence-transformers' trainer: pairs a second and peak memory
at Rank-DistiLLM's two stages, and the hours that the whole recipe would take."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from baselines import PaddedTrainer
from gpu_models import checkpoint, texts
from timing import Comparison, Contender, describe, release_memory

from fastrank.train import TrainConfig
from fastrank.train.feed import Ahead
from fastrank.train.trainer import Trainer

# Stage: loss, documents of a list, pairs of the whole stage in the recipe, and lists of a step by shape: as many as the
# padded loop has room for.
STAGES = {
    "stage 1": ("lce", 8, 5.12e6, {"MiniLM-L6": 64, "ELECTRA-base": 32, "XLM-R-large": 16}),
    "stage 2": ("ranknet", 100, 3.0e6, {"MiniLM-L6": 8, "ELECTRA-base": 4, "XLM-R-large": 1}),
}
MAX_LENGTH = 256
UNTIMED = 4  # first steps of sentence-transformers' trainer


class PaddedLoop(PaddedTrainer):
    """transformers in bf16 autocast on the device, pairs padded in batches of `size`, one update a step."""

    def __init__(self, folder, device: str, loss: str):
        super().__init__(folder, "bf16", MAX_LENGTH)
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.device, self.loss = device, loss
        self.first_weights = {name: one.clone() for name, one in self.model.state_dict().items()}

    def begin_anew(self) -> None:
        """Back to the weights that checks expect."""
        self.model.load_state_dict(self.first_weights)
        self.optimizer.state.clear()

    def step(self, lists, batch_size: int, *, update: bool = True) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        places, logits = [], []
        with torch.autocast(self.device, torch.bfloat16):
            for rows, batch in self.batches(lists, batch_size):
                places.append(rows)
                given = {name: one.to(self.device, non_blocking=True) for name, one in batch.items()}
                logits.append(self.model(**given).logits[:, 0].float())
        order = torch.from_numpy(np.argsort(np.concatenate(places))).to(self.device)
        scores = torch.cat(logits)[order].view(len(lists), -1)
        labels = torch.tensor(np.array([one.labels for one in lists]), device=self.device)
        if self.loss == "lce":
            loss = torch.nn.functional.cross_entropy(scores, labels.argmax(1))
        else:
            better = labels[:, :, None] > labels[:, None, :]
            loss = torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None])[better].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if update:
            self.optimizer.step()
        return loss.detach()


def lists_of(stage: str, shape: str, lists, dry_run: bool) -> list:
    loss, size, _, counts = STAGES[stage]
    count, size = (2, 4) if dry_run else (counts[shape], size)
    made = []
    for one in itertools.islice(itertools.cycle(lists), count):
        labels = [float(i == 0) for i in range(size)] if loss == "lce" else [float(-i) for i in range(size)]
        start = (len(made) // len(lists)) * size % max(1, len(one.documents) - size + 1)
        made.append(
            dataclasses.replace(one, documents=one.documents[start : start + size], labels=labels, document_ids=None)
        )
    return made


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    for shape in ("tiny",) if dry_run else (*["XLM-R-large"] * large, "ELECTRA-base", "MiniLM-L6"):
        hours = 0.0
        for stage, (_, _, num_pairs, _) in STAGES.items():
            rate = compare(shape, stage, device, data, dry_run)
            hours += num_pairs / rate / 3600
            yield f"{shape}, {stage}: {rate:.0f} pairs/s"
            if device == "cuda":
                torch.cuda.empty_cache()
        yield f"{shape}: both stages of Rank-DistiLLM, 5.12 M and 3.0 M pairs, would take {hours:.2f} hours here"


def compare(shape: str, stage: str, device: str, data: Path | None, dry_run: bool) -> float:
    """Pairs a second of ours, NaN where it is wrong."""
    source, lists = texts(data, dry_run)
    folder = checkpoint(shape, data, dry_run)
    step_lists = lists_of(stage, shape, lists, dry_run)
    num_pairs = sum(len(one.documents) for one in step_lists)
    title = f"training, {stage}, {shape}, {len(step_lists)} lists, {num_pairs} pairs of {source} a step"
    comparison, expected = compare_loops(title, folder, stage, step_lists, num_pairs, device, dry_run)
    for size in (8,) if dry_run else (256,):
        release_memory(device)
        other = Contender(f"sentence-transformers' trainer, by {size}", lambda: None, num_pairs)
        try:
            other.durations = [their_trainer(folder, stage, step_lists, size, expected, device, 2 if dry_run else 12)]
        except Exception as error:  # it needs `datasets`, and may run out of memory
            other.failure = describe(error)
        comparison.contenders.append(other)
    ours = comparison["fastrank"]
    return ours.rate if ours.durations else math.nan


def compare_loops(
    title: str, folder: Path, stage: str, step_lists: list, num_pairs: int, device: str, dry_run: bool
) -> tuple[Comparison, float]:
    """Ours beside the padded loop; and the loss that a first step must have."""
    loss = STAGES[stage][0]
    options = {"device": device, "max_length": MAX_LENGTH, "dropout": 0.0, "loss": loss}
    options |= {"per_device_train_batch_size": len(step_lists), "output_dir": tempfile.mkdtemp()}
    config = TrainConfig(model=str(folder), train_data=step_lists, **options)
    steps = itertools.count()
    loop = PaddedLoop(folder, device, loss)
    expected = float(loop.step(step_lists, 64, update=False))

    def check(value: torch.Tensor) -> str | None:
        right = abs(float(value) - expected) < 0.05 * abs(expected) + 0.01
        return None if right else f"loss {float(value):.4f} instead of {expected:.4f}"

    trainer = Trainer(config)
    numbers = Ahead(lambda _: trainer.prepare(step_lists), itertools.count())  # as in training
    ours = Contender("fastrank", lambda: trainer.step(next(numbers), next(steps)), num_pairs, ours=True, check=check)
    bare = Trainer(dataclasses.replace(config, cuda_graphs=False))  # graphs hold their memory all the time
    bare.step(step_lists, 0)
    ours.memory_run = functools.partial(bare.step, step_lists, 1)
    made = [ours]
    for size in (8,) if dry_run else (256, 512):
        checked: list[int] = []

        def step(size=size, checked=checked) -> torch.Tensor:
            if not checked:  # the first step is the one that is checked, on the weights that others have changed
                loop.begin_anew()
                checked.append(size)
            return loop.step(step_lists, size)

        made.append(Contender(f"padded bf16 loop, by {size}", step, num_pairs, check=check))
    for one in made[1:]:
        try:
            loop.step(step_lists, int(one.name.split()[-1]), update=False)
        except torch.cuda.OutOfMemoryError as error:
            one.failure = str(error)[:80]
    # Several steps a round, as in training: the host may run ahead.
    comparison = Comparison(title, "pairs", made, [], device)
    with numbers:
        comparison.measure(2 if dry_run else 4, memory=not dry_run, shortest_round=0 if dry_run else 0.2)
    return comparison, expected


def their_trainer(folder, stage: str, lists, size: int, expected: float, device: str, steps: int) -> float:
    """Seconds a step of sentence-transformers' trainer, in batches of `size` pairs, one update a step; the first few
    do not count. ValueError where its first loss is not what is expected."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
    from transformers import TrainerCallback

    count, times = steps + UNTIMED, []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            if state.global_step in (UNTIMED, count):
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

    model = CrossEncoder(
        str(folder),
        num_labels=1,
        max_length=MAX_LENGTH,
        device=device,
        model_kwargs={"attn_implementation": "sdpa"},
        config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    is_lce = STAGES[stage][0] == "lce"
    # ListNet's softmax of 1,000 and zeros is LCE's single relevant document; RankNet counts in bits.
    loss = (losses.ListNetLoss if is_lce else losses.RankNetLoss)(model, mini_batch_size=size)
    rows = {
        "query": [one.query for one in lists] * count,
        "documents": [list(one.documents) for one in lists] * count,
        "labels": [[label * (1000.0 if is_lce else 1.0) for label in one.labels] for one in lists] * count,
    }
    arguments = CrossEncoderTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(lists),
        max_steps=count,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        logging_first_step=True,
        logging_steps=count,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict(rows)
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[Clock()])
    trainer.train()
    found = next(one["loss"] for one in trainer.state.log_history if "loss" in one)
    found *= 1.0 if is_lce else math.log(2)
    if not abs(found - expected) < 0.05 * abs(expected) + 0.01:
        raise ValueError(f"its first loss is {found:.4f} instead of {expected:.4f}")
    return (times[1] - times[0]) / steps
