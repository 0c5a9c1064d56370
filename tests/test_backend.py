"""Which backend runs an operation: refusals in sentences, auto, the environment, and what is an error rather than an
absence."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import fastrank
from fastrank import _cpu, backend, ops

IN_TRITON = ("attention", "fp8", "gelu", "layer_norm", "listwise")
IN_CPP = tuple(op for op in backend.OPS if op != "fp8")  # which is for GPUs
OFFSETS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FASTRANK_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_warned", set())


def chosen(op: str, tensor: torch.Tensor, name: str = "auto") -> str:
    return backend.choose(op, name, tensor).__name__


@pytest.mark.parametrize("op", IN_CPP)
def test_the_cpu_backend_computes_on_cpu_tensors(op):
    tensor = torch.zeros(5, 2, 8)
    assert backend.refusals(op, "cpu", tensor) == []
    assert chosen(op, tensor) == f"fastrank.kernels.{op}.cpu"
    known = "float32" if op in ("linear", "listwise") else "float32, bf16"
    for dtype, name in ((torch.float64, "float64"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        expected = [] if name in known else [f"The cpu backend computes in {known}, not in {name}."]
        assert backend.refusals(op, "cpu", tensor.to(dtype)) == expected
    assert backend.refusals(op, "cpu", tensor.to("meta")) == [
        "The cpu backend runs on cpu tensors, not on meta tensors."
    ]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend.refusals(op, "reference", tensor.to(dtype)) == []


def test_no_cpu_kernel_is_claimed():
    assert backend.refusals("fp8", "cpu", torch.zeros(5, 8)) == ["fastrank has no C++ kernel for fp8."]


@pytest.mark.parametrize("op", [op for op in backend.OPS if op not in IN_TRITON])
def test_no_gpu_kernel_is_claimed(op):
    assert backend.refusals(op, "gpu", torch.zeros(5, 2, 8)) == [f"fastrank has no GPU kernel for {op}."]


@pytest.mark.parametrize("op", IN_TRITON)
def test_the_gpu_backend_wants_triton_and_a_cuda_tensor(op, monkeypatch):
    tensor = torch.zeros(5, 2, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.refusals(op, "gpu", tensor) == ["The gpu backend runs on cuda tensors, not on cpu tensors."]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refusals(op, "gpu", tensor) == []
    assert backend.refusals(op, "gpu", tensor.to("meta")) == [
        "The gpu backend runs on cuda tensors, not on meta tensors."
    ]
    if op in IN_CPP:
        assert chosen(op, tensor) == f"fastrank.kernels.{op}.cpu", "the interpreter is for whoever asks for it"


def test_other_peoples_attention_wants_a_cuda_tensor_and_half_precision(monkeypatch):
    x = torch.zeros(5, 2, 32)
    assert backend.refusals("attention", "varlen", x) == [
        "The varlen backend runs on cuda tensors, not on cpu tensors.",
        "The varlen backend computes in bf16, fp16, not in float32.",
    ]
    assert backend.refusals("gelu", "varlen", x) == ["fastrank has no torch.nn.attention.varlen kernel for gelu."]
    monkeypatch.setattr(backend.importlib.util, "find_spec", _without(backend.importlib.util.find_spec, "flash_attn"))
    backend._standing_refusals.cache_clear()
    assert "flash-attn is not installed." in backend.refusals("attention", "flash_attn", x)


def test_a_backend_for_attention_alone_leaves_the_rest_of_a_model_to_auto(monkeypatch):
    monkeypatch.setenv("FASTRANK_BACKEND", "varlen")
    assert chosen("gelu", torch.zeros(5, 8)) == "fastrank.kernels.gelu.cpu"
    with pytest.raises(backend.BackendRefused, match=r"'varlen' \(from the environment variable"):
        chosen("attention", torch.zeros(5, 2, 32))
    with pytest.raises(backend.BackendRefused, match=r"no torch\.nn\.attention\.varlen kernel for gelu"):
        chosen("gelu", torch.zeros(5, 8), "varlen")


def _without(find_spec, missing: str):
    return lambda name, *package: None if name == missing else find_spec(name, *package)


def test_a_missing_triton_is_a_refusal_that_says_how_to_install_it(without_extension):
    result = python(
        """
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *package: None if name == "triton" else find_spec(name, *package)
        import torch
        from fastrank import backend
        (one, two) = backend.refusals("listwise", "gpu", torch.zeros(1))
        assert one == "Triton is not installed: pip install 'fastrank[gpu]'." and "cuda tensors" in two
        """,
        without_extension,
    )
    assert result.returncode == 0, result.stderr


def test_nothing_imports_triton_until_a_gpu_kernel_is_wanted():
    code = """
        import sys
        import torch
        from fastrank import backend, losses
        loss = losses.LOSSES["ranknet"](torch.zeros(2), torch.arange(2), torch.tensor([0, 2]), backend="reference")
        backend.table()
        assert "triton" not in sys.modules, "triton is imported"
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_kernel_may_refuse_a_shape():
    assert backend.refusals("attention", "cpu", torch.zeros(1, 1, 128)) == []
    (sentence,) = backend.refusals("attention", "cpu", torch.zeros(1, 1, 129))
    assert "up to 128, not for 129" in sentence


