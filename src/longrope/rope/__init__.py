"""Rotary embeddings: geometry, closed-form factors, `RopeScaling` and its angles. No model is loaded here."""
