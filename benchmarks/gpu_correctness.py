"""Every Triton kernel against its reference in float64 on the device: fresh random inputs, poisoned outputs.

On a GPU several processes share the cases: nothing is timed here, and most of the work is the host's.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accuracy import assert_accurate
from attention_cases import cut
from fp8_accuracy import assert_quantised, convert_as_gpus_do, emulated_fp8
from gpu_models import SHAPES, agrees, batch_of, make_model, pairs_of
from listwise_cases import VARIANTS, make, options_of
from torch import Tensor

from fastrank import Reranker, ops
from fastrank.kernels.attention import gpu as attention_kernels
from fastrank.model.gpu_layers import has_fp8
from fastrank.packing import Pairs, pack_pairs

Case = tuple[str, Callable[[], None]]
PROCESSES = 10
ONLY = "FASTRANK_GPU_CASES"  # a regular expression that names of cases must match, for worker processes, too
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention_cases(device: str, dry_run: bool, seed: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    longest, pairs = (140, 4) if dry_run else (600, 40)
    heads = 1 if dry_run else 3
    ragged = torch.randint(0, longest, (pairs,), generator=generator)
    edges = torch.tensor(
        [1, 33, 96, 129] if dry_run else [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 511, 512]
    )
    for dtype in (torch.float16,) if dry_run else DTYPES:
        for head_dim in attention_kernels.HEAD_DIMS[: 1 if dry_run else None]:
            for name, lengths in (("ragged", ragged), ("edges", edges)):
                offsets = cut(lengths).to(device)
                qkv = draw(int(lengths.sum()), 3, heads, head_dim).to(dtype).float()

                def fused(backend, qkv, offsets=offsets):
                    return ops.fused_attention(qkv, offsets, backend=backend)

                yield (
                    f"fused attention, {name}, {dtype}, {head_dim}",
                    lambda run=fused, qkv=qkv, dtype=dtype: assert_accurate(
                        run, {"qkv": qkv}, backend="gpu", dtype=dtype, device=device
                    ),
                )
            one = cut(torch.ones(len(edges), dtype=torch.int64)).to(device)
            offsets = cut(edges).to(device)
            given = {
                name: draw(len(edges) if name == "q" else int(edges.sum()), heads, head_dim).to(dtype).float()
                for name in "qkv"
            }

            def first(backend, q, k, v, offsets=offsets, one=one):
                return ops.attention(q, k, v, offsets, query_offsets=one, backend=backend)

            yield (
                f"attention of first tokens, {dtype}, {head_dim}",
                lambda run=first, given=given, dtype=dtype: assert_accurate(
                    run, given, backend="gpu", dtype=dtype, device=device
                ),
            )
        yield f"a pair alone and in a batch, {dtype}", lambda dtype=dtype: same_in_any_batch(device, dtype, edges)


def same_in_any_batch(device: str, dtype: torch.dtype, lengths: Tensor) -> None:
    """Outputs and gradients of each pair, bit for bit."""
    offsets = cut(lengths).to(device)
    qkv = torch.randn(int(lengths.sum()), 3, 2, 64, device=device).to(dtype)
    upstream = torch.randn(len(qkv), 2, 64, device=device).to(dtype)

    def of(rows: slice, offsets: Tensor) -> tuple[Tensor, Tensor]:
        leaf = qkv[rows].clone().requires_grad_()
        out = ops.fused_attention(leaf, offsets, backend="gpu")
        return out.detach(), torch.autograd.grad(out, leaf, upstream[rows])[0]

    whole, starts = of(slice(None), offsets), offsets.tolist()
    for i, length in enumerate(lengths.tolist()):
        rows = slice(starts[i], starts[i + 1])
        alone = of(rows, cut(lengths[i : i + 1]).to(device))
        assert all(torch.equal(one, other[rows]) for one, other in zip(alone, whole, strict=True)), length


def epilogue_cases(device: str, dry_run: bool, seed: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()  # exact in dtype

    for dtype in (torch.float16,) if dry_run else DTYPES:
        for rows, columns in ((9, 64),) if dry_run else ((3001, 384), (2000, 768), (1500, 1024), (900, 1544)):
            given = {"x": draw(rows, columns), "residual": draw(rows, columns)}
            given |= {"weight": draw(columns), "bias": draw(columns)}

            def norm(backend, x, residual, weight, bias):
                return ops.layer_norm(x, residual, weight, bias, 1e-5, backend=backend)

            def gelu(backend, x, bias):
                return ops.bias_gelu(x, bias, backend=backend)

            def tanh_gelu(backend, x, bias):
                return ops.bias_gelu(x, bias, tanh_form=True, backend=backend)

            ids = tuple(torch.randint(n, (rows,), generator=generator).to(device) for n in (500, 2, 60))
            tables = {name: draw(n, columns) for name, n in (("words", 500), ("types", 2), ("places", 60))}
            tables |= {"weight": given["weight"], "bias": given["bias"]}

            def embed(backend, words, types, places, weight, bias, ids=ids):
                return ops.embedding_norm(
                    ids, (words, types, places), weight, bias, 1e-5, padding=(0, None), backend=backend
                )

            narrow = {"x": given["x"], "bias": given["bias"]}
            for name, run, inputs in (
                ("layer_norm", norm, given),
                ("bias_gelu", gelu, narrow),
                ("bias_gelu, tanh", tanh_gelu, narrow),
                ("embedding_norm", embed, tables),
            ):
                yield (
                    f"{name}, {rows} x {columns}, {dtype}",
                    lambda run=run, inputs=inputs, dtype=dtype: assert_accurate(
                        run, inputs, backend="gpu", dtype=dtype, device=device
                    ),
                )


def fp8_cases(device: str, dry_run: bool, seed: int) -> Iterator[Case]:
    """What writes rows in fp8, and products of them beside plain ones of the same codes and scales."""
    from fastrank.kernels.fp8 import reference
    from fastrank.kernels.gelu import gpu as gelus
    from fastrank.kernels.layer_norm import gpu as norms

    if not has_fp8(torch.device(device)):
        return
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if dry_run else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def room(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(len(x), dtype=torch.float32, device=device)

    def rows(x: Tensor) -> None:
        assert_quantised(*ops.quantise_rows(x, backend="gpu"), x.double())

    def norm(x: Tensor) -> None:
        residual, weight, bias = draw(*x.shape).to(dtype), draw(x.shape[1]), draw(x.shape[1])
        out, (codes, scales) = torch.empty_like(x), room(x)
        norms.fp8_launch(x, residual, weight, bias, 1e-5, out, codes, scales)()
        exact = ops.layer_norm(*(one.double() for one in (x, residual, weight, bias)), 1e-5, backend="reference")
        allowed = exact.abs() * torch.finfo(dtype).eps + exact.abs().max() * 2.0**-18
        assert ((out.double() - exact).abs() <= allowed).all(), "what is written beside the codes is wrong"
        assert_quantised(codes, scales, exact, rounding=2.0**-18)

    def gelu(x: Tensor, tanh_form: bool) -> None:
        bias, (codes, scales) = draw(x.shape[1]), room(x)
        gelus.fp8_launch(x, bias, tanh_form, codes, scales)()
        exact = ops.bias_gelu(x.double(), bias.double(), tanh_form=tanh_form, backend="reference")
        assert_quantised(codes, scales, exact, rounding=2.0**-14)

    def product(x: Tensor, outputs: int, with_bias: bool) -> None:
        (codes, scales), weight = ops.quantise_rows(x, backend="gpu"), draw(outputs, x.shape[1])
        bias = draw(outputs).to(dtype) if with_bias else None
        weights, weight_scales = ops.quantise_rows(weight, backend="reference")
        out = torch.empty(len(x), outputs, dtype=dtype, device=device)
        given = {"bias": bias, "out_dtype": dtype, "use_fast_accum": True, "out": out}
        torch._scaled_mm(codes, weights.t(), scales[:, None], weight_scales[None], **given)
        exact = (
            reference.dequantise_rows(codes, scales).double()
            @ reference.dequantise_rows(weights, weight_scales).t().double()
        )
        exact = exact if bias is None else exact + bias.double()
        apart = float((out.double() - exact).norm() / exact.norm())
        # Rounding to bf16 leaves .0017. Sums in a Hopper's matrix units, in 14 bits, leave more (DeepSeek-V3's report:
        # up to .02 for single numbers of 4,096 products); rounding to fp8 before it, .037.
        assert apart < 0.01, f"off by {apart:.2g}"

    for num_rows, columns in (
        ((9, 64),) if dry_run else ((3008, 384), (2000, 768), (16, 1024), (1504, 1536), (900, 2048))
    ):
        x = draw(num_rows, columns).to(dtype)
        yield f"fp8 rows, {num_rows} x {columns}", lambda x=x: rows(x)
        yield f"fp8 layer_norm, {num_rows} x {columns}", lambda x=x: norm(x)
        yield f"fp8 product, {num_rows} x {columns}", lambda x=x: product(x, 3 * x.shape[1], with_bias=True)
        yield f"fp8 product without a bias, {num_rows} x {columns}", lambda x=x: product(x, 48, with_bias=False)
    for num_rows, columns in ((3, 128),) if dry_run else ((1001, 1536), (777, 3072), (500, 4096), (300, 8192)):
        x = draw(num_rows, columns).to(dtype)
        for tanh_form in (False, True):
            form = "tanh" if tanh_form else "erf"
            yield f"fp8 bias_gelu, {form}, {num_rows} x {columns}", lambda x=x, tanh_form=tanh_form: gelu(x, tanh_form)


def loss_cases(device: str, dry_run: bool, seed: int) -> Iterator[Case]:
    sizes = (3, 7) if dry_run else (0, 1, 7, 100, 33, 1000)
    for variant in list(VARIANTS)[: 2 if dry_run else None]:
        for case in ("three tiers", "tied scores", "right by far"):
            name, options = options_of(variant)
            scores, labels, offsets = make(variant, case, sizes, seed=seed % 1000)
            labels, offsets = labels.to(device), offsets.to(device)

            def loss(backend, scores, name=name, options=options, labels=labels, offsets=offsets):
                return ops.listwise(name, scores, labels, offsets, options=options, backend=backend)

            yield (
                f"{variant}, {case}",
                lambda run=loss, scores=scores: assert_accurate(run, {"scores": scores}, backend="gpu", device=device),
            )


def model_cases(device: str, dry_run: bool, seed: int) -> Iterator[Case]:
    for shape in ("tiny",) if dry_run else ("tiny", *SHAPES):
        yield (
            f"{shape}: scores and gradients in half precision",
            lambda shape=shape: whole_model(shape, device, dry_run),
        )
        yield f"{shape}: gradients of several passes", lambda shape=shape: several_passes(shape, device, dry_run)
        if has_fp8(torch.device(device)):
            yield f"{shape}: scores in fp8", lambda shape=shape: fp8_model(shape, device, dry_run)

    if device == "cuda":
        yield "CUDA graphs give the scores of the forward", lambda: graphs_agree(device)
        yield "training by CUDA graphs takes the steps of training without", lambda: graphs_train_alike(device)
        for precision in ("bf16", "fp8") if has_fp8(torch.device(device)) else ("bf16",):
            yield (
                f"deterministic scores in {precision} are the same bits in any company",
                lambda precision=precision: company_changes_no_bit(device, precision),
            )
        if has_fp8(torch.device(device)):
            yield "CUDA graphs give the scores of the forward in fp8", lambda: graphs_agree(device, "fp8")


def fp8_model(shape: str, device: str, dry_run: bool) -> None:
    """Scores beside float32's and beside the definition's in plain PyTorch: at most twice as far off. Random weights
    make more of a rounding than trained ones: 12 layers of them leave a correlation of about .91."""
    from fastrank.agreement import kendall_tau

    model = make_model(shape).requires_grad_(False).to(device)
    lengths = [20, 3, 5] if dry_run else np.random.default_rng(0).integers(10, 200, 127).tolist()
    batch = batch_of(lengths, model.settings.vocab_size, device)
    found = {}
    with torch.inference_mode():
        for name, precision in (("exact", "float32"), ("fp8", "fp8")):
            os.environ["FASTRANK_BACKEND"] = "gpu" if precision == "fp8" else "reference"
            try:
                hidden = torch.float16 if dry_run and precision == "fp8" else None
                model.to_precision(precision, hidden_states=hidden)
                found[name] = model.score(batch)
                if precision == "float32":
                    with emulated_fp8(model):
                        found["emulated"] = model.score(batch)
            finally:
                del os.environ["FASTRANK_BACKEND"]
    scores = {name: one.double().cpu().numpy() for name, one in found.items()}
    apart = {name: np.linalg.norm(one - scores["exact"]) for name, one in scores.items()}
    told = ", ".join(
        f"{name}: correlation {np.corrcoef(scores[name], scores['exact'])[0, 1]:.4f}, "
        f"tau {kendall_tau(scores[name], scores['exact']):.3f}"
        for name in ("fp8", "emulated")
    )
    print(f"{shape} beside float32, {told}", flush=True)
    assert apart["fp8"] <= 2 * apart["emulated"], told


def company_changes_no_bit(device: str, precision: str) -> None:
    model = make_model("MiniLM-L6").requires_grad_(False).to(device).to_precision(precision)
    reranker = Reranker.from_parts(model, None, deterministic=True)
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(5, 1000, n).astype(np.int32), np.zeros(n, np.int32)) for n in rng.integers(3, 400, 900).tolist()
    ]
    together = reranker.score_pairs(pairs)
    for chosen in ([5], range(10), range(3, 400, 7)):
        alone = reranker.score_pairs([pairs[i] for i in chosen])
        assert np.array_equal(alone, together[list(chosen)]), f"{len(alone)} pairs score otherwise among 900"


def graphs_agree(device: str, precision: str = "bf16") -> None:
    """Batches of several buckets, each met twice."""
    from fastrank.model.graphs import Graphs

    model = make_model("MiniLM-L6").requires_grad_(False).to(device).to_precision(precision)
    with torch.inference_mode():
        filler = model.settings.first_position, 0
        given = {"longest": model.max_pair_tokens, "filler": filler, "parameters": list(model.parameters())}
        graphs = Graphs(model.score, torch.device(device), **given, unrecorded=1)
        kinds = [90] * 10, [120, 30, 64] * 33, [8], [90] * 11, [500, 40], [100, 60, 200, 20] * 170
        found, expected = [], []
        for number, lengths in enumerate((*kinds, *kinds[::-1])):  # the second time with other ids, graphs interleaved
            pairs = Pairs.join(pairs_of(lengths, model.settings.vocab_size, seed=number))
            order = np.random.default_rng(number).permutation(len(pairs))
            expected.append(model.score(pack_pairs(pairs, order).to(device)))
            found.append(graphs.score(pairs, order))
            assert graphs.score(pairs, order).equal(found[-1]), "a graph gives other scores when it is replayed"
        complaint = agrees(torch.cat(found).float().cpu().numpy(), torch.cat(expected).float().cpu().numpy())
        assert complaint is None, complaint


def graphs_train_alike(device: str) -> None:
    """Scores, gradients and weights of several steps with dropout, two passes a step, batches of several buckets."""
    from fastrank.train.passes import Passes, Update

    def steps(*, by_graphs: bool) -> Iterator[list[Tensor]]:
        model = make_model("MiniLM-L6", dropout=0.1).to(device).to_precision("bf16").train()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW([{"params": parameters, "peak": 1e-6}], fused=True)
        given = {"filler": (model.settings.first_position, 0), "uses_graphs": by_graphs, "unrecorded": 1}
        passes = Passes(model, torch.device(device), **given)
        update = Update(model, optimizer, 1.0, uses_graphs=by_graphs)
        for number in range(8):
            passes.clear_gradients()
            found = []
            for index, lengths in enumerate(([90 + number] * 10, [120, 30, 64] * 33)):
                batch = batch_of(lengths, model.settings.vocab_size, "cpu", seed=number)
                scores, go_back = passes.forward(batch, 10 * number + index)
                go_back(torch.linspace(-1, 1, len(scores), device=device))
                found.append(scores.clone())
            gradients = [parameter.grad.clone() for parameter in parameters]
            update(1 - number / 10)
            share = (1 / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert torch.allclose(parameter.grad, share * gradient, rtol=1e-5, atol=0), "clipped otherwise"
            yield [*found, *gradients, *(parameter.detach().clone() for parameter in parameters)]
        assert bool(passes._recorded) == (update._graph is not None) == by_graphs, "graphs, where there should be none"

    for number, (found, expected) in enumerate(zip(steps(by_graphs=True), steps(by_graphs=False), strict=True)):
        for place, (actual, truth) in enumerate(zip(found, expected, strict=True)):
            # Other masks would show in the first digit; cuBLAS may choose other products for a graph.
            apart = float((actual - truth).norm() / (truth.norm() + 1e-12))
            assert apart < 0.01, f"step {number}, tensor {place} is off by {apart:.2g}"


def whole_model(shape: str, device: str, dry_run: bool) -> None:
    """Scores and gradients in bf16 against float32 of the same weights: as near as the reference backend's in bf16."""
    import os

    dtype = torch.float16 if dry_run else torch.bfloat16
    model = make_model(shape).to(device).train()
    batch = batch_of([20, 3] if dry_run else [90, 128, 30, 200, 64, 5] * 3, model.settings.vocab_size, device)

    def run(backend: str, precision: torch.dtype) -> dict[str, Tensor]:
        os.environ["FASTRANK_BACKEND"] = backend
        try:
            model.to_precision(precision, hidden_states=precision)
            model.zero_grad()
            scores = model.score(batch)
            (scores * torch.linspace(-1, 1, len(scores), device=device)).sum().backward()
        finally:
            del os.environ["FASTRANK_BACKEND"]
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        return {"scores": scores.detach()} | gradients

    exact, rounded, actual = run("reference", torch.float32), run("reference", dtype), run("gpu", dtype)
    for name, truth in exact.items():
        allowed = 2 * (rounded[name] - truth).norm() + 0.02 * truth.norm() + 1e-6
        assert (actual[name] - truth).norm() <= allowed, f"{name}: {(actual[name] - truth).norm()} above {allowed}"


