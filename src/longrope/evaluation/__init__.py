"""Measurements of a model under a scaling: typed rows, with everything needed to repeat them."""
