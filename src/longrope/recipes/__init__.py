"""Recipes: searches, fine-tuning, recovery, evaluation and export as stages that resume; and `extend`."""
