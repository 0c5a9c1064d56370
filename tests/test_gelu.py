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


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh_form", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (31, 16), (33, 40), (65, 257), (200, 1536)])
def test_accuracy(isa, shape, tanh_form, dtype):
    inputs = {name: value.to(dtype).float() for name, value in values(*shape).items()}
    skip_unless_runs("gelu", "cpu", inputs["x"])

    def run(backend, x, bias):
        return ops.bias_gelu(x, bias, tanh_form=tanh_form, backend=backend)

    assert_accurate(run, inputs, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("tanh_form", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (33, 40), (65, 257)])
def test_bf16_with_a_bias_of_float32_is_float32_rounded(isa, shape, tanh_form):
    """Outputs and dx are float32's, rounded to the nearest even; the bias, and what is summed for it, stay float32."""
    inputs = values(*shape)
    results = []
    for x in (inputs["x"].bfloat16(), inputs["x"].bfloat16().float()):
        leaves = x.requires_grad_(), inputs["bias"].clone().requires_grad_()
        out = ops.bias_gelu(*leaves, tanh_form=tanh_form, backend="cpu")
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16().to(out.dtype)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    (out, dx, dbias), (exact, exact_dx, exact_dbias) = results
    assert torch.equal(out, exact.bfloat16()) and torch.equal(dx, exact_dx.bfloat16())
    assert dbias.dtype == torch.float32 and torch.equal(dbias, exact_dbias)


def test_bf16_numbers_of_every_kind(isa):
    """Far out GELU is x itself: what is read is what is written, infinities and NaN included; and every tie to even."""
    x = torch.tensor([math.nan, math.inf, 300.0, 3e38, 1e9, 257.0]).bfloat16()[None]
    out = ops.bias_gelu(x, torch.zeros(x.shape[1]), backend="cpu")
    assert torch.equal(out.view(torch.int16)[:, 1:], x.view(torch.int16)[:, 1:]) and out[0, 0].isnan()
    bits = torch.arange(0x4380, 0x7F70, dtype=torch.int32)[None] << 16  # from 256 on
    large = bits.view(torch.float32)
    half_a_step = (bits + 0x8000).view(torch.float32) - large
    for bias in (half_a_step[0], half_a_step[0] * 0.998, half_a_step[0] * 1.002):
        out = ops.bias_gelu(large.bfloat16(), bias, backend="cpu")
        assert torch.equal(out, (large + bias).bfloat16())


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
