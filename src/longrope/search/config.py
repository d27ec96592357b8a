"""The settings of a search, each written once: `SearchConfig`, and the numbers that its named values stand for.

Command line, recipes, the docs' tables and the JSON beside a result are made from `SearchConfig`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from longrope.errors import LongRopeError
from longrope.models.config import LayerInputs
from longrope.settings import LARGEST_SEED, MOST, Settings

if TYPE_CHECKING:
    from longrope.rope.geometry import RopeGeometry

Below = Literal["ntk", "yarn", "ramp"]
"""The rule for λ below d_rcd (`spaces.py`)."""
Method = Literal["longrope", "longrope2", "gradient", "hybrid", "cma"]
Objective = Literal["perplexity", "needle"]
METHODS: tuple[str, ...] = get_args(Method)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""The start tokens n̂ that the paper's search chooses from."""
LARGEST = 1e9
"""The largest rescale factor of a window, where a search stops that would go ever further up: such a pair hardly
turns."""
LARGEST_ATTENTION_FACTOR = 100.0
"""The largest attention factor m of a search: logits grow with m², and `su` for a window 10^6 times as long is below
1.8."""
CONTINUED = "continued"
EVOLUTION, GRADIENT = ("longrope", "longrope2"), ("gradient", "hybrid")


class RayOptions(Settings):
    """The workers that compute a search, with a model replica each; without them, this process does."""

    workers: int | None = Field(None, ge=1, le=MOST)
    """Search with this many Ray workers, one model replica each."""
    ray_address: str | None = None
    """The Ray cluster to search on: auto, or HOST:PORT."""


