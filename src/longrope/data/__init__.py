"""Text as a model reads it: documents, their tokens, samples of exactly L' tokens, needles, and rows to train on."""
