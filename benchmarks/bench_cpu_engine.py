"""Re-ranking from strings to scores on the CPU: fastrank in float32, bf16 and int8 against the same checkpoint in
transformers, ONNX Runtime and OpenVINO, each length-sorted and padded at its own best batch size.

Scores are first compared with transformers' in float32. What bf16 and int8 do to them is said in notes: correlations.
The machine's rates for matrix products are measured beside, and which share of them the forward pass reaches.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time

import numpy as np
import pytest
import torch
from baselines import PaddedReranker, best_batch_size, refusal
from engines import OnnxRuntime, OpenVino
from timing import CLOCK, Comparison, Contender
from workloads import checkpoint, ranking_lists

import fastrank
from fastrank import _cpu, ops
from fastrank.packing import pack_pairs, plan_batches

MAX_LENGTH = 512
SHAPES = ["MiniLM-L6", "BERT-base"]
OURS = [f"fastrank {dtype}" for dtype in ("float32", "bf16", "int8")]
PEERS = {
    "transformers": (PaddedReranker, ("float32", "bf16"), "transformers"),
    "ONNX Runtime": (OnnxRuntime, ("float32", "int8"), "onnxruntime"),
    "OpenVINO": (OpenVino, ("float32", "bf16", "int8"), "nncf"),
}
NAMES = OURS + [f"{name} {dtype}" for name, (_, dtypes, _) in PEERS.items() for dtype in dtypes]
# Scores spread by about 3. float32 must agree; what rounding to bf16 does is known, and grows with the layers; what is
# not float32 must still rank alike.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bf16": 0.3}  # with LAYERS
LAYERS = 6
LEAST_CORRELATION = {"bf16": 0.995, "int8": 0.95}


def checked(dtype: str, exact: np.ndarray, notes: list[str], name: str, num_layers: int = LAYERS):
    def check(scores) -> str | None:
        scores = np.asarray(scores)
        difference = float(np.abs(scores - exact).max())
        if dtype in LEAST_CORRELATION:
            correlation = float(np.corrcoef(scores, exact)[0, 1])
            notes.append(f"{name}: correlation with float32 {correlation:.5f}, largest difference {difference:.2f}")
            if not correlation >= LEAST_CORRELATION[dtype]:
                return f"correlation of scores {correlation:.3f}"
        if dtype in LARGEST_DIFFERENCE:
            allowed = LARGEST_DIFFERENCE[dtype] * (num_layers / LAYERS if dtype == "bf16" else 1)
            if not difference <= allowed:
                return f"scores differ by {difference:.2g}"
        return None

    return check


def scores_of(reranker: fastrank.Reranker, lists) -> np.ndarray:
    queries, documents = [one.query for one in lists], [list(one.documents) for one in lists]
    scores = []
    for ranking in reranker.rank(queries, documents, activation="none"):
        scores += [item.score for item in sorted(ranking, key=lambda item: item.index)]
    return np.array(scores)


def best_rate(run, operations: float, rounds: int = 5) -> float:
    """Billions of operations a second."""
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return operations / statistics.median(seconds) / 1e9


@torch.inference_mode()
def product_rates(hidden: int, inner: int) -> dict[str, float]:
    """The fastest product of a batch with the feed-forward weights, by dtype: torch's or ours, Gop/s."""
    x, weight, bias = torch.randn(4096, hidden), torch.randn(inner, hidden), torch.zeros(inner)
    operations = 2 * 4096 * hidden * inner
    rates = {}
    for dtype in ("float32", "bf16", "int8"):
        frozen = ops.freeze_linear(weight, bias, dtype)
        rates[dtype] = best_rate(lambda frozen=frozen: ops.linear(x, frozen), operations)
    linear = torch.nn.functional.linear
    rates["float32"] = max(rates["float32"], best_rate(lambda: linear(x, weight, bias), operations))
    if not refusal("bf16"):
        low = [tensor.bfloat16() for tensor in (x, weight, bias)]
        rates["bf16"] = max(rates["bf16"], best_rate(lambda: linear(*low), operations))
    if _cpu.isa() == "amx":  # int8 weights are multiplied as bf16 there
        rates["int8"] = max(rates["int8"], rates["bf16"])
    return rates