def _name_of_number(value: Any) -> Any:
    """Turn a number into text: the setting takes names too, and YAML reads `1` as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


NameOrNumber = Annotated[str, BeforeValidator(_name_of_number)]


class SearchConfig(Settings):
    """The settings of a search for rescale factors. None stands for the method's own default."""

    method: Method = "gradient"
    """The search method: `gradient` descends on the factors; `longrope` and `longrope2` are the papers' evolutions,
    many times as expensive; `hybrid` polishes the gradient's result by CMA-ES, `cma` is CMA-ES alone."""
    objective: Objective | None = None
    """The loss to minimise: of all tokens (`perplexity`), or only of the answer about a hidden number (`needle`).
    Default: needle for longrope2, perplexity for the others."""
    needle_depth: NameOrNumber = "spread"
    """The depth of the needles: spread over the text, at its start, or at a share of it from 0 to 1."""
    samples: int | None = Field(None, ge=1, le=MOST)
    """Texts of exactly L' tokens that are scored. Default: 5 (3 beyond 512k tokens), 10 with needles."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """The random seed."""
    attention_factor: NameOrNumber | None = None
    """The attention factor beyond the original window: `su` (every runtime computes it by itself), `yarn`, `continued`
    (the attention factor of the checkpoint's scaling, continued as YaRN does), or a number; 1 keeps short texts exactly
    as they were. Default: that of the checkpoint's scaling, else su."""
    baselines: bool = True
    """Score the closed forms, and those that stretch the checkpoint's scaling, to compare with, at an evaluation of all
    texts each. Without them only the original RoPE and the checkpoint's scaling as it is."""
    population: int | None = Field(None, ge=1, le=MOST)
    """Candidates of the first generation, P; mutations and crossovers are P/4 each, the top k P/2. Default: 64 (32
    beyond 512k tokens)."""
    iterations: int = Field(40, ge=0, le=MOST)
    """Generations after the first."""
    patience: int | None = Field(None, ge=1, le=MOST)
    """Stop after this many iterations without improvement (gradient: validations, of which 30 steps have 2)."""
    start_tokens: NameOrNumber = "0"
    """Tokens at the start of a text that keep their original angles: 0, which every runtime can express, a number, or
    `search` (the paper's set)."""
    racing: bool = False
    """Score candidates text by text and drop those that fall behind; without it, Algorithm 1 as published."""
    critical_dim: int | None = Field(None, ge=1, le=MOST)
    """The real critical dimension to use: longrope2 searches with it alone, and every method also reports YaRN and NTK
    with it."""
    below: Below = "ntk"
    """The rule of longrope2 for factors below d_rcd: ntk, as in the paper, for a model that is trained afterwards;
    yarn; or ramp, linear in 1/λ from a pair that is searched too, recommended where nothing is trained afterwards."""
    space: Literal["relative", "absolute"] | None = None
    """The space of a second search, which goes beyond a scaling that the checkpoint has: relative, multiples of the
    factors that the model was trained with, monotone and from 1 to 1.25·L'/L_ft, as the papers' authors did; or
    absolute, factors of the original RoPE. Default: relative."""
    max_factor: float | None = Field(None, ge=1.0, le=LARGEST)
    """The largest rescale factor, in a relative space the largest multiple. Default of longrope: 1.25 times the
    extension ratio."""
    beta_fast: float = Field(32.0, gt=0, le=MOST)
    """Of the YaRN that longrope starts from: a pair with more rotations in L keeps its frequency (128 in the paper's
    search for Mistral)."""
    beta_slow: float = Field(1.0, gt=0, le=MOST)
    """Of the same YaRN: a pair with fewer rotations in L is interpolated in full (2 in the paper's search for
    Mistral)."""
    yarn_ramp: Literal["transformers", "authors"] = "transformers"
    """The ramp of the same YaRN: linear in 1/λ as in transformers, or in λ as in the code of LongRoPE's authors."""
    steps: int = Field(30, ge=1, le=MOST)
    """Gradient steps of each stage."""
    knots: int | None = Field(None, ge=0, le=MOST)
    """The number of knots between which log λ is interpolated; 0: a knot for every pair. Default: every pair; CMA-ES
    12."""
    learning_rate: float = Field(0.1, gt=0.0, le=100.0)
    """Learning rate of the gradient search, in its variables of log λ."""
    continuation: bool = True
    """Search windows of 2L, 4L, … before L', each from the result of the one before; without it, L' alone."""
    learn_attention_factor: bool = False
    """Optimise the attention factor by gradient too."""
    evaluations: int | None = Field(None, ge=1, le=MOST)
    """Candidates of CMA-ES. Default: 256, hybrid 66."""
    layer_inputs: Literal["auto"] | LayerInputs = "auto"
    """Where a gradient has the input of every layer until its backward pass, with the same result: keep, on the device;
    offload, in host memory; recompute, made again from every √N-th of N; auto, the first of them that fits."""

    OF_METHODS: ClassVar[dict[str, tuple[str, ...]]] = {
        "population": EVOLUTION,
        "iterations": EVOLUTION,
        "racing": EVOLUTION,
        "below": ("longrope2",),
        "beta_fast": ("longrope",),
        "beta_slow": ("longrope",),
        "yarn_ramp": ("longrope",),
        "start_tokens": ("longrope", "gradient", "hybrid", "cma"),
        "max_factor": ("longrope", "gradient", "hybrid", "cma"),
        "steps": GRADIENT,
        "learning_rate": GRADIENT,
        "continuation": GRADIENT,
        "learn_attention_factor": GRADIENT,
        "knots": (*GRADIENT, "cma"),
        "evaluations": ("hybrid", "cma"),
        "layer_inputs": GRADIENT,
    }
    """Setting -> the methods that use it; with any other method it must keep its default."""

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        start_tokens_of(self.start_tokens)
        for name, methods in self.OF_METHODS.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise LongRopeError(
                    f"`{name}` is a setting of the methods {', '.join(methods)}; found {getattr(self, name)} with "
                    f"{self.method!r}",
                    code="setting-of-another-method",
                )
        if self.beta_fast < self.beta_slow:
            raise LongRopeError(
                f"expected a `beta_fast` of at least `beta_slow`, found {self.beta_fast:g} and {self.beta_slow:g}",
                code="invalid-setting",
            )
        if self.critical_dim is not None and not self.baselines and self.method != "longrope2":
            raise LongRopeError(
                f"expected `baselines` with a `critical_dim` for {self.method}: YaRN and NTK with it are two of them",
                code="invalid-setting",
                hint="leave one of them out",
            )
        if self.needle_depth != "spread" and self.chosen_objective != "needle" and self.method != "longrope2":
            raise LongRopeError(
                f"`needle_depth` is for the objective needle; found {self.chosen_objective!r}",
                code="setting-of-another-method",
            )
        return self

    def require_target(self, target_length: int) -> None:
        """Raise LongRopeError where `start_tokens` is not below `target_length`."""
        if self.start_tokens != "search" and int(self.start_tokens) >= target_length:
            raise LongRopeError(
                f"expected `start_tokens` below the target length of {target_length}, found {self.start_tokens}",
                code="invalid-setting",
            )

    @property
    def chosen_objective(self) -> str:
        """The objective asked for, or the method's own."""
        return self.objective or ("needle" if self.method == "longrope2" else "perplexity")

    @property
    def other_objective(self) -> str:
        """The objective that was not chosen."""
        return OBJECTIVES[1 - OBJECTIVES.index(self.chosen_objective)]

    @property
    def by_gradient(self) -> bool:
        """True if the method descends on gradients: in stages of growing windows, with validation texts."""
        return self.method in GRADIENT


def attention_factor_of(text: str, geometry: RopeGeometry, target_length: int) -> float:
    """The attention factor that `su`, `yarn` or a number names. Raises LongRopeError for anything else."""
    from longrope.rope.closed_forms import su_attention_factor, yarn_attention_factor  # NumPy, not for --help

    named = {"su": su_attention_factor, "yarn": yarn_attention_factor}
    if text in named:
        return named[text](geometry, target_length)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= LARGEST_ATTENTION_FACTOR:
        raise LongRopeError(
            f"expected an `attention_factor` of su, yarn or a positive number up to {LARGEST_ATTENTION_FACTOR:g}; "
            f"found {text!r}",
            code="invalid-setting",
        )
    return value


def start_tokens_of(text: str) -> tuple[int, ...]:
    """The choices of n̂ that `search` or a number names. Raises LongRopeError for anything else."""
    if text == "search":
        return START_TOKENS
    if text.isdecimal() and len(text) <= 9:
        return (int(text),)
    raise LongRopeError(
        f"expected `start_tokens` to be 'search' or a number of tokens, found {text!r}", code="invalid-setting"
    )
