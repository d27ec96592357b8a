"""Searches for rescale factors: methods (functions, no model), evaluators (windows in, losses out), log, job."""
