"""Matrix products of inference and what follows them: one file a backend, the same names and signatures in each."""
