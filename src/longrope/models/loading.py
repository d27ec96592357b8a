"""Loads a causal language model from a folder, a GGUF file, the hub or this package, with all that a job needs.

Weights come from safetensors or GGUF only; a checkpoint's own code runs only with `trust_remote_code`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longrope.errors import LongRopeError, one_line
from longrope.input_files import require_inside
from longrope.models.adapters import adapter_error, hub_adapter
from longrope.models.apply import geometry_of
from longrope.models.blocked_attention import register as register_blocked_attention
from longrope.models.checkpoint_files import (
    EMBEDDED_MODELS,
    RECORD,
    embedded_model_path,
    gguf_path,
    refuse_folded,
    refuse_kernels,
    resolve,
    states_original_length,
    why_unreachable,
)
from longrope.models.config import LoadOptions
from longrope.models.config_sizes import check_config_file
from longrope.models.devices import AUTO, best_device, device_of, is_spread, spread, spread_options, usable_device
from longrope.models.gguf.config import gguf_config
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.tokenizer import load_gguf_tokenizer
from longrope.models.gguf.weights import load_gguf_weights, stored_dtype
from longrope.models.remarks import keys_of_others_unremarked
from longrope.models.scalable import require_scalable, require_scalable_config
from longrope.rope.geometry import RENAMED_TYPES, RopeGeometry, original_length_guess, stated_types
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import RopeScaling, Window, numbers_sha256
from longrope.run_files import SCALING
from longrope.storage import read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model.

    Raises LongRopeError when it cannot be loaded, names code without consent to it, or states a RoPE type with which
    transformers cannot build the model.
    """
    if (file := gguf_path(name)) is not None:
        return gguf_config(read_gguf(file))
    check_config_file(Path(resolve(name)) / "config.json")
    try:
        config: PreTrainedConfig = _loaded(
            AutoConfig.from_pretrained, name, "config", trust_remote_code=trust_remote_code
        )
    except LongRopeError as error:  # a class may refuse an old name without naming it
        _refuse_unknown_types(name, _types_in_file(name), error)
        raise
    if type(config).__module__.startswith("transformers."):  # code of the checkpoint may know other types
        _refuse_unknown_types(name, stated_types(config))
        _require_causal(config, name)
    if not trust_remote_code:
        refuse_kernels(config, name)
    return config


