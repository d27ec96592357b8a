"""Losses of a window over prepared samples. What minimises them lives in `search/`."""
