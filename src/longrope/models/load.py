"""Load a causal language model, its config or its tokenizer from a folder, a hub name, or one embedded here.

Weights come from safetensors only; code that travels with a checkpoint runs only when the caller says so.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longrope.errors import LongRopeError, one_line

EMBEDDED, EMBEDDED_LONG = "tiny", "tiny-512x"
"""The embedded model, and the same extended to 512 times its window: its scaling.json says so, not its config."""
EMBEDDED_MODELS = (EMBEDDED, EMBEDDED_LONG)
CHECKPOINT = "checkpoint"
"""The folder of a run with the weights that it trained or exported."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def embedded_model_path(name: str = EMBEDDED) -> Path:
    """The folder of an embedded model in this installation."""
    return Path(str(resources.files("longrope"))) / "assets" / name


def resolve(name: str) -> str:
    """A model folder, or a hub name of the form `owner/model`.

    The folder of a run (`longrope finetune` or `extend`) is that of its checkpoint. Raises LongRopeError for anything
    else, before any network is touched.
    """
    if name in EMBEDDED_MODELS:
        path = embedded_model_path(name)
        if not (path / "config.json").is_file():
            raise LongRopeError(f"this installation of longrope lacks the embedded model {name!r}; install it again")
        return str(path)
    path = Path(name).expanduser()
    if path.is_dir():
        for folder in (path, path / CHECKPOINT):
            if (folder / "config.json").is_file():
                return str(folder)
        raise LongRopeError(f"expected a model folder with a config.json, found none in {path} or its {CHECKPOINT}/")
    if path.exists():
        raise LongRopeError(f"expected a model folder, found a file at {path}; give the folder that holds config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return name
    raise LongRopeError(
        f"there is no model folder at {name}; give a folder, a hub name (owner/model) or "
        f"{' or '.join(map(repr, EMBEDDED_MODELS))}"
    )


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model. Raises LongRopeError when it cannot be loaded."""
    return _loaded(AutoConfig.from_pretrained, name, "config", trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises LongRopeError when it cannot be loaded."""
    return _loaded(AutoTokenizer.from_pretrained, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode, on `device`.

    `dtype`: float32, bfloat16, float16, float64, checkpoint (its own), or auto: float32 on a CPU, its own elsewhere.
    Raises LongRopeError when the folder or name holds no such model, or its weights are not safetensors or incomplete.
    """
    if dtype not in ("auto", "checkpoint", *_DTYPES):
        raise LongRopeError(f"expected a dtype of auto, checkpoint, {', '.join(_DTYPES)}; found {dtype!r}")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError) as error:
        raise LongRopeError(f"the device {device!r} cannot be used here: {one_line(error)}") from error
    wanted: Any = _DTYPES.get(dtype, torch.float32 if dtype == "auto" and target.type == "cpu" else "auto")
    model: PreTrainedModel
    model, report = _loaded(
        AutoModelForCausalLM.from_pretrained,
        name,
        "model",
        dtype=wanted,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise LongRopeError(
            f"the checkpoint {name} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]};"
            " give a complete one"
        )
    try:
        return model.to(target).eval()
    except (RuntimeError, ValueError) as error:  # no room, or quantised weights that stay where they are
        raise LongRopeError(f"cannot put {name} on {device}: {one_line(error)}") from error


def _loaded(load: Any, name: str, what: str, **options: Any) -> Any:
    place = resolve(name)
    local = Path(place).is_dir()
    unreachable = "" if local else _why_unreachable(place)
    offline = local or bool(unreachable)
    if what == "model":  # where peft is installed, an adapter is looked for, and that looks at its own options only
        options["adapter_kwargs"] = {"local_files_only": offline}
    try:
        return load(place, local_files_only=offline, **options)
    except Exception as error:  # transformers raises many kinds; what it said is passed on in one line
        not_here = unreachable and isinstance(error, OSError)
        reason = f"the hub cannot be reached: {unreachable}" if not_here else one_line(error)
        raise LongRopeError(f"cannot load the {what} of {name}: {reason}") from error


def _why_unreachable(hub_name: str) -> str:
    """Why the hub does not answer, or nothing; asked once, because transformers retries for half a minute.

    Without the hub, what was downloaded before is used.
    """
    try:
        model_info(hub_name, timeout=10)
    except HfHubHTTPError:
        return ""  # it did answer: what is wrong with the name is transformers' to say
    except Exception as error:  # the HTTP client's own kinds: no common type
        return one_line(error)
    return ""
