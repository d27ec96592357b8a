"""A standalone model on disk: `model.safetensors` and `standalone.json`, its sizes and its scaling. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longrope.errors import LongRopeError, one_line
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling
from longrope.standalone.sizes import Sizes
from longrope.storage import new_output_folder, read_json, write_json_atomic
from longrope.written import move_up, temporary_folder

WEIGHTS, DESCRIPTION = "model.safetensors", "standalone.json"
SCHEMA = "longrope.standalone/1"


def write_standalone(folder: Path, sizes: Sizes, scaling: RopeScaling, tensors: Mapping[str, Tensor]) -> None:
    """Write a model to the new folder `folder`, the description last: a folder without a description is no model.

    Raises LongRopeError when the folder has anything in it or cannot be written.
    """
    new_output_folder(folder)
    description = {"schema": SCHEMA, "sizes": asdict(sizes), "scaling": json.loads(scaling.to_json()), **record()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with temporary_folder(folder / "model") as made:
            save_file(contiguous, made / WEIGHTS, metadata={"format": "pt"})
            write_json_atomic(made / DESCRIPTION, description)
            move_up(made, last=DESCRIPTION)
    except (OSError, SafetensorError) as error:
        raise LongRopeError(
            f"cannot write {folder / WEIGHTS}: {one_line(error)}", code="output-not-writable"
        ) from error


def read_standalone(folder: Path) -> tuple[Sizes, RopeScaling, dict[str, Tensor]]:
    """Sizes, scaling and weights in `folder`, each checked. Raises LongRopeError when one is missing or damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise LongRopeError(f"no saved LongRoPEModel in {folder}: it has no {DESCRIPTION}", code="no-such-model")
    description = read_json(path)
    found = description.get("schema")
    if found != SCHEMA:
        raise LongRopeError(
            f"expected a saved LongRoPEModel with schema {SCHEMA!r} in {path}; found {found!r}", code="damaged-file"
        )
    try:
        sizes = Sizes(**description["sizes"])
        scaling = RopeScaling.from_json(json.dumps(description["scaling"]), f"the scaling in {path}")
        scaling.check_fits(sizes.geometry)
    except (KeyError, TypeError) as error:
        raise LongRopeError(
            f"expected sizes and a scaling in {path}; found others: {one_line(error)}", code="damaged-file"
        ) from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise LongRopeError(
            f"cannot read the weights {folder / WEIGHTS}: {one_line(error)}", code="damaged-file"
        ) from error
    if kinds := sorted({str(tensor.dtype) for tensor in tensors.values() if not tensor.is_floating_point()}):
        raise LongRopeError(
            f"expected floating-point weights in {folder / WEIGHTS}; found {', '.join(kinds)}", code="damaged-file"
        )
    return sizes, scaling, tensors