def _require_causal(config: PreTrainedConfig, name: str) -> None:
    """Raise LongRopeError where transformers has no causal language model for a class of config of its own."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LongRopeError(
            f"expected a causal language model in {name}, found {config.model_type}, which AutoModelForCausalLM of"
            f" transformers {transformers.__version__} does not know",
            code="unsupported-model",
            hint="give a model of text that it knows",
        )


def _types_in_file(name: str) -> set[str]:
    """The RoPE types in the config.json of the folder `name`; none for a hub name or a file that is damaged."""
    try:
        whole = read_json(Path(resolve(name)) / "config.json")
        inner = whole.get("text_config")
        return stated_types(SimpleNamespace(**(inner if isinstance(inner, dict) else whole)))
    except LongRopeError:
        return set()


def _refuse_unknown_types(name: str, types: set[str], cause: Exception | None = None) -> None:
    """Raise LongRopeError where transformers has no function for one of the RoPE `types`."""
    known = {"default", "axial", *ROPE_INIT_FUNCTIONS}
    for found in sorted(types - known):
        new = RENAMED_TYPES.get(found)
        raise LongRopeError(
            f"the config of {name} states the RoPE type {found!r}, which transformers {transformers.__version__} does"
            f" not know; it knows {', '.join(sorted(known))}",
            code="unknown-rope-type",
            hint=f"write {new!r} in place of {found!r} (the old name) in its config.json" if new else "",
        ) from cause


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises LongRopeError when it cannot be loaded."""
    if (file := gguf_path(name)) is not None:
        return load_gguf_tokenizer(read_gguf(file))
    return _loaded(AutoTokenizer.from_pretrained, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode, on `device`.

    `dtype`: float32, bfloat16, float16, float64, checkpoint (its own), or auto: float32 on a CPU, its own elsewhere.
    A quantised GGUF file's own is float32, in which its numbers are exact. `config` stands in for the model's own,
    which is not looked at then; weights for which it has no place are passed over. The `device` auto is the best one
    here; a model that is too large for it is spread over all GPUs and main memory by accelerate's device map.

    Raises LongRopeError when the folder or name holds no such model, or its weights are neither safetensors nor a GGUF
    file, or incomplete.
    """
    if dtype not in ("auto", "checkpoint", *_DTYPES):
        raise LongRopeError(
            f"expected a `dtype` of auto, checkpoint, {', '.join(_DTYPES)}; found {dtype!r}", code="invalid-setting"
        )
    register_blocked_attention()
    target = usable_device(device)
    own = dtype == "checkpoint" or (dtype == "auto" and target.type != "cpu")
    wanted: Any = "auto" if own else _DTYPES.get(dtype, torch.float32)
    model: PreTrainedModel
    if (path := gguf_path(name)) is not None:
        file = read_gguf(path)
        stated, precision = config or gguf_config(file), stored_dtype(file) if own else wanted
        placed = spread_options(stated, precision, name) if device == AUTO else {}
        model = load_gguf_weights(file, stated, precision, attn_implementation)
        return spread(model, placed["max_memory"]).eval() if placed else _moved(model, target, name)
    # A config without consent to its code is refused here.
    stated = load_config(name, trust_remote_code=trust_remote_code) if config is None else config
    placed = {}
    if device == AUTO:
        placed = spread_options(stated, None if own else wanted, name, trust_remote_code=trust_remote_code)
    model, report = _loaded(
        AutoModelForCausalLM.from_pretrained,
        name,
        "model",
        dtype=wanted,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **({} if config is None else {"config": config}),
        **placed,
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise LongRopeError(
            f"the checkpoint {name} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}",
            code="damaged-file",
            hint="give a complete one",
        )
    return model.eval() if placed else _moved(model, target, name)


def _moved(model: PreTrainedModel, device: torch.device, name: str) -> PreTrainedModel:
    try:
        return model.to(device).eval()
    except (RuntimeError, ValueError) as error:  # no room, or quantised weights that stay where they are
        code = "out-of-memory" if isinstance(error, torch.OutOfMemoryError) else "runtime-fault"
        hint = "`device` auto spreads it over all GPUs and main memory" if code == "out-of-memory" else ""
        raise LongRopeError(f"cannot move {name} to {device}: {one_line(error)}", code=code, hint=hint) from error


def _loaded(load: Any, name: str, what: str, **options: Any) -> Any:
    place = resolve(name)
    local = Path(place).is_dir()
    unreachable = "" if local else why_unreachable(place)
    offline = local or bool(unreachable)
    if what == "model":  # where peft is installed, an adapter is looked for, and that looks at its own options only
        options["adapter_kwargs"] = {"local_files_only": offline}
    if not local and what != "tokenizer" and (adapter := hub_adapter(place, offline)) is not None:
        raise adapter_error(adapter, place)
    try:
        with keys_of_others_unremarked():
            return load(place, local_files_only=offline, **options)
    except Exception as error:  # transformers raises many kinds of error
        not_here = unreachable and isinstance(error, OSError)
        reason = f"the hub cannot be reached: {unreachable}" if not_here else one_line(error)
        if what == "tokenizer" and local and not any((Path(place) / file).exists() for file in _TOKENIZER_FILES):
            raise LongRopeError(
                f"expected a tokenizer in {name}, found none of {', '.join(_TOKENIZER_FILES)}",
                code="no-such-model",
                hint="copy these files from the model that it was made of",
            ) from error
        raise LongRopeError(f"cannot load the {what} of {name}: {reason}", code="no-such-model") from error


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, its geometry, the scaling of its checkpoint, and how it was loaded.

    `checkpoint_scaling` is relative to the original RoPE, None for the original RoPE itself; `find_checkpoint_scaling`
    says where it is read from. The model computes with the RoPE of its config, until another scaling is applied to it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: RopeGeometry
    checkpoint_scaling: RopeScaling | None
    options: LoadOptions

    @property
    def context_length(self) -> int:
        """Tokens that the checkpoint supports: up to the end of its scaling, or the original window without one."""
        scaling = self.checkpoint_scaling
        return self.geometry.original_length if scaling is None else scaling.target_length

    @property
    def recorded(self) -> RopeScaling | None:
        """`recorded_scaling` of its folder; None for a model that was built in memory, or whose folder is gone."""
        here = self.name in EMBEDDED_MODELS or Path(self.name).expanduser().is_dir()
        return recorded_scaling(self.name) if here and self.model.name_or_path else None

    @property
    def original_length_guess(self) -> str:
        """The way L was guessed, in words; empty where the config states it, or it was given."""
        guess = "" if self.options.original_length is not None else original_length_guess(self.model.config)
        return "" if guess and states_original_length(self.name) else guess

    def checkpoint_window(self, length: int) -> Window | None:
        """The window of the checkpoint's scaling for `length` tokens, beyond all windows the last; None without one."""
        scaling = self.checkpoint_scaling
        return None if scaling is None else scaling.window_for(min(length, scaling.target_length))


def open_model(
    model: PreTrainedModel | LoadedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    options: LoadOptions | None = None,
) -> LoadedModel:
    """The model that a job works on, with its tokenizer, geometry and the scaling of its checkpoint.

    `model` is a `PreTrainedModel` that the caller loaded (any device, dtype and `device_map`; merge a PEFT adapter
    first), the folder of a model or of a run with a checkpoint, a GGUF file, a hub name (`owner/model`, or
    `owner/model:file.gguf`), or the name of an embedded model. `tokenizer` is a tokenizer or where to load it from:
    where `model` came from, when not given. A loaded model is put into eval mode, and of `options` only
    `original_length` and `trust_remote_code` apply to it.

    Raises LongRopeError when the model or its tokenizer cannot be loaded, it has no RoPE, or the `scaling.json` beside
    it is for another one.
    """
    options = options or LoadOptions()
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, PreTrainedModel):
        return _opened(model, tokenizer, options)
    if not isinstance(model, str | Path):
        raise LongRopeError(
            f"expected a transformers model, a folder or a name, found {type(model).__name__}",
            code="no-such-model",
            hint="merge a PEFT adapter with merge_and_unload() first" if hasattr(model, "merge_and_unload") else "",
        )
    name = str(model)
    loaded = open_without_tokenizer(name, options)
    return replace(loaded, tokenizer=_tokenizer(name if tokenizer is None else tokenizer, options))


