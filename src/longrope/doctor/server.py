"""The RoPE that a running server computes, by its log-probabilities against those of the model here.

The model computes the same texts here under every hypothesis: plain RoPE or the factors of one window of the scaling,
for all lengths, with the attention factor 1, the stated one, or that of Phi-3's formula. The server computes the
hypothesis that its numbers are nearest to, if they are much further from all others: its dtype, kernels or quantised
weights are others, so they are never equal. Rounding is as large in short texts; the distance to a rotation that is no
hypothesis grows with the position. A server that gives the log-probabilities of a prompt is compared on the last tokens
of every text, another one on the most likely next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope.callbacks import Callbacks
from longrope.data.books import shipped_books
from longrope.data.samples import draw_samples
from longrope.data.sources import read_all
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.server.client import Server
from longrope.evaluation.server.config import ServerOptions
from longrope.models.apply import scaled
from longrope.models.config import LoadOptions
from longrope.models.devices import device_of, says_where
from longrope.models.finite import require_finite, require_finite_logits
from longrope.models.loading import LoadedModel, config_and_scaling, load_tokenizer, open_model
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import last_logits, token_nll
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.scaling import RopeScaling, Window
from longrope.units import format_length

TEXTS = 2
"""Texts of each length."""
LAST = 256
"""Tokens at the end of a text whose log-probabilities are compared."""
TOP = 5
"""Most likely next tokens that are asked for; more are refused by some servers."""
APART = 3.0
"""The ratio of distances from which on the nearest hypothesis is told from another."""
EQUAL = 1e-4
"""Nats: hypotheses that lie closer are not told apart by any server."""
FAR = 0.5
"""Nats: a mean distance above which a server computes none of the hypotheses, or another model."""
ROUNDED = 0.02
"""Nats: a mean distance that is rounding, whatever it is in short texts."""
SHORT, SHORT_TEXTS = 33, 16
"""Tokens of the short texts that rounding is measured on, and their number."""
GROWN = 1.5
"""The ratio of a distance to that of short texts from which on it is no rounding; APART for next tokens, as few."""
COARSE = 0.1
"""Nats: a mean distance above which rounding is mentioned: weights of some four bits."""
AT_ONCE = 1024
"""Tokens of texts that run here in one batch; a longer text runs alone."""
PLAIN = "plain RoPE"


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A rotation for all lengths: the factors of a window, and an attention factor."""

    factors: str
    """`plain RoPE`, `the short factors`, `the long factors`, or those of a window between."""
    window: Window

    def __str__(self) -> str:
        m = self.window.attention_factor
        return self.factors if self.factors == PLAIN and m == 1.0 else f"{self.factors} with attention factor {m:.4g}"


