"""pytest --benchmark runs the bench_*.py files; a plain pytest does not even import them. The report comes last."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
MOST_PROCESSES = 8  # each holds torch and a few models


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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests run in a process a processor; a few of them, and whatever is measured, in one."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
    is_one = hasattr(config, "workerinput")
    if chosen or is_one or config.option.benchmark or config.option.usepdb:
        return
    if getattr(config.option, "numprocesses", 0) is None:  # 0: without pytest-xdist
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        config.option.dist = "loadfile"  # what a file's tests share is made once
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait take no time from the other processes


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
