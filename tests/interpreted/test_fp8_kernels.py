"""What writes rows in fp8 against the definition, and a whole model in fp8 on these kernels."""

import warnings

import numpy as np
import pytest
import torch
from accuracy import poisoned_memory
from fp8_accuracy import assert_quantised, emulated_fp8
from test_epilogue_kernels import make_batch, make_model

from fastrank import Reranker, agreement, backend, ops
from fastrank.kernels.fp8 import gpu as fp8
from fastrank.kernels.fp8 import reference
from fastrank.kernels.gelu import gpu as gelus
from fastrank.kernels.layer_norm import gpu as norms
from fastrank.model import gpu_layers
from fastrank.model.encoder import Norm

HALF = (torch.float16, torch.bfloat16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes that bf16 and float16 hold."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2.0 ** torch.randn(shape, generator=generator)).bfloat16().float()


def room(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, dtype=torch.float32)


def test_every_code_and_every_half_between_two_is_rounded_as_torch_rounds():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    row = torch.cat([codes, halves, -halves, -codes, codes[:6]])  # 448 is in it: its scale is 1
    found, scales = ops.quantise_rows(row[None], backend="gpu")
    assert scales.tolist() == [1.0]
    assert torch.equal(found.float(), row[None].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (9, 64), (5, 768), (3, 1032), (2, 2048)])
def test_quantise_rows(shape, dtype):
    x = draw(*shape).to(dtype)
    for name in ("gpu", "reference"):
        with poisoned_memory():
            codes, scales = ops.quantise_rows(x, backend=name)
        assert_quantised(codes, scales, x.double())


def test_rows_of_zeros_and_of_what_is_no_number():
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 2], x[3] = torch.nan, torch.inf, 1e-44
    for name in ("gpu", "reference"):
        codes, scales = ops.quantise_rows(x, backend=name)
        numbers = reference.dequantise_rows(codes, scales)
        assert not numbers[0].any() and scales.gt(0).logical_or(scales.isnan()).all()
        assert numbers[1].sum().isnan() and numbers[2].sum().isnan() and numbers[3].isfinite().all()


def test_what_cannot_be_quantised_is_refused():
    for columns in (12, 2056):
        with pytest.raises(backend.BackendRefused, match=f"up to 2048, not of {columns}"):
            ops.quantise_rows(torch.zeros(2, columns), backend="gpu")
    with pytest.raises(ValueError, match=r"quantise_rows takes x \(rows, columns\)"):
        ops.quantise_rows(torch.zeros(8), backend="gpu")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (33, 384), (5, 768), (2, 1040)])
def test_layer_norm_in_fp8(shape, dtype):
    x, residual = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
    weight, bias = draw(shape[1], seed=2), draw(shape[1], seed=3)
    with poisoned_memory():
        out, (codes, scales) = torch.empty_like(x), room(*shape)
        norms.fp8_launch(x, residual, weight, bias, 1e-5, out, codes, scales)()
        plain = ops.layer_norm(x, residual, weight, bias, 1e-5, backend="gpu")
    assert torch.equal(out, plain)
    exact = ops.layer_norm(*(one.double() for one in (x, residual, weight, bias)), 1e-5, backend="reference")
    assert_quantised(codes, scales, exact, rounding=2.0**-18)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tanh_form", [False, True])
@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (9, 272), (3, 3072), (2, 4112)])
def test_gelu_in_fp8(shape, tanh_form, dtype):
    x, bias = draw(*shape).to(dtype), draw(shape[1], seed=1)
    with poisoned_memory():
        codes, scales = room(*shape)
        gelus.fp8_launch(x, bias, tanh_form, codes, scales)()
    exact = ops.bias_gelu(x.double(), bias.double(), tanh_form=tanh_form, backend="reference")
    assert_quantised(codes, scales, exact, rounding=2.0**-14)  # the polynomial's, far below a code's


def test_launches_check_their_tensors():
    x = torch.zeros(2, 16, dtype=torch.float16)
    _, scales = room(2, 16)
    with pytest.raises(TypeError, match=r"codes_ptr must be \*fp8e4nv, not \*fp16"):
        fp8.rows_launch(x, x, scales)
    with pytest.raises(ValueError, match="codes_ptr must begin at a multiple of 16 bytes"):
        fp8.rows_launch(x, torch.empty(33, dtype=torch.float8_e4m3fn)[1:].view(2, 16), scales)


def score(model, batch, precision: str) -> torch.Tensor:
    model.to_precision(precision, hidden_states="float32" if precision == "float32" else "fp16")
    return model.encoder(batch, batch.positions).double()


