"""Contenders in, durations out: each is checked against the reference first, then all run in turn (A B C A B C ...).

The durations reach pytest-benchmark through a clock that only moves when a measured round is handed over, so that its
groups, JSON and comparisons work although the rounds of one comparison are interleaved.
"""

from __future__ import annotations

import contextlib
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
MOST_HIDDEN_RUNS = 16  # in a round: with some 1,000 launches in the queue the host would wait for the GPU
LONGEST_HEAD_START = 0.05  # seconds
CYCLES_PER_SECOND = 2e9  # of a GPU, about


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
    memory_run: Callable[[], object] | None = None  # that run, where `run` holds its memory all the time
    failure: str = ""  # why there is no time: not installed, or WRONG
    launches_hidden: bool = False  # on a GPU: a round is queued as a whole before it begins, which times kernels alone
    head_start: float = 0.001  # seconds that the GPU is kept busy for meanwhile; grows to what the host needs

    @property
    def median(self) -> float:
        return statistics.median(self.durations)

    @property
    def rate(self) -> float:
        return self.work / self.median

    @property
    def spread(self) -> float:
        return (max(self.durations) - min(self.durations)) / self.median

    def let_go(self) -> None:
        """Drops the models and tensors that it holds, which would stay until the report."""
        self.run, self.check, self.memory_run = _measured, _measured, None


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
            self._try(self._check, one, shortest_round)
        gc.collect()
        for _ in range(rounds):
            for one in self.contenders:
                self._try(self._time, one)
        for one in self.contenders:
            if memory:
                self._try(self._measure_memory, one)
            one.let_go()
        COMPARISONS.append(self)
        return self

    def _try(self, step: Callable[..., None], one: Contender, *arguments: object) -> None:
        """A step of a contender that has not failed yet. What goes wrong on a GPU is its failure alone, and what it
        held is free for the others."""
        if one.failure:
            return
        try:
            step(one, *arguments)
        except Exception as error:
            if self.device == "cpu":
                raise
            one.failure = describe(error)
        if one.failure:  # out of the except clause: an error holds the frames that it came through, and their tensors
            one.durations.clear()
            one.let_go()
            with contextlib.suppress(RuntimeError):  # a GPU that has failed for good: all others will say so
                release_memory(self.device)

    def _check(self, one: Contender, shortest_round: float) -> None:
        """Runs a contender once, which doubles as its warm-up, and chooses how often a round repeats it."""
        wrong = one.check(one.run())
        one.failure = f"WRONG: {wrong}" if wrong else ""
        if self.device != "cpu":
            torch.cuda.synchronize()  # what fails late fails here, not in the next contender
        if shortest_round and not one.failure:
            one.repeats = math.ceil(shortest_round / min(self._seconds(one.run, 1) for _ in range(3)))
            if one.launches_hidden:
                one.repeats = min(one.repeats, MOST_HIDDEN_RUNS)

    def _time(self, one: Contender) -> None:
        """One round."""
        if self.device == "cpu":
            gc.collect()
        hides = one.launches_hidden and self.device != "cpu"
        one.durations.append(self._hidden_seconds(one) if hides else self._seconds(one.run, one.repeats))

    def _measure_memory(self, one: Contender) -> None:
        one.peak_extra_bytes = _peak_extra_bytes(one.memory_run or one.run, self.device)

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

    def _hidden_seconds(self, one: Contender) -> float:
        """The mean of a round's runs on the GPU alone: a busy wait keeps it from the first until the last is queued.
        Where it was over too soon the round is repeated behind a longer one; a contender that reads something back
        comes too late behind any, and its launches count."""
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(one.head_start * CYCLES_PER_SECOND))
            begin.record()
            started = time.perf_counter()
            for _ in range(one.repeats):
                one.run()
            end.record()
            queued = time.perf_counter() - started
            is_late = begin.query()
            torch.cuda.synchronize()
            if not is_late or one.head_start >= LONGEST_HEAD_START:
                break
            one.head_start = min(1.5 * max(queued, one.head_start), LONGEST_HEAD_START)
        note = f"{one.name}: launches count, too, as it could not be queued ahead of the GPU"
        if is_late and note not in self.notes:
            self.notes.append(note)
        return begin.elapsed_time(end) / 1000 / one.repeats

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
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def release_memory(device: str) -> None:
    """Gives back to the GPU what nothing holds any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _measured(*_: object) -> None:
    raise RuntimeError("This contender has been measured and let go.")


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
