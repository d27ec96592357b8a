"""The folder of a recipe's run: its identity, its finished stages, and the lock of the process that works in it.

`recipe.json` identifies the run, `.lock` is locked while a process works. A stage is known here by its `stage.json`
alone, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.locked import FolderLock, has_lines
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel
from longrope.provenance import record, versions
from longrope.recipes.check import stage_field, stage_texts
from longrope.recipes.graph import Step
from longrope.recipes.schema import STAGES, Recipe
from longrope.report.run import figures_folder
from longrope.rope.scaling import numbers_sha256
from longrope.run_files import FINETUNE_IDENTITY, LOCK, RECIPE, REPORT, RESULT, SCALING, SEARCH_LOG, STAGE
from longrope.settings import Settings
from longrope.storage import check_output_folder, json_ready, read_json, refuse_links, write_json_atomic
from longrope.written import begin_record, has_record, occupied_by, remove_own, require_own, sweep

CHANGE_NO_BIT = {"layer_inputs", "workers"}
"""Settings that decide no number of a stage: it goes on with others."""


@dataclass(frozen=True)
class RunFolder:
    """A run at `path`. `identity`: its model, device and versions. `stages`: folder -> all that decides its result.

    Both are plain JSON.
    """

    path: Path
    identity: dict[str, Any]
    stages: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path, loaded: LoadedModel, recipe: Recipe, steps: Sequence[Step]) -> RunFolder:
        """The run of these steps. Raises LongRopeError where a stage has no texts."""
        identity = {
            "model": loaded.name,
            "model_fingerprint": fingerprint(loaded.model),
            "device": loaded.options.device,
            "versions": versions(),
        }
        if loaded.checkpoint_scaling is not None:
            identity["scaling_sha256"] = numbers_sha256(loaded.checkpoint_scaling)
        stages = {}
        for step in steps:
            texts = stage_texts(loaded.name, recipe, step.stage)
            field = stage_field(recipe, step.stage)
            reads = {"weights": step.weights, "scaling": step.scaling, "factors": step.factors}
            decides = step.stage.model_dump(mode="json", exclude={"field": True, "settings": CHANGE_NO_BIT})
            stage = _deciding(decides) | {"data": texts, "reads": reads}
            stages[step.folder] = stage if field is None else stage | {"field": field}
        return cls(path, _plain(identity), _plain(stages))

    def finished(self) -> set[str]:
        """The folders of the stages that are finished."""
        return {folder for folder in self.stages if (self.path / folder / STAGE).is_file()}

    def check(self) -> None:
        """Raise LongRopeError unless the run can begin or go on here: a folder of another run, or of something else,
        stages begun with other settings, files in the way that the run did not write, another process at work. Writes
        nothing.
        """
        self._require_own()
        for path in self._outdated():
            require_own(path)
        for folder in self.stages.keys() - self.finished():
            self._require_free(self.path / folder)
        if (self.path / LOCK).is_file():
            self._lock().close()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder, locked. Stages that were not begun may have been added, left out or changed since the last time.

        Raises LongRopeError as `check` does, and when it cannot be written.
        """
        self._require_own()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LongRopeError(
                f"cannot write to the run folder {self.path}: {error.strerror}", hint="choose another `output_dir`"
            ) from error
        with self._lock():
            self._require_own()  # a process may have been here since
            begin_record(self.path)
            sweep(self.path)
            for path in self._outdated():
                remove_own(path)
            if self._is_another(self._found()):
                write_json_atomic(
                    self.path / RECIPE, self.identity | {"stages": self.stages, "command": record()["command"]}
                )
            yield

    def _lock(self) -> FolderLock:
        return FolderLock(self.path, f"another process runs a recipe in {self.path}")

    def _require_own(self) -> None:
        found = self._found()
        if found is None:
            check_output_folder(self.path)
            return
        wanted = dict(self.identity)
        if "scaling_sha256" not in found:  # a run from before it was recorded goes on
            wanted.pop("scaling_sha256", None)
        if differing := sorted(key for key, value in wanted.items() if found.get(key) != value):
            raise LongRopeError(
                f"the run in {self.path} is another one (it differs in {', '.join(differing)}); nothing is overwritten",
                code="other-run",
                hint="use the same command, or choose another `output_dir`",
            )
        for folder in self._changed(found):
            if (self.path / folder).exists():
                raise LongRopeError(
                    f"the stage {folder} of the run in {self.path} was begun with other settings",
                    code="other-run",
                    hint="choose another `output_dir`, or remove the folders from this one on to run them anew",
                )

    def _found(self) -> dict[str, Any] | None:
        """The folder's `recipe.json`; None where there is none yet."""
        path = self.path / RECIPE
        if not path.is_file():
            return None
        found = read_object(path)
        if not isinstance(found.get("stages"), dict):
            raise LongRopeError(
                f"{path} is not of a recipe's run: expected its stages",
                code="damaged-file",
                hint="choose another `output_dir`",
            )
        return found

    def _changed(self, found: dict[str, Any]) -> Iterator[str]:
        """The stages of the folder that have changed, or are no longer in the recipe."""
        for folder, stage in found["stages"].items():
            wanted = self.stages.get(folder)
            if wanted is None or not _same(stage, wanted):
                yield folder

    def _is_another(self, found: dict[str, Any] | None) -> bool:
        """True if the recipe is new here, or has other stages than the one that was run here before."""
        return found is None or found["stages"].keys() != self.stages.keys() or any(self._changed(found))

    def _outdated(self) -> list[Path]:
        """The results of the recipe as it was, where its stages have changed or were removed to be run again."""
        found = self._found()
        if found is None or not (self._is_another(found) or self.stages.keys() - self.finished()):
            return []
        page = self.path / REPORT
        return [self.path / RESULT, page, figures_folder(page), self.path / SCALING]

    def _require_free(self, folder: Path) -> None:
        """Raise LongRopeError where the folder of a stage that is not finished holds files of somebody else: in one
        that is not begun anything, in an export, which begins anew, anything that the run has not written.
        """
        refuse_links(folder)
        if not folder.is_dir():
            check_output_folder(folder)
            return
        if is_begun(folder):
            return
        if has_record(folder):
            require_own(folder)
        elif (other := occupied_by(folder)) is not None:
            raise LongRopeError(
                f"the stage {folder.name} of the run in {self.path} is not begun, and its folder holds {other.name}",
                code="output-exists",
                hint="move that to another place, or choose another `output_dir`",
            )


