"""Who an evaluation compares: the scaling it is about, and what `--against` names, each on its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longrope.errors import LongRopeError
from longrope.models.loading import Subject, is_export, load_config, recorded_scaling
from longrope.rope.baselines import (
    CHECKPOINT,
    ORIGINAL,
    Contender,
    checkpoint_contender,
    closed_form_contender,
    dynamic_contender,
    scaling_contender,
    second_contender,
)
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.geometry import rope_parameters_of
from longrope.rope.hf_config import existing_scaling
from longrope.rope.progressive import SECOND_FORMS
from longrope.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Field:
    """All that are compared, in the order of the results: the scaling in question is the last.

    `scalings` are the files among them, name -> scaling; `original` is the model before it was extended, which short
    texts are held against whether it is among the contenders or not.
    """

    contenders: tuple[Contender, ...]
    scalings: dict[str, RopeScaling]
    original: Contender


def compared(
    subject: Subject,
    scaling: RopeScaling | None,
    name: str,
    against: Sequence[str],
    target_length: int,
    original: Subject | None = None,
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
    target = max(target_length, subject.geometry.original_length)
    itself = as_it_is(subject)
    before = _before(subject, original, target)
    names = list(dict.fromkeys(against))
    if scaling is None:
        own = "none" if itself is None else CHECKPOINT
        names = [*(name for name in names if name != own), own]
    contenders, scalings = [], {}
    for entry in names:
        check_named(entry)
        if entry == ORIGINAL:
            contenders.append(before)
        elif entry == CHECKPOINT:
            if itself is None:
                raise LongRopeError(f"{subject.name} carries no scaling to compare with; leave {CHECKPOINT!r} out")
            contenders.append(itself)
        elif entry in SECOND_FORMS:
            if subject.existing is None:
                raise LongRopeError(f"{subject.name} carries no scaling to stretch; leave {entry!r} out")
            contenders.append(second_contender(entry, subject.existing, target))
        elif entry.endswith(".json"):
            scalings[entry] = RopeScaling.load(entry)
            scalings[entry].check_fits(subject.geometry)
            contenders.append(scaling_contender(entry, scalings[entry]))
        else:
            contenders.append(closed_form_contender(entry, subject.geometry, target))
    if scaling is not None:
        if name in names:
            raise LongRopeError(f"{name} is compared with itself; leave it out of what to compare with")
        contenders.append(scaling_contender(name, scaling))
        scalings[name] = scaling
    return Field(tuple(contenders), scalings, before)


def check_named(entry: str) -> None:
    """Raise LongRopeError where `entry` is no name of something to compare with, and no path of a scaling."""
    known = (*CLOSED_FORMS, CHECKPOINT, ORIGINAL, *SECOND_FORMS)
    if entry not in known and not entry.endswith(".json"):
        raise LongRopeError(
            f"expected {', '.join(known)} or a scaling's path ending in .json to compare with, found {entry!r}"
        )


def as_it_is(subject: Subject) -> Contender | None:
    """What the checkpoint itself does with long texts; None where it is the original RoPE."""
    if subject.existing is not None:
        return checkpoint_contender(subject.existing)
    parameters = rope_parameters_of(subject.model.config)
    if parameters["rope_type"] == "dynamic":
        return dynamic_contender(subject.geometry, float(parameters.get("factor", 1.0)))
    return None


def _before(subject: Subject, original: Subject | None, target: int) -> Contender:
    of = original or subject
    recorded = recorded_scaling(subject.name) if original is None else None
    if recorded is not None:  # what this checkpoint carries is the extension
        config = load_config(subject.name, trust_remote_code=subject.options.trust_remote_code)
        of = replace(subject, existing=None if is_export(config, recorded) else existing_scaling(config))
    return replace(as_it_is(of) or closed_form_contender("none", of.geometry, target), name=ORIGINAL)
