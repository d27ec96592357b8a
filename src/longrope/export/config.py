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

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.target == GGUF and self.fold_attention_factor:
            raise LongRopeError(
                "a GGUF file states the attention factor, and llama.cpp applies it: there is nothing to fold",
                code="setting-of-another-target",
            )
        if self.target != GGUF and self.gguf is not None:
            raise LongRopeError(
                f"`gguf` goes with the target {GGUF}; found the target {self.target}", code="setting-of-another-target"
            )
        return self
