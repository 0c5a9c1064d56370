"""LayerNorm, embedding and GELU in Triton against their references, and a whole model on Triton's kernels."""

import copy
import math
import os

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, poisoned_memory

from fastrank import backend, ops
from fastrank.kernels.accumulation import accumulate_in_place
from fastrank.kernels.layer_norm import gpu as norms
from fastrank.model import CrossEncoder, gpu_layers
from fastrank.packing import PackedBatch, pack_lists
from fastrank.train.passes import Passes

DTYPES = (torch.float32, torch.float16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that float16 holds too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (9, 64), (33, 384), (3, 1032), (2, 2048)])
def test_layer_norm(shape, dtype):
    inputs = {"x": 3 * draw(*shape) + 1, "weight": draw(shape[1], seed=1), "bias": draw(shape[1], seed=2)}

    def run(backend, x, weight, bias, residual=None):
        return ops.layer_norm(x, residual, weight, bias, 1e-5, backend=backend)

    assert_accurate(run, inputs, backend="gpu", dtype=dtype)
    assert_accurate(run, inputs | {"residual": draw(*shape, seed=3)}, backend="gpu", dtype=dtype)


def test_layer_norm_sums_over_more_rows_than_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(norms, "MOST_PROGRAMS", 3)
    inputs = {"x": draw(60, 384), "residual": draw(60, 384, seed=1), "weight": draw(384), "bias": draw(384)}
    run = lambda backend, x, residual, weight, bias: ops.layer_norm(x, residual, weight, bias, 1e-5, backend=backend)  # noqa: E731
    assert_accurate(run, inputs, backend="gpu")


def test_weights_in_float32_beside_hidden_states_in_half():
    x, residual = draw(9, 64).half().requires_grad_(), draw(9, 64, seed=1).half().requires_grad_()
    weight, bias = draw(64, seed=2).requires_grad_(), draw(64, seed=3).requires_grad_()
    upstream = draw(9, 64, seed=4).half()
    results = []
    for name in ("gpu", "reference"):
        normal = ops.layer_norm(x, residual, weight, bias, 1e-5, backend=name)
        out = ops.bias_gelu(normal, bias, backend=name)
        assert normal.dtype == out.dtype == torch.half
        gradients = torch.autograd.grad(out, (x, residual, weight, bias), upstream)
        assert [one.dtype for one in gradients] == [torch.half] * 2 + [torch.float32] * 2
        results.append((out, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 128, 384, 768])
