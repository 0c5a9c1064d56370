"""An encoder's layers in one call, in matrix units, against the same layers in float64: they may be wrong by at most
twice as much as the reference is, in float32, or rounding to bf16 what they round to it."""

import pytest
import torch
from accuracy import hold_to_the_rule, poisoned_memory
from attention_cases import cut, draw
from hub_models import make_checkpoint, random_pairs
from torch import Tensor
from torch.nn import functional as F

from fastrank import _cpu, ops
from fastrank.checkpoint import load_model
from fastrank.kernels import encoder_cpu
from fastrank.kernels.linear import reference
from fastrank.kernels.linear.cpu import pack
from fastrank.kernels.linear.weights import LinearWeights
from fastrank.packing import PackedBatch, pack_pairs

PRECISIONS = ["float32", "bf16"]
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130, 3)


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    if "amx" not in _cpu.supported_isas():
        pytest.skip("This processor has no AMX.")
    monkeypatch.setenv("FASTRANK_CPU_ISA", "amx")
    assert encoder_cpu.runs()


def make(hidden: int, inner: int, *, layers: int = 2, precision: str = "bf16", seed: int = 0):
    """Weights of the layers, and of the last one's query and of its key and value."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731

    def weights(columns: int, depth: int) -> LinearWeights:
        return ops.freeze_linear(1.5 * draw(columns, depth) / depth**0.5, 0.3 * draw(columns), precision)

    def norm() -> tuple[Tensor, Tensor, float]:
        return 1 + 0.2 * draw(hidden), 0.2 * draw(hidden), 1e-6

    whole = []
    for _ in range(layers):
        attention = weights(3 * hidden, hidden), weights(hidden, hidden), norm()
        whole.append((*attention, weights(inner, hidden), weights(hidden, inner), norm()))
    return whole, weights(hidden, hidden), weights(2 * hidden, hidden)


def expected(x, offsets, num_heads, layers, activation, query, key_value, *, dtype, rounds) -> dict[str, Tensor]:
    """The definition; with `rounds` everything is rounded to bf16 that is when products are bf16."""

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().to(dtype) if rounds else x

    def multiply(x: Tensor, weights: LinearWeights) -> Tensor:
        if weights.precision != "float32":
            x, weights = rounded(x), weights.as_bf16()
        return x @ weights.weight.to(dtype).T + weights.bias.to(dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.unflatten(1, (num_heads, -1)).transpose(0, 1) for one in (q, k, v))
        scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return rounded(rounded(powers) @ v / powers.sum(-1, keepdim=True)).transpose(0, 1).flatten(1)

    def normalise(x: Tensor, norm: tuple) -> Tensor:
        return F.layer_norm(x, x.shape[1:], norm[0].to(dtype), norm[1].to(dtype), norm[2])

    x = x.to(dtype)
    pairs = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    for qkv, output, attention_norm, up, down, norm in layers:
        q, k, v = rounded(multiply(x, qkv)).chunk(3, 1)
        attended = torch.cat([attend(q[a:b], k[a:b], v[a:b]) for a, b in pairs])
        x = normalise(multiply(attended, output) + x, attention_norm)
        between = multiply(x, up)
        is_polynomial = rounds and activation == "gelu"
        between = (
            reference.gelu_polynomial(between, "bf16") if is_polynomial else reference.ACTIVATIONS[activation](between)
        )
        x = normalise(multiply(between, down) + x, norm)
    k, v = rounded(multiply(x, key_value)).chunk(2, 1)
    q = rounded(multiply(x[offsets[:-1].long()], query))
    attended = torch.cat([attend(q[i : i + 1], k[a:b], v[a:b]) for i, (a, b) in enumerate(pairs)])
    return {"x": x, "attended": attended}


def run(x: Tensor, *arguments) -> dict[str, Tensor]:
    x = x.clone()
    with poisoned_memory():
        return {"attended": encoder_cpu.encode(x, *arguments), "x": x}


def assert_accurate(x: Tensor, offsets: Tensor, num_heads: int, made: tuple, activation: str = "gelu") -> None:
    whole, query, key_value = made
    arguments = offsets, num_heads, whole, activation, query, key_value
    exact = expected(x, *arguments, dtype=torch.float64, rounds=False)
    reference = expected(x, *arguments, dtype=torch.float32, rounds=query.precision != "float32")
    hold_to_the_rule(exact, reference, run(x, *arguments), backend="cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 32), (2, 64), (1, 96), (2, 128), (12, 32), (13, 32)])
def test_accuracy(heads, head_dim, precision):
    hidden = heads * head_dim
    made = make(hidden, 4 * hidden, seed=heads, precision=precision)
    assert_accurate(draw(sum(LENGTHS), hidden), cut(LENGTHS), heads, made)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 31, 32, 33, 47, 64, 511])
def test_accuracy_of_each_length_alone(length, precision):
    made = make(64, 96, seed=length, precision=precision)
    assert_accurate(draw(length, 64, seed=length), cut([length]), 2, made)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inner", [1, 31, 32, 33, 384, 385, 800])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_accuracy_of_any_network(inner, activation, precision):
    made = make(64, inner, seed=inner, precision=precision)
    assert_accurate(draw(70, 64, seed=inner), cut([30, 40]), 2, made, activation)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_any_number_of_layers(layers, precision):
    assert_accurate(draw(70, 64), cut([30, 40]), 2, make(64, 128, layers=layers, precision=precision))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_products_of_float32_are_nearer_than_torchs(scale):
    """Six products of bf16 numbers for one of float32: of those along 1,536 numbers torch's own rounds away more."""
    random = torch.Generator().manual_seed(7)
    x, weight = scale * torch.randn(100, 1536, generator=random), torch.randn(96, 1536, generator=random) / 40
    exact = x.double() @ weight.double().T
    frozen = ops.freeze_linear(weight, torch.zeros(96), "float32")
    ours, torchs = ops.linear(x, frozen, backend="cpu"), x @ weight.T
    assert (ours - exact).norm() < (torchs - exact).norm()


