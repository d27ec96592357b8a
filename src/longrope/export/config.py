"""The settings of an export, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import model_validator

from longrope.errors import LongRopeError
from longrope.settings import Settings

Target = Literal["hf", "hf-unified", "phi3", "gguf"]
TARGETS: tuple[str, ...] = get_args(Target)
HF, UNIFIED, PHI3, GGUF = TARGETS
FORMS = (HF, UNIFIED, PHI3)
"""The targets that are Hugging Face folders."""

Proof = Literal["full", "rotary", "none"]
FULL, ROTARY, NONE = get_args(Proof)


class ExportConfig(Settings):
    """The settings of an export."""

    target: Target = "hf"
    """hf: a plain transformers folder. hf-unified: the long factors at every length, so that every runtime computes the
    same. phi3: a Llama or Mistral model as Phi-3. gguf: a file for llama.cpp."""
    gguf: Path | None = None
    """With the target gguf: a GGUF file of the model, in any quantisation, to add the factors to."""
    fold_attention_factor: bool = False
    """Fold the attention factor into the queries' weights, for runtimes that compute their own."""
    allow_lossy: bool = False
    """Leave out the parts of the scaling that the runtime cannot express, and name them."""
    copy_weights: bool = False
    """Copy weight files that do not change, in place of a clone of them or a hard link to them."""
    config_only: bool = False
    """Write config.json, scaling.json, the model card and what else changes, without weights: for a pull request to the
    repository that has them."""
    proof: Proof = "full"
    """full: the whole model is reloaded and compared. rotary: its first layers only, one of each kind, for a model that
    is too large. none: nothing is, and the model card says so."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.target == GGUF and self.fold_attention_factor:
            raise LongRopeError(
                "a GGUF file states the attention factor, and llama.cpp applies it: there is nothing to fold",
                code="setting-of-another-target",
            )
        if self.config_only and (self.target not in (HF, UNIFIED) or self.fold_attention_factor):
            raise LongRopeError(
                "`config_only` leaves the weights as they are: it goes with the targets hf and hf-unified, without "
                "`fold_attention_factor`",
                code="setting-of-another-target",
            )
        if self.copy_weights and (self.config_only or self.target in (PHI3, GGUF)):
            raise LongRopeError(
                "`copy_weights` copies weights that do not change; found "
                + ("`config_only`, which has none" if self.config_only else f"the target {self.target}: all are new"),
                code="setting-of-another-target",
            )
        if self.target == GGUF and self.proof != FULL:
            raise LongRopeError(
                f"a GGUF file is read back whole; found the `proof` {self.proof}", code="setting-of-another-target"
            )
        if self.target != GGUF and self.gguf is not None:
            raise LongRopeError(
                f"`gguf` goes with the target {GGUF}; found the target {self.target}", code="setting-of-another-target"
            )
        return self
