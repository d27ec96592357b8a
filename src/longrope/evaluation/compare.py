"""The methods that an evaluation compares: the scaling in question, and the baselines, each by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longrope.checks import scale_factor
from longrope.errors import LongRopeError
from longrope.evaluation.results import OWN
from longrope.models.apply import applied_scaling
from longrope.models.loading import LoadedModel, is_export, load_config
from longrope.rope.baselines import (
    BASELINES,
    CHECKPOINT,
    ORIGINAL,
    Method,
    check_baseline,
    checkpoint_method,
    closed_form_method,
    dynamic_method,
    second_method,
)
from longrope.rope.geometry import rope_parameters_of, stated_window
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.progressive import SECOND_FORMS
from longrope.rope.scaling import RopeScaling

Baselines = str | Path | RopeScaling | Sequence[str | Path | RopeScaling] | Mapping[str, RopeScaling]
"""Names and paths (see `Comparison.of`), scalings (called `scaling-1`, `scaling-2`, …), or name -> scaling."""


@dataclass(frozen=True)
class Comparison:
    """The methods in the order of the results, the scaling in question last.

    `scalings` are those of the methods that come from a file or an object, by name; `original` is the model before it
    was extended, which short texts are compared with whether it is among `methods` or not.
    """

    methods: tuple[Method, ...]
    scalings: dict[str, RopeScaling]
    original: Method

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        scaling: RopeScaling | None,
        name: str,
        baselines: Mapping[str, RopeScaling | None],
        target_length: int,
        original: LoadedModel | None = None,
    ) -> Comparison:
        """`scaling`, called `name`, or without it the model as it is; and the `baselines`, which are scalings or names:

        - a closed form (`none`, `pi`, `ntk`, …) with the factors of `target_length`;
        - `checkpoint`, the scaling of the model's checkpoint;
        - a second closed form (`second-pi`, `second-yarn`, …): the checkpoint's scaling, stretched to `target_length`;
        - `original`, the model before it was extended: the model `original` as it is, where that is given, else these
          weights with the RoPE they came with, which is `checkpoint` unless longrope exported it, and `none` otherwise;
        - the path of a scaling, ending in .json.

        Raises LongRopeError for an unknown name, a scaling that is not for this model, or a checkpoint that has none.
        """
        target = max(target_length, loaded.geometry.original_length)
        before = _before(loaded, original, target)
        names = list(baselines)
        if scaling is None:
            own = "none" if as_it_is(loaded) is None else CHECKPOINT
            names = [*(entry for entry in names if entry != own), own]
        methods, scalings = [], {}
        for entry in names:
            given = baselines.get(entry)
            if given is None:
                check_baseline(entry)
                given = RopeScaling.load(entry) if entry.endswith(".json") else None
            if given is None:
                methods.append(before if entry == ORIGINAL else _named(entry, loaded, target))
            else:
                given.check_fits(loaded.geometry)
                scalings[entry] = given
                methods.append(Method(entry, given.window_for))
        if scaling is not None:
            if name in names:
                raise LongRopeError(
                    f"{name} is compared with itself", code="invalid-setting", hint="leave it out of `baselines`"
                )
            methods.append(Method(name, scaling.window_for))
            scalings[name] = scaling
        return cls(tuple(methods), scalings, before)


def named_baselines(baselines: Baselines) -> dict[str, RopeScaling | None]:
    """The baselines by name, each once, in their order: a scaling, or None where the name says enough.

    Raises LongRopeError for a scaling with the name of another baseline.
    """
    if isinstance(baselines, Mapping):
        if taken := [name for name in baselines if name in BASELINES]:
            raise LongRopeError(
                f"{', '.join(taken)} is the name of a baseline of longrope",
                code="invalid-setting",
                hint="give your scaling another name",
            )
        return dict(baselines)
    entries = [baselines] if isinstance(baselines, str | Path | RopeScaling) else baselines
    named: dict[str, RopeScaling | None] = {}
    for entry in entries:
        if isinstance(entry, RopeScaling):
            named[f"scaling-{1 + sum(isinstance(scaling, RopeScaling) for scaling in named.values())}"] = entry
        else:
            named[str(entry)] = None
    return named


def scaling_to_measure(
    loaded: LoadedModel, scaling: RopeScaling | Path | str | None, name: str | None = None
) -> tuple[RopeScaling | None, str]:
    """The scaling in question and its name in the results; None for the model as it is.

    Without `scaling` it is the one that is applied to the model, if any. A file is called by its path, any other
    scaling `longrope`, unless `name` says otherwise. Raises LongRopeError when it is not for this model.
    """
    if scaling is None:
        scaling = applied_scaling(loaded.model)
    elif not isinstance(scaling, RopeScaling):
        name = str(scaling) if name is None else name
        scaling = RopeScaling.load(scaling)
    if scaling is not None:
        scaling.check_fits(loaded.geometry)
    return scaling, OWN if name is None else name


def _named(name: str, loaded: LoadedModel, target: int) -> Method:
    """The method of a name in BASELINES other than `original`."""
    if name == CHECKPOINT:
        itself = as_it_is(loaded)
        if itself is None:
            raise _no_scaling(loaded, "compare with", name)
        return itself
    if name in SECOND_FORMS:
        if loaded.checkpoint_scaling is None:
            raise _no_scaling(loaded, "stretch", name)
        return second_method(name, loaded.checkpoint_scaling, target)
    return closed_form_method(name, loaded.geometry, target)


def as_it_is(loaded: LoadedModel) -> Method | None:
    """The method that the checkpoint itself applies to long texts; None where it has the original RoPE."""
    if loaded.checkpoint_scaling is not None:
        return checkpoint_method(loaded.checkpoint_scaling)
    parameters = rope_parameters_of(loaded.model.config)
    if parameters["rope_type"] == "dynamic":
        window = (
            stated_window(loaded.model.config) or loaded.geometry.original_length
        )  # what transformers computes with
        computed = replace(loaded.geometry, original_length=window)
        return dynamic_method(computed, scale_factor("factor", parameters.get("factor", 1.0)))
    return None


def _before(loaded: LoadedModel, original: LoadedModel | None, target: int) -> Method:
    """The model before it was extended, as a method called `original`."""
    model = original or loaded
    recorded = loaded.recorded if original is None else None
    if recorded is not None:  # the checkpoint's scaling is the extension
        config = load_config(loaded.name, trust_remote_code=loaded.options.trust_remote_code)
        stated = scaling_of_config(config, original_length=loaded.geometry.original_length)
        model = replace(loaded, checkpoint_scaling=None if is_export(config, recorded) else stated)
    return replace(as_it_is(model) or closed_form_method("none", model.geometry, target), name=ORIGINAL)


def _no_scaling(loaded: LoadedModel, purpose: str, name: str) -> LongRopeError:
    return LongRopeError(
        f"{loaded.name} has no scaling to {purpose}",
        code="invalid-setting",
        hint=f"leave {name!r} out of `baselines`",
    )
