"""`longrope export RUN_OR_MODEL --to hf|hf-unified|phi3|gguf -o OUT`: a checkpoint that runtimes really apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import Json, ProofLoad, option, out
from longrope.cli.tables.runs import show_export
from longrope.cli.verb import Options, verb
from longrope.export.config import ExportConfig

MODEL = "The folder of a search, finetune or extend run, or a model (folder, GGUF file or name)."
SCALING = (
    "The scaling.json to apply, or a formula: yarn, ntk, ntk-critical, pi. Default: that of the run folder, or the one "
    "that the model's config states."
)
TARGET_LENGTH = "With a formula: the window, such as 128k. Default: the run's."
PUSH = """Upload the proved export to this repository of the hub: a new private one, or a pull request where it has
files. The token is huggingface_hub's: hf auth login."""


@verb
def command(
    model: Annotated[str, option(MODEL)],
    /,
    *,
    output_dir: Annotated[Path, out("A new folder for the checkpoint; for gguf a new file.")],
    scaling: Annotated[str | None, option(SCALING, metavar="PATH|NAME")] = None,
    target_length: Annotated[str | None, option(TARGET_LENGTH, metavar="TOKENS")] = None,
    push: Annotated[str | None, option(PUSH, metavar="OWNER/NAME")] = None,
    config: Annotated[ExportConfig, Options("Checkpoint", names={"target": "--to", "copy_weights": "--copy"})],
    load: ProofLoad,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with the longer window, reload it and prove that it is applied."""
    from longrope.export.export import export_checkpoint

    quiet_libraries()
    done = export_checkpoint(
        model,
        scaling,
        output_dir,
        config=config,
        original_length=load.original_length,
        device=load.device if "device" in load.model_fields_set else None,
        push=push,
        target_length=target_length,
        trust_remote_code=load.trust_remote_code,
    )
    if as_json:
        print_json(done.to_json())
    else:
        show_export(done)
