"""Ranking lists in, a checkpoint folder out: python -m fastrank.train, or train(TrainConfig(...)) from Python.

config.py holds the keys, loop.py the run, stages.py several of them, feed.py which lists a step sees, state.py what
survives a kill, report.py what is printed.
"""

from .config import TrainConfig
from .loop import train
from .stages import read_stages, train_stages

__all__ = ["TrainConfig", "read_stages", "train", "train_stages"]