def open_without_tokenizer(name: str, options: LoadOptions) -> LoadedModel:
    """`open_model` of a name, for a process that reads no texts: `tokenizer` is None."""
    # A model without RoPE, or with a scaling that is not for it, is refused before its weights are read.
    _, _, checkpoint_scaling = config_and_scaling(
        name, options.original_length, trust_remote_code=options.trust_remote_code
    )
    loaded = load_model(name, **options.model_dump(exclude={"original_length"}))
    geometry = geometry_of(loaded, options.original_length)
    if options.device == AUTO and not is_spread(loaded):  # so that a worker takes the same
        options = options.replace(device=best_device())
    return LoadedModel(name, loaded, cast(Any, None), geometry, checkpoint_scaling, options)


def _opened(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | None, options: LoadOptions
) -> LoadedModel:
    """`open_model` for a `PreTrainedModel`."""
    geometry = geometry_of(model, options.original_length)
    require_scalable(model)
    name = name_of(model)
    if tokenizer is None and not model.name_or_path:
        raise LongRopeError(
            f"expected a tokenizer for this {name}, which does not say where it was loaded from",
            code="missing-tokenizer",
            hint="give `tokenizer`",
        )
    checkpoint_scaling = find_checkpoint_scaling(_folder(model), model.config, geometry)
    chosen = _tokenizer(name if tokenizer is None else tokenizer, options)
    dtype = str(model.dtype).removeprefix("torch.")
    actual = options.replace(
        dtype=dtype if dtype in _DTYPES else "checkpoint",
        device=str(device_of(model)),
        attn_implementation=model.config._attn_implementation,
    )
    return LoadedModel(name, model.eval(), chosen, geometry, checkpoint_scaling, actual)


