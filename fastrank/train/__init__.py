"""Ranking lists in, a checkpoint folder out: python -m fastrank.train, or train(TrainConfig(...)) from Python.

config.py holds the keys, loop.py the run, feed.py which lists a step sees, state.py what survives a kill, report.py
what is printed.
"""

from .config import TrainConfig
from .loop import train

__all__ = ["TrainConfig", "train"]
