"""Attention inside each pair of a packed batch: one file a backend, the same names and signatures in each."""
