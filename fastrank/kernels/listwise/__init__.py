"""Listwise losses on ragged lists of scores: one file a backend, the same names and signatures in each."""
