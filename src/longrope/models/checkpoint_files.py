"""The files of a checkpoint: the folder of a model, its weight files, and the files that are copied beside them.

The tensors are read in `export/weights.py`. Pickled weights are never opened, and code is copied only on request.
Before anything of a folder is loaded or copied, its files are checked: each is a regular file inside the folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from longrope.checks import shown
from longrope.errors import LongRopeError, one_line
from longrope.file_links import COPIED, share
from longrope.input_files import require_inside
from longrope.models.adapters import ADAPTER_CONFIG, adapter_config_of, adapter_error
from longrope.rope.scaling import RopeScaling, numbers_sha256
from longrope.run_files import CHECKPOINT
from longrope.storage import read_json, write_json_atomic

EMBEDDED, EMBEDDED_LONG = "tiny", "tiny-512x"
"""The embedded model, and the same extended to 512 times its window, as its config states."""
EMBEDDED_MODELS = (EMBEDDED, EMBEDDED_LONG)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
RECORD = "longrope"
"""The key of config.json with the record of an export; `save_pretrained` of other tools keeps it."""
GGUF_SUFFIX = ".gguf"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = ("*.json", "*.jinja", "*.safetensors", "*.gguf", "*.py", *_COMPANIONS)
"""The files of a folder that transformers, an export or the doctor may read."""


def embedded_model_path(name: str = EMBEDDED) -> Path:
    """The folder of an embedded model in this installation."""
    return Path(str(resources.files("longrope"))) / "assets" / name


def gguf_path(name: str) -> Path | None:
    """The GGUF file that `name` is: a path, or `owner/model:file.gguf` on the hub, which is downloaded; else None.

    Raises LongRopeError when there is no such file, or it cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() != GGUF_SUFFIX or path.is_dir():
        return None
    if path.is_file():
        return path
    repository, _, file = name.partition(":")
    if not file or not _is_hub_name(repository):
        raise LongRopeError(f"there is no GGUF file at {name}", code="no-such-model")
    unreachable = why_unreachable(repository)
    try:
        return Path(hf_hub_download(repository, file, local_files_only=bool(unreachable)))
    except Exception as error:  # the hub's client raises many kinds of error
        reason = f"the hub cannot be reached: {unreachable}" if unreachable else one_line(error)
        raise LongRopeError(f"cannot download {name}: {reason}", code="no-such-model") from error


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not name.startswith((".", "/", "~")) and not name.endswith("/")


def resolve(name: str) -> str:
    """A model folder, the path of a GGUF file, or a hub name of the form `owner/model`.

    The folder of a run (`longrope finetune` or `extend`) is that of its checkpoint. Raises LongRopeError for anything
    else, before any network is touched.
    """
    if name in EMBEDDED_MODELS:
        path = embedded_model_path(name)
        if not (path / "config.json").is_file():
            raise LongRopeError(
                f"this installation of longrope lacks the embedded model {name!r}",
                code="no-such-model",
                hint="install it again",
            )
        return str(path)
    if (file := gguf_path(name)) is not None:
        return str(file)
    path = Path(name).expanduser()
    if path.is_dir():
        for folder in (path, path / CHECKPOINT):
            if os.path.lexists(folder / "config.json"):
                if folder != path and not folder.resolve().is_relative_to(path.resolve()):
                    raise LongRopeError(
                        f"{folder} is a link out of its folder, to {folder.resolve()}",
                        code="not-inside",
                        hint="give that folder itself",
                    )
                check_files(folder)
                return str(folder)
        if (adapter := adapter_config_of(path)) is not None:
            raise adapter_error(adapter, str(adapter.parent))
        raise LongRopeError(
            f"expected a model folder with a config.json, found none in {path} or its {CHECKPOINT}/",
            code="no-such-model",
        )
    if path.exists():
        raise LongRopeError(
            f"expected a model folder or a .gguf file, found another file at {path}",
            code="no-such-model",
            hint="give the folder that holds config.json",
        )
    if _is_hub_name(name):
        return name
    raise LongRopeError(
        f"there is no model folder at {name}",
        code="no-such-model",
        hint="give a folder, a .gguf file, a hub name (owner/model or owner/model:file.gguf) or "
        f"{' or '.join(map(repr, EMBEDDED_MODELS))}",
    )


