"""`LongRoPEModel`: a small transformer of our own with a scaled RoPE, to train, extend and export."""
