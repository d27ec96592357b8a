"""What each runtime computes from a checkpoint's files, compared with the scaling that it should apply.

Nothing is run and no weights are read: config.json or the keys and factor tensors of a GGUF file, and one table of the
runtimes' rules (`assets/runtimes.json`, each rule with its version and source).
"""
