"""Rows of numbers in fp8 (e4m3), each with a scale of its own: one file a backend, the same names and signatures in
each."""
