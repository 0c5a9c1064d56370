"""LayerNorm of a sum against its reference: every instruction set, sizes around the vectors, rows around the chunks."""

import re

import pytest
import torch
from accuracy import assert_accurate, outputs_and_gradients, poisoned_memory, skip_unless_runs
from torch import Tensor

from fastrank import ops


@pytest.fixture
def backend(isa):
    """The cpu backend, by instruction set."""
    skip_unless_runs("layer_norm", "cpu", torch.empty(0, 1))
    return "cpu"


def make(tokens: int, hidden: int, *, residual: bool = True, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inputs = {"x": draw(tokens, hidden), "residual": draw(tokens, hidden) if residual else None}
    return inputs | {"weight": 1 + 0.3 * draw(hidden), "bias": draw(hidden)}


def run_with(eps: float):
    return lambda backend, x, residual, weight, bias: ops.layer_norm(x, residual, weight, bias, eps, backend=backend)


DTYPES = [torch.float32, torch.bfloat16]


def exact_in(dtype: torch.dtype, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The nearest numbers that the dtype holds."""
    return {name: None if value is None else value.to(dtype).float() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("hidden", [2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100, 384, 768, 1000, 1024])
def test_accuracy(backend, hidden, residual, dtype):
    inputs = exact_in(dtype, make(37, hidden, residual=residual, seed=hidden))
    assert_accurate(run_with(1e-12), inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 300, 4096, 5000])
def test_accuracy_of_any_number_of_tokens(backend, tokens, dtype):
    assert_accurate(run_with(1e-5), exact_in(dtype, make(tokens, 48)), backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_far_from_zero(backend, dtype):
    inputs = make(20, 384)
    inputs["x"] = inputs["x"] + 1000  # a variance of squares minus the square of the mean would lose all digits
    assert_accurate(run_with(1e-12), exact_in(dtype, inputs), backend=backend, dtype=dtype)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("hidden", [7, 33, 384])
def test_bf16_with_float32_weights_is_float32_rounded(backend, hidden, residual):
    """Outputs and dx are float32's, rounded; weights, and what is summed for them, stay float32."""
    inputs = make(300, hidden, residual=residual)
    results = []
    for wide in (False, True):
        given = {
            name: value if value is None or name in ("weight", "bias") else value.bfloat16()
            for name, value in inputs.items()
        }
        given = {name: value.float() if wide and value is not None else value for name, value in given.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in given.items() if value is not None}
        out = run_with(1e-5)(backend, **{**given, **leaves})
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
        results.append({"out": out.detach(), **dict(zip(leaves, gradients, strict=True))})
    for name, value in results[0].items():
        assert value.dtype == (torch.float32 if name in ("weight", "bias") else torch.bfloat16)
        assert torch.equal(value, results[1][name].to(value.dtype)), name


def test_eps_decides_where_all_values_are_equal(backend):
    inputs = make(5, 40)
    inputs["x"], inputs["residual"] = torch.full((5, 40), 3.0), torch.full((5, 40), -1.0)
    assert_accurate(run_with(0.5), inputs, backend=backend)
    out = run_with(0.5)(backend, **inputs)
    torch.testing.assert_close(out, inputs["bias"].expand(5, 40))


def test_hidden_size_one_gives_the_bias(backend):
    inputs = make(6, 1)
    results = outputs_and_gradients(lambda **given: run_with(1e-12)(backend, **given), inputs, torch.float32)
    assert torch.equal(results["output 0"], inputs["bias"].expand(6, 1))
    assert not results["gradient of x"].any()


def test_x_and_residual_get_the_same_gradient(backend):
    results = outputs_and_gradients(lambda **given: run_with(1e-12)(backend, **given), make(9, 64), torch.float32)
    assert torch.equal(results["gradient of x"], results["gradient of residual"])


def test_a_tensor_added_to_itself_gets_both_gradients(backend):
    inputs = make(9, 64)

    def run(backend, x, weight, bias):
        return ops.layer_norm(x, x, weight, bias, 1e-5, backend=backend)

    assert_accurate(run, {name: inputs[name] for name in ("x", "weight", "bias")}, backend=backend)


def test_strided_inputs_and_upstream_gradients(backend):
    inputs = make(12, 40)

    def run(backend, wide, flipped, weight, bias):
        out = ops.layer_norm(wide[:, ::2], flipped.t(), weight[::2], bias, 1e-5, backend=backend)
        return out.t().clone().t()[:, ::3]

    generator = torch.Generator().manual_seed(1)
    strided = {
        "wide": torch.randn(12, 80, generator=generator),
        "flipped": torch.randn(40, 12, generator=generator),
        "weight": torch.randn(80, generator=generator),
        "bias": inputs["bias"],
    }
    assert_accurate(run, strided, backend=backend)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_only_wanted_gradients_are_computed(backend, wanted):
    inputs = make(9, 64)
    every = outputs_and_gradients(lambda **given: run_with(1e-5)(backend, **given), inputs, torch.float32)
    leaf = inputs[wanted].clone().requires_grad_()
    out = run_with(1e-5)(backend, **{**inputs, wanted: leaf})
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(upstream)
    assert torch.equal(leaf.grad, every[f"gradient of {wanted}"])


def test_threads_change_no_bit(backend):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            run = run_with(1e-5)
            results.append(
                outputs_and_gradients(lambda run=run, **given: run(backend, **given), make(999, 96), torch.float32)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_a_token_does_not_depend_on_the_others(backend):
    inputs = make(50, 384)
    whole = run_with(1e-5)(backend, **inputs)
    part = run_with(1e-5)(backend, **{**inputs, "x": inputs["x"][20:21], "residual": inputs["residual"][20:21]})
    assert torch.equal(whole[20:21], part)
    inputs["x"][3, 100] = torch.nan
    spoilt = run_with(1e-5)(backend, **inputs)
    assert spoilt[3].isnan().all()
    spoilt[3] = whole[3]
    assert torch.equal(spoilt, whole)


def test_no_second_derivative():
    x = make(4, 8)["x"].requires_grad_()
    out = ops.layer_norm(x, None, torch.ones(8), torch.zeros(8), 1e-5, backend="cpu")
    (gradient,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bad_input():
    x, w = torch.zeros(5, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=re.escape("given: x (5, 8), weight (7,), bias (8,)")):
        ops.layer_norm(x, None, w[:7], w, 1e-5)
    with pytest.raises(ValueError, match=re.escape("residual (4, 8)")):
        ops.layer_norm(x, x[:4], w, w, 1e-5)
    with pytest.raises(ValueError, match=re.escape("given: x (1, 5, 8)")):
        ops.layer_norm(x[None], None, w, w, 1e-5)
    with pytest.raises(ValueError, match=r"weight torch\.float64 on cpu"):
        ops.layer_norm(x, None, w.double(), w, 1e-5)


def test_norms_of_embeddings_in_bf16_are_those_in_float32_rounded(backend):
    random = torch.Generator().manual_seed(0)
    for hidden in (1, 7, 33, 384):
        tables = tuple(torch.randn(count, hidden, generator=random) for count in (50, 2, 40))
        ids = tuple(torch.randint(0, len(one), (300,), generator=random) for one in tables)
        weight, bias = torch.randn(2, hidden, generator=random)

        def run(dtype, ids=ids, tables=tables, weight=weight, bias=bias):
            return ops.embedding_norm(ids, tables, weight, bias, 1e-6, dtype=dtype, backend=backend)

        with poisoned_memory():
            out = run(torch.bfloat16)
        assert out.dtype == torch.bfloat16 and torch.equal(out, run(torch.float32).bfloat16())
        weight.requires_grad_()
        assert torch.equal(run(torch.bfloat16).detach(), out), "with a gradient the same bits"


@pytest.mark.parametrize("hidden", [1, 7, 16, 33, 384])
@pytest.mark.parametrize("rows", [0, 1, 17, 300])
def test_norms_of_embeddings(backend, rows, hidden):
    random = torch.Generator().manual_seed(hidden)
    tables = tuple(torch.randn(count, hidden, generator=random) for count in (50, 2, 40))
    ids = tuple(torch.randint(0, len(one), (rows,), generator=random) for one in tables)
    weight, bias = torch.randn(2, hidden, generator=random)
    run = lambda: ops.embedding_norm(ids, tables, weight, bias, 1e-6, backend=backend)  # noqa: E731
    with poisoned_memory():
        out = run()
    summed = sum(one[i].double() for one, i in zip(tables, ids, strict=True))
    exact = torch.nn.functional.layer_norm(summed, (hidden,), weight.double(), bias.double(), 1e-6)
    assert out.shape == (rows, hidden)
    assert rows == 0 or (out - exact).abs().max() <= 2e-6 * (1 + exact.abs().max())
    weight.requires_grad_()
    assert torch.equal(run().detach(), out), "with a gradient the same bits"


def test_ids_outside_their_tables(backend):
    tables = torch.ones(5, 8), torch.ones(2, 8), torch.ones(7, 8)
    for wrong in (-1, 2):
        ids = torch.tensor([4]), torch.tensor([wrong]), torch.tensor([6])
        with pytest.raises(IndexError, match=f"id {wrong} is outside of a table of 2 vectors"):
            ops.embedding_norm(ids, tables, torch.ones(8), torch.ones(8), 1e-6, backend=backend)
