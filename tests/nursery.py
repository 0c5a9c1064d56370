"""Training runs that are killed: children of one process, which has done the imports that take longer than they do."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastrank.train.report import LOG_FILE

SECONDS = 120  # until a moment must have come
CODE = """
import os, sys, yaml
from pathlib import Path
from fastrank.train import read_stages, train_stages
configs = read_stages(yaml.safe_load(Path(sys.argv[1]).read_text()) | {"resume": True})
for _ in sys.stdin:  # nothing was computed here, so that a child may start threads
    child = os.fork()
    if child == 0:
        train_stages(configs, quiet=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Begins the run of a configuration file, or goes on with it, in a process of its own each time."""

    def __init__(self, configuration: Path) -> None:
        command = [sys.executable, "-c", CODE, str(configuration)]
        self._running: int | None = None
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:  # a test failed
            os.kill(self._running, signal.SIGKILL)
        self._process.communicate()

    def kill_when(self, moment: Callable[[], bool], name: str, *, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kills the run with SIGKILL as soon as the moment has come, after `meanwhile`."""
        child, deadline = self._begin(), time.monotonic() + SECONDS
        while not moment():
            ended = select.select([self._process.stdout], [], [], 0.0002)[0]
            assert not ended, f"the run ended with {self._exit_code()} before it was killed: {name}"
            assert time.monotonic() < deadline, f"the moment does not come: {name}"
        meanwhile()
        os.kill(child, signal.SIGKILL)
        assert self._exit_code() == -signal.SIGKILL, f"the run ended before it was killed: {name}"

    def run(self) -> int:
        """Runs to the end; returns the exit status."""
        self._begin()
        return self._exit_code()

    def _begin(self) -> int:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._running = int(self._process.stdout.readline())
        return self._running

    def _exit_code(self) -> int:
        code = int(self._process.stdout.readline())
        self._running = None
        return code


def steps_logged(folder: Path) -> int:
    """Steps after which a run has written a line; -1 before its first."""
    path = folder / LOG_FILE
    return len(path.read_text().splitlines()) - 1 if path.exists() else -1
