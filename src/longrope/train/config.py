"""What a fine-tuning run can be told, validated where it is made. The defaults are the papers'."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from longrope.data.packing import ORIGINAL_WINDOW, parse_mix
from longrope.errors import LongRopeError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Names of schedules -> transformers' own; all of them after a linear warm-up."""
SAVE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of all linear layers; embeddings and norms are trained in full (as LongLoRA does).

    `merge`: add the updates to the weights at the end; without it the adapter is saved beside the model.
    """

    rank: int = 8
    alpha: float = 16.0
    merge: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 < self.alpha < math.inf:
            raise LongRopeError(f"expected a LoRA rank from 1 and a positive alpha, found {self.rank} and {self.alpha}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What decides the trained weights. None is the default of the mix.

    `mix`: shares of tokens by part, see `data/packing.py`; `long` alone is LongRoPE's single window, with the original
    window among the parts it is LongRoPE2's mixed training. `steps` optimizer steps of `batch` rows of N tokens,
    computed `micro_batch` rows at a time on each device. `schedule` and `warmup`: single window linear after 20 steps
    with 32 rows (LongRoPE, LLaMA2), mixed cosine after 40 with 64 (LongRoPE2). `bf16`: compute in bfloat16 over the
    weights' own dtype. `checkpointing`: keep only every layer's input for the backward pass; `offload`: in host memory.
    `context_parallel`: how many processes share each row, which a multiple of twice as many tokens is needed for.
    `fused_loss`: auto uses Liger's kernel where it is installed and fits (`fused_loss.py`), off never does.
    `deterministic`: only kernels that give the same bits again (slower; a CPU needs nothing for that). `trainer`:
    further `transformers.TrainingArguments` as they are: fsdp, fsdp_config, deepspeed, parallelism_config, …
    """

    length: int
    mix: str = "long"
    steps: int = 400
    batch: int | None = None
    micro_batch: int = 1
    learning_rate: float = 2e-5
    schedule: str | None = None
    warmup: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    checkpointing: bool = True
    offload: bool = False
    context_parallel: int = 1
    fused_loss: str = "auto"
    deterministic: bool = False
    save_every: int = 50
    save_dtype: str | None = None
    lora: LoraConfig | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_mix(self.mix)
        for name, least in (
            ("length", 2),
            ("steps", 1),
            ("micro_batch", 1),
            ("seed", 0),
            ("save_every", 1),
            ("context_parallel", 1),
        ):
            if getattr(self, name) < least:
                raise LongRopeError(f"expected {name} from {least}, found {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise LongRopeError(f"expected a positive {name}, found {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise LongRopeError(f"expected a weight_decay from 0, found {self.weight_decay}")
        if (self.batch is not None and self.batch < 1) or (self.warmup is not None and self.warmup < 0):
            raise LongRopeError(f"expected a batch from 1 and a warm-up from 0, found {self.batch} and {self.warmup}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise LongRopeError(f"expected a schedule of {', '.join(SCHEDULES)}; found {self.schedule!r}")
        if self.save_dtype is not None and self.save_dtype not in SAVE_DTYPES:
            raise LongRopeError(f"expected to save as {', '.join(SAVE_DTYPES)}; found {self.save_dtype!r}")
        if self.fused_loss not in ("auto", "off"):
            raise LongRopeError(f"expected a fused_loss of auto or off, found {self.fused_loss!r}")
        if self.context_parallel > 1 and self.length % (2 * self.context_parallel):
            raise LongRopeError(
                f"{self.context_parallel} processes share a row in {2 * self.context_parallel} pieces: give a --length "
                f"that this divides, found {self.length}"
            )
        if self.offload and not self.checkpointing:
            raise LongRopeError("offload moves what activation checkpointing keeps: leave checkpointing on")

    @property
    def shares(self) -> dict[str, float]:
        """The mix as shares of tokens by part."""
        return parse_mix(self.mix)

    @property
    def mixed(self) -> bool:
        """Whether the original window is trained too."""
        return any(part in ORIGINAL_WINDOW for part in self.shares)

    @property
    def rows_per_step(self) -> int:
        return self.batch or (64 if self.mixed else 32)

    @property
    def chosen_schedule(self) -> str:
        return self.schedule or ("cosine" if self.mixed else "linear")

    @property
    def chosen_warmup(self) -> int:
        return (40 if self.mixed else 20) if self.warmup is None else self.warmup
