"""pytest --benchmark runs the bench_*.py files; a plain pytest does not even import them. The report comes last."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    group = parser.getgroup("fastrank")
    group.addoption("--benchmark", action="store_true", help="measure speed instead of testing")
    group.addoption("--benchmark-full", action="store_true", help="measure the long sweeps as well")


def pytest_configure(config):
    if config.getoption("--benchmark-full"):
        config.option.benchmark = True
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Registered by hand, since a conftest's own hook is asked only about files beside it.
    config.pluginmanager.register(Selection(config.getoption("--benchmark")))


class Selection:
    """Benchmarks or tests, never both."""

    def __init__(self, benchmark: bool):
        self._unwanted = "test_" if benchmark else "bench_"

    def pytest_ignore_collect(self, collection_path):
        return True if collection_path.name.startswith(self._unwanted) else None


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--benchmark"):
        return
    from report import markdown, record
    from timing import COMPARISONS

    if COMPARISONS:
        terminalreporter.section("fastrank")
        terminalreporter.write_line(markdown(COMPARISONS))
        terminalreporter.write_line(json.dumps(record(COMPARISONS)))


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--benchmark-full")
