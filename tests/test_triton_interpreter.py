"""The Triton kernels' results, by Triton's interpreter on the CPU, in two pytest processes of their own: it has no
threads."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
PARTS = 2


def test_triton_kernels_pass_their_tests_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "interpreted")]
    parts = [
        subprocess.Popen(
            command,
            cwd=TESTS.parent,
            env=environment | {"INTERPRETED_PART": f"{part}/{PARTS}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(PARTS)
    ]
    printed = [part.communicate()[0] for part in parts]
    for part, output in zip(parts, printed, strict=True):
        assert part.returncode == 0, output
        assert "skipped" not in output, output
