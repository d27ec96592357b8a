"""The doctor: the RoPE that each runtime computes from a checkpoint's files, against the scaling it should apply.

No runtime is started and no weights are read. The doctor reads config.json, or the keys and factor tensors of a GGUF
file, and one table of the runtimes' rules (`assets/runtimes.json`, each rule with its version and source).
"""
