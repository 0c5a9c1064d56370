"""benchmarks/gpu.py, which waits for a GPU: all of its parts run on the CPU with tiny shapes and find nothing wrong."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_part_runs(tmp_path):
    result = run("--part", "all", "--dry_run", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WRONG" not in result.stdout and ", 0 wrong," in result.stdout
    for part in ("correctness", "attention", "forward", "rerank", "train", "losses", "variants", "profile", "cpu"):
        assert f"\n{part}: " in result.stdout
    for contender in (
        "fastrank",
        "fastrank fp8",
        "padded SDPA, math",
        "sentence-transformers float32",
        "padded bf16 loop",
        "sentence-transformers' trainer",
        "ONNX Runtime int8",
    ):
        assert contender in result.stdout
    assert not list(tmp_path.iterdir()), "a dry run leaves no result"


def test_without_a_gpu_it_says_so():
    result = run("--part", "attention")
    assert result.returncode == 2 and "torch finds no GPU here; --dry_run runs on the CPU" in result.stderr
