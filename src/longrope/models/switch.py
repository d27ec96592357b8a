"""What makes stock `model.generate` right while a scaling with several windows is installed.

A cache holds keys of one window. When the next forward needs another (`window_rule.py`), the cache is filled again from
the tokens, in chunks, or its keys are turned, so that the token after n tokens is predicted under the window for n,
cached or not. transformers leaves the cache as it is for all but three families, and what follows the switch is then
wrong without a word.

`install` puts the hooks on the model and `uninstall` takes them off. They take the place of methods on the instance:
`prepare_inputs_for_generation`, which sees every forward before it runs, and two entrances (`entrance.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.cache import PREFILL_CHUNK, check_cache, fill, is_plain
from longrope.models.entrance import Entrance, check_mode, refuse_batching
from longrope.models.rerotate import Rerotation
from longrope.models.window_rule import same_keys, switches, window_of_rows
from longrope.rope.scaling import Window

if TYPE_CHECKING:
    from longrope.models.install import Installed

Switch = Literal["recompute", "rerotate"]

_OF_TOKENS = ("attention_mask", "position_ids")
_MARK = "longrope_window"  # on a cache: the window of its keys; copies of the cache carry it along


def hook_generation(installed: Installed) -> None:
    """Put the hooks on the model; one that cannot generate is left as it is."""
    model = installed.model
    if not isinstance(model, GenerationMixin):
        return
    model.prepare_inputs_for_generation = CacheSwitch(installed)
    model.generate = Entrance(installed, model.generate, check_mode)
    model.init_continuous_batching = Entrance(installed, model.init_continuous_batching, refuse_batching)


def unhook_generation(model: PreTrainedModel) -> None:
    """Take the hooks off; a model without them stays as it is."""
    for name in ("prepare_inputs_for_generation", "generate", "init_continuous_batching"):
        hook = vars(model).get(name)
        if isinstance(hook, CacheSwitch | Entrance):
            delattr(model, name)
            if getattr(model, name) != hook.own:  # it was on the instance before
                setattr(model, name, hook.own)


def cache_switch(installed: Installed) -> CacheSwitch:
    """The hook on the model. Raises LongRopeError when it has none, or one of another installation."""
    hook = vars(installed.model).get("prepare_inputs_for_generation")
    if isinstance(hook, CacheSwitch) and hook.installed is installed:
        return hook
    name = type(installed.model).__name__
    if isinstance(installed.model, GenerationMixin):
        raise LongRopeError(f"this scaling is no longer installed in {name}: give what the last install() returned")
    raise LongRopeError(f"expected a model that generates text, found {name}, which does not")


class CacheSwitch:
    """In the place of `prepare_inputs_for_generation`: the cache it hands on is right for the forward to come."""

    def __init__(self, installed: Installed) -> None:
        self.installed = installed
        self.own = installed.model.prepare_inputs_for_generation
        self.prefill_chunk = PREFILL_CHUNK
        self.rerotation: Rerotation | None = None
        """Turns the keys at a switch; None: they are computed again."""
        self.__wrapped__ = self.own  # transformers looks at the signature

    def __call__(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next forward, as `prepare_inputs_for_generation` gives them.

        `input_ids` (B, W) is the whole text, or only what the cache does not hold; `position_ids` (B or 1, T) and
        `attention_mask` (B, T) are the whole text's.
        """
        cache, several = past_key_values, switches(self.installed)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given |= {"past_key_values": cache} | kwargs
        past = 0 if cache is None else int(cache.get_seq_length())
        if not several:
            # Any cache and any way of generating will do. A plain text is still read in chunks.
            coming = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            whole = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == past + coming
            if not whole or inputs_embeds is not None or not is_plain(cache) or self._numbers_replaced:
                return self._own(input_ids, next_sequence_length, given)
        if position_ids is None or position_ids.dim() != 2:
            raise LongRopeError("expected position_ids of shape (batch, tokens): windows are chosen by position")
        window = window_of_rows(self.installed, (position_ids.max(dim=-1).values + 1).tolist())
        if cache is None:  # every forward is of the whole text
            return self._own(input_ids, next_sequence_length, given)
        check_cache(cache, "generation across windows")
        if inputs_embeds is not None:
            raise LongRopeError("expected input_ids, found inputs_embeds: a cache is filled again from tokens")

        total = position_ids.shape[1]
        new = total - past  # tokens that the cache does not hold
        if new < 1:
            raise LongRopeError(f"expected new tokens after the {past} that the cache holds, found {total} in all")
        held: Window | None = getattr(cache, _MARK, None if several else window)
        if past and (held is None or not same_keys(held, window)):
            past = self._switch(cache, held, window, position_ids[:, :past], whole=input_ids.shape[1] == total)
        # The forward to come takes the last tokens only, as many as fit a chunk.
        last = min(new, self.prefill_chunk)
        if total - past > last:
            self._fill(cache, input_ids, last, window, given)
        setattr(cache, _MARK, window)
        return self._own(input_ids, last, given)

    @property
    def _numbers_replaced(self) -> bool:
        """Whether tensors take the place of the fixed window's numbers: then nothing can be filled under a window."""
        rotary = self.installed.rotaries[0]
        return rotary.factors is not None or rotary.attention_factor is not None

    def _own(self, input_ids: Tensor, last: int | None, given: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = self.own(input_ids, next_sequence_length=last, **given)
        if inputs.get("past_key_values") is not given["past_key_values"]:
            # Phi-3 drops the cache at the switch of its own config: this one is right already.
            inputs = GenerationMixin.prepare_inputs_for_generation(
                self.installed.model, input_ids, next_sequence_length=last, **given
            )
        return inputs

    def _switch(self, cache: Any, held: Window | None, window: Window, positions: Tensor, *, whole: bool) -> int:
        """Make `cache`, with keys of `held` at `positions` (B or 1, p), one of `window`: how many tokens it keeps."""
        if self.rerotation is not None:
            if held is None:
                raise LongRopeError(
                    "expected a cache filled by this model's generate, found one whose window is not known: its keys "
                    "cannot be turned; use switch='recompute'"
                )
            self.rerotation.turn(cache, positions, held, window)
            return positions.shape[1]
        if not whole:
            raise LongRopeError(
                f"this text needs the window of {window.max_length} tokens, for which its cache has to be filled again:"
                " give input_ids of the whole text, not of its new tokens only"
            )
        cache.reset()
        return 0

    def _fill(self, cache: DynamicCache, ids: Tensor, last: int, window: Window, given: dict[str, Any]) -> None:
        """Bring into the cache what it lacks of the text, but for the `last` tokens."""
        content = [name for name, value in given.items() if isinstance(value, Tensor) and name not in _OF_TOKENS]
        if content:
            raise LongRopeError(f"expected text only, found {', '.join(content)}: a cache is filled from tokens")
        positions, mask = given["position_ids"], given["attention_mask"]
        end, past = positions.shape[1] - last, int(cache.get_seq_length())
        device = self.installed.model.device
        fill(
            self.installed,
            cache,
            ids[:, past - positions.shape[1] : -last].to(device),
            window,
            self.prefill_chunk,
            position_ids=positions[:, past:end].to(device),
            attention_mask=None if mask is None else mask[:, :end].to(device),
        )
