"""bias_gelu against its definition in float64, over the range of floats, and on any number of threads."""

import math

import pytest
import torch
from accuracy import assert_accurate, skip_unless_runs

from fastrank import ops


def values(rows: int, columns: int, scale: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return {
        "x": torch.randn(rows, columns, generator=generator) * scale,
        "bias": torch.randn(columns, generator=generator),
    }


@pytest.mark.parametrize("tanh_form", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (31, 16), (33, 40), (65, 257), (200, 1536)])
def test_accuracy(isa, shape, tanh_form):
    inputs = values(*shape)
    skip_unless_runs("gelu", "cpu", inputs["x"])

    def run(backend, x, bias):
        return ops.bias_gelu(x, bias, tanh_form=tanh_form, backend=backend)

    assert_accurate(run, inputs, backend="cpu")


@pytest.mark.parametrize("tanh_form", [False, True])
def test_every_size_of_number(isa, tanh_form):
    """Below zero the exact form keeps relative accuracy; far out it is 0 or x; infinities and NaN go through."""
    x = torch.linspace(-15, 15, 30001)
    x = torch.cat([x, torch.tensor([-math.inf, -1e30, -88.0, 0.0, -0.0, 1e-30, 88.0, 1e30, math.inf])])[None]
    bias = torch.zeros(x.shape[1])
    x.requires_grad_()
    out = ops.bias_gelu(x, bias, tanh_form=tanh_form, backend="cpu")
    out.sum().backward()
    out = out.detach()
    exact_x = x.detach().double()
    tail = 0.5 * torch.special.erfc(-exact_x / math.sqrt(2))
    exact = torch.nn.functional.gelu(exact_x, approximate="tanh") if tanh_form else exact_x * tail
    exact = torch.where(exact_x == -math.inf, 0.0, torch.where(exact_x == math.inf, math.inf, exact))
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert float((out.double() - exact)[finite & (exact.abs() < 100)].abs().max()) < 2e-6
    assert torch.equal(out[exact.abs() >= 100], x.detach()[exact.abs() >= 100])
    if not tanh_form:
        near = (exact_x > -9) & (exact_x < 9) & (exact_x != 0)
        assert float(((out.double() - exact) / exact)[near].abs().max()) < 5e-6  # x^2 / 2 is rounded before exp
    assert x.grad.isfinite().all()
    ends = torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1])
    assert torch.allclose(x.grad[0, -9:], ends, rtol=0, atol=1e-30)
    nan = ops.bias_gelu(torch.tensor([[math.nan, 1.0]]), torch.zeros(2), tanh_form=tanh_form, backend="cpu")
    assert nan.isnan().tolist() == [[True, False]]


def test_threads_change_no_bit(isa):
    inputs = values(300, 97)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            x, bias = (inputs[name].clone().requires_grad_() for name in ("x", "bias"))
            out = ops.bias_gelu(x, bias, backend="cpu")
            gradients = torch.autograd.grad(out, [x, bias], torch.linspace(-1, 1, out.numel()).view_as(out))
        finally:
            torch.set_num_threads(before)
        results.append((out, *gradients))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"x \(3, 4\), bias \(3,\)"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="one dtype"):
        ops.bias_gelu(torch.zeros(3, 4), torch.zeros(4, dtype=torch.float64))