@dataclass(frozen=True, slots=True)
class ServedLength:
    """The comparison at one length; distances are means of |Δ log p| in nats."""

    length: int
    expected: Hypothesis
    distances: dict[str, float]
    """By hypothesis; empty where the server gave nothing."""
    near: tuple[Hypothesis, ...]
    """The hypotheses that the server's numbers do not tell apart from the nearest; none where all are far."""
    in_short_texts: float | None = None
    """The distance of the nearest hypothesis in short texts; None where the nearest is so near that none was needed."""

    @property
    def as_expected(self) -> bool:
        """True if the expected rotation is among the nearest."""
        return self.expected in self.near

    @property
    def found(self) -> str:
        """The rotation that the server computes, in words."""
        if not self.distances:
            return "not compared: the server gave no log-probabilities"
        if not self.near:
            nearest = min(self.distances, key=self.distances.__getitem__)
            if self.distances[nearest] > FAR:
                return "none of the rotations: another model, another tokenizer, or weights that are far from these"
            return f"another rotation, nearest to {nearest}: in short texts it is {self.in_short_texts:.2g} nats off"
        if self.as_expected:
            return str(self.expected)
        return " or ".join(map(str, self.near))

    def to_json(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "expected": str(self.expected),
            "found": self.found,
            "as_expected": self.as_expected,
            "near": [str(hypothesis) for hypothesis in self.near],
            "nats": self.distances,
            "nats_in_short_texts": self.in_short_texts,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDiagnosis:
    """The verdict on a server, and the comparison at every length."""

    server: str
    model: str
    compared_by: str
    """The numbers that were compared, in words."""
    lengths: tuple[ServedLength, ...]
    notes: tuple[str, ...]

    @property
    def compared(self) -> list[ServedLength]:
        return [at for at in self.lengths if at.distances]

    @property
    def right(self) -> bool:
        """True if every length that was compared is served as expected."""
        return all(at.as_expected for at in self.compared)

    @property
    def verdict(self) -> str:
        """The behaviour of the server in one sentence."""
        wrong = [at for at in self.compared if not at.as_expected]
        if not wrong:
            return "applies the scaling at every length that was compared"
        if any(not at.near for at in wrong):
            return "computes none of the rotations that the scaling could mean: see below"
        names = {hypothesis.factors for at in self.compared for hypothesis in _fewest(at)}
        where = "at every length"
        if len(names) == 1 and (name := names.pop()) == PLAIN:
            return f"applies no scaling: plain RoPE {where}"
        if all(at.expected.factors in {h.factors for h in at.near} for at in wrong):
            found = ", ".join(sorted({f"{h.window.attention_factor:.4g}" for at in wrong for h in at.near}))
            wanted = ", ".join(sorted({f"{at.expected.window.attention_factor:.4g}" for at in wrong}))
            return f"applies the factors with another attention factor: {found}, not {wanted}"
        if name := _everywhere(self.compared):
            return f"applies {name} {where}"
        listed = "; ".join(f"{format_length(at.length)}: {at.found}, not {at.expected}" for at in wrong)
        return f"applies something else: {listed}"

    def to_json(self) -> dict[str, Any]:
        """The object that `longrope doctor --server --json` prints."""
        return {
            "server": self.server,
            "model": self.model,
            "verdict": self.verdict,
            "right": self.right,
            "compared_by": self.compared_by,
            "lengths": [at.to_json() for at in self.lengths],
            "notes": list(self.notes),
        }


def _fewest(at: ServedLength) -> Sequence[Hypothesis]:
    """The hypotheses that a length speaks for: plain RoPE alone where it is among them."""
    plain = [hypothesis for hypothesis in at.near if hypothesis.factors == PLAIN]
    return plain or at.near


def _everywhere(compared: Sequence[ServedLength]) -> str:
    """The factors that all lengths have among the nearest; empty where none have."""
    shared = set.intersection(*({hypothesis.factors for hypothesis in at.near} for at in compared))
    return min(shared, default="")


def diagnose_server(
    checkpoint: str | Path,
    server: str,
    *,
    expect: RopeScaling | str | Path | None = None,
    lengths: Sequence[int] = (),
    options: ServerOptions | None = None,
    load: LoadOptions | None = None,
    callbacks: Callbacks | None = None,
) -> ServerDiagnosis:
    """Compare the model that `server` serves with what `checkpoint` should compute, which is computed here.

    `expect`: the scaling, or the path of one (default: that of the checkpoint). `lengths`: tokens of the texts, from
    shipped books (default: half of L, L, L + 1 and the target, as far as the server's context goes, one token for its
    reply). Weights are loaded here by `load`, and run once for each hypothesis and text.

    Raises LongRopeError, before weights are loaded, for no scaling or one of another model, another tokenizer, lengths
    above the target or the server's context; later for no log-probabilities and for numbers that are not finite. An
    error of the server after some lengths is a note.
    """
    name, load, callbacks = str(checkpoint), load or LoadOptions(), callbacks or Callbacks()
    _, geometry, own = config_and_scaling(name, load.original_length, trust_remote_code=load.trust_remote_code)
    scaling = expect if isinstance(expect, RopeScaling) else RopeScaling.load(expect) if expect else own
    if scaling is None:
        raise LongRopeError(
            f"{checkpoint} has no scaling, so there is nothing to tell apart on a server",
            code="no-scaling",
            hint="give the scaling.json that the server should apply as `expect`",
        )
    scaling.check_fits(replace(geometry, original_length=scaling.geometry.original_length))  # L is the scaling's
    asked = Server(server, options or ServerOptions())
    notes: list[str] = []
    tokenizer = load_tokenizer(name, trust_remote_code=load.trust_remote_code)
    if not asked.check_tokenizer(tokenizer):
        notes += asked.warnings or ["the server does not tell its tokens: not compared"]
    chosen = _lengths(scaling, asked, lengths, notes)
    loaded = open_model(name, tokenizer, load)
    texts = _texts(loaded, max(chosen))
    callbacks.on_device(says_where(loaded.model))
    with scaled(loaded.model, RopeScaling.original(scaling.geometry)) as handle:
        by_prompt, among = True, hypotheses(scaling)
        rows: list[ServedLength] = []
        in_short_texts: float | None = None
        for length in chosen:
            ids = texts[:, :length]
            try:
                try:
                    seen = _seen(asked, ids) if by_prompt else None
                except LongRopeError as error:
                    if error.code != "not-expressible":
                        raise
                    by_prompt, seen = False, None
                nats = _distances(handle, among, ids, asked, seen)
                if in_short_texts is None and nats and ROUNDED < min(nats.values()) <= FAR:
                    short = _texts(loaded, SHORT, SHORT_TEXTS)
                    found = _distances(handle, among, short, asked, _seen(asked, short) if by_prompt else None)
                    in_short_texts = min(found.values(), default=FAR)
            except LongRopeError as error:
                if error.code != "server-error" or not any(row.distances for row in rows):
                    raise
                notes.append(f"from {length} tokens on nothing is compared: {error.message}")
                break
            ratio = GROWN if by_prompt else APART
            rows.append(_judged(length, _expected(scaling, length, among), among, nats, in_short_texts, ratio))
    if not any(row.distances for row in rows):
        raise LongRopeError(
            f"{asked.address} gives no log-probabilities, of prompts or of next tokens: nothing can be compared",
            code="not-expressible",
            hint="measure it: longrope eval URL --suite passkey",
        )
    how = f"the last {LAST} tokens of prompts" if by_prompt else f"the {TOP} most likely next tokens"
    if not by_prompt:
        notes.append("the server gives no log-probabilities of prompts, so one token a text is compared")
    if any(row.near and min(row.distances.values()) > COARSE for row in rows):
        notes.append(
            f"the server's log-probabilities are {in_short_texts:.2g} nats off in short texts too: weights of few bits "
            "are, and so would be a rotation that is wrong for the nearest tokens already"
        )
    return ServerDiagnosis(
        server=asked.address, model=asked.model, compared_by=how, lengths=tuple(rows), notes=tuple(notes)
    )


def _lengths(scaling: RopeScaling, server: Server, given: Sequence[int], notes: list[str]) -> list[int]:
    """The lengths to compare at, each with room for a token of reply in the server's context."""
    room = None if server.context_length is None else server.context_length - 1
    if given:
        if not 2 <= min(given) <= max(given) <= scaling.target_length:
            raise LongRopeError(
                f"expected `lengths` of 2 to {scaling.target_length} tokens, the target of the scaling; found "
                f"{', '.join(map(str, given))}",
                code="invalid-setting",
            )
        server.check_lengths([length + 1 for length in given])
        return sorted(set(given))
    windows = scaling.windows
    switches = [window.max_length for window in windows[:-1]] or [scaling.geometry.original_length]
    wanted = {max(2, switches[0] // 2), scaling.target_length - 1}
    wanted |= {length for switch in switches for length in (switch, switch + 1)}
    fitting = sorted(length for length in wanted if room is None or length <= room)
    if len(fitting) < len(wanted) and room is not None:
        longest = scaling.target_length
        notes.append(f"the server takes {room + 1} tokens; longer texts, up to {longest}, are not compared")
        fitting = sorted({*fitting, room})
    return fitting


def _texts(loaded: LoadedModel, length: int, count: int = TEXTS) -> torch.Tensor:
    """Token ids (count, length) of shipped books."""
    sources = [f"book:{book.name}" for book in shipped_books() if book.role == "evaluation"]
    documents = tokenize(read_all(sources, tokenizer=loaded.tokenizer), loaded.tokenizer)
    return draw_samples(documents, length=length, count=count, seed=0, bos_token_id=bos_of(loaded.tokenizer)).ids


def hypotheses(scaling: RopeScaling) -> list[Hypothesis]:
    """Every rotation that the scaling could be taken for, equal ones once."""
    geometry, windows = scaling.geometry, scaling.windows
    named = {"the short factors": windows[0], "the long factors": windows[-1]}
    if len({window.factors for window in windows}) == 1:
        named = {"the long factors": windows[0]}
    for window in windows[1:-1]:
        named[f"the factors for {format_length(window.max_length)} tokens"] = window
    factors = {PLAIN: (1.0,) * geometry.pairs} | {name: window.factors for name, window in named.items()}
    ms = [1.0, *(window.attention_factor for window in windows), su_attention_factor(geometry, scaling.target_length)]
    starts = {window.factors: window.start_tokens for window in windows}
    found: list[Hypothesis] = []
    for name, values in factors.items():
        for m in ms:
            window = Window(scaling.target_length, values, starts.get(values, 0), m)
            if not any(_same(window, other.window) for other in found):
                found.append(Hypothesis(name, window))
    return found


def _same(first: Window, second: Window) -> bool:
    return first.start_tokens == second.start_tokens and np.allclose(
        [*first.factors, first.attention_factor], [*second.factors, second.attention_factor], rtol=1e-6, atol=0
    )


def _expected(scaling: RopeScaling, length: int, among: Sequence[Hypothesis]) -> Hypothesis:
    """The rotation of the scaling for a text of `length` tokens."""
    window = scaling.window_for(length)
    wanted = Window(scaling.target_length, window.factors, window.start_tokens, window.attention_factor)
    return next(hypothesis for hypothesis in among if _same(hypothesis.window, wanted))


def _seen(server: Server, ids: torch.Tensor) -> np.ndarray:
    """The losses of the last tokens, LAST at most, of texts `ids` (B, T) by the server: (B, tokens)."""
    return np.array([server.losses(row)[-LAST:] for row in ids.tolist()])


def _distances(
    handle: ScaledModel, among: Sequence[Hypothesis], ids: torch.Tensor, server: Server, seen: np.ndarray | None
) -> dict[str, float]:
    """The distance of each hypothesis on texts `ids` (B, T): by `seen`, or by next tokens where that is None."""
    return _by_next_tokens(handle, among, ids, server) if seen is None else _by_prompts(handle, among, ids, seen)


def _by_prompts(
    handle: ScaledModel, among: Sequence[Hypothesis], ids: torch.Tensor, seen: np.ndarray
) -> dict[str, float]:
    """The distance of each hypothesis by the losses `seen` (B, tokens) of the last tokens of texts `ids` (B, T)."""
    distances = {}
    texts, rows = ids.to(device_of(handle.model)), max(1, AT_ONCE // ids.shape[1])
    batches = [texts[at : at + rows] for at in range(0, len(texts), rows)]
    start = ids.shape[1] - 1 - seen.shape[1]
    for hypothesis in among:
        with handle.using(hypothesis.window), torch.inference_mode():
            own = torch.cat([token_nll(handle.model, batch, start=start).double().cpu() for batch in batches])
        require_finite(handle.model, own, "the loss is", ids.shape[1])
        distances[str(hypothesis)] = float(np.abs(own.numpy() - seen).mean())
    return distances


def _by_next_tokens(
    handle: ScaledModel, among: Sequence[Hypothesis], ids: torch.Tensor, server: Server
) -> dict[str, float]:
    """The distance of each hypothesis by the most likely tokens after texts `ids` (TEXTS, T); where the server does not
    name ids, by their order. Empty where it gives none."""
    answers = [(row, top) for row in ids if (top := server.next_tokens(row.tolist(), TOP))]
    distances: dict[str, float] = {}
    for hypothesis in among if answers else []:
        parts = []
        for row, top in answers:
            with handle.using(hypothesis.window), torch.inference_mode():
                logits = last_logits(handle.model, row[None].to(device_of(handle.model)), 1)[0, -1]
            require_finite_logits(handle.model, logits, len(row))
            own = logits.double().log_softmax(-1).cpu().numpy()
            values = np.array([value for _, value in top])
            named = [token for token, _ in top if token is not None]
            ours = own[named] if len(named) == len(top) else np.sort(own)[::-1][: len(top)]
            parts.append(np.abs(ours - (values if len(named) == len(top) else np.sort(values)[::-1])).mean())
        distances[str(hypothesis)] = float(np.mean(parts))
    return distances


def _judged(
    length: int,
    expected: Hypothesis,
    among: Sequence[Hypothesis],
    distances: dict[str, float],
    in_short_texts: float | None,
    ratio: float,
) -> ServedLength:
    """The hypotheses near the server's numbers; `ratio`: how far beyond that in short texts rounding may go."""
    nearest = min(distances.values(), default=0.0)
    grown = in_short_texts is not None and nearest > max(ROUNDED, ratio * in_short_texts)
    if not distances or nearest > FAR or grown:
        return ServedLength(length, expected, distances, (), in_short_texts)
    most = max(APART * nearest, EQUAL)
    near = tuple(hypothesis for hypothesis in among if distances[str(hypothesis)] <= most)
    return ServedLength(length, expected, distances, near, in_short_texts)
