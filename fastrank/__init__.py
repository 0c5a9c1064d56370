"""fastrank: train and run cross-encoder re-rankers without padding."""

__version__ = "0.1.0"
