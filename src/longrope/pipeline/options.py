"""What a search can be told, validated, and the named values of its options."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.rope.factors import su_attention_factor, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.search.space import START_TOKENS

METHODS = ("longrope", "longrope2", "gradient", "hybrid", "cma")
OBJECTIVES = ("perplexity", "needle")
CONTINUED = "continued"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search can be told; None is the method's own default.

    `method`: `longrope` (evolution over all pairs), `longrope2` (evolution over d_rcd and the pairs beyond it),
    `gradient`, `hybrid` (the gradient's result polished by CMA-ES) or `cma` (CMA-ES alone). `objective`: `perplexity`,
    or `needle` with its `needle_depth` (`spread`, `start`, or a number in [0, 1]); by default `needle` for longrope2,
    else `perplexity`. `samples`: texts that are scored, by default the papers' 5 (3 beyond 512k tokens), 10 for
    needles. `attention_factor`: `su`, `yarn`, or a number; by default that of the scaling the checkpoint carries, else
    `su`, which every runtime computes by itself. `continued`: the carried one, continued beyond its reach as YaRN does;
    better where nothing is trained there, and two attention factors, which no other runtime has. With 1, sequences
    inside the original window stay exactly those of the original model, in the runtimes that honour it.

    Evolution: `population`, by default the papers' 64 (32 beyond 512k tokens), `iterations`, `patience`.
    `start_tokens`: `0` (portable: no runtime but ours can express others), a number, or `search` (the paper's set as a
    gene; longrope only). `racing`: candidates are dropped after each sample on which they cannot be expected in the
    top k; without it, Algorithm 1 as it is. `critical_dim`: longrope2 searches with this d_rcd alone, and every method
    also reports YaRN-rcd and NTK-rcd with it. `max_factor`: the largest λ (longrope only; by default 1.25·s).

    Gradient and CMA-ES: `knots` (0: every pair; by default every pair for the gradient, 12 for CMA-ES). Gradient:
    `steps`, `learning_rate`, `continuation` (reach L' over 2L, 4L, …), `learn_attention_factor`. CMA-ES:
    `evaluations`, by default 256 alone and 66 after the gradient.
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
    racing: bool = False
    critical_dim: int | None = None
    max_factor: float | None = None
    steps: int = 30
    knots: int | None = None
    learning_rate: float = 0.1
    continuation: bool = True
    learn_attention_factor: bool = False
    evaluations: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LongRopeError(f"expected a search method of {', '.join(METHODS)}; found {self.method!r}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise LongRopeError(f"expected an objective of {', '.join(OBJECTIVES)}; found {self.objective!r}")
        if self.method != "longrope" and start_tokens_of(self.start_tokens) != (0,):
            raise LongRopeError(f"start tokens are searched by the method longrope only; found {self.method!r}")
        if self.racing and self.method not in ("longrope", "longrope2"):
            raise LongRopeError(f"racing is for the methods longrope and longrope2; found {self.method!r}")
        if self.critical_dim is not None and self.critical_dim < 1:
            raise LongRopeError(f"expected a critical dimension of at least 1, found {self.critical_dim}")
        if self.max_factor is not None and self.method != "longrope":
            raise LongRopeError(f"the largest λ is bounded by the method longrope only; found {self.method!r}")
        if self.max_factor is not None and not 1.0 <= self.max_factor < float("inf"):
            raise LongRopeError(f"expected a largest λ of at least 1, found {self.max_factor}")

    @property
    def chosen_objective(self) -> str:
        """The objective asked for, or the method's own."""
        return self.objective or ("needle" if self.method == "longrope2" else "perplexity")

    @property
    def other_objective(self) -> str:
        """The one that was not chosen."""
        return OBJECTIVES[1 - OBJECTIVES.index(self.chosen_objective)]

    @property
    def by_gradient(self) -> bool:
        """Whether the method goes through stages and validates."""
        return self.method in ("gradient", "hybrid")


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
