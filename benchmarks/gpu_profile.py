"""Where the time of a forward and of a training step goes: kernels by their share, and how long the GPU waits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gpu_models import batch_of, checkpoint, make_model, texts
from gpu_train import MAX_LENGTH, STAGES, lists_of
from torch.profiler import ProfilerActivity, profile

from fastrank import Reranker
from fastrank.train import TrainConfig
from fastrank.train.trainer import Trainer

ROUNDS = 5
MOST_KERNELS = 22


def shares(title: str, run: Callable[[], object], device: str) -> Iterator[str]:
    """Wall time of a run, what of it the GPU works, and the kernels that take the most of that."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    wait()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    launched = (time.perf_counter() - started) / ROUNDS
    wait()
    wall = (time.perf_counter() - started) / ROUNDS
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(ROUNDS):
            run()
        wait()
    rows = [(one.key, one.count, one.self_device_time_total) for one in profiler.key_averages()]
    rows = sorted((row for row in rows if row[2]), key=lambda row: -row[2])
    busy = sum(row[2] for row in rows) / ROUNDS / 1e6
    yield (
        f"{title}: {wall * 1e3:.2f} ms, launched in {launched * 1e3:.2f} ms, GPU busy {busy * 1e3:.2f} ms, "
        f"{sum(row[1] for row in rows) / ROUNDS:.0f} launches"
    )
    for name, count, total in rows[:MOST_KERNELS]:
        share = total / ROUNDS / 1e6 / max(busy, 1e-12)
        yield f"    {share:6.1%} {total / ROUNDS / 1e3:8.3f} ms {count / ROUNDS:6.1f} x {name[:110]}"


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.42, 0.4, 8 if dry_run else 700), 24, 256).astype(int)
    for shape in ("tiny",) if dry_run else ("MiniLM-L6", "ELECTRA-base"):
        model = make_model(shape).requires_grad_(False).to(device).to_precision("float32" if dry_run else "bf16")
        batch = batch_of(lengths, model.settings.vocab_size, device)
        with torch.inference_mode():
            yield from shares(f"forward, {shape}, {lengths.sum()} tokens", lambda m=model, b=batch: m.score(b), device)
        del model
        _, lists = texts(data, dry_run)
        reranker = Reranker(checkpoint(shape, data, dry_run), device=device, max_length=MAX_LENGTH)
        one = lists[0]
        documents = list(one.documents)
        yield from shares(
            f"one query, {shape}, {len(documents)} documents",
            lambda r=reranker, q=one.query, d=documents: r.rank(q, d),
            device,
        )
        del reranker
        for stage in STAGES:
            yield from training(shape, stage, device, data, dry_run)


def training(shape: str, stage: str, device: str, data: Path | None, dry_run: bool) -> Iterator[str]:
    _, lists = texts(data, dry_run)
    step_lists = lists_of(stage, shape, lists, dry_run)
    trainer = Trainer(
        TrainConfig(
            model=str(checkpoint(shape, data, dry_run)),
            train_data=step_lists,
            output_dir=tempfile.mkdtemp(),
            loss=STAGES[stage][0],
            device=device,
            max_length=MAX_LENGTH,
            dropout=0.0,
            per_device_train_batch_size=len(step_lists),
        )
    )
    yield from shares(f"training step, {stage}, {shape}", lambda: trainer.step(step_lists, 1), device)
    if device == "cuda":
        torch.cuda.empty_cache()
