"""A model without its weights, by name: all modules of its config on the meta device, to look at before anything else.

Whether a family can be scaled shows in its modules, so `inspect` and `plan` refuse what a search would refuse.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from longrope.errors import LongRopeError, one_line
from longrope.models.devices import weightless_model
from longrope.models.loading import load_config
from longrope.models.scalable import require_scalable
from longrope.rope.geometry import RopeGeometry

_ANY_LENGTH = 2  # the window is not looked at here


def weightless(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device: every module and parameter, without the numbers.

    Raises LongRopeError when there is no such config, transformers makes no causal language model of it, or it cannot
    be scaled (`require_scalable`).
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    RopeGeometry.from_config(config, original_length=_ANY_LENGTH)  # a model without RoPE cannot be extended
    try:
        model = weightless_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that transformers cannot build raises many kinds
        raise LongRopeError(
            f"cannot build the model of {name} from its config: {one_line(error)}", code="no-such-model"
        ) from error
    require_scalable(model)
    return model
