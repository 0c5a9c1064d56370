"""From token ids to scores, models of the real shapes: pairs a second, and the share of the matrix units' rate that
goes into real tokens."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fp8_accuracy import emulated_fp8
from gpu_models import SHAPES, agrees, checkpoint, texts, useful_flop
from timing import Comparison, Contender, best_setting, describe

from fastrank import Reranker
from fastrank.checkpoint import load_model
from fastrank.model.gpu_layers import has_fp8
from fastrank.packing import pack_pairs, plan_batches

MOST_LISTS = 20


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    source, lists = texts(data, dry_run)
    compiles = bool(os.environ.get("FASTRANK_GPU_COMPILES"))
    for shape in ("tiny",) if dry_run else [name for name in SHAPES if large or name != "XLM-R-large"]:
        folder = checkpoint(shape, data, dry_run)
        reranker = Reranker(folder, device=device, max_length=256)
        some = lists[:MOST_LISTS]
        pairs = reranker._encode([one.query for one in some], [list(one.documents) for one in some])
        lengths = np.array([len(ids) for ids, _ in pairs])
        plan = plan_batches(lengths, reranker.max_batch_tokens)
        batches = [pack_pairs([pairs[i] for i in part]).to(device) for part in plan]
        padded = [pad(batch, reranker.model.settings.pad_token_id or 0) for batch in batches]
        exact = reference_scores(folder, [padded[0]], device)

        @torch.inference_mode()
        def ours(reranker=reranker, batches=batches):
            return torch.cat([reranker.model.score(batch) for batch in batches])

        def check(scores, exact=exact):
            return agrees(scores[: len(exact)].float().cpu().numpy(), exact.cpu().numpy())

        made = [Contender("fastrank", ours, len(pairs), ours=True, check=check)]
        if shape not in ("MiniLM-L6", "MiniLM-L12"):  # which are too narrow to gain by it
            checked = pack_pairs([pairs[i] for i in plan[0][: len(exact)]])
            try:
                line, contender = in_fp8(folder, batches, checked, exact, len(pairs), device, dry_run)
            except Exception as error:  # the others go on
                line = f"fp8 failed: {describe(error)}"
                contender = Contender("fastrank fp8", lambda: None, len(pairs), ours=True, failure=describe(error))
            yield f"{shape}: {line}"
            made.append(contender)
        if not dry_run:
            made += peers(folder, padded, len(pairs), device, check, compiles=compiles and shape == "MiniLM-L6")
        title = f"forward, {shape}, {len(pairs)} pairs of {source}, {lengths.mean():.0f} tokens each"
        comparison = Comparison(title, "pairs", made, [], device)
        comparison.measure(3 if dry_run else 5, shortest_round=0 if dry_run else 0.05)
        flop = useful_flop(shape, lengths)
        for one in made:
            if not one.failure:
                rate = flop / one.median
                share = rate / limits["bf16_flop_per_second"]
                yield f"{title}: {one.name:28s} {rate / 1e12:7.1f} useful TFLOP/s, {share:.0%} of bf16's limit"
        del reranker, batches, padded, made, comparison
        if device == "cuda":
            torch.cuda.empty_cache()


def in_fp8(
    folder: Path, batches, checked, exact: torch.Tensor, num_pairs: int, device: str, dry_run: bool
) -> tuple[str, Contender]:
    """A line about its scores of the `checked` pairs, whose float32 scores are `exact`, and the contender. Random
    weights make much of a rounding, so that it may leave twice as much uncorrelated as fp8 in plain PyTorch does. A dry
    run has nothing else to run."""
    if not dry_run and not has_fp8(torch.device(device)):
        return "no fp8 here", Contender("fastrank fp8", lambda: None, num_pairs, failure="no fp8 here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a model of random weights ranks otherwise
        reranker = Reranker(folder, device=device, dtype="float32" if dry_run else "fp8", max_length=256)
    model, checked = reranker.model, checked.to(device)
    emulated_model = load_model(folder).requires_grad_(False).to(device).eval()
    with torch.inference_mode(), emulated_fp8(emulated_model):
        expected = correlation(emulated_model.score(checked), exact)
    if dry_run:
        model = emulated_model
    else:
        del emulated_model

    @torch.inference_mode()
    def run():
        with emulated_fp8(model) if dry_run else contextlib.nullcontext():
            return torch.cat([model.score(batch) for batch in batches])

    with torch.inference_mode():
        found = correlation(run()[: len(exact)], exact)
    line = f"fp8 scores correlate with float32's by {found:.4f}, in plain PyTorch by {expected:.4f}"
    if reranker.fp8_agreement is not None:
        line += f"; Kendall's tau of made-up pairs beside bf16 {reranker.fp8_agreement:.3f}"

    def check(scores) -> str | None:
        found = correlation(scores[: len(exact)], exact)
        return None if 1 - found <= 2 * (1 - expected) + 0.002 else f"{found:.4f}, and {expected:.4f} in plain PyTorch"

    return line, Contender("fastrank fp8", run, num_pairs, ours=True, check=check)


def correlation(scores: torch.Tensor, exact: torch.Tensor) -> float:
    return float(np.corrcoef(scores.double().cpu().numpy(), exact.double().cpu().numpy())[0, 1])


def pad(batch, pad_token_id: int) -> dict[str, torch.Tensor]:
    """The same pairs as transformers takes them."""
    lengths = batch.pair_offsets.diff()
    real = torch.arange(batch.max_pair_tokens, device=lengths.device) < lengths[:, None]
    ids = torch.full(real.shape, pad_token_id, device=lengths.device)
    types = torch.zeros(real.shape, dtype=torch.int64, device=lengths.device)
    ids[real], types[real] = batch.token_ids, batch.token_types
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": real.long()}


def load(folder: Path, device: str, dtype: torch.dtype):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().to(device)


def cut(batches, size: int) -> list[dict[str, torch.Tensor]]:
    """Sorted pairs, `size` at a time, each part padded to its own longest."""
    parts = []
    for batch in batches:
        for start in range(0, len(batch["input_ids"]), size):
            part = {name: one[start : start + size] for name, one in batch.items()}
            longest = int(part["attention_mask"].sum(1).max())
            parts.append({name: one[:, :longest].contiguous() for name, one in part.items()})
    return parts


def score(model, parts) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(**part).logits[:, 0] for part in parts])


def reference_scores(folder: Path, batches, device: str) -> torch.Tensor:
    return score(load(folder, device, torch.float32), cut([{k: v[:64] for k, v in batches[0].items()}], 64)).float()


def peers(folder: Path, padded, num_pairs: int, device: str, check, *, compiles: bool) -> list[Contender]:
    """transformers in bf16, length-sorted, at the best of some batch sizes; as it is and compiled."""
    model = load(folder, device, torch.bfloat16)
    cuts = {size: cut(padded, size) for size in (64, 256, 1024)}
    best = best_setting(lambda size: lambda: score(model, cuts[size]).cpu(), list(cuts))  # which waits for the GPU
    made = [Contender(f"transformers bf16, by {best}", lambda: score(model, cuts[best]), num_pairs, check=check)]
    if compiles:  # it takes a minute
        compiled = torch.compile(model, dynamic=True)
        run = functools.partial(score, compiled, cuts[best])
        made.append(Contender(f"torch.compile bf16, by {best}", run, num_pairs, check=check))
    return made
