"""The verbs as Python functions: what the command line calls, one module each."""