def several_passes(shape: str, device: str, dry_run: bool) -> None:
    """A step's gradients added up in place, without graphs and by them, and by layers that compute again: as near to
    float64's as those that autograd adds up, and the same bits in the next step."""
    from fastrank.train.passes import Passes

    model = make_model(shape).to(device).train()
    lengths = ([20, 3], [9]) if dry_run else ([90] * 10, [120, 30, 64] * 20, [8])
    batches = [batch_of(one, model.settings.vocab_size, "cpu", seed=number) for number, one in enumerate(lengths)]

    def step(passes: Passes) -> dict[str, Tensor]:
        passes.clear_gradients()
        for number, batch in enumerate(batches):
            scores, go_back = passes.forward(batch, number)
            go_back(torch.linspace(-0.5, 1, len(scores), device=device).to(scores.dtype))
        return {name: one.grad.clone() for name, one in model.named_parameters()}

    def run(in_place: bool, *, unrecorded: int = 2**31, backend: str = "gpu") -> dict[str, Tensor]:
        given = {"filler": (model.settings.first_position, 0), "uses_graphs": in_place, "unrecorded": unrecorded}
        passes = Passes(model, torch.device(device), **given)
        passes._keeps_gradients = in_place  # in a dry run, too
        model.zero_grad()
        os.environ["FASTRANK_BACKEND"] = backend
        try:
            found, again = step(passes), step(passes)
        finally:
            del os.environ["FASTRANK_BACKEND"]
        others = [name for name, one in again.items() if not found[name].equal(one)]
        assert backend != "gpu" or not others, f"{in_place=}, {unrecorded=}: other bits again in {others[:3]}"
        assert bool(passes._recorded) == (unrecorded == 0), "graphs, where there should be none, or none"
        return found

    exact = {}
    if shape in ("tiny", "MiniLM-L6"):
        model.double()
        exact = run(False, backend="reference")
        model.float()
    model.to_precision(torch.float16 if dry_run else torch.bfloat16)
    if dry_run:
        model.encoder.hidden_dtype = torch.float16
    plain = run(False)
    routes = {"in place": run(True)}
    if not dry_run:
        routes["by graphs"] = run(True, unrecorded=0)
    model.encoder.recomputes = True
    routes["computed again"] = run(False)
    for route, found in routes.items():
        for name, one in plain.items():
            truth = exact.get(name, one).double()
            off, allowed = float((found[name] - truth).norm()), float((one - truth).norm())
            size = float(truth.norm())
            # Buckets are filled up, and cuBLAS may choose other products for other sizes, or for a graph.
            allowed = 1.2 * allowed + (2e-3 if exact else 1e-2) * size + 1e-6
            assert off <= allowed, f"{name}, {route}: {off:.3g} above {allowed:.3g}"


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    seed = time.time_ns() % 10**6
    count = wrong = 0
    workers = 1 if dry_run else min(PROCESSES, os.cpu_count() or 1)
    slices = [(number, workers, device, dry_run, seed) for number in range(workers)]
    if workers == 1:
        results = map(check_slice, slices)
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        results = pool.map(check_slice, slices)
    for checked, complaints in results:
        count += checked
        wrong += len(complaints)
        yield from complaints
    yield f"{count} cases, {wrong} wrong, seed {seed}"


def check_slice(given: tuple[int, int, str, bool, int]) -> tuple[int, list[str]]:
    """Every `workers`-th case from `number` on: how many ran, and a line for each that went wrong. A device that has
    failed fails everything after it, so what is left then counts as one more."""
    number, workers, device, dry_run, seed = given
    if dry_run:
        convert_as_gpus_do()
    count, complaints = 0, []
    cases = (
        case
        for make_cases in (model_cases, attention_cases, epilogue_cases, fp8_cases, loss_cases)
        for case in make_cases(device, dry_run, seed)
        if re.search(os.environ.get(ONLY, ""), case[0])
    )
    for name, check in itertools.islice(cases, number, None, workers):
        count += 1
        try:
            check()
        except Exception as error:
            complaints.append(f"WRONG {name}: {type(error).__name__}: {error}"[:600])
            if isinstance(error, torch.AcceleratorError):
                complaints.append(f"WRONG the cases after it, every {workers}th, did not run")
                break
    return count, complaints
