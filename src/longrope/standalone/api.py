"""`longrope.LongRoPEModel`: the standalone model with its training, its extension and its export.

    from longrope import LongRoPEModel, load_data

    data = load_data("books/")
    model = LongRoPEModel(d_model=512, n_heads=8, num_layers=6, base_length=4096)
    model.fit(data, steps=2000)
    model = model.extend_context(data, 16384)

The network itself is in `model.py`. The search is that of every model, on a Llama with the same weights.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from longrope.callbacks import Callbacks, TrainProgress
from longrope.checks import LARGEST_SEED, count_in, positive_number, whole_number
from longrope.data.documents import Document
from longrope.data.sources import Field, TextData, as_sources, read_all
from longrope.errors import LongRopeError
from longrope.export.config import ExportConfig
from longrope.export.hf import export_hf
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, load_model
from longrope.models.targets import require_longer
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.run import search
from longrope.standalone.llama import as_llama, byte_tokenizer, write_llama
from longrope.standalone.model import StandaloneModel
from longrope.standalone.sizes import VOCABULARY
from longrope.units import format_length, parse_length

Bytes = npt.NDArray[np.uint8]
_P = ParamSpec("_P")
_R = TypeVar("_R")

_WARM_UP, _LAST_RATE = 0.05, 0.1  # shares of the steps and of the learning rate
_CLIP = 1.0  # norm of the gradient
_LONG_FORWARD = 1e15  # FLOPs of one text: beyond, a search takes more than minutes, and warns


def _renamed(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Lets a function take keyword arguments by their names of the last release, with a DeprecationWarning."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for old in names.keys() & kwargs.keys():
                message = f"{function.__name__}({old}=…) is deprecated: use {names[old]}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def load_data(path: Path | str, field: Field | None = None) -> list[Document]:
    """Read the texts of a file (`.txt`, `.jsonl`, `.json`, also `.gz`, `.xz`, `.zst`; `.parquet`) or folder, each once.

    `field`: where rows have their text (`a.b` for a nested field; of several, the first that a row has); by default
    `text`. Raises LongRopeError for what is missing, empty or not text.
    """
    return read_all(as_sources(path, field))


def default_search(geometry: RopeGeometry) -> SearchConfig:
    """The default search of `extend_context`: 12 gradient steps for each doubling of the window, on 2 texts."""
    knots = 8 if geometry.pairs >= 8 else 0  # 0: every pair
    return SearchConfig(method="gradient", steps=12, samples=2, knots=knots)


class LongRoPEModel(StandaloneModel):
    """A causal transformer over embeddings or bytes whose context window can be extended."""

    def fit(
        self,
        data: TextData,
        *,
        steps: int = 1000,
        batch: int = 16,
        length: int | None = None,
        learning_rate: float = 1e-3,
        seed: int = 0,
        callbacks: Callbacks | None = None,
    ) -> list[float]:
        """Train on next-byte prediction: `steps` of AdamW, each on `batch` random rows of `length` bytes of `data`.

        `data`: documents from `load_data`, or files and folders. `length` is the base length by default; any length
        that the scaling reaches fine-tunes its window. The learning rate warms up over a twentieth of the steps and
        falls by a cosine to a tenth. Returns the loss of every step in nats per byte. The model is in eval mode
        afterwards.

        Raises LongRopeError for settings that cannot be, for texts that are too short, and when the loss is no longer
        finite: the weights are then those of the last good step.
        """
        length = whole_number("length", self.sizes.base_length if length is None else length, 1)
        steps, batch = whole_number("steps", steps, 1), whole_number("batch", batch, 1)
        seed, peak = count_in("seed", seed, 0, LARGEST_SEED), positive_number("learning_rate", learning_rate)
        self.scaling.window_for(length)
        texts = [text for document in read_all(as_sources(data)) if len(text := _bytes(document)) > length]
        if not texts:
            raise LongRopeError(
                f"expected a text of more than {length} bytes to train on; found none", code="too-short-text"
            )
        callbacks = callbacks or Callbacks()
        optimizer = torch.optim.AdamW(self.parameters(), lr=peak, betas=(0.9, 0.95))
        rng = np.random.default_rng(seed)
        losses: list[float] = []
        self.train()
        callbacks.on_train_start(steps, 0)
        began = time.monotonic()
        try:
            for step in range(1, steps + 1):
                loss = next_byte_loss(self, draw_rows(texts, length + 1, batch, rng))
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise LongRopeError(
                        f"the loss became {losses[-1]} at step {step}",
                        code="not-finite",
                        hint=f"train with a `learning_rate` below {peak:g}",
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.parameters(), _CLIP)
                for group in optimizer.param_groups:
                    group["lr"] = peak * _rate(step, steps)
                optimizer.step()
                rate = step * batch * length / max(time.monotonic() - began, 1e-9)
                callbacks.on_train_progress(TrainProgress(step, losses[-1], rate))
        finally:
            self.zero_grad()
            self.eval()
        return losses

    @_renamed(options="config", out="output_dir")
    def extend_context(
        self,
        data: TextData,
        target_length: int | str,
        config: SearchConfig | None = None,
        *,
        output_dir: Path | str | None = None,
        callbacks: Callbacks | None = None,
    ) -> Self:
        """Search rescale factors for `target_length` tokens on `data`; returns a copy of this model under them.

        The search is that of `longrope search`, on the bytes of the texts. `config`: its method and its budget, by
        default a short gradient search (`default_search`). `output_dir`: a new folder for its log and its result. Up
        to the window that this model has, the rescale factors stay as they are.

        Warns when the model predicts the text no better than the frequencies of its bytes do: the model is untrained,
        and factors found for it mean little. Warns, too, when scoring one text takes more than 1e15 FLOPs.

        Raises LongRopeError when `target_length` is not above the model's window or `data` is too short for it.
        """
        documents, target_length = read_all(as_sources(data)), parse_length(target_length)
        loaded = self._as_loaded()
        require_longer(loaded, target_length)
        config = config or default_search(loaded.geometry)
        self._warn(documents, target_length)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "search" if output_dir is None else Path(output_dir)
            found = search(loaded, target_length, documents, folder, config, callbacks=callbacks)
        return self.with_scaling(found.scaling)

    def to_hf(self, folder: Path | str | None = None, *, allow_lossy: bool = False) -> PreTrainedModel:
        """A LlamaForCausalLM with the same logits, in eval mode; with `folder`, the checkpoint stays there.

        The checkpoint has a tokenizer of bytes, so that every function and command works on it. That of an extended
        model is written and proved as `export_checkpoint` does. transformers computes angles in float32, so logits
        agree to rounding.

        Raises LongRopeError when transformers cannot express the scaling (start tokens, more than two windows) and
        `allow_lossy` is not set, or when the folder has anything in it.
        """
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) / "checkpoint" if folder is None else Path(folder)
            if self._extended:
                plain = Path(temporary) / type(self).__name__  # the card of the export says this name
                write_llama(self, plain)
                export_hf(str(plain), self.scaling, target, ExportConfig(allow_lossy=allow_lossy))
            else:
                write_llama(self, target)
            return load_model(str(target), dtype="checkpoint", device=str(self.lm_head.weight.device))

    @property
    def _extended(self) -> bool:
        return self.scaling.windows != RopeScaling.original(self.sizes.geometry).windows

    def _as_loaded(self) -> LoadedModel:
        """The model as a search takes it: a Llama under its original RoPE, and the scaling that it has."""
        return LoadedModel(
            name=type(self).__name__,
            model=as_llama(self),
            tokenizer=byte_tokenizer(self.sizes.base_length),
            geometry=self.sizes.geometry,
            checkpoint_scaling=self.scaling if self._extended else None,
            options=LoadOptions(device=str(self.lm_head.weight.device)),
        )

    def _warn(self, documents: Sequence[Document], target_length: int) -> None:
        """The warnings of `extend_context`."""
        texts = [_bytes(document) for document in documents]
        loss, chance = self._loss_of_start(max(texts, key=len)), _entropy(texts)
        if loss is not None and not loss < chance:
            warnings.warn(
                f"this model is untrained: {loss:.2f} nats per byte of this text, where the frequencies of its bytes "
                f"alone give {chance:.2f}; rescale factors searched for it mean little: fit() it first",
                stacklevel=3,
            )
        flops = self.plan(target_length).flops
        if flops > _LONG_FORWARD:
            warnings.warn(
                f"the search scores dozens of texts of {format_length(target_length)} tokens, {flops:.1e} FLOPs each; "
                "plan() shows their cost, SearchConfig bounds their number",
                stacklevel=3,
            )

    def _loss_of_start(self, text: Bytes) -> float | None:
        """The loss of the first base length of `text`, in nats per byte; None where there is nothing to predict."""
        row = torch.from_numpy(text[: self.sizes.base_length + 1].astype(np.int64))[None]
        return float(next_byte_loss(self, row).detach()) if row.shape[1] > 1 else None


def _entropy(texts: Sequence[Bytes]) -> float:
    """The entropy of the byte frequencies of `texts`, in nats."""
    counts = np.sum([np.bincount(text, minlength=VOCABULARY) for text in texts], axis=0)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _bytes(document: Document) -> Bytes:
    return np.frombuffer(document.text.encode(), dtype=np.uint8)


def next_byte_loss(model: StandaloneModel, rows: Tensor) -> Tensor:
    """Mean loss, in nats per byte, of predicting each next byte of `rows`, int64 (B, T + 1)."""
    rows = rows.to(model.lm_head.weight.device)
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def draw_rows(texts: Sequence[Bytes], length: int, count: int, rng: np.random.Generator) -> Tensor:
    """Draw `count` rows of `length` consecutive bytes, int64 (B, length), from all places of `texts` alike."""
    ends = np.cumsum([len(text) - length + 1 for text in texts])
    rows = np.empty((count, length), dtype=np.int64)
    for row, place in zip(rows, rng.integers(ends[-1], size=count), strict=True):
        index = int(np.searchsorted(ends, place, side="right"))
        start = int(place) - (int(ends[index - 1]) if index else 0)
        row[:] = texts[index][start : start + length]
    return torch.from_numpy(rows)


def _rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`, from 1."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up) / (steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
