"""Where the time of a forward, a query and a training step goes: what the GPU waits for the host, its kernels by their
share, and the host's functions."""

from __future__ import annotations

import cProfile
import pstats
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
MOST_KERNELS, MOST_FUNCTIONS = 22, 16


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    runs: dict[str, Callable[[], object]] = {}
    for shape in ("tiny",) if dry_run else ("MiniLM-L6", "ELECTRA-base"):
        runs |= runs_of(shape, device, data, dry_run)
    walls = {title: wall_and_launched(one, device) for title, one in runs.items()}  # before a profiler slows launches
    for title, one in runs.items():
        rows = kernels(one, device)
        busy = sum(row[2] for row in rows)
        wall, launched = walls[title]
        yield (
            f"{title}: {wall * 1e3:.2f} ms, launched in {launched * 1e3:.2f} ms, GPU busy {busy * 1e3:.2f} ms, "
            f"{sum(row[1] for row in rows):.0f} launches"
        )
        for name, count, seconds in rows[:MOST_KERNELS]:
            yield f"    {seconds / max(busy, 1e-12):6.1%} {seconds * 1e3:8.3f} ms {count:6.1f} x {name[:110]}"
        yield from (f"    host {line}" for line in functions(one, device))


def runs_of(shape: str, device: str, data: Path | None, dry_run: bool) -> dict[str, Callable[[], object]]:
    """By title."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.42, 0.4, 8 if dry_run else 700), 24, 256).astype(int)
    model = make_model(shape).requires_grad_(False).to(device).to_precision("float32" if dry_run else "bf16")
    batch = batch_of(lengths, model.settings.vocab_size, device)
    _, lists = texts(data, dry_run)
    graphs = {"cuda_graphs": False} if device == "cuda" else {}
    reranker = Reranker(checkpoint(shape, data, dry_run), device=device, max_length=MAX_LENGTH, **graphs)
    query, documents = lists[0].query, list(lists[0].documents)
    found = {
        f"forward, {shape}, {lengths.sum()} tokens": torch.inference_mode()(lambda: model.score(batch)),
        f"one query, {shape}, {len(documents)} documents": lambda: reranker.rank(query, documents),
    }
    for stage in STAGES:
        found[f"training step, {stage}, {shape}"] = training(shape, stage, device, data, dry_run)
    return found


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall_and_launched(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a run, and those after which the host is done with it."""
    for _ in range(3):
        run()
    wait(device)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    launched = (time.perf_counter() - started) / ROUNDS
    wait(device)
    return (time.perf_counter() - started) / ROUNDS, launched


def kernels(run: Callable[[], object], device: str) -> list[tuple[str, float, float]]:
    """Name, launches and seconds in a run, the longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(ROUNDS):
            run()
        wait(device)
    rows = [(one.key, one.count / ROUNDS, one.self_device_time_total / ROUNDS / 1e6) for one in profiler.key_averages()]
    return sorted((row for row in rows if row[2]), key=lambda row: -row[2])


def functions(run: Callable[[], object], device: str) -> Iterator[str]:
    """The host's functions by their own time; the profiler adds to each call."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(ROUNDS):
        run()
    profiler.disable()
    wait(device)
    stats = pstats.Stats(profiler).stats
    own = sorted(stats.items(), key=lambda item: -item[1][2])[:MOST_FUNCTIONS]
    for (file, line, name), (_, calls, seconds, _, _) in own:
        where = f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        yield f"{seconds / ROUNDS * 1e3:8.3f} ms {calls / ROUNDS:6.0f} x {where[:110]}"


def training(shape: str, stage: str, device: str, data: Path | None, dry_run: bool) -> Callable[[], object]:
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
    return lambda: trainer.step(step_lists, 1)
