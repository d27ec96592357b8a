"""The costs of a search, a fine-tuning and an evaluation before they are run: FLOPs, memory and hours."""
