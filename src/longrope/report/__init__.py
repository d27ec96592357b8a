"""Reports: one HTML page of runs and evaluations, with its figures and tables."""