def is_begun(folder: Path) -> bool:
    """True if the folder of a stage has what it can be resumed from: a log with a first line, the identity of a run."""
    logs = [path for pattern in (SEARCH_LOG, f"*/{SEARCH_LOG}", "*.cells.jsonl") for path in folder.glob(pattern)]
    return (folder / FINETUNE_IDENTITY).is_file() or any(map(has_lines, logs))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises LongRopeError when it is none."""
    try:
        return read_json(path)
    except LongRopeError as error:
        raise LongRopeError(
            error.message, code=error.code, hint="put it back, or choose another `output_dir`"
        ) from error


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON."""
    read: dict[str, Any] = json.loads(json.dumps(json_ready(value)))
    return read


def _deciding(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in CHANGE_NO_BIT}


def _same(stage: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """True if two descriptions of a stage are the same. A setting that is newer than the run had its default then."""
    kind = STAGES[wanted["stage"]]
    stage = _defaults(kind, wanted) | _deciding(stage)
    if (job := kind.job()) is not None and isinstance(stage.get("settings"), dict):
        stage["settings"] = _defaults(job, wanted["settings"]) | _deciding(stage["settings"])
    return stage == wanted


def _defaults(settings: type[Settings], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the fields in `wanted`, as they come back from JSON."""
    fields = {name: own for name, own in settings.model_fields.items() if name in wanted and not own.is_required()}
    return _plain({name: own.get_default(call_default_factory=True) for name, own in fields.items()})