def name_of(model: PreTrainedModel) -> str:
    """The folder, hub name or embedded name that `model` was loaded from, or its class where it does not say."""
    embedded = {str(embedded_model_path(name)): name for name in EMBEDDED_MODELS}
    place = str(model.name_or_path)
    return embedded.get(place, place or type(model).__name__)


def _folder(model: PreTrainedModel) -> str | None:
    """The folder that `model` was loaded from, where it still is."""
    return model.name_or_path if model.name_or_path and Path(model.name_or_path).is_dir() else None


def config_and_scaling(
    model: PreTrainedModel | Path | str, original_length: int | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, RopeGeometry, RopeScaling | None]:
    """The config, geometry and checkpoint scaling of a model, a folder or a name; weights are not read.

    Raises LongRopeError as `open_model` does.
    """
    place: str | None
    if isinstance(model, PreTrainedModel):
        config, place = model.config, _folder(model)
    else:
        config, place = load_config(str(model), trust_remote_code=trust_remote_code), str(model)
    geometry = RopeGeometry.from_config(config, original_length=original_length)
    found = find_checkpoint_scaling(place, config, geometry)
    require_scalable_config(config, trust_remote_code=trust_remote_code)
    return config, geometry, found


def _tokenizer(given: PreTrainedTokenizerBase | str, options: LoadOptions) -> PreTrainedTokenizerBase:
    return load_tokenizer(given, trust_remote_code=options.trust_remote_code) if isinstance(given, str) else given


def find_checkpoint_scaling(name: str | None, config: Any, geometry: RopeGeometry) -> RopeScaling | None:
    """The scaling that the weights of `name` are for, relative to their original RoPE; None for the original RoPE.

    It is the recorded one (`recorded_scaling`), which fine-tuning leaves, or the one that `config` states where there
    is none. An export's config states what its weights compute, with folded factors, so there it is the config's.
    `name` is None for a model that was not loaded from a folder.

    Raises LongRopeError for a recorded scaling that does not fit `geometry`, or weights that have a factor folded in.
    """
    recorded = None if name is None else recorded_scaling(name)
    if name is None or recorded is None or is_export(config, recorded):
        stated = scaling_of_config(config, original_length=geometry.original_length)
        if stated is None or recorded is None:
            return stated
        return replace(stated, provenance=recorded.provenance)  # the texts that the weights have seen
    refuse_folded(getattr(config, RECORD, None), name)
    try:
        recorded.check_fits(geometry)
    except LongRopeError as error:
        raise LongRopeError(f"{SCALING} of {name}: {error}", code=error.code) from error
    return recorded


def recorded_scaling(name: str) -> RopeScaling | None:
    """The `scaling.json` of the run folder `name`, or that beside the config.json of a model; None where there is none.

    Raises LongRopeError when it is no scaling.
    """
    given, folder = Path(name).expanduser(), Path(resolve(name))
    for path in (given / SCALING, folder / SCALING) if given.is_dir() else (folder / SCALING,):
        if path.is_file():
            require_inside(path.parent, [path])
            return RopeScaling.load(path)
    return None


def is_export(config: Any, recorded: RopeScaling) -> bool:
    """True if `longrope export` wrote `config` to express `recorded`."""
    record = getattr(config, RECORD, None)
    return isinstance(record, dict) and record.get("scaling_sha256") == numbers_sha256(recorded)
