"""What a search can be told, validated, and the named values of its options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import su_attention_factor, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.search.knots import LARGEST
from longrope.search.spaces import START_TOKENS

METHODS = ("longrope", "longrope2", "gradient", "hybrid", "cma")
OBJECTIVES = ("perplexity", "needle")
CONTINUED = "continued"
EVOLUTION, GRADIENT = ("longrope", "longrope2"), ("gradient", "hybrid")
_OF_METHODS = {
    "population": EVOLUTION,
    "iterations": EVOLUTION,
    "racing": EVOLUTION,
    "start_tokens": ("longrope", "gradient", "hybrid", "cma"),
    "max_factor": ("longrope", "gradient", "hybrid", "cma"),
    "steps": GRADIENT,
    "learning_rate": GRADIENT,
    "continuation": GRADIENT,
    "learn_attention_factor": GRADIENT,
    "knots": (*GRADIENT, "cma"),
    "evaluations": ("hybrid", "cma"),
}
"""The methods that an option means something to: with another it may only be what it is by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What a search can be told; None is the method's own default.

    `method`: `longrope` (evolution over all pairs), `longrope2` (evolution over d_rcd and the pairs beyond it),
    `gradient`, `hybrid` (the gradient's result polished by CMA-ES) or `cma` (CMA-ES alone). `objective`: `perplexity`,
    or `needle` with its `needle_depth` (`spread`, `start`, or a number in [0, 1]); by default `needle` for longrope2,
    else `perplexity`. `samples`: texts that are scored, by default the papers' 5 (3 beyond 512k tokens), 10 for
    needles. `attention_factor`: `su`, `yarn`, or a number; by default that of the scaling the checkpoint carries, else
    `su`, which every runtime computes by itself. `continued`: the carried one, continued beyond its reach as YaRN does;
    better where nothing is trained there, and two attention factors, which no other runtime has. With 1, sequences
    inside the original window stay exactly those of the original model, in the runtimes that honour it.

    All but longrope2: `start_tokens`: `0` (portable: no runtime but ours can express others), a number, or `search`
    (the paper's set: a gene of longrope, an outer choice of the others, whose result is tried with each). `max_factor`:
    the largest λ, for longrope by default 1.25·s.

    Evolution: `population`, by default the papers' 64 (32 beyond 512k tokens), `iterations`. `racing`: candidates are
    dropped after each sample on which they cannot be expected in the top k; without it, Algorithm 1 as it is.

    Gradient and CMA-ES: `knots` (0: every pair; by default every pair for the gradient, 12 for CMA-ES). Gradient:
    `steps`, `learning_rate`, `continuation` (reach L' over 2L, 4L, …), `learn_attention_factor`. CMA-ES:
    `evaluations`, by default 256 alone and 66 after the gradient.

    `patience`: iterations of an evolution, generations of CMA-ES, validations of the gradient without improvement that
    end a search or stage. `critical_dim`: longrope2 searches with this d_rcd alone, and every method also reports
    YaRN-rcd and NTK-rcd with it.

    Raises LongRopeError for values that mean nothing, or nothing to the method.
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
        start_tokens_of(self.start_tokens)
        for name, methods in _OF_METHODS.items():
            if self.method not in methods and getattr(self, name) != _default(name):
                raise LongRopeError(
                    f"{name.replace('_', ' ')} is an option of the methods {', '.join(methods)}; "
                    f"found {getattr(self, name)} with {self.method!r}"
                )
        if self.needle_depth != "spread" and self.chosen_objective != "needle" and self.method != "longrope2":
            raise LongRopeError(f"a needle depth is for the objective needle; found {self.chosen_objective!r}")
        for name, least in (("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LongRopeError(f"expected {name} of at least {least}, found {value}")
        if self.critical_dim is not None and self.critical_dim < 1:
            raise LongRopeError(f"expected a critical dimension of at least 1, found {self.critical_dim}")
        if self.max_factor is not None and not 1.0 <= self.max_factor <= LARGEST:
            raise LongRopeError(f"expected a largest λ from 1 to {LARGEST:g}, found {self.max_factor}")

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
        return self.method in GRADIENT


def _default(name: str) -> Any:
    return next(field.default for field in fields(SearchConfig) if field.name == name)


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