@pytest.mark.parametrize(("layers", "sizes"), [(3, ((5, 17), (1, 3))), (1, ((11, 5),))])  # 26 tokens; 16
def test_a_whole_model_in_fp8(layers, sizes, monkeypatch):
    """First tokens' vectors against float32: at most twice as far off as the definition's in plain PyTorch."""
    model, batch = make_model(layers=layers).eval().requires_grad_(False), make_batch(*sizes)
    with torch.inference_mode():
        monkeypatch.setenv("FASTRANK_BACKEND", "reference")
        exact = score(model, batch, "float32")
        with emulated_fp8(model):
            emulated = score(model, batch, "float32")
        monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
        half = score(model, batch, "fp16")
        with poisoned_memory():
            found = score(model, batch, "fp8")
        assert torch.equal(half, score(model, batch, "fp16")), "nothing of fp8 stays"
    expected = (emulated - exact).norm()
    assert (half - exact).norm() < 0.25 * expected < (found - exact).norm() <= 2 * expected
    # Mostly the same rounding, not merely as much of it.
    assert (found - emulated).norm() <= 0.8 * expected


def test_fp8_scores_a_pair_alike_in_any_company(monkeypatch):
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    model = make_model(layers=2).eval().requires_grad_(False)
    batch = make_batch((5, 17, 3))
    with torch.inference_mode():
        together = score(model, batch, "fp8")
        weight = model.encoder.layers[0].up.weight
        alone = score(model, make_batch((5,)), "fp8")
        torch.testing.assert_close(alone[0], together[0], rtol=0.02, atol=0.02)
    with torch.no_grad():
        weight.mul_(2)
        assert not torch.equal(score(model, batch, "fp8"), together), "changed weights are quantised again"


def test_fp8_does_not_train(monkeypatch):
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    model = make_model(layers=1, dropout=0.1).eval().to_precision("fp8", hidden_states="fp16")
    with pytest.raises(ValueError, match=r"fp8 is for inference: call eval\(\) and score under torch.no_grad"):
        model.score(make_batch((5,)))
    with torch.no_grad():
        model.score(make_batch((5,)))
        with pytest.raises(ValueError, match="fp8 is for inference"):
            model.train().score(make_batch((5,)))
        monkeypatch.setenv("FASTRANK_BACKEND", "reference")
        with pytest.raises(ValueError, match="fp8 runs only by fastrank's Triton kernels"):
            model.eval().score(make_batch((5,)))
    assert len(model.to_precision("float32").score(make_batch((5,)))) == 1


class MadeUpTokenizer:
    """As much of a PairTokenizer as Reranker.from_parts and made-up lists want."""

    word_ids = np.arange(5, 100, dtype=np.int32)
    num_truncated = 0

    def kept_tokens(self, num_query: int, num_document: int) -> tuple[int, int]:
        return num_query, min(num_document, 12)

    def pairs(self, queries, documents):
        joined = [np.concatenate([[1], *pair]) for pair in zip(queries, documents, strict=True)]
        return [(one.astype(np.int32), np.zeros(len(one), np.int32)) for one in joined]


def test_loading_in_fp8_compares_the_order_with_bf16s(monkeypatch):
    monkeypatch.setenv("FASTRANK_BACKEND", "gpu")
    for name, value in {"NUM_QUERIES": 1, "NUM_DOCUMENTS": 6}.items():
        monkeypatch.setattr(agreement, name, value)
    model = make_model(layers=1).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Norm):  # so that scores spread
            module.weight.fill_(1), module.bias.zero_()
    reranker = Reranker.from_parts(model, MadeUpTokenizer())
    assert reranker.fp8_agreement is None
    to_precision = model.to_precision
    # The interpreter multiplies no bf16, and on a CPU hidden states are float32 unless told otherwise.
    chosen = {"bf16": "fp16", "fp8": "fp8"}
    monkeypatch.setattr(model, "to_precision", lambda name: to_precision(chosen[name], hidden_states="fp16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert reranker._compare_with_bf16() > 0.9
    assert model.encoder.uses_fp8, "in which the model is left"
    original = gpu_layers.ops.quantise_rows

    def spoil(weight, **more):
        codes, scales = original(weight, **more)
        return codes.view(torch.uint8).flip(1).view(codes.dtype), scales

    monkeypatch.setattr(gpu_layers.ops, "quantise_rows", spoil)
    model.encoder._halves = None
    with pytest.warns(UserWarning, match=r"ranks made-up pairs otherwise than in bf16 \(Kendall's tau -?0"):
        assert reranker._compare_with_bf16() < 0.9

    def fail(*given, **more):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    with pytest.raises(ValueError, match=r"fp8 does not run here; choose dtype='bf16' \(CUBLAS_STATUS_NOT_SUPPORTED\)"):
        reranker._compare_with_bf16()
