"""Rotary embeddings: geometry, closed-form factors, the `RopeScaling` artefact and its angles; knows no model."""
