"""Contenders in, durations out: each is checked against the reference first, then all run in turn (A B C A B C ...).

The durations reach pytest-benchmark through a clock that only moves when a measured round is handed over, so that its
groups, JSON and comparisons work although the rounds of one comparison are interleaved.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

COMPARISONS: list[Comparison] = []


class VirtualClock:
    """A timer for pytest-benchmark whose time is the sum of the durations handed over so far."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, duration: float) -> None:
        self.now += duration


CLOCK = VirtualClock()


@dataclass
class Contender:
    """One way to do the work. `run` does it once and returns its result; `work` is how much that is, in the
    comparison's unit."""

    name: str
    run: Callable[[], object]
    work: float
    ours: bool = False
    check: Callable[[object], str | None] = lambda result: None  # a sentence where the result is wrong
    durations: list[float] = field(default_factory=list)  # of one run each, in seconds
    repeats: int = 1  # runs in a round, whose mean is a duration
    peak_extra_bytes: int | None = None  # memory that one run takes above what is there before it
    failure: str = ""  # why there is no time: not installed, or WRONG

    @property
    def median(self) -> float:
        return statistics.median(self.durations)

    @property
    def rate(self) -> float:
        return self.work / self.median

    @property
    def spread(self) -> float:
        return (max(self.durations) - min(self.durations)) / self.median


@dataclass
class Comparison:
    """Contenders for one piece of work; `unit` is what the rate counts per second. Work on a GPU is timed by its
    events."""

    title: str
    unit: str
    contenders: list[Contender]
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"

    def __getitem__(self, name: str) -> Contender:
        return next(one for one in self.contenders if one.name == name)

    def measure(self, rounds: int, *, memory: bool = False, shortest_round: float = 0.0) -> Comparison:
        """Checks every contender, then times `rounds` rounds of each in turn; memory: its peak, too, in a run of its
        own. A round is one run, repeated where it is shorter than shortest_round (seconds)."""
        for one in self.contenders:
            if not one.failure:
                self._check(one)
            if not one.failure and shortest_round:
                one.repeats = math.ceil(shortest_round / min(self._seconds(one.run, 1) for _ in range(3)))
        gc.collect()
        for _ in range(rounds):
            for one in self.contenders:
                if not one.failure:
                    if self.device == "cpu":
                        gc.collect()
                    one.durations.append(self._seconds(one.run, one.repeats))
        for one in self.contenders:
            if memory and not one.failure:
                one.peak_extra_bytes = _peak_extra_bytes(one.run, self.device)
        for one in self.contenders:  # models and tensors that these hold would stay until the report
            one.run, one.check = _measured, _measured
        COMPARISONS.append(self)
        return self

    def _check(self, one: Contender) -> None:
        """Runs a contender once, which doubles as its warm-up. What goes wrong on a GPU is its failure alone."""
        try:
            wrong = one.check(one.run())
            one.failure = f"WRONG: {wrong}" if wrong else ""
        except Exception as error:
            if self.device == "cpu":
                raise
            one.failure = describe(error)

    def _seconds(self, run: Callable[[], object], repeats: int) -> float:
        """The mean of so many runs, one straight after another."""
        if self.device == "cpu":
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - started) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats

    def hand_over(self, name: str, benchmark) -> None:
        """Gives one contender's rounds to pytest-benchmark; a wrong one of ours fails, an absent peer is skipped."""
        one = self[name]
        if one.failure:
            (pytest.fail if one.ours else pytest.skip)(f"{name}: {one.failure}")
        durations = iter(one.durations)
        benchmark.extra_info[f"{self.unit}_per_second"] = one.rate
        benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=len(one.durations))

    @property
    def strongest_baseline(self) -> Contender | None:
        return max(
            (one for one in self.contenders if not one.ours and one.durations), key=lambda one: one.rate, default=None
        )


def describe(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _measured(*_: object) -> None:
    raise RuntimeError("This contender has been measured and let go.")


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The GPU's work of a run alone, replayed from a CUDA graph: what is left when no host has to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _peak_extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """On a CPU the resident memory's high-water mark, which Linux lets a process reset; None where it does not."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the run would reuse what earlier ones have freed, and show nothing
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident_bytes("VmRSS")
    run()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def best_setting(make: Callable[[int], Callable[[], object]], settings: list[int]) -> int:
    """The setting with the shortest single run after one warm-up run."""
    seconds = {}
    for setting in settings:
        run = make(setting)
        run()
        started = time.perf_counter()
        run()
        seconds[setting] = time.perf_counter() - started
    return min(seconds, key=seconds.get)
