"""`longrope inspect MODEL`: rotary geometry, critical dimensions, the scaling present."""

from __future__ import annotations

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import ConfigOnly, Json, Model
from longrope.cli.tables.model import show_inspection
from longrope.cli.verb import verb


@verb
def command(model: Model, /, *, load: ConfigOnly, as_json: Json = False) -> None:
    """Show a model's rotary geometry: periods, critical dimensions, the scaling already present."""
    from longrope.models.inspect import inspect_model

    quiet_libraries()
    found = inspect_model(model, original_length=load.original_length, trust_remote_code=load.trust_remote_code)
    if as_json:
        print_json(found.to_json())
    else:
        show_inspection(found)
