"""Perplexity by length: exp(Σ NLL / Σ tokens), summed first and divided once, never a mean of per-window means.

Two forms. *Prefix*: the first `length` tokens of every sample, one window each. *Sliding* (LongRoPE's evaluation, with
stride 256): every token of the whole sample is scored once, with at most `length` tokens of context. The prefix form
also gives the loss by position, in buckets that double, which shows whether far context helps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.samples import Samples
from longrope.data.sources import Field, TextData, as_sources
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalContext, EvalTask, PreparedTask, ScaledMethod, Suite, sources_of
from longrope.evaluation.compare import Comparison, scaling_to_measure
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.held_out import check_unseen, read_texts
from longrope.evaluation.results import EvalRow, mean_and_stderr, values_by_length
from longrope.evaluation.retrieval import ids_sha256
from longrope.models.apply import kept_modes
from longrope.models.apply import scaled as with_scaling
from longrope.models.config import LoadOptions
from longrope.models.devices import device_of
from longrope.models.finite import not_finite, require_finite
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import token_nll
from longrope.models.texts import require_texts
from longrope.rope.baselines import Method
from longrope.rope.scaling import RopeScaling
from longrope.units import parse_lengths

SUITE = "perplexity"
FIRST_BUCKET = 32
"""The end, in tokens, of the first bucket of the loss by position; the others end at 64, 128, …"""


def perplexity(
    model: PreTrainedModel | LoadedModel | Path | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    data: TextData = (),
    field: Field | None = None,
    lengths: int | str | Sequence[int | str],
    scaling: RopeScaling | Path | str | None = None,
    samples: int = 10,
    stride: int | None = None,
    seed: int = 0,
    allow_seen: bool = False,
    load: LoadOptions | None = None,
) -> dict[int, float]:
    """The perplexity of a model by length: {tokens: perplexity}.

    The numbers are those of `evaluate` with the suite `perplexity`, which also gives standard errors.

    Args:
        model: A loaded transformers model (its scaling, if one is applied, and its training mode are put back at the
            end), a folder or a name.
        tokenizer: Its tokenizer; by default the one that `model` came with.
        data: Held-out texts: files, folders, `book:NAME`, `hf:NAME`.
        field: The field of rows of `data` that holds their text or chat messages (`a.b` for a nested one); of several,
            the first that a row has counts. By default `text`, else `messages`.
        lengths: Context lengths in tokens: `4096`, `"128k"`, or several.
        scaling: The scaling to measure or its file. By default the one that is applied to `model`, else the model as it
            is.
        samples: Texts of the longest length, one per document first; shorter lengths score their beginnings.
        stride: Tokens that a sliding window moves by; by default each text is scored once from its beginning.
        seed: Decides the samples.
        allow_seen: Accept texts that the search or training of the scaling has seen.
        load: The options of loading a model by name or folder.

    Raises LongRopeError for lengths that the scaling or the texts cannot give, and for texts that were seen.
    """
    with kept_modes(model):
        require_texts(model, as_sources(data, field), "evaluation", load)
        loaded, windows = open_model(model, tokenizer, load), list(dict.fromkeys(parse_lengths(lengths)))
        check_lengths(windows, max(windows, default=0), stride)
        wanted, name = scaling_to_measure(loaded, scaling)
        (method,) = Comparison.of(loaded, wanted, name, {}, max(windows)).methods
        method.window(max(windows))
        documents = read_texts(loaded, data, field)
        check_unseen(loaded.recorded, documents, [wanted], allow_seen)
        drawn = EvalContext.of(loaded, windows, documents, seed, EvalConfig(samples=samples)).samples(max(windows))
        with with_scaling(loaded.model, RopeScaling.original(loaded.geometry)) as scaled:
            rows = measure_perplexity(scaled, drawn, windows, method, stride=stride)
    return values_by_length(rows, method.name)


def measure_perplexity(
    scaled: ScaledModel,
    samples: Samples,
    lengths: Sequence[int],
    method: Method,
    *,
    stride: int | None = None,
    positions: bool = False,
    callbacks: Callbacks | None = None,
) -> list[EvalRow]:
    """One row per length: perplexity, its standard error over samples (delta method), and the number of samples.

    `lengths` are context windows in tokens; `samples` must be at least as long as the longest. `stride` chooses the
    sliding form. `positions` adds the rows of `loss_by_position` for each length, in the prefix form. A step is one
    sample at one length.

    Raises LongRopeError: `invalid-setting` for lengths the samples cannot give, `not-finite` for NaN and infinity.
    """
    check_lengths(lengths, samples.length, stride)
    callbacks = callbacks or Callbacks()
    scaled.model.eval()
    rows = []
    for length in lengths:
        sums, counts, losses = [], [], []
        with scaled.using(method.window(length)), torch.inference_mode():
            for ids in samples.ids.to(device_of(scaled.model)):
                if stride is None:
                    nll = token_nll(scaled.model, ids[None, :length])[0]
                else:
                    nll = sliding_nll(scaled, ids, length, stride, samples.has_bos)
                require_finite(scaled.model, nll, "the loss is", length)
                sums.append(float(nll.sum(dtype=torch.float64)))
                counts.append(nll.numel())
                if positions and stride is None:
                    losses.append(nll.cpu())
                callbacks.on_eval_step()
        rows.append(_row(method.name, length, sums, counts, samples.ids[:, :length]))
        if not math.isfinite(rows[-1].value):
            raise not_finite(scaled.model, f"the perplexity of a loss of {sum(sums) / sum(counts):.0f} nats is", length)
        rows += loss_by_position(method.name, losses) if losses else []
    return rows


def perplexity_rows(name: str, ids: Tensor, losses: Sequence[Tensor]) -> list[EvalRow]:
    """The rows of `measure_perplexity` at one length T, from `ids` (N, T) and the losses (T − 1,) of every sample."""
    sums = [float(nll.sum(dtype=torch.float64)) for nll in losses]
    counts = [nll.numel() for nll in losses]
    return [_row(name, ids.shape[1], sums, counts, ids), *loss_by_position(name, losses)]


def loss_by_position(name: str, losses: Sequence[Tensor]) -> list[EvalRow]:
    """The mean loss, in nats, of the tokens at positions [1, 32), [32, 64), [64, 128), …: one row per bucket.

    `losses` are the losses (T − 1,) of samples of equally many tokens T, as `token_nll` gives them: entry j is that of
    the token at position j + 1. The rows' `detail` has the first position of the bucket and the first behind it.
    """
    length = losses[0].numel() + 1
    edges = [1]
    while edges[-1] < length:
        edges.append(min(max(2 * edges[-1], FIRST_BUCKET), length))
    rows = []
    for begin, end in pairwise(edges):
        means = [float(nll[begin - 1 : end - 1].mean(dtype=torch.float64)) for nll in losses]
        detail = {"from": begin, "to": end}
        rows.append(EvalRow(SUITE, name, length, "nll", *mean_and_stderr(means), len(losses), detail))
    return rows


def check_lengths(lengths: Sequence[int], longest: int, stride: int | None) -> None:
    """Raise LongRopeError for context lengths that texts of `longest` tokens cannot give, or a stride too long."""
    if not lengths or max(lengths) > longest or min(lengths) < 2:
        raise LongRopeError(
            f"expected `lengths` from 2 to the samples' {longest} tokens, found {list(lengths)}", code="invalid-setting"
        )
    if stride is not None and not 1 <= stride < min(lengths):
        raise LongRopeError(
            f"expected a `stride` from 1 to below the shortest length {min(lengths)}, found {stride}",
            code="invalid-setting",
        )


def sliding_nll(scaled: ScaledModel, ids: Tensor, window: int, stride: int, has_bos: bool) -> Tensor:
    """NLL in nats of every token of `ids` (T,) but the first, each with at most `window` tokens of context: (T − 1,).

    The window moves by `stride` and scores only the tokens that are new. Where the tokenizer has a BOS, every window
    begins with it, as every text the model was trained on does.
    """
    if not 1 <= stride < window:
        raise LongRopeError(
            f"expected a `stride` from 1 to below the window of {window} tokens, found {stride}", code="invalid-setting"
        )
    front, text = (ids[:1], ids[1:]) if has_bos else (ids[:0], ids)
    room = window - len(front)
    pieces, scored = [], 1 - len(front)  # text tokens scored so far; without BOS the first cannot be
    end = min(room, len(text))
    while True:
        begin = end - min(room, end)
        piece = torch.cat([front, text[begin:end]])
        pieces.append(token_nll(scaled.model, piece[None], start=len(front) + scored - begin - 1)[0])
        scored = end
        if end == len(text):
            return torch.cat(pieces)
        end = min(end + stride, len(text))


def _row(name: str, length: int, sums: Sequence[float], counts: Sequence[int], ids: Tensor) -> EvalRow:
    # torch's exponential: infinity where the perplexity is beyond float64.
    value = float(torch.tensor(sum(sums) / sum(counts), dtype=torch.float64).exp())
    stderr = None
    if len(sums) > 1:
        means = torch.tensor(sums, dtype=torch.float64) / torch.tensor(counts, dtype=torch.float64)
        stderr = value * float(means.std() / math.sqrt(len(sums)))
    texts = (ids_sha256([row.cpu().numpy()])[:16] for row in ids)
    losses = {text: total / count for text, total, count in zip(texts, sums, counts, strict=True)}
    return EvalRow(SUITE, name, length, "perplexity", value, stderr, len(sums), losses=losses)


class PerplexitySuite(Suite):
    """Perplexity by length, and loss by position."""

    name = SUITE

    @cached_property
    def samples(self) -> Samples:
        """Texts of the longest length: shorter lengths score their beginnings."""
        return self.context.samples(max(self.context.lengths))

    def check(self) -> None:
        lengths = self.context.lengths
        check_lengths(lengths, max(lengths), self.context.config.stride)
        _ = self.samples  # drawn now, so that too little text is found now

    def settings(self) -> dict[str, Any]:
        return {"samples": self.context.config.samples, "stride": self.context.config.stride}

    def tasks(self) -> Iterator[EvalTask]:
        for length in self.context.lengths:
            yield EvalTask(self.name, "", length, self.context.config.samples)

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        stride = self.context.config.stride
        return PreparedTask(
            self.samples.sha256,
            sources_of(self.samples),
            lambda scaled, method, callbacks: measure_perplexity(
                scaled, self.samples, [task.length], method, stride=stride, positions=True, callbacks=callbacks
            ),
        )