def test_auto_falls_to_the_reference_with_one_warning():
    x = torch.randn(5, 1, 130)
    with pytest.warns(
        UserWarning, match=r"attention runs in plain PyTorch.*up to 128, not for 130.*gpu: The gpu backend runs on cuda"
    ) as caught:
        ops.attention(x, x, x, OFFSETS)
    assert caught[0].filename == __file__, "the warning points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.attention(x, x, x, OFFSETS)
    with pytest.warns(UserWarning, match=r"layer_norm runs in plain PyTorch.*not in float64"):
        ops.layer_norm(torch.zeros(1, 2).double(), None, torch.zeros(2).double(), torch.zeros(2).double(), 1e-5)


def test_an_explicit_backend_never_falls_back():
    x = torch.zeros(5, 2, 8).double()
    with pytest.raises(
        backend.BackendRefused, match="'cpu' cannot run attention: The cpu backend computes in float32, bf16, not in"
    ):
        ops.attention(x, x, x, OFFSETS, backend="cpu")
    with pytest.raises(backend.BackendRefused, match="'gpu' cannot run linear: fastrank has no GPU kernel"):
        backend.choose("linear", "gpu", x.float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.attention(x, x, x, OFFSETS, backend="reference")


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no backend 'cuda'; known are auto, cpu, gpu, varlen, flash_attn, reference"):
        chosen("attention", torch.zeros(1, 1, 8), "cuda")


def test_the_environment_sets_the_default(monkeypatch):
    x = torch.zeros(1, 1, 8)
    monkeypatch.setenv("FASTRANK_BACKEND", "reference")
    assert chosen("attention", x) == "fastrank.kernels.attention.reference"
    assert chosen("attention", x, "cpu") == "fastrank.kernels.attention.cpu", "an argument wins"
    monkeypatch.setenv("FASTRANK_BACKEND", "cpu")
    with pytest.raises(backend.BackendRefused, match=r"environment variable FASTRANK_BACKEND.*not in float64"):
        chosen("attention", x.double())
    monkeypatch.setenv("FASTRANK_BACKEND", "cup")
    with pytest.raises(ValueError, match=r"no backend 'cup' .from the environment variable FASTRANK_BACKEND"):
        chosen("attention", x)


def test_an_import_error_in_our_own_file_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "__init__.py").touch()
    (broken / "cpu.py").write_text("import a_module_that_is_not_there\n")
    (broken / "reference.py").touch()
    monkeypatch.setattr(fastrank.kernels, "__path__", [*fastrank.kernels.__path__, str(tmp_path)])
    with pytest.raises(ImportError, match="a_module_that_is_not_there"):
        chosen("broken", torch.zeros(1))
    assert chosen("broken", torch.zeros(1), "reference") == "fastrank.kernels.broken.reference"


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory) -> Path:
    """A copy of the package in which the C++ extension was never built."""
    root = tmp_path_factory.mktemp("checkout")
    package = Path(backend.__file__).parent
    shutil.copytree(package, root / "fastrank", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    # An editable installation finds submodules of its own, wherever the package itself was found.
    setup = f"""
    import sys
    sys.path.insert(0, {str(folder)!r})
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    """
    script = textwrap.dedent(setup) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)