def test_int8_weights_are_multiplied_as_bf16():
    made = make(64, 128, precision="int8")
    assert_accurate(draw(70, 64), cut([30, 40]), 2, made)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pair_is_the_same_bit_for_bit_alone_and_with_any_number_of_threads(precision):
    lengths = (3, 129, 64, 1, 30, 77, 300, 16)
    offsets = cut(lengths)
    whole, query, key_value = make(64, 128, precision=precision)
    x = draw(sum(lengths), 64)
    together = run(x, offsets, 2, whole, "gelu", query, key_value)
    for pair, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        alone = run(x[begin:end], cut([end - begin]), 2, whole, "gelu", query, key_value)
        assert torch.equal(alone["x"], together["x"][begin:end])
        assert torch.equal(alone["attended"][0], together["attended"][pair])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 9):
            torch.set_num_threads(count)
            other = run(x, offsets, 2, whole, "gelu", query, key_value)
            assert all(torch.equal(other[name], together[name]) for name in together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_stays_in_its_pair(precision):
    offsets, x = cut([20, 33, 40]), draw(93, 64)
    whole, query, key_value = make(64, 128, precision=precision)
    clean = run(x, offsets, 2, whole, "gelu", query, key_value)
    spoilt = x.clone()
    spoilt[25, 7] = torch.nan
    out = run(spoilt, offsets, 2, whole, "gelu", query, key_value)
    assert out["x"][20:53].isnan().all() and out["attended"][1].isnan().all()
    for rows in (slice(0, 20), slice(53, 93)):
        assert torch.equal(out["x"][rows], clean["x"][rows])
    assert torch.equal(run(x, offsets, 2, whole, "gelu", query, key_value)["x"], clean["x"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_key_far_above_the_others_takes_all(precision):
    assert_accurate(100 * draw(50, 64), cut([50]), 2, make(64, 128, precision=precision))


def test_no_pairs():
    whole, query, key_value = make(64, 128)
    assert run(torch.empty(0, 64), cut([]), 2, whole, "gelu", query, key_value)["attended"].shape == (0, 64)


def test_offsets_that_reach_into_foreign_memory_are_refused(tmp_path):
    """A batch may be made by hand; strided offsets are none of its faults."""
    pairs = random_pairs(make_checkpoint(tmp_path, "bert", hidden_size=64, num_attention_heads=2), [5, 9, 3])
    model = load_model(tmp_path).eval().requires_grad_(False).freeze("bf16")
    made = pack_pairs(pairs)

    def score(*offsets: int, step: int = 1) -> Tensor:
        cuts = torch.tensor(offsets, dtype=torch.int32)[::step]
        tensors = made.token_ids, made.token_types, made.positions, cuts, made.list_offsets
        return model.score(PackedBatch(*tensors, max_pair_tokens=9, min_pair_tokens=3))

    for offsets, message in (
        ((0, 5, 14, 1000), "offsets must end at the number of tokens, 17, not at 1000"),
        ((0, 5, 14), "offsets must end at the number of tokens, 17, not at 14"),
        ((-5, 5, 14, 17), "offsets must begin at 0, not at -5"),
        ((0, 14, 5, 17), "offsets must not decrease, but pair 1 reaches from 14 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*offsets)
    assert torch.equal(score(0, 0, 5, 5, 14, 14, 17, 17, step=2), model.score(made))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"num_heads": 0}, "heads of equal size"),
        ({"num_heads": 5}, "heads of equal size"),
        ({"num_heads": 8}, "heads of 32, 64, 96 or 128 columns"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, r"offsets \(pairs \+ 1,\)"),
        ({"attended": torch.empty(2, 64)}, r"attended \(pairs, hidden\)"),
        ({"hidden": 32}, "weights that fit the hidden size"),
        ({"precision": "float32"}, "weights that are all float32 or all bf16"),
        ({"norm": torch.ones(63)}, "norms of the hidden size"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed, sentence):
    layers, query, key_value = make(changed.get("hidden", 64), 96)
    if "norm" in changed:
        layers = [(*layer[:5], (changed["norm"], *layer[5][1:])) for layer in layers]
    if "precision" in changed:
        query = make(64, 96, precision=changed["precision"])[1]
    packed = [tuple(pack(one) if isinstance(one, LinearWeights) else _numpy(one) for one in layer) for layer in layers]
    with pytest.raises(ValueError, match=sentence):
        _cpu.encoder_forward(
            torch.zeros(3, 64).numpy(),
            changed.get("offsets", torch.tensor([0, 3], dtype=torch.int32)).numpy(),
            changed.get("num_heads", 2),
            1.0,
            packed,
            "gelu",
            pack(query),
            pack(key_value),
            changed.get("attended", torch.empty(1, 64)).numpy(),
            1,
        )


def _numpy(norm: tuple) -> tuple:
    return norm[0].numpy(), norm[1].numpy(), norm[2]
