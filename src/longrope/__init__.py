"""longrope: a checkpoint of any RoPE language model in, one with a longer context window out, and the evidence."""

from importlib.metadata import version

__version__ = version("longrope")
