"""The stages of a recipe: each runs one job in a folder of its own, from its beginning or from where it was stopped.

A process may have been killed anywhere. Each job then goes on from its own log, checkpoints or results to the end it
would have had; only an export begins anew. Nothing is removed that the run has not written itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrope.callbacks import Callbacks
from longrope.evaluation.run import SUITES, evaluate, log_path
from longrope.locked import has_lines
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes.check import stage_field, stage_sources, stage_texts
from longrope.recipes.folder import is_begun
from longrope.recipes.graph import Step
from longrope.recipes.schema import EvaluateStage, ExportStage, FinetuneStage, Recipe, RecoverStage, SearchStage
from longrope.rope.baselines import ORIGINAL
from longrope.rope.scaling import RopeScaling
from longrope.run_files import (
    CHECKPOINT,
    EVALUATION,
    FINETUNE_IDENTITY,
    FINETUNE_SUMMARY,
    SCALING,
    SEARCH_LOG,
)
from longrope.search.recover import begun, recover
from longrope.search.run import search
from longrope.storage import keep_or_write_json, new_output_folder
from longrope.written import begin_record, remove_own


@dataclass(frozen=True)
class Stages:
    """The stages of `recipe` for the model `base`, each in a folder of `out`."""

    base: LoadedModel
    recipe: Recipe
    out: Path
    callbacks: Callbacks

    def run(self, step: Step, scaling: RopeScaling | None) -> dict[str, Any]:
        """Run a step, or the rest of it. Returns its summary. `scaling`: the one to evaluate or export."""
        stage, folder = step.stage, self.out / step.folder
        if not is_begun(folder):
            remove_own(folder)  # nothing that could be resumed: an export, or a log that a power cut has emptied
            new_output_folder(folder)
        begin_record(folder)
        if isinstance(stage, SearchStage):
            return self._search(step, stage, folder)
        if isinstance(stage, FinetuneStage):
            return self._finetune(step, stage, folder)
        if isinstance(stage, RecoverStage):
            return self._recover(step, stage, folder)
        assert scaling is not None  # `steps` has refused stages before any search, unless the model states one
        if isinstance(stage, EvaluateStage):
            return self._evaluate(step, stage, folder, scaling)
        return self._export(step, stage, folder, scaling)

    def _name(self, step: Step) -> str:
        """The model a step works on."""
        return self.base.name if step.weights is None else str(self.out / step.weights)

    def _open(self, step: Step, stage: SearchStage | FinetuneStage | RecoverStage | EvaluateStage) -> LoadedModel:
        """The model a step works on, with the scaling it was trained for."""
        return open_model(self._name(step), options=self.base.options.replace(dtype=stage.dtype))

    def _scaling(self, folder: str | None) -> RopeScaling:
        """The scaling of a stage before, or the model's own."""
        if folder is not None:
            return RopeScaling.load(self.out / folder / SCALING)
        assert self.base.checkpoint_scaling is not None
        return self.base.checkpoint_scaling

    def _search(self, step: Step, stage: SearchStage, folder: Path) -> dict[str, Any]:
        loaded = self._open(step, stage)
        if step.continues:
            loaded = replace(loaded, checkpoint_scaling=self._scaling(step.scaling))
        found = search(
            loaded,
            stage.target,
            stage_sources(self.base.name, self.recipe, stage),
            folder,
            stage.settings,
            resume=has_lines(folder / SEARCH_LOG),
            workers=stage.workers,
            context_parallel=stage.context_parallel,
            callbacks=self.callbacks,
        )
        return found.to_json()

    def _finetune(self, step: Step, stage: FinetuneStage, folder: Path) -> dict[str, Any]:
        from longrope.train.finetune import finetune  # needs accelerate
        from longrope.train.launch import finetune_in_processes
        from longrope.train.output import FinetuneResult
        from longrope.train.resume import remove_checkpoints

        if not (folder / FINETUNE_SUMMARY).is_file():
            deterministic = torch.are_deterministic_algorithms_enabled()
            given: dict[str, Any] = {
                "scaling": None if step.factors is None else self.out / step.factors / SCALING,
                "data": stage_texts(self.base.name, self.recipe, stage),
                "field": stage_field(self.recipe, stage),
                "output_dir": folder,
                "config": stage.settings,
                "resume": (folder / FINETUNE_IDENTITY).is_file(),
                "load": self.base.options.replace(dtype=stage.dtype),
                "callbacks": self.callbacks,
            }
            if stage.processes > 1:
                finetune_in_processes(stage.processes, self._name(step), **given)
            else:
                finetune(self._name(step), **given)
                # The Trainer's setting is not for the stages after it, which may begin in another process.
                torch.use_deterministic_algorithms(deterministic)
        remove_checkpoints(folder)
        made = FinetuneResult.load(folder)
        return {
            "checkpoint": str(made.checkpoint),
            "steps": made.summary["steps"],
            "tokens": made.summary["tokens"],
            "first_loss": made.losses[0],
            "final_loss": made.losses[-1],
        }

    def _recover(self, step: Step, stage: RecoverStage, folder: Path) -> dict[str, Any]:
        scaling = self._scaling(step.scaling)
        recovered = recover(
            replace(self._open(step, stage), checkpoint_scaling=scaling),
            stage.lengths,
            stage_sources(self.base.name, self.recipe, stage),
            folder,
            stage.settings,
            resume=bool(begun(folder)),
            workers=stage.workers,
            context_parallel=stage.context_parallel,
            callbacks=self.callbacks,
        )
        return recovered.to_json()

    def _evaluate(self, step: Step, stage: EvaluateStage, folder: Path, scaling: RopeScaling) -> dict[str, Any]:
        output = folder / EVALUATION
        loaded = self._open(step, stage)
        compared = ORIGINAL in stage.against or any(SUITES[name].with_original for name in stage.suites)
        extended = step.weights is not None or self.base.checkpoint_scaling is not None
        before = open_model(self.base.name, options=loaded.options) if extended and compared else None
        evaluate(
            loaded,
            data=stage_sources(self.base.name, self.recipe, stage),
            lengths=stage.lengths_for(loaded.geometry.original_length, step.context_length),
            suites=stage.suites,
            scaling=scaling,
            baselines=stage.against,
            original=before,
            seed=stage.seed,
            config=stage.settings,
            output=output,
            resume=has_lines(log_path(output)),
            callbacks=self.callbacks,
        )
        # The measured one: `longrope report` reads this folder.
        keep_or_write_json(folder / SCALING, json.loads(scaling.to_json()))
        return {"evaluation": str(output)}

    def _export(self, step: Step, stage: ExportStage, folder: Path, scaling: RopeScaling) -> dict[str, Any]:
        from longrope.export.config import GGUF, ExportConfig
        from longrope.export.export import export_checkpoint
        from longrope.export.source import measured_stages

        scaling.save(folder / SCALING)
        done = export_checkpoint(
            self.base.name if step.weights is None else str(self.out / step.weights / CHECKPOINT),
            folder / SCALING,
            folder / ("model.gguf" if stage.to == GGUF else "checkpoint"),
            target=stage.to,
            config=ExportConfig(fold_attention_factor=stage.fold_attention_factor, allow_lossy=stage.allow_lossy),
            original_length=self.base.options.original_length,
            trust_remote_code=self.base.options.trust_remote_code,
            evidence=measured_stages(self.out, scaling, step.weights or "", step.folder),
        )
        return {"checkpoint": str(done.path), "to": stage.to, "losses": done.unsupported, "notes": done.notes}
