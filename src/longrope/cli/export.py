"""`longrope export RUN_OR_MODEL --to hf|hf-unified|phi3|gguf -o OUT`: a checkpoint that runtimes really apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Json, OriginalLength, RemoteCode, output, print_json, quiet_libraries


def command(
    run_or_model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="The folder of a search, finetune or extend run, or a model (folder or name) with --scaling.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the checkpoint; for gguf a new file.")],
    scaling: Annotated[
        Path | None, typer.Option("--scaling", help="The scaling.json to apply; a run folder brings its own.")
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="hf: a plain transformers folder. hf-unified: the long factors at every length, so that every runtime "
            "computes the same. phi3: a Llama or Mistral model relabelled as Phi-3. gguf: a file for llama.cpp.",
        ),
    ] = "hf",
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", help="With --to gguf: a GGUF file of the model to add the factors to."),
    ] = None,
    fold_attention_factor: Annotated[
        bool,
        typer.Option(
            "--fold-attention-factor",
            help="Fold the attention factor into the queries, for runtimes that compute their own.",
        ),
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Export what the runtime cannot express, and name the loss.")
    ] = False,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with the longer window, reload it and prove that it is applied."""
    from longrope.export.config import ExportConfig
    from longrope.export.export import export_checkpoint

    quiet_libraries()
    settings = {"gguf": gguf, "fold_attention_factor": fold_attention_factor, "allow_lossy": allow_lossy}
    done = export_checkpoint(
        run_or_model,
        scaling,
        out,
        config=ExportConfig.model_validate({"target": to, **settings}),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(done.to_json())
        return
    output.print(f"wrote {done.path} from {done.model} and {done.scaling_path}")
    if check := done.verification:
        output.print(
            f"reloaded with transformers: frequencies equal to {check.max_frequency_error:.1e}, "
            f"logits to {check.max_logit_error_short:.1e} inside and {check.max_logit_error_long:.1e} beyond "
            "the original window"
        )
    for loss in done.unsupported:
        output.print(f"lost: {loss}")
    for note in done.notes:
        output.print(note)
    for serving in done.servings:
        for line in serving.lines():
            output.print(line)
