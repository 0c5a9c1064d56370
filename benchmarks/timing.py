"""Contenders in, durations out: each is checked against the reference first, then all run in turn (A B C A B C ...).

The durations reach pytest-benchmark through a clock that only moves when a measured round is handed over, so that its
groups, JSON and comparisons work although the rounds of one comparison are interleaved.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

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
    durations: list[float] = field(default_factory=list)
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
    """Contenders for one piece of work; `unit` is what the rate counts per second."""

    title: str
    unit: str
    contenders: list[Contender]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Contender:
        return next(one for one in self.contenders if one.name == name)

    def measure(self, rounds: int) -> Comparison:
        for one in self.contenders:
            if not one.failure:
                wrong = one.check(one.run())  # doubles as the warm-up
                one.failure = f"WRONG: {wrong}" if wrong else ""
        for _ in range(rounds):
            for one in self.contenders:
                if not one.failure:
                    gc.collect()
                    started = time.perf_counter()
                    one.run()
                    one.durations.append(time.perf_counter() - started)
        COMPARISONS.append(self)
        return self

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
