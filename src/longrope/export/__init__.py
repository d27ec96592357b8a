"""Checkpoints that runtimes really apply: written, reloaded and compared before they are called done."""
