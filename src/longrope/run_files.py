"""Names of the files and folders in a run folder."""

from __future__ import annotations

SCALING = "scaling.json"
"""A `RopeScaling`: the result of a search, or the scaling of the checkpoint beside it."""
SEARCH_LOG = "search.jsonl"
"""Every evaluation of a search, one per line: its whole state."""
SEARCH_SUMMARY = "search.json"
"""Settings, result and cost of a search."""
RECOVER_SUMMARY = "recover.json"
"""Results of a recovery, one per length."""
EVALUATION = "eval.json"
"""Results of an evaluation."""
EXTENSION = "extend.json"
"""Results of the checks that `extend` made of its export."""
REPORT = "report.html"
CHECKPOINT = "checkpoint"
"""The folder of trained or exported weights."""
ADAPTER = "adapter"
"""The folder of a LoRA adapter that was not merged."""
FINETUNE_SUMMARY = "finetune.json"
"""Losses, cost and settings of a finished fine-tuning run."""
FINETUNE_IDENTITY = "run.json"
"""Model, rows and settings of a fine-tuning run, to be compared when it is resumed; the run's lock is on this file."""
TRAINER = "trainer"
"""The folder of the Trainer's own checkpoints, while a fine-tuning run lasts."""
RECIPE = "recipe.json"
"""The stages of a recipe's run and their settings, to be compared when it is resumed."""
STAGE = "stage.json"
"""The result of a finished stage of a recipe."""
RESULT = "result.json"
"""The results of a finished recipe."""
JSON_FILES = {
    SCALING,
    SEARCH_SUMMARY,
    RECOVER_SUMMARY,
    EVALUATION,
    EXTENSION,
    FINETUNE_SUMMARY,
    FINETUNE_IDENTITY,
    RECIPE,
    STAGE,
    RESULT,
}
LOCK = ".lock"
"""The file whose lock keeps a second process out of a run folder."""
WRITTEN = ".written.jsonl"
"""The record of the files that a run has written into a folder, with their hashes."""
