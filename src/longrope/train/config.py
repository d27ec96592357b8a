"""The settings of a fine-tuning run, each written once. The defaults are the papers'."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from longrope.data.mix import LONG, MEDIUM, ORIGINAL_WINDOW, WHOLE_ROWS, parse_mix
from longrope.errors import LongRopeError
from longrope.settings import LARGEST_SEED, MOST, Settings
from longrope.units import Length

MOST_ROWS = 5_000_000
"""The most rows of a run: packing this many takes some minutes. LongRoPE2's 10B tokens are 2.4M rows of 4,096."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Names of schedules -> transformers' own; all of them after a linear warm-up."""


class LoraConfig(Settings):
    """Low-rank updates of all linear layers; embeddings and norms are trained in full (as LongLoRA does)."""

    rank: int = Field(8, ge=1, le=MOST)
    """Rank of the updates."""
    alpha: float = Field(16.0, gt=0, le=MOST)
    """The updates are scaled by alpha / rank."""
    merge: bool = True
    """Add the updates to the weights at the end; without it the adapter is saved beside the model."""


class FinetuneConfig(Settings):
    """The settings of a fine-tuning run, which decide the trained weights. None stands for the default of the mix."""

    length: Length = Field(ge=2)
    """Tokens in a row, N: 4096, 128k. At most the scaling's window."""
    mix: str = "long"
    """Shares of tokens by part, as in short:0.3,long:0.7. long: full segments; medium: documents between the original
    window and those of long; chunks: all documents chained and cut at N, with attention across; short: of at most the
    original window; pieces: long ones cut to it. The last two keep the original RoPE."""
    long_from: Length | None = Field(None, ge=2)
    """The shortest documents of the part long, in tokens; medium has the shorter ones. Default: N."""
    long_to: Length | None = Field(None, ge=2)
    """The longest documents of the parts long and chunks; longer ones are left out. Default: all."""
    skip_to: Length | None = Field(None, ge=2)
    """Train positions up to R, this one, with rows of N tokens, whose positions skip ahead at random places (PoSE).
    Rows have the window's attention factor times √(ln N / ln R), as they have fewer keys. Default: N, no skips."""
    steps: int = Field(400, ge=1, le=1000 * MOST)
    """Optimizer steps."""
    batch: int | None = Field(None, ge=1, le=MOST)
    """Rows of a step, on all devices. Default: 32; mixed windows 64."""
    micro_batch: int = Field(1, ge=1, le=MOST)
    """Rows that a device computes at once."""
    learning_rate: float = Field(2e-5, gt=0, le=10)
    """The highest learning rate."""
    schedule: Literal["linear", "cosine", "constant"] | None = None
    """The learning rate after the warm-up. Default: linear; mixed windows cosine."""
    warmup: int | None = Field(None, ge=0, le=1000 * MOST)
    """Steps of linear warm-up. Default: 20; mixed windows 40."""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e12)
    """The norm that gradients are clipped to."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """The random seed."""
    bf16: bool = False
    """Compute in bfloat16; weights and AdamW keep the dtype that the model is loaded in."""
    checkpointing: bool = True
    """Activation checkpointing: keep only every layer's input for the backward pass and compute the rest again."""
    offload: bool = False
    """Keep the layers' inputs in host memory instead of the GPU's."""
    context_parallel: int = Field(1, ge=1, le=MOST)
    """Processes that share each row; the rest are data parallel."""
    fused_loss: Literal["auto", "off"] = "auto"
    """auto: head and loss by liger_kernel where it is installed and fits; or off."""
    deterministic: bool = False
    """Use only kernels that give the same bits again (slower on a GPU; a CPU does so anyway)."""
    save_every: int = Field(50, ge=1, le=1000 * MOST)
    """Steps between checkpoints to resume from."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the result. Default: as trained."""
    lora: LoraConfig | None = None
    """Train low-rank updates, embeddings and norms in place of all weights."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of transformers' TrainingArguments as they are: fsdp, deepspeed, parallelism_config, …"""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        parse_mix(self.mix)
        if self.context_parallel > 1 and self.length % (2 * self.context_parallel):
            raise LongRopeError(
                f"{self.context_parallel} processes share a row in {2 * self.context_parallel} pieces: expected a "
                f"`length` that this divides, found {self.length}",
                code="indivisible-row",
            )
        if self.long_from is not None and self.long_from > self.length:
            raise LongRopeError(
                f"expected a `long_from` of at most the length of {self.length} tokens, found {self.long_from}",
                code="invalid-setting",
            )
        if self.long_to is not None and self.long_to < (self.long_from or (self.length if LONG in self.shares else 2)):
            raise LongRopeError(
                f"expected a `long_to` of at least {self.long_from or self.length} tokens, the shortest documents of "
                f"the part long, found {self.long_to}",
                code="invalid-setting",
            )
        self._require_skips()
        if self.offload and not self.checkpointing:
            raise LongRopeError(
                "`offload` moves what activation checkpointing keeps: leave checkpointing on", code="invalid-setting"
            )
        return self

    def _require_skips(self) -> None:
        if self.skip_to is None:
            return
        if self.skip_to <= self.length:
            raise LongRopeError(
                f"expected a `skip_to` above the length of {self.length} tokens, found {self.skip_to}",
                code="invalid-setting",
                hint="leave it out, or give a smaller `length`",
            )
        if self._side_by_side:
            raise LongRopeError(
                "`skip_to` needs rows of one document or of the chain, whose positions do not begin anew; the part "
                f"{MEDIUM} and a `long_from` below N put documents side by side",
                code="invalid-setting",
                hint=f"use the parts {' and '.join(WHOLE_ROWS)}, without `long_from`",
            )
        if not any(part in WHOLE_ROWS for part in self.shares):
            raise LongRopeError(
                "`skip_to` is for the parts of the new window, and the mix has none",
                code="invalid-setting",
                hint=f"add {' or '.join(WHOLE_ROWS)} to the mix",
            )

    @property
    def reach(self) -> int:
        """Positions of the longest row: its tokens, or where it skips to."""
        return self.skip_to or self.length

    def require_longer(self, original_length: int) -> None:
        """Raise LongRopeError (`not-longer`) where rows do not reach beyond the model's window of `original_length`
        tokens; rows that skip ahead may have just as many, as PoSE's have."""
        if self.length < original_length or self.reach == original_length:
            least = "above" if self.skip_to is None else "of at least"
            raise LongRopeError(
                f"expected a `length` {least} the model's window of {original_length} tokens, found {self.length}",
                code="not-longer",
            )

    def require_rows(self) -> None:
        """Raise LongRopeError where the run has more rows than can be packed before it begins."""
        rows = self.steps * self.rows_per_step
        if rows > MOST_ROWS:
            raise LongRopeError(
                f"expected at most {MOST_ROWS:,} rows in a run, found {self.steps:,} `steps` of {self.rows_per_step:,}",
                code="invalid-setting",
                hint="give fewer `steps` or a smaller `batch`",
            )

    @property
    def shares(self) -> dict[str, float]:
        """The mix as shares of tokens by part."""
        return parse_mix(self.mix)

    @property
    def packed(self) -> bool:
        """True if a row may hold several documents that must not see each other."""
        return self.mixed or self._side_by_side

    @property
    def _side_by_side(self) -> bool:
        """True if a row of the new window may hold several documents."""
        several = LONG in self.shares and self.long_from is not None and self.long_from < self.length
        return several or MEDIUM in self.shares

    @property
    def mixed(self) -> bool:
        """True if the original window is trained too."""
        return any(part in ORIGINAL_WINDOW for part in self.shares)

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, on all devices."""
        return self.batch or (64 if self.mixed else 32)

    @property
    def chosen_schedule(self) -> str:
        """The schedule that was given, or the default of the mix."""
        return self.schedule or ("cosine" if self.mixed else "linear")

    @property
    def chosen_warmup(self) -> int:
        """The warm-up that was given, or the default of the mix."""
        return (40 if self.mixed else 20) if self.warmup is None else self.warmup