def check_files(folder: Path) -> None:
    """Raise LongRopeError (`not-inside`, `unreadable-file`) unless every file of the checkpoint in `folder` is a
    regular file inside of it; the layout of the hub's cache is one too. The index of its weights may name no others.

    A folder with an adapter beside a whole model is refused: transformers would load another model, which the adapter
    names, and the adapter's pickled weights.
    """
    found = {path for pattern in _READ for path in folder.glob(pattern) if path.suffix or not path.is_dir()}
    require_inside(folder, sorted(found))
    if (folder / INDEX).is_file():
        _indexed(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise LongRopeError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}); a model without one is needed",
            code="unsupported-model",
            hint="merge the adapter into the weights, or move it out of the folder",
        )


def why_unreachable(hub_name: str) -> str:
    """The reason why the hub does not answer, empty where it does. Without the hub, earlier downloads are used.

    The hub is asked once here, because transformers retries for half a minute.
    """
    try:
        model_info(hub_name, timeout=10)
    except HfHubHTTPError:
        return ""  # the hub answered; transformers reports the fault in the name
    except Exception as error:  # the HTTP client's own kinds: no common type
        return one_line(error)
    return ""


def source_folder(model_name: str, code: tuple[str, ...] = (), *, weights: bool = True) -> Path:
    """The folder with the files of a model; for a hub name the snapshot, downloaded where it is not there yet.

    `code` are further patterns of files to download; the `weights` may be left out. Raises LongRopeError when there is
    no such model.
    """
    place = Path(resolve(model_name))
    if place.is_dir():  # its files are checked
        return place
    patterns = ["config.json", "README.md", *_COMPANIONS, *code]
    patterns += [SINGLE, INDEX, "model-*.safetensors"] if weights else []
    try:
        snapshot = Path(snapshot_download(model_name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds of error
        raise LongRopeError(f"cannot download {model_name}: {one_line(error)}", code="no-such-model") from error
    check_files(snapshot)
    return snapshot


def config_folder(model_name: str) -> Path:
    """The folder with the JSON files of a model; for a hub name they alone are downloaded, without the weights.

    Raises LongRopeError when there is no such model.
    """
    place = Path(resolve(model_name))
    if place.is_dir():
        return place
    try:
        return Path(snapshot_download(model_name, allow_patterns=["*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises many kinds of error
        raise LongRopeError(f"cannot download {model_name}: {one_line(error)}", code="no-such-model") from error


def states_original_length(model_name: str) -> bool:
    """True if the config.json of a model states an original length; False for a model that is not on disk.

    transformers fills in the window as YaRN's where the file states none, and then a config does not tell.
    """
    try:
        whole = read_json(config_folder(model_name) / "config.json")
    except LongRopeError:
        return False
    inner = whole.get("text_config")
    values = inner if isinstance(inner, dict) else whole
    dictionaries = [
        entry for name in ("rope_scaling", "rope_parameters") if isinstance(entry := values.get(name), dict)
    ]
    nested = [entry for outer in dictionaries for entry in outer.values() if isinstance(entry, dict)]
    return any(entry.get("original_max_position_embeddings") for entry in (values, *dictionaries, *nested))


def weight_files(source: Path) -> list[str]:
    """Names of the safetensors files that make the model: those that the index names, or the only one.

    Raises LongRopeError when there are none, with the conversion where the weights are pickled, or one is missing.
    """
    names = _indexed(source) if (source / INDEX).is_file() else [SINGLE]
    missing = [name for name in names if not (source / name).is_file()]
    if not missing:
        return names
    if (source / INDEX).is_file():
        raise LongRopeError(
            f"{source / INDEX} names {missing[0]}, which is not there",
            code="damaged-file",
            hint="give a complete checkpoint",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in source.glob(pattern))
    if pickles:
        code = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"[one.from_pretrained({str(source)!r}).save_pretrained('CONVERTED') for one in (M, T)]"
        )
        raise LongRopeError(
            f"expected safetensors weights in {source}, found pickled ones ({pickles[0]}), which can run code and are "
            "not opened",
            code="pickled-weights",
            hint=f"if you trust them: python -c {shlex.quote(code)}",
        )
    raise LongRopeError(
        f"expected safetensors weights in {source}, found none",
        code="no-such-model",
        hint=f"give a folder that holds {SINGLE}",
    )


def _indexed(source: Path) -> list[str]:
    """The weight files that the index of `source` names. Raises LongRopeError where one is no name in the folder."""
    named = read_json(source / INDEX).get("weight_map")
    values = list(named.values()) if isinstance(named, dict) else [named]
    if wrong := [value for value in values if not _is_name(value) or not str(value).endswith(".safetensors")]:
        raise LongRopeError(
            f"expected a weight_map of file names, *.safetensors, in {source / INDEX}; found {shown(wrong[0])}",
            code="damaged-file",
        )
    return sorted({str(value) for value in values})


def _is_name(value: Any) -> bool:
    """True for the name of a file in the folder itself, on any system."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\:\0")


def copy_companions(source: Path, folder: Path, code: tuple[str, ...] = ()) -> None:
    """Copy the files beside the weights: tokenizer, generation config, licence, and those of the patterns `code`."""
    for pattern in (*_COMPANIONS, *code):
        for file in source.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def place_weights(source: Path, folder: Path, *, copy: bool = False) -> str:
    """The weight files of `source` in `folder`, byte for byte, as clones, hard links or, with `copy`, copies.

    Returns how they came there, as `share` does. Their index, where there is one, is copied.
    """
    how = {place_file(source / name, folder, copy=copy) for name in weight_files(source)}
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, folder / INDEX)
    return " and ".join(sorted(how))


def place_file(file: Path, folder: Path, *, copy: bool = False) -> str:
    """One file as `place_weights` places them all."""
    if not copy:
        return share(file, folder / file.name)
    shutil.copyfile(file, folder / file.name)
    return COPIED


def raise_limits(folder: Path, length: int) -> None:
    """Let tokenizer and `generate` take `length` tokens: limits of the old window are raised, none is added."""
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        path = folder / name
        if path.is_file():
            settings = read_json(path)
            limit = settings.get(key)
            if isinstance(limit, int) and limit < length:
                write_json_atomic(path, settings | {key: length})


def export_record(scaling: RopeScaling, form: str = "hf", query_scale: float = 1.0) -> dict[str, Any]:
    """The value of RECORD, from which `longrope fix-config` can write the `scaling` into config.json again.

    `query_scale` is the factor that the queries' weights were multiplied by.
    """
    return {"form": form, "query_scale": query_scale, "scaling_sha256": numbers_sha256(scaling)}


def refuse_folded(record: Any, model_name: str) -> None:
    """Raise LongRopeError for an export whose attention factor is folded into its weights: `record` is its RECORD."""
    if isinstance(record, dict) and record.get("query_scale", 1.0) != 1.0:
        raise LongRopeError(
            f"{model_name} is an export with an attention factor folded into its weights",
            code="folded-weights",
            hint="use the model that it was made from",
        )


def refuse_kernels(config: Any, model_name: str) -> None:
    """Raise LongRopeError (`untrusted-code`) where a config names a kernel of the hub for its attention.

    transformers would fetch it while the model is loaded, and run it: it is compiled code.
    """
    for part in [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]:
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:
            raise LongRopeError(
                f"the config of {model_name} names a kernel of the hub for its attention, {kernel}",
                code="untrusted-code",
                hint="if you trust it, give `trust_remote_code=True`",
            )
