"""LayerNorm(x + residual) * weight + bias: one file a backend, the same name and signature in each."""
