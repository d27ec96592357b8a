"""Searches for rescale factors: optimisers (ask/tell, no model), evaluators (windows in, losses out), the log."""
