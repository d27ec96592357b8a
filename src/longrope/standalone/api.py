"""`longrope.LongRoPEModel`: the standalone model with all it takes to train, extend and export it.

    from longrope import LongRoPEModel, load_data

    data = load_data("books/")
    model = LongRoPEModel(d_model=512, n_heads=8, num_layers=6, base_length=4096)
    model.fit(data, steps=2000)
    model = model.extend_context(data, 16384)

The model itself is `models/standalone.py`. Its search is the tool's own, on a Llama with the same weights.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel

from longrope.checks import whole_number
from longrope.data.documents import Document
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.export.config import ExportConfig
from longrope.export.hf import export_hf
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, load_model, require_longer
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.loop import Progress
from longrope.search.run import search
from longrope.standalone import training as standalone_fit
from longrope.standalone.llama import as_llama, byte_tokenizer, write_llama
from longrope.standalone.model import StandaloneModel
from longrope.standalone.sizes import VOCABULARY
from longrope.standalone.training import Bytes, next_byte_loss
from longrope.units import format_length

_LONG_FORWARD = 1e15  # FLOPs of one text: beyond, a search is no matter of minutes, and says so


def load_data(path: Path | str) -> list[Document]:
    """Read the texts of a file (`.txt`, `.jsonl`, also `.gz` and `.xz`; `.parquet`) or of a folder of them, each once.

    Raises LongRopeError for what is missing, empty or not text.
    """
    return read_all([path])


def default_budget(geometry: RopeGeometry) -> SearchConfig:
    """What `extend_context` spends when it is told nothing else: 12 gradient steps for each doubling, on 2 texts."""
    knots = 8 if geometry.pairs >= 8 else 0  # 0: every pair
    return SearchConfig(method="gradient", steps=12, samples=2, knots=knots)


class LongRoPEModel(StandaloneModel):
    """A causal transformer over embeddings or bytes whose context window can be extended."""

    def fit(
        self,
        data: Sequence[Document],
        *,
        steps: int = 1000,
        batch: int = 16,
        length: int | None = None,
        learning_rate: float = 1e-3,
        seed: int = 0,
        on_progress: Callable[[int, float], None] = lambda *_: None,
    ) -> list[float]:
        """Train on next-byte prediction: `steps` of AdamW, each on `batch` random rows of `length` bytes of `data`.

        `length` is the base length by default; any length that the scaling reaches fine-tunes its window. The learning
        rate warms up over a twentieth of the steps and falls by a cosine to a tenth. `on_progress` gets the step, from
        1, and its loss. Returns the loss of every step in nats per byte. The model is in eval mode afterwards.

        Raises LongRopeError for settings that cannot be, for texts that are too short, and when the loss is no longer
        finite: the weights are then those of the last good step.
        """
        return standalone_fit.fit(
            self,
            [_bytes(document) for document in _documents(data)],
            length=self.sizes.base_length if length is None else length,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            on_progress=on_progress,
        )

    def extend_context(
        self,
        data: Sequence[Document],
        target_length: int,
        options: SearchConfig | None = None,
        *,
        out: Path | str | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Self:
        """Search rescale factors for `target_length` tokens on `data`; returns a copy of this model under them.

        The search is that of `longrope search`, on the bytes of the texts. `options` are its method and its budget,
        by default a short gradient search (`default_budget`); `out` is a new folder for its log and its result. Up to
        the window that this model has, the rescale factors stay as they are.

        Warns when the model predicts the text no better than the frequencies of its bytes do: it is untrained, and
        factors found for it mean little. Warns, too, when scoring one text takes more than 1e15 FLOPs.

        Raises LongRopeError when `target_length` is not above the model's window or `data` is too short for it.
        """
        documents = _documents(data)
        target_length = whole_number("target_length", target_length, 1)
        loaded = self._subject()
        require_longer(loaded, target_length)
        options = options or default_budget(loaded.geometry)
        self._warn(documents, target_length)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "search" if out is None else Path(out)
            found = search(loaded, target_length, documents, folder, options, on_progress=on_progress)
        return self.with_scaling(found.scaling)

    def to_hf(self, folder: Path | str | None = None, *, allow_lossy: bool = False) -> PreTrainedModel:
        """A LlamaForCausalLM with the same logits, in eval mode; with `folder`, the checkpoint stays there.

        The checkpoint has a tokenizer of bytes, so that every verb of the tool works on it. That of an extended model
        is `longrope export`'s, with its proof. transformers computes angles in float32, so logits agree to rounding.

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

    def _subject(self) -> LoadedModel:
        """This model as the tool's verbs see one: a Llama under its original RoPE, and the scaling that it has."""
        return LoadedModel(
            name=type(self).__name__,
            model=as_llama(self),
            tokenizer=byte_tokenizer(self.sizes.base_length),
            geometry=self.sizes.geometry,
            checkpoint_scaling=self.scaling if self._extended else None,
            options=LoadOptions(),
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
                "plan() says what they are made of, SearchOptions bounds their number",
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


def _documents(data: Sequence[Document]) -> list[Document]:
    documents = [] if isinstance(data, str) else list(data)
    if not documents or not all(isinstance(document, Document) for document in documents):
        raise LongRopeError("expected the documents that load_data(path) returns; found something else")
    return documents


def _bytes(document: Document) -> Bytes:
    return np.frombuffer(document.text.encode(), dtype=np.uint8)
