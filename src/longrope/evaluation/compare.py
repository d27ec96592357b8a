"""Who an evaluation compares: the scaling it is about, and what `--against` names, each on its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel, is_export, load_config, recorded_scaling
from longrope.rope.baselines import (
    CHECKPOINT,
    ORIGINAL,
    Method,
    checkpoint_method,
    closed_form_method,
    dynamic_method,
    scaling_method,
    second_method,
)
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.geometry import rope_parameters_of
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.progressive import SECOND_FORMS
from longrope.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Field:
    """All that are compared, in the order of the results: the scaling in question is the last.

    `scalings` are the files among them, name -> scaling; `original` is the model before it was extended, which short
    texts are held against whether it is among the contenders or not.
    """

    methods: tuple[Method, ...]
    scalings: dict[str, RopeScaling]
    original: Method


def compared(
    loaded: LoadedModel,
    scaling: RopeScaling | None,
    name: str,
    against: Sequence[str],
    target_length: int,
    original: LoadedModel | None = None,
) -> Field:
    """`scaling`, called `name`, or without it the model as it is; and whatever `against` names, each once:

    - a closed form (`none`, `pi`, `ntk`, …) with the factors of `target_length`;
    - `checkpoint`, the scaling that the model's checkpoint carries;
    - a second closed form (`second-pi`, `second-yarn`, …), that scaling stretched to `target_length`;
    - `original`, the model before it was extended: the model `original` as it is, where one is given, else these
      weights with the RoPE they came with, which is `checkpoint` unless longrope exported that, and `none` otherwise;
    - the path of a scaling, ending in .json.

    Raises LongRopeError for an unknown name, a file that is no scaling for this model, or a checkpoint that has none.
    """
    target = max(target_length, loaded.geometry.original_length)
    itself = as_it_is(loaded)
    before = _before(loaded, original, target)
    names = list(dict.fromkeys(against))
    if scaling is None:
        own = "none" if itself is None else CHECKPOINT
        names = [*(name for name in names if name != own), own]
    methods, scalings = [], {}
    for entry in names:
        check_named(entry)
        if entry == ORIGINAL:
            methods.append(before)
        elif entry == CHECKPOINT:
            if itself is None:
                raise LongRopeError(f"{loaded.name} carries no scaling to compare with; leave {CHECKPOINT!r} out")
            methods.append(itself)
        elif entry in SECOND_FORMS:
            if loaded.checkpoint_scaling is None:
                raise LongRopeError(f"{loaded.name} carries no scaling to stretch; leave {entry!r} out")
            methods.append(second_method(entry, loaded.checkpoint_scaling, target))
        elif entry.endswith(".json"):
            scalings[entry] = RopeScaling.load(entry)
            scalings[entry].check_fits(loaded.geometry)
            methods.append(scaling_method(entry, scalings[entry]))
        else:
            methods.append(closed_form_method(entry, loaded.geometry, target))
    if scaling is not None:
        if name in names:
            raise LongRopeError(f"{name} is compared with itself; leave it out of what to compare with")
        methods.append(scaling_method(name, scaling))
        scalings[name] = scaling
    return Field(tuple(methods), scalings, before)


def check_named(entry: str) -> None:
    """Raise LongRopeError where `entry` is no name of something to compare with, and no path of a scaling."""
    known = (*CLOSED_FORMS, CHECKPOINT, ORIGINAL, *SECOND_FORMS)
    if entry not in known and not entry.endswith(".json"):
        raise LongRopeError(
            f"expected {', '.join(known)} or a scaling's path ending in .json to compare with, found {entry!r}"
        )


def as_it_is(loaded: LoadedModel) -> Method | None:
    """What the checkpoint itself does with long texts; None where it is the original RoPE."""
    if loaded.checkpoint_scaling is not None:
        return checkpoint_method(loaded.checkpoint_scaling)
    parameters = rope_parameters_of(loaded.model.config)
    if parameters["rope_type"] == "dynamic":
        return dynamic_method(loaded.geometry, float(parameters.get("factor", 1.0)))
    return None


def _before(loaded: LoadedModel, original: LoadedModel | None, target: int) -> Method:
    of = original or loaded
    recorded = recorded_scaling(loaded.name) if original is None else None
    if recorded is not None:  # what this checkpoint carries is the extension
        config = load_config(loaded.name, trust_remote_code=loaded.options.trust_remote_code)
        of = replace(loaded, checkpoint_scaling=None if is_export(config, recorded) else scaling_of_config(config))
    return replace(as_it_is(of) or closed_form_method("none", of.geometry, target), name=ORIGINAL)
