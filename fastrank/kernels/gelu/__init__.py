"""GELU(x + bias): one file a backend, the same names and signatures in each."""
