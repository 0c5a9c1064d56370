"""Products with what follows them, against their reference: every instruction set and precision, sizes around tiles,
panels and blocks."""

import os
import subprocess
import sys

import pytest
import torch
from accuracy import before_a_wall, hold_to_the_rule, poisoned_memory, skip_unless_runs
from torch import Tensor
from torch.nn import functional

from fastrank import _cpu, ops
from fastrank.kernels.linear import reference
from fastrank.kernels.linear.weights import BLOCK, LinearWeights, freeze

PRECISIONS = ["float32", "bf16", "int8"]
ACTIVATIONS = ["none", "gelu", "gelu_tanh", "relu"]


@pytest.fixture
def backend(isa):
    """The cpu backend, by instruction set."""
    skip_unless_runs("linear", "cpu", torch.empty(0, 1))
    return "cpu"


def draw_weights(columns: int, depth: int, precision: str, random: torch.Generator) -> LinearWeights:
    weight = torch.randn(columns, depth, generator=random) / max(depth, 1) ** 0.5
    return ops.freeze_linear(weight, torch.randn(columns, generator=random), precision)


def make(rows: int, depth: int, columns: int, precision: str, *, second: int = 0, norm: bool = False, seed: int = 0):
    """Arguments of ops.linear: x, first and options. Every row of x has a size and an offset of its own."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
    x = draw(rows, depth) * torch.exp(draw(rows, 1)) + draw(rows, 1)
    first = draw_weights(columns, depth, precision, random)
    options = {"second": draw_weights(second, columns, precision, random)} if second else {}
    if norm:
        last = second or columns
        options |= {"residual": draw(rows, last), "norm_weight": 1 + 0.3 * draw(last), "norm_bias": draw(last)}
        options["eps"] = 1e-6
    return x, first, options


def multiplied(weights: LinearWeights) -> LinearWeights:
    """int8 weights in the form in which the instruction set in use multiplies them."""
    return weights.as_bf16() if weights.precision == "int8" and _cpu.multiplies_in_tiles() else weights


def assert_accurate(x: Tensor, first: LinearWeights, options: dict, backend: str) -> None:
    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {name: value.to(dtype) if name == "residual" else value for name, value in options.items()}
        given |= {name: multiplied(value) for name, value in options.items() if name == "second"}
        return {"output": ops.linear(x.to(dtype), multiplied(first), backend=backend, **given)}

    exact, rounded = run("reference", torch.float64), run("reference", torch.float32)
    walled = {name: before_a_wall(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    with poisoned_memory():
        actual = {"output": ops.linear(before_a_wall(x), first, backend=backend, **walled)}
    hold_to_the_rule(exact, rounded, actual, backend=backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 31, 63, 64, 65, 127, 128, 130, 384, 1536])
def test_accuracy_of_any_depth(backend, depth, norm, precision):
    assert_accurate(*make(13, depth, 40, precision, norm=norm, seed=depth), backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 100, 384])
def test_accuracy_of_any_number_of_columns(backend, columns, precision):
    assert_accurate(*make(7, 70, columns, precision, norm=columns > 1, seed=columns), backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 47, 48, 49, 95, 97, 300])
def test_accuracy_of_any_number_of_rows(backend, rows, precision):
    assert_accurate(*make(rows, 66, 33, precision, norm=True, seed=rows), backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy_of_activations(backend, activation, precision):
    x, first, _ = make(20, 96, 50, precision)
    assert_accurate(x * 5, first, {"activation": activation}, backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "groups", "each"), [(1, 2, 16), (50, 3, 16), (13, 6, 32), (97, 2, 48), (0, 2, 16)])
def test_groups_are_the_same_numbers_elsewhere(backend, rows, groups, each, precision):
    x, first, _ = make(rows, 70, groups * each, precision)
    together = ops.linear(x, first, activation="gelu", backend=backend)
    apart = ops.linear(x, first, activation="gelu", groups=groups, backend=backend)
    assert torch.equal(apart, together.view(rows, groups, each))
    assert apart.stride(2) == 1 and apart.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(("precision", "error"), [("bf16", 1.2e-5), ("int8", 1.9e-4)])
def test_polynomials_are_gelu_but_for_a_little(precision, error):
    x = torch.cat([torch.linspace(-9, 9, 100_001), torch.tensor([-1e30, 1e30])]).double()
    exact = torch.nn.functional.gelu(x)
    assert ((reference.gelu_polynomial(x, precision) - exact).abs() <= error + 1e-7 * exact.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "second"), [(5, 33, 70, 21), (100, 96, 200, 48), (49, 384, 1536, 384)]
)
def test_accuracy_of_two_products(backend, rows, depth, columns, second, activation):
    x, first, options = make(rows, depth, columns, "float32", second=second, norm=True)
    assert_accurate(x, first, options | {"activation": activation}, backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_products_are_one_after_the_other(backend, activation, precision):
    """Bit for bit: what lies between two products is quantised from the same numbers, in memory or not."""
    x, first, options = make(101, 130, 200, precision, second=72, norm=True)
    second = options.pop("second")
    between = ops.linear(x, first, activation=activation, backend=backend)
    apart = ops.linear(between, second, backend=backend, **options)
    assert torch.equal(ops.linear(x, first, activation=activation, second=second, backend=backend, **options), apart)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_depends_on_nothing_else(backend, precision, monkeypatch):
    x, first, options = make(150, 100, 90, precision, second=40, norm=True)

    def run(rows: slice) -> Tensor:
        given = options | {"residual": options["residual"][rows]}
        return ops.linear(x[rows], first, activation="gelu", backend=backend, **given)

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(7, 12), slice(3, 150), slice(149, 150)):
        assert torch.equal(run(rows), whole[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(slice(None)), whole)
    finally:
        torch.set_num_threads(threads)


SPECIAL_ROWS = {
    "zeros": torch.zeros(130),
    "all equal": torch.full((130,), -3.25),
    "one outlier": torch.cat([torch.full((129,), 0.01), torch.tensor([1e4])]),
    "halves": torch.arange(130) * 0.5,  # steps that lie between two levels: rounded to even, on every processor
    "positive": torch.linspace(1, 2, 130),
    "negative": torch.linspace(-2, -1, 130),
    "huge": torch.linspace(-1e30, 1e30, 130),
    "tiny": torch.linspace(-1e-33, 1e-33, 130),
    "denormal": torch.full((130,), 1e-41),
}


@pytest.mark.parametrize("name", SPECIAL_ROWS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_rows(backend, name, precision):
    x, first, _ = make(9, 130, 40, precision)
    x[4] = SPECIAL_ROWS[name]
    assert_accurate(x, first, {}, backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5, 63, 64, 129])
def test_what_is_not_finite_stays_so_in_its_row(backend, place, value, precision):
    x, first, _ = make(9, 130, 40, precision)
    clean = ops.linear(x, first, backend=backend)
    x[4, place] = value
    out = ops.linear(x, first, backend=backend)
    assert not out[4].isfinite().any()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], clean[others])


def test_bf16_is_rounded_as_torch_rounds(backend):
    """Ties to even, what rounds up to a power of two or to infinity, and NaN with any bits."""
    upper = torch.tensor([0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x7F7F, 0x7F80, 0x7FFF], dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (upper[:, None] + lower).flatten().view(torch.float32)
    x = torch.cat([x, -x, torch.zeros(1)])[:, None]
    out = ops.linear(x, freeze(torch.ones(1, 1), torch.zeros(1), "bf16"), backend=backend)
    assert torch.equal(out.isnan(), x.isnan()) and torch.equal(out[~x.isnan()], x[~x.isnan()].bfloat16().float())


@pytest.mark.parametrize("depth", [1, 2, 63, 191, 193, 385])
def test_every_instruction_set_sums_bf16_alike(isa, backend, depth):
    """Bit for bit: sums of 192 products each, pair by pair, of a pair the second product first. Matrix units sum the
    first and the second products of sixteen pairs by themselves, and the bias comes last."""
    x, first, _ = make(7, depth, 40, "bf16", seed=depth)
    left, right = (functional.pad(one.bfloat16().float(), (0, -depth % 32)) for one in (x, first.weight))
    product = lambda k: left[:, k, None] * right[:, k]  # noqa: E731  (exact)
    sums = torch.zeros(7, 40) if isa == "amx" else first.bias.expand(7, 40)
    block = 32 if isa == "amx" else 192
    for begin in range(0, depth, block):
        pairs = range(begin, min(begin + block, left.shape[1]), 2)
        if isa == "amx":
            sums = sums + (sum(map(product, pairs)) + sum(product(k + 1) for k in pairs))
        else:
            sums = sums + sum(product(place) for k in pairs for place in (k + 1, k))
    sums = sums + first.bias if isa == "amx" else sums
    assert torch.equal(ops.linear(x, first, backend=backend), sums)


def test_int8_is_as_close_as_its_steps_say():
    """x W^T differs by at most half a step of x times the weights, plus half a step of the weights times x."""
    random = torch.Generator().manual_seed(3)
    x, weight = torch.randn(50, 300, generator=random), torch.randn(20, 300, generator=random)
    frozen = freeze(weight, torch.zeros(20), "int8")
    dense = (frozen.weight * frozen.scales[..., None]).flatten(1)[:, :300]
    half_steps = frozen.scales.repeat_interleave(BLOCK, 1)[:, :300] / 2
    assert ((dense - weight).abs() <= half_steps * 1.0001).all()
    pairs = frozen.weight.int().abs().unflatten(2, (-1, 2)).sum(3)
    assert pairs.max() <= 128 and pairs.amax(2).min() >= 126, "neighbours use the 16 bits that AVX2 adds them in"
    levels, scale, low = reference.quantize_blocks(x[:, :256].view(50, 4, 64))
    assert levels.min() == 0 and levels.max() == 255
    assert ((levels * scale + low - x[:, :256].view(50, 4, 64)).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("depth", [64, 130, 384])
def test_matrix_units_are_closer_to_int8_weights_than_int8_is(isa, depth):
    """They take the weights as bf16, which rounds x less than 256 levels for a whole block of 64 do."""
    if isa != "amx":
        pytest.skip("Other instruction sets quantise x.")
    x, first, _ = make(50, depth, 40, "int8", seed=depth)
    weight = (first.weight.double() * first.scales[..., None]).flatten(1)[:, :depth]
    exact = x.double() @ weight.T + first.bias.double()
    ours, quantised = ops.linear(x, first), ops.linear(x, first, backend="reference")
    assert (ours - exact).std() < (quantised - exact).std()  # about half


def test_extremes_meet_in_sixteen_bits(backend):
    """The largest levels on the largest pairs of weights, of both signs: nothing saturates."""
    for signs in ((1, 1), (-1, -1), (1, -1)):
        weight = torch.tensor([signs[0] * 1.0, signs[1] * 1.0]).repeat(2, 64)
        x = torch.tensor([0.0, 1.0]).repeat_interleave(64)[None].repeat(3, 1)
        x[:, 63::64] = 1 - x[:, 63::64]  # in each block both ends of the range
        # With a bias, since the products of the last signs sum to 0, where no rounding at all would be allowed.
        assert_accurate(x, freeze(weight, torch.ones(2), "int8"), {}, backend)


def test_weights_that_int8_cannot_say():
    weight = torch.ones(3, 5)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        ops.freeze_linear(weight, torch.zeros(3), "int8")
    with pytest.raises(ValueError, match="float32, bf16, int8, not as 'int4'"):
        ops.freeze_linear(weight, torch.zeros(3), "int4")
    zeros = ops.freeze_linear(torch.zeros(4, 70), torch.arange(4.0), "int8")
    assert torch.equal(ops.linear(torch.randn(2, 70), zeros), torch.arange(4.0).expand(2, 4))


def test_bad_input():
    x, first, options = make(4, 10, 6, "float32", second=5, norm=True)
    with pytest.raises(ValueError, match=r"weights that fit it, not weights of 6 x 10 then 5 x 6; given: x \(4, 9\)"):
        ops.linear(x[:, :9], first, **options)
    with pytest.raises(ValueError, match="give all three or none"):
        ops.linear(x, first, residual=options["residual"])
    with pytest.raises(ValueError, match=r"residual \(rows, 5\)"):
        ops.linear(x, first, **options | {"residual": options["residual"][:3]})
    with pytest.raises(ValueError, match="'swish': choose one of none, gelu"):
        ops.linear(x, first, activation="swish")
    for other in ("bf16", "int8"):
        with pytest.raises(ValueError, match="one precision"):
            ops.linear(x, first, second=ops.freeze_linear(torch.ones(5, 6), torch.ones(5), other))
    with pytest.raises(ValueError, match=r"groups=2: only .* multiple of 16 columns, not 6 columns"):
        ops.linear(x, first, groups=2)
    with pytest.raises(ValueError, match="no gradient"):
        ops.linear(x.requires_grad_(), first)


PRINT_A_HASH = """
import hashlib, torch
from fastrank import _cpu, ops
x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(2))
frozen = ops.freeze_linear(weight, torch.zeros(64), "int8")
multiplied = frozen.as_bf16() if _cpu.multiplies_in_tiles() else frozen
exact = ops.linear(x.double(), multiplied, backend="reference")
apart = (ops.linear(x, frozen).double() - exact).abs().max() / exact.abs().max()
print(float(apart), hashlib.sha1(frozen.weight.numpy()).hexdigest())
"""


def test_instruction_sets_agree():
    """In processes of their own, as a user would choose one."""
    lines = []
    for isa in _cpu.supported_isas():
        environment = os.environ | {"FASTRANK_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", PRINT_A_HASH], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        lines.append(run.stdout.split())
    assert all(float(apart) < 2e-6 for apart, _ in lines)
    assert len({weights for _, weights in lines}) == 1


def test_what_cannot_be_frozen_is_refused():
    weight, bias = torch.ones(3, 4), torch.zeros(3)
    for other in (weight.int(), weight.double(), weight.half()):
        with pytest.raises(ValueError, match="frozen from float32"):
            ops.freeze_linear(other, bias, "float32")
    with pytest.raises(ValueError, match="frozen from float32"):
        ops.freeze_linear(weight, bias.double(), "int8")
    for shapes in ((torch.ones(3), bias), (weight, torch.zeros(2)), (torch.ones(0, 4), torch.zeros(0))):
        with pytest.raises(ValueError, match="A linear layer has weights"):
            ops.freeze_linear(*shapes, "float32")
    with pytest.raises(ValueError, match="without values"):
        ops.freeze_linear(weight.to("meta"), bias, "int8")
    with pytest.raises(ValueError, match="sums pass float32"):
        ops.freeze_linear(weight * 3e38, bias, "int8")
    frozen = ops.freeze_linear(weight, bias, "float32")
    for x in (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="floating point"):
            ops.linear(x, frozen)


@pytest.mark.parametrize("size", [1e-35, 1e-37, 1e-39])
def test_tiny_weights_keep_their_size(size):
    frozen = ops.freeze_linear(torch.full((2, 64), size), torch.zeros(2), "int8")
    dense = frozen.weight.double() * frozen.scales[..., None].double()
    assert (dense - size).abs().max() <= frozen.scales.double().max() * 0.5001
    assert frozen.scales.double().max() <= max(2 * size / 127 * 1.01, 1.2e-38)


def test_restored_weights_are_checked():
    frozen = ops.freeze_linear(torch.randn(3, 70), torch.zeros(3), "int8")
    assert ops.restore_linear(frozen.weight, frozen.bias, frozen.scales, 70).depth == 70
    for scales in (-frozen.scales, frozen.scales * torch.nan):
        with pytest.raises(ValueError, match="finite and not negative"):
            ops.restore_linear(frozen.weight, frozen.bias, scales, 70)
    filled = frozen.weight.clone()
    filled[0, 1, 63] = 1
    with pytest.raises(ValueError, match="must be zero"):
        ops.restore_linear(filled, frozen.bias, frozen.scales, 70)