def test_embedding_norm(columns, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(rows, (37,), generator=generator) for rows in (50, 2, 40))
    names = "words", "types", "places", "weight", "bias"
    shapes = (50, columns), (2, columns), (40, columns), (columns,), (columns,)
    inputs = {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    padding = int(ids[0][3]), int(ids[2][5])

    def run(backend, words, types, places, weight, bias):
        tables = words, types, places
        return ops.embedding_norm(ids, tables, weight, bias, 1e-5, padding=padding, backend=backend)

    assert_accurate(run, inputs, backend="gpu", dtype=dtype)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    run("gpu", **leaves).square().sum().backward()
    assert not leaves["words"].grad[padding[0]].any() and not leaves["places"].grad[padding[1]].any()
    unused = torch.ones(50, dtype=torch.bool)
    unused[ids[0]] = False
    assert not leaves["words"].grad[unused].any()


@pytest.mark.parametrize("padding", [None, 7])
def test_gradients_of_few_words_are_added_where_they_lie(padding):
    """To the last digit what autograd adds, row by row."""
    ids = torch.randint(5, 25, (40,), generator=torch.Generator().manual_seed(0))
    tables = [draw(rows, 64, seed=rows) for rows in (80, 2, 40)]
    gradients = []
    for in_place in (False, True):
        words, *others = (one.clone().requires_grad_() for one in tables)
        words.grad = held = draw(80, 64, seed=1)
        with accumulate_in_place(in_place), poisoned_memory():
            tables_ids, weights = (ids, ids % 2, ids), (torch.ones(64), torch.zeros(64))
            out = ops.embedding_norm(
                tables_ids, (words, *others), *weights, 1e-5, padding=(padding, None), backend="gpu"
            )
            (out**3).sum().backward()
        assert (words.grad is held) and all(one.grad is not None for one in others)
        gradients.append(words.grad)
    plain, kept = gradients
    assert (kept != draw(80, 64, seed=1)).any(1).nonzero()[:, 0].tolist() == sorted({*ids.tolist()} - {padding})
    assert kept.equal(plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh_form", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (9, 264), (33, 1536)])
def test_bias_gelu(shape, tanh_form, dtype):
    inputs = {"x": 2 * draw(*shape), "bias": draw(shape[1], seed=1)}
    run = lambda backend, x, bias: ops.bias_gelu(x, bias, tanh_form=tanh_form, backend=backend)  # noqa: E731
    assert_accurate(run, inputs, backend="gpu", dtype=dtype)


@pytest.mark.parametrize("tanh_form", [False, True])
def test_gelu_in_half_precision_of_large_numbers(tanh_form):
    numbers = [-math.inf, -60000.0, -20.0, -9.0, -6.0, 0.0, 6.0, 9.0, 60000.0, math.inf, math.nan, 1, 2, 3, 4, 5]
    x = torch.tensor([numbers], dtype=torch.half).requires_grad_()
    out = ops.bias_gelu(x, torch.zeros(16), tanh_form=tanh_form, backend="gpu")
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out[0, 10].isnan() and gradient[0, 10].isnan()
    assert out[0, :6].tolist() == pytest.approx([0] * 6, abs=1e-6)
    assert out[0, 6:10].tolist() == pytest.approx([6, 9, 60000, math.inf], rel=1e-3)
    assert gradient[0, :10].tolist() == pytest.approx([0] * 5 + [0.5] + [1] * 4, abs=1e-3)


@pytest.mark.parametrize("tanh_form", [False, True])
def test_gelu_of_every_size_of_number(tanh_form):
    x = torch.tensor([[-math.inf, -1e30, -88.0, -9.0, 0.0, 9.0, 88.0, 1e30, math.inf, math.nan, 1, -1, 2, -2, 3, -3]])
    x.requires_grad_()
    out = ops.bias_gelu(x, torch.zeros(16), tanh_form=tanh_form, backend="gpu")
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out[0, 9].isnan() and gradient[0, 9].isnan()
    out, gradient = out[0].tolist(), gradient[0].tolist()
    assert out[:5] == pytest.approx([0] * 5, abs=1e-15) and out[5:9] == pytest.approx([9, 88, 1e30, math.inf])
    assert gradient[:4] == pytest.approx([0] * 4, abs=1e-14) and gradient[4:9] == pytest.approx([0.5, 1, 1, 1, 1])


def test_rows_that_are_not_aligned_are_copied():
    wide = draw(6, 65)[:, 1:]
    weight, bias = draw(65)[1:], draw(66)[2:]
    expected = ops.layer_norm(wide.contiguous(), None, weight, bias, 1e-5, backend="reference")
    out = ops.layer_norm(wide, wide[:6], weight, bias, 1e-5, backend="gpu")
    torch.testing.assert_close(ops.layer_norm(wide, None, weight, bias, 1e-5, backend="gpu"), expected)
    torch.testing.assert_close(out, ops.layer_norm(2 * wide, None, weight, bias, 1e-5, backend="reference"))


def test_sizes_without_a_kernel_are_refused():
    for columns in (12, 2056):
        x, w = torch.zeros(2, columns), torch.zeros(columns)
        with pytest.raises(backend.BackendRefused, match=f"up to 2048, not of {columns}"):
            ops.layer_norm(x, None, w, w, 1e-5, backend="gpu")
    with pytest.raises(backend.BackendRefused, match="multiple of 8 numbers, not of 12"):
        ops.bias_gelu(torch.zeros(2, 12), torch.zeros(12), backend="gpu")


def make_model(*, layers: int = 3, activation: str = "gelu", dropout: float = 0.0) -> CrossEncoder:
    config = {
        "model_type": "bert",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 160,
        "num_labels": 1,
        "hidden_act": activation,
    }
    model = CrossEncoder(config, dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape, seed=int(torch.randint(1000, (), generator=generator))) / 8)
    return model


def make_batch(*sizes: tuple[int, ...]) -> PackedBatch:
    rng = np.random.default_rng(0)
    return pack_lists([[(rng.integers(1, 100, n), rng.integers(0, 2, n)) for n in one] for one in sizes])


def scores_and_gradients(model: CrossEncoder, batch, dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    os.environ["FASTRANK_BACKEND"] = name
    try:
        if dtype == torch.float64:
            model.double()
        else:
            model.float().to_precision(dtype, hidden_states=dtype)
        model.zero_grad()
        with poisoned_memory():
            scores = model.score(batch)
            (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    finally:
        del os.environ["FASTRANK_BACKEND"]
    gradients = {name: parameter.grad.double().clone() for name, parameter in model.named_parameters()}
    return {"scores": scores.detach().double()} | gradients


@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "gelu"), (torch.half, "gelu"), (torch.half, "relu")])
def test_a_whole_model(dtype, activation):
    """Scores and the gradient of every weight, against float64: no further off than the reference in this dtype."""
    model = make_model(activation=activation)
    if activation == "relu":  # whose slope jumps at 0, where rounding decides: every other unit lies above, or below
        for layer in model.encoder.layers:
            layer.up.bias.data.copy_(torch.tensor([4.0, -4.0]).repeat(layer.up.out_features // 2))
    batch = make_batch((5, 17), (1, 40) if dtype == torch.half and activation == "gelu" else (1, 20))
    exact = scores_and_gradients(model, batch, torch.float64, "reference")
    rounded = scores_and_gradients(model, batch, dtype, "reference")
    actual = scores_and_gradients(model, batch, dtype, "gpu")
    for name, truth in exact.items():
        size = truth.norm()
        allowed = 2 * (rounded[name] - truth).norm() + 8 * torch.finfo(dtype).eps * size + 1e-6
        assert (actual[name] - truth).norm() <= allowed, name


@pytest.mark.parametrize(("frozen_layers", "recomputes"), [(0, True), (1, False)])
def test_layers_in_few_steps_train_as_modules_do(frozen_layers, recomputes, monkeypatch):
    """gpu_layers beside encoder.Layer on the same kernels, with dropout: the same masks, the same gradients but for
    rounding, none for what does not learn."""
    model = make_model(layers=3, dropout=0.3).train().to_precision("fp16", hidden_states="fp16")
    for module in (model.encoder.embeddings, *model.encoder.layers[:frozen_layers]) if frozen_layers else ():
        module.requires_grad_(False)
    model.encoder.recomputes = recomputes
    batch = make_batch((5, 17), (1, 20))
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    used = []
    for name in ("train", "infer"):
        function = getattr(gpu_layers, name)
        counted = lambda *given, f=function, n=name, **more: used.append(n) or f(*given, **more)  # noqa: E731
        monkeypatch.setattr(gpu_layers, name, counted)

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        scores = model.score(batch)
        (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
        return {"scores": scores.detach()} | {
            name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
        }

    found = run()
    torch.manual_seed(0)
    with torch.no_grad():  # as gradient caching scores first: the same masks
        assert model.score(batch).equal(found["scores"])
    assert used == ["train", "train"]
    monkeypatch.setattr(gpu_layers, "suits", lambda layers, x: False)
    expected = run()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm() + 1e-5, name


@pytest.mark.parametrize(("frozen_layers", "recomputes"), [(0, False), (0, True), (2, False)])
def test_gradients_of_several_passes_are_added_where_they_lie(frozen_layers, recomputes, monkeypatch):
    """As autograd adds them up, but for large weights, of which it gets none; nothing is added to what does not learn,
    nor to anything by those who ask autograd for gradients themselves."""
    model = make_model(layers=3, dropout=0.3).train().to_precision("fp16", hidden_states="fp16")
    for module in (model.encoder.embeddings, *model.encoder.layers[:frozen_layers]) if frozen_layers else ():
        module.requires_grad_(False)
    model.encoder.recomputes = recomputes
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    passes = Passes(model, torch.device("cpu"), filler=(0, 0))
    gradients = []
    for passes._keeps_gradients in (False, True):
        for _ in range(2):  # what the first step leaves must be gone in the second
            passes.clear_gradients()
            places = [one.grad for one in model.parameters()]
            for seed, batch in enumerate((make_batch((5, 17), (1, 20)), make_batch((9,)))):
                scores, go_back = passes.forward(batch, seed)
                go_back(torch.linspace(-1, 1, len(scores)) if len(scores) > 1 else torch.ones(1))
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    assert all(one.grad is place for one, place in zip(model.parameters(), places, strict=True))
    for name, one in model.named_parameters():
        plain, kept = (found[name] for found in gradients)
        assert (plain is None) == (kept is None) == (not one.requires_grad), name
        assert plain is None or (kept - plain).norm() <= 1e-5 * plain.norm(), name

    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.grad.clone() for name, one in learning.items()}
    for in_place in (False, True):
        with accumulate_in_place(in_place):
            scores = model.score(batch)
        found = torch.autograd.grad(scores.sum(), list(learning.values()), allow_unused=in_place)
        added = {name for name, one in learning.items() if not one.grad.equal(before[name])}
        assert added == {name for name, one in zip(learning, found, strict=True) if one is None}
        large = {name for name, one in learning.items() if one.dim() > 1 and ("layers" in name or "words" in name)}
        assert added == (large if in_place else set())


def test_layers_in_few_steps_score_as_modules_do(monkeypatch):
    model = make_model(layers=2).eval().requires_grad_(False).to_precision("fp16", hidden_states="fp16")
    batch = make_batch((5, 17), (1,))
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    with torch.inference_mode(), poisoned_memory():
        found = model.score(batch)
    weight = model.encoder.layers[0].up.weight
    with torch.no_grad():
        assert model.score(batch).equal(found)
        weight.mul_(2)
        changed = model.score(batch)
        weight.requires_grad_().data.div_(2)  # of which no version tells
        assert not changed.equal(found) and model.score(batch).equal(found)
        weight.requires_grad_(False)
        model.score(batch)
        weight.data = 2 * weight.data  # other memory
        assert model.score(batch).equal(changed)
        model.encoder.layers[0].up.weight = torch.nn.Parameter(weight / 2, requires_grad=False)
        assert model.score(batch).equal(found) and copy.deepcopy(model).score(batch).equal(found)
    monkeypatch.setattr(gpu_layers, "suits", lambda layers, x: False)
    torch.testing.assert_close(found, model.score(batch), rtol=2e-3, atol=2e-3)