def test_a_missing_extension_is_a_refusal_that_says_how_to_build_it(without_extension):
    result = python(
        """
        import torch
        from fastrank import backend, ops
        offsets = torch.tensor([0, 5], dtype=torch.int32)
        assert "fastrank._cpu is not built" in backend.refusals("attention", "cpu", torch.zeros(5, 3, 2, 8))[0]
        assert ops.fused_attention(torch.zeros(5, 3, 2, 8), offsets).shape == (5, 2, 8)
        raise SystemExit(backend.backends_command([]))
        """,
        without_extension,
    )
    assert result.returncode == 0, result.stderr
    assert "UserWarning: attention runs in plain PyTorch" in result.stderr
    assert "pip install -e ." in result.stdout and "instruction set none" in result.stdout


def test_a_broken_extension_is_an_error(without_extension, tmp_path):
    shutil.copytree(without_extension / "fastrank", tmp_path / "fastrank")
    (tmp_path / "fastrank" / "_cpu.py").write_text("raise ImportError('undefined symbol')\n")
    result = python(
        """
        import torch
        from fastrank import ops
        ops.fused_attention(torch.zeros(5, 3, 2, 8), torch.tensor([0, 5], dtype=torch.int32))
        """,
        tmp_path,
    )
    assert result.returncode != 0 and "ImportError: undefined symbol" in result.stderr


def test_the_command_prints_every_operation_and_backend(capsys):
    assert backend.backends_command([]) == 0
    text = capsys.readouterr().out
    amx = _cpu.multiplies_in_tiles()
    assert ("AMX" in text) == amx == (_cpu.isa() == "amx")
    assert ("no bf16 instruction" in text) == (not _cpu.multiplies_bf16() and not amx)
    assert f"instruction set {_cpu.isa()}" in text and f"torch {torch.__version__}" in text
    for op in ("attention", "layer_norm", "listwise"):
        rows = [line.split() for line in text.splitlines() if line.startswith(op)]
        more = ["varlen", "flash_attn"] * (op == "attention")
        assert [row[1] for row in rows] == ["cpu", "gpu", *more, "reference"]
        assert all(row[-1] == "(untested)" for row in rows if row[1] in more)
        assert rows[0][2:] == (["yes", "float32"] if op == "listwise" else ["yes", "float32,", "bf16"])
        assert rows[1][2] == ("yes" if op in IN_TRITON and torch.cuda.is_available() else "no")
    assert backend.backends_command(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["instruction_set"] == _cpu.isa()
    assert report["machine"]["multiplies_bf16"] == _cpu.multiplies_bf16()
    assert report["machine"]["amx"] == amx
    assert {"op": "attention", "backend": "cpu", "runs": True, "dtypes": ["float32", "bf16"], "refusals": []} in report[
        "backends"
    ]


def test_the_command_refuses_other_arguments(capsys):
    assert backend.backends_command(["--jsno"]) == 2
    assert "--jsno" in capsys.readouterr().err


def test_an_impossible_instruction_set_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setenv("FASTRANK_CPU_ISA", "neon")
    with pytest.raises(ValueError, match=r"FASTRANK_CPU_ISA=neon cannot run on this processor, which offers .*plain"):
        _cpu.isa()


@pytest.mark.parametrize("verb", [["backends"], ["backends", "--json"]])
def test_an_instruction_set_that_is_not_there_is_one_sentence(verb):
    result = subprocess.run(
        [sys.executable, "-m", "fastrank", *verb],
        capture_output=True, text=True, env={**os.environ, "FASTRANK_CPU_ISA": "neon"},
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "neon" in result.stderr
