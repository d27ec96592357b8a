"""Figures and pages that show a run to a person."""
