"""The processor of the same machine, on two of its cores: fastrank in float32, bf16 and int8 beside ONNX Runtime."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from baselines import PaddedReranker, best_batch_size
from bench_cpu_engine import checked, forward_share, product_rates, scores_of
from engines import OnnxRuntime
from gpu_models import checkpoint, texts
from timing import Comparison, Contender

from fastrank import Reranker, _cpu

MAX_LENGTH = 256


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:4:2] or cores)
    torch.set_num_threads(2)
    try:
        yield from compare("tiny" if dry_run else "MiniLM-L6", data, dry_run)
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


def compare(shape: str, data: Path | None, dry_run: bool) -> Iterator[str]:
    source, lists = texts(data, dry_run)
    lists = [replace(one, documents=one.documents[:50], labels=None, document_ids=None) for one in lists[:6]]
    folder = checkpoint(shape, data, dry_run)
    num_pairs = sum(len(one.documents) for one in lists)
    exact = np.asarray(PaddedReranker(folder, "float32", MAX_LENGTH).scores(lists, 8))
    settings = Reranker(folder, device="cpu").model.settings
    rates = product_rates(settings.hidden_size, settings.intermediate_size)
    notes = [f"instruction set {_cpu.isa()}"]
    made = []
    for dtype in ("float32", "bf16", "int8"):
        reranker = Reranker(folder, device="cpu", dtype=dtype, max_length=MAX_LENGTH)
        notes.append(forward_share(reranker, lists, dtype, rates))
        run = functools.partial(scores_of, reranker, lists)
        name = f"fastrank {dtype}"
        made.append(Contender(name, run, num_pairs, ours=True, check=checked(dtype, exact, notes, name)))
    for dtype in ("float32", "int8"):
        name = f"ONNX Runtime {dtype}"
        if importlib.util.find_spec("onnxruntime") is None:
            made.append(Contender(name, lambda: None, num_pairs, failure="onnxruntime is not installed"))
            continue
        engine = OnnxRuntime(folder, dtype, MAX_LENGTH)
        size = best_batch_size(engine, lists)
        run = functools.partial(engine.scores, lists, size)
        more = {} if dry_run else {"check": checked(dtype, exact, notes, name)}  # int8 does not suit tiny weights
        made.append(Contender(f"{name}, by {size}", run, num_pairs, **more))
    title = f"re-ranking on 2 cores, {shape}, {num_pairs} pairs of {source}"
    Comparison(title, "pairs", made, notes).measure(1 if dry_run else 5)
    yield from notes
