"""Comparisons in, the table for people and the record for machines out; both begin with the machine."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

import torch
from timing import Comparison

import fastrank


def set_commit(name: str) -> None:
    """Of the code, where git does not tell it."""
    machine()["commit"] = name


@functools.cache
def machine() -> dict:
    from fastrank import _cpu

    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    except OSError:  # no git here
        commit = ""
    return {
        "cpu": names[0] if names else platform.processor(),
        "isa": _cpu.isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastrank": fastrank.__version__,
        "commit": commit.strip() or None,
    }


def markdown(comparisons: list[Comparison]) -> str:
    lines = ["machine: " + ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None), ""]
    for comparison in comparisons:
        strongest = comparison.strongest_baseline
        lines += [f"### {comparison.title}", "", *(f"{note}" for note in comparison.notes), ""]
        memory = any(one.peak_extra_bytes is not None for one in comparison.contenders)
        lines += [
            f"| contender | {comparison.unit}/s | spread | times the strongest baseline |"
            + " peak extra MiB |" * memory,
            "|---|---:|---:|---:|" + "---:|" * memory,
        ]
        for one in comparison.contenders:
            name = f"**{one.name}**" if one.ours else one.name
            if one.failure:
                lines.append(f"| {name} | {one.failure} | | |" + " |" * memory)
                continue
            factor = f"{one.rate / strongest.rate:.2f}" if strongest else ""
            peak = f" {one.peak_extra_bytes / 2**20:,.1f} |" if one.peak_extra_bytes is not None else " |" * memory
            lines.append(f"| {name} | {one.rate:,.1f} | {one.spread:.0%} | {factor} |" + peak)
        lines.append("")
    return "\n".join(lines)


def record(comparisons: list[Comparison]) -> dict:
    return {
        "machine": machine(),
        "comparisons": [
            {
                "title": comparison.title,
                "unit": comparison.unit,
                "notes": comparison.notes,
                "contenders": {
                    one.name: {"failure": one.failure}
                    if one.failure
                    else {
                        "rate": one.rate,
                        "seconds": one.durations,
                        "peak_extra_bytes": one.peak_extra_bytes,
                        "times_strongest": one.rate / comparison.strongest_baseline.rate
                        if comparison.strongest_baseline
                        else None,
                    }
                    for one in comparison.contenders
                },
            }
            for comparison in comparisons
        ],
    }
