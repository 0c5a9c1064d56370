"""What several test files share."""

import os

import pytest

# These run Triton's interpreter, which must be chosen before triton is imported: test_triton_interpreter.py does.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(params=["plain", "avx2", "avx512", "amx"])
def isa(request, monkeypatch) -> str:
    """Each instruction set in turn, for the time of a test; one that this processor lacks is a visible skip."""
    from fastrank import _cpu

    if request.param not in _cpu.supported_isas():
        pytest.skip(f"This processor does not offer {request.param}.")
    monkeypatch.setenv("FASTRANK_CPU_ISA", request.param)
    assert _cpu.isa() == request.param
    return request.param
