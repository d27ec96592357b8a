"""Runs llama.cpp on a GGUF file in this process, by the package xllamacpp, and asks for the probabilities of next
tokens.

The proof of an exported file needs them. The file is served as a user would serve it, with a context of `-c` tokens and
everything else at its default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrope.errors import LongRopeError

MOST_LIKELY = 512
"""The number of most likely tokens whose probabilities are asked for; the others hardly count in a distribution."""


def llama_cpp_package() -> Any:
    """The optional package xllamacpp. Raises LongRopeError (`missing-dependency`) when it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise LongRopeError(
            "the proof of a GGUF file runs llama.cpp, from the package xllamacpp, which is not installed",
            code="missing-dependency",
            hint='pip install "longrope[llamacpp]"; or longrope search and export --to gguf, which proves the bytes',
        ) from error
    return xllamacpp


class LlamaCpp:
    """llama.cpp's server on one file, with one slot; it ends with the object."""

    def __init__(self, path: Path, context: int, threads: int, **settings: Any) -> None:
        """`context`: the size of the context in tokens, which llama.cpp rounds up to a multiple of 256. `settings`:
        further parameters of llama.cpp by their names, such as `rope_freq_scale`.

        Raises LongRopeError (`runtime-fault`) where llama.cpp does not load the file.
        """
        package = llama_cpp_package()
        params = package.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = 0
        params.warmup = params.fit_params = False
        params.verbosity = 0
        for name, value in settings.items():
            setattr(params, name, value)
        self.path = path
        try:
            self.server: Any = package.Server(params)
        except RuntimeError as error:
            raise LongRopeError(f"llama.cpp cannot load {path}: {error}", code="runtime-fault") from error

    def next_token(self, prompt: Sequence[int], character: int) -> tuple[Tensor, Tensor]:
        """The most likely tokens after `prompt` and log p of each: int64 and float64, (MOST_LIKELY,) each.

        `character` is a token that is a whole character by itself: it is the one that is generated, because llama.cpp
        gives no probabilities with a token that ends the text or is a part of a character. The probabilities are those
        before. Keys of the last prompt are kept for a prompt that begins with it.
        """
        question = {
            "prompt": list(prompt),
            "n_predict": 1,
            "n_probs": MOST_LIKELY,
            "temperature": 0,
            "cache_prompt": True,
            "logit_bias": [[character, 1e6]],
        }
        answer = self.server.handle_completions(question)
        try:
            entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise LongRopeError(
                f"llama.cpp gives no probabilities for {self.path}: {json.dumps(answer)[:200]}", code="runtime-fault"
            ) from error
        ids = torch.tensor([entry["id"] for entry in entries])
        return ids, torch.tensor([entry["logprob"] for entry in entries], dtype=torch.float64)