def forward_share(reranker: fastrank.Reranker, lists, dtype: str, rates: dict[str, float]) -> str:
    """The forward pass alone: operations of the products it computes, a second, beside the machine's rate."""
    tokenizer, settings = reranker.tokenizer, reranker.model.settings
    pairs = [
        tokenizer.pair(query, document)
        for one in lists
        for query in tokenizer.encode([one.query])
        for document in tokenizer.encode(list(one.documents))
    ]
    plan = plan_batches([len(ids) for ids, _ in pairs], reranker.max_batch_tokens)
    batches = [pack_pairs([pairs[i] for i in part]) for part in plan]
    hidden, inner, tokens = settings.hidden_size, settings.intermediate_size, sum(len(ids) for ids, _ in pairs)
    layer = 4 * hidden * hidden + 2 * hidden * inner
    last = tokens * 2 * hidden * hidden + len(pairs) * (2 * hidden * hidden + 2 * hidden * inner)
    operations = 2 * ((settings.num_layers - 1) * tokens * layer + last)
    with torch.inference_mode():
        rate = best_rate(lambda: [reranker.model.score(batch) for batch in batches], operations, 3)
    return f"fastrank {dtype}, forward alone: {rate:.0f} of {rates[dtype]:.0f} Gop/s ({rate / rates[dtype]:.0%})"


@functools.cache
def comparison(shape: str, full: bool) -> Comparison:
    folder = checkpoint(shape)
    source, lists = ranking_lists(*((2, 25) if shape != "MiniLM-L6" else (43, 100) if full else (6, 50)))
    num_pairs = sum(len(one.documents) for one in lists)
    exact = PaddedReranker(folder, "float32", MAX_LENGTH).scores(lists, 8)
    notes = [f"{num_pairs} pairs of {source}, {shape}, from strings to scores; scores checked first"]
    settings = fastrank.Reranker(folder).model.settings
    rates = product_rates(settings.hidden_size, settings.intermediate_size)
    check = functools.partial(checked, exact=exact, notes=notes, num_layers=settings.num_layers)
    contenders = []
    for name in OURS:
        dtype = name.split()[-1]
        reranker = fastrank.Reranker(folder, dtype=dtype, max_length=MAX_LENGTH)
        notes.append(forward_share(reranker, lists, dtype, rates))
        run = functools.partial(scores_of, reranker, lists)
        contenders.append(Contender(name, run, num_pairs, ours=True, check=check(dtype, name=name)))
    for peer, (engine_class, dtypes, package) in PEERS.items():
        for dtype in dtypes:
            name = f"{peer} {dtype}"
            missing = "" if importlib.util.find_spec(package) else f"{package} is not installed (extra `bench`)"
            if reason := missing or refusal(dtype):
                contenders.append(Contender(name, lambda: None, num_pairs, failure=reason))
                continue
            more = {"calibration": lists} if (peer, dtype) == ("OpenVINO", "int8") else {}
            engine = engine_class(folder, dtype, MAX_LENGTH, **more)
            size = best_batch_size(engine, lists)
            notes.append(f"{name}: best batch size {size}")
            run = functools.partial(engine.scores, lists, size)
            contenders.append(Contender(name, run, num_pairs, check=check(dtype, name=name)))
    return Comparison(f"Re-ranking on the CPU, {shape}", "pairs", contenders, notes).measure(
        5 if full and shape == "MiniLM-L6" else 3
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=CLOCK)
def bench_cpu_engine(name, shape, benchmark, full):
    if shape != "MiniLM-L6" and not full:
        pytest.skip("a part of --benchmark-full")
    compared = comparison(shape, full)
    benchmark.group = compared.title
    compared.hand_over(name, benchmark)
