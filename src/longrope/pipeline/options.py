"""What a search can be told, validated, and the named values of its options."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.rope.factors import su_attention_factor, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.search.space import START_TOKENS

METHODS = ("longrope", "longrope2", "gradient")
OBJECTIVES = ("perplexity", "needle")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search can be told; None is the method's own default.

    `method`: `longrope` (evolution over all pairs), `longrope2` (evolution over d_rcd and the pairs beyond it) or
    `gradient`. `objective`: `perplexity`, or `needle` with its `needle_depth` (`spread`, `start`, or a number in
    [0, 1]); by default `needle` for longrope2, else `perplexity`. `samples`: texts that are scored, by default the
    papers' 5 (3 beyond 512k tokens), 10 for needles. `attention_factor`: `su`, `yarn`, or a number; by default that of
    the scaling the checkpoint carries, else `su`, which every runtime computes by itself. With 1, sequences inside the
    original window stay exactly those of the original model, in the runtimes that honour it.

    Evolution: `population`, by default the papers' 64 (32 beyond 512k tokens), `iterations`, `patience`.
    `start_tokens`: `0` (portable: no runtime but ours can express others), a number, or `search` (the paper's set as a
    gene; longrope only).

    Gradient: `steps`, `knots` (0: every pair), `learning_rate`, `continuation` (reach L' over 2L, 4L, …),
    `learn_attention_factor`.
    """

    method: str = "longrope"
    objective: str | None = None
    needle_depth: str = "spread"
    samples: int | None = None
    seed: int = 0
    attention_factor: str | None = None
    population: int | None = None
    iterations: int = 40
    patience: int | None = None
    start_tokens: str = "0"
    steps: int = 36
    knots: int = 8
    learning_rate: float = 0.2
    continuation: bool = True
    learn_attention_factor: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LongRopeError(f"expected a search method of {', '.join(METHODS)}; found {self.method!r}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise LongRopeError(f"expected an objective of {', '.join(OBJECTIVES)}; found {self.objective!r}")
        if self.method != "longrope" and start_tokens_of(self.start_tokens) != (0,):
            raise LongRopeError(f"start tokens are searched by the method longrope only; found {self.method!r}")

    @property
    def chosen_objective(self) -> str:
        """The objective asked for, or the method's own."""
        return self.objective or ("needle" if self.method == "longrope2" else "perplexity")


def attention_factor_of(text: str, geometry: RopeGeometry, target_length: int) -> float:
    """The attention factor that `su`, `yarn` or a number names. Raises LongRopeError for anything else."""
    named = {"su": su_attention_factor, "yarn": yarn_attention_factor}
    if text in named:
        return named[text](geometry, target_length)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise LongRopeError(f"expected an attention factor of su, yarn or a positive number; found {text!r}")
    return value


def start_tokens_of(text: str) -> tuple[int, ...]:
    """The choices of n̂ that `search` or a number names. Raises LongRopeError for anything else."""
    if text == "search":
        return START_TOKENS
    if text.isdecimal() and len(text) <= 9:
        return (int(text),)
    raise LongRopeError(f"expected start tokens of 'search' or a number of tokens, found {text!r}")
