"""The origin of an exported checkpoint, for its model card: the base model, its licence, and what was trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.markdown import code_span, plain
from longrope.models.checkpoint_files import resolve
from longrope.rope.scaling import RopeScaling
from longrope.safe_yaml import parse_yaml, read_yaml

CARD = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a checkpoint: its base model, licence and training."""

    name: str
    """The name of the base model: its hub name, or the last part of its folder."""
    base_model: str | None
    """The hub name of the model before any training here; None where it is a folder or no valid name."""
    licence: str | None
    """The licence that the base model's card states, as an identifier of the hub; None where it states none."""
    has_licence_file: bool
    """True if the base model's own licence file is copied beside the weights."""
    trainings: tuple[dict[str, Any], ...]
    """The trainings that the scaling's provenance records, in order; empty: the weights are the base model's."""

    def front_matter(self) -> str:
        """The lines of the card's head that say it to the hub."""
        lines = [f"license: {self.licence}"] if self.licence else []
        if self.base_model is not None:
            lines += [f"base_model: {self.base_model}"]
            lines += ["base_model_relation: finetune"] if self.trainings else []
        return "".join(f"{line}\n" for line in lines)

    def licence_text(self) -> str:
        """The licence in a sentence or two."""
        base = code_span(self.name)
        if self.licence is not None:
            text = f"The card of {base} states {code_span(self.licence)}, which holds for these weights too."
        elif self.has_licence_file:
            text = f"The files of {base} come with its licence, which holds for these weights too."
        else:
            text = f"The files of {base} state no licence: look it up before you pass these weights on."
        return f"{text} Its licence file is copied beside them." if self.has_licence_file else text

    def training_text(self) -> str:
        """The trainings of the weights, a line for each; without any, that nothing was trained."""
        if not self.trainings:
            return (
                "Nothing was trained: the weights are those of the base model, and only the angles of the rotary "
                "position embedding are others."
            )
        lines = [_training(entry) for entry in self.trainings]
        return "The weights were fine-tuned under this scaling:\n\n" + "\n".join(f"- {line}" for line in lines)


def origin_of(model_name: str, source: Path, scaling: RopeScaling) -> Origin:
    """The origin of the model `model_name`, whose files are in `source`, exported with `scaling`."""
    trainings = tuple(_trainings(scaling.provenance))
    first = str(trainings[0].get("model", "")) if trainings else model_name
    hub = first if _HUB_NAME.fullmatch(first) and not Path(first).exists() else None
    cards = [source / CARD, *([folder / CARD] if (folder := _local(first)) is not None else [])]
    licence = next((found for card in cards if (found := _licence(card)) is not None), None)
    has_file = any(source.glob("LICENSE*"))
    return Origin(public_name(first), hub, licence, has_file, trainings)


def search_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance of the search that found the factors: in the scaling of a recipe's run, of its last search."""
    inner = [] if "method" in provenance else [search_of(found) for found in reversed(_stages(provenance))]
    return next((found for found in inner if "method" in found), provenance)


def _trainings(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of the weights in order, each once: those before this run, those of a recipe's stages, the last."""
    carried, own = provenance.get("carried"), provenance.get("training")
    earlier = [carried] if isinstance(carried, dict) else []
    found = [training for before in (*earlier, *_stages(provenance)) for training in _trainings(before)]
    found += [entry for entry in (own if isinstance(own, list) else []) if isinstance(entry, dict)]
    return [entry for place, entry in enumerate(found) if entry not in found[:place]]


def _stages(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenances of the stages of a recipe's run, in order; none for any other scaling."""
    stages = provenance.get("stages")
    return [found for found in stages.values() if isinstance(found, dict)] if isinstance(stages, dict) else []


def public_name(model_name: str) -> str:
    """The name of a model on its card: the hub name, or the folder's own name without its path."""
    return Path(model_name).resolve().name if Path(model_name).exists() else model_name


def _local(model_name: str) -> Path | None:
    """The folder of a model on this machine, of an embedded one too; None for a hub name, and where it is gone."""
    try:
        place = Path(resolve(model_name))
    except LongRopeError:
        return None
    return place if place.is_dir() else None


def _licence(card: Path) -> str | None:
    """The licence in the front matter of a model card; None where there is no card, or none that can be read."""
    try:
        matter = _FRONT_MATTER.match(read_yaml(card)) if card.is_file() else None
        stated = parse_yaml(matter[1], str(card)).get("license") if matter else None
    except LongRopeError:
        return None
    return stated if isinstance(stated, str) and _LICENCE_ID.fullmatch(stated) else None


def _training(entry: dict[str, Any]) -> str:
    """One training: steps, rows, mix, what of the weights, and its last loss."""
    recorded = entry.get("settings")
    settings = recorded if isinstance(recorded, dict) else {}
    parts = [f"{settings['steps']} steps of rows of {settings['length']} tokens"] if "length" in settings else []
    if parts and settings.get("skip_to"):
        parts[0] += f" whose positions skip ahead, up to {settings['skip_to']}"
        factors = entry.get("row_attention_factors")
        listed = factors.items() if isinstance(factors, dict) else ()
        parts += [f"attention factor {value:.4g} in {part}" for part, value in listed if isinstance(value, int | float)]
    if settings.get("mix"):
        parts.append(f"mix {settings['mix']}")
    lora = settings.get("lora")
    if isinstance(lora, dict):
        parts.append(f"LoRA of rank {lora.get('rank')}, embeddings and norms in full")
    else:
        parts.append("all weights")
    if isinstance(entry.get("final_loss"), int | float):
        parts.append(f"last loss {entry['final_loss']:.4f} nats per token")
    command = f"; {code_span(entry['command'])}" if entry.get("command") else ""
    return plain(", ".join(parts)) + command
