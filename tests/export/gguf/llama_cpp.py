"""llama.cpp in this process, for tests: the prebuilt one of the optional package xllamacpp, one thread, f32 cache."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

xllamacpp = pytest.importorskip("xllamacpp")


def serve(path: Path, n_ctx: int, *, slots: int = 1, kv_unified: bool = False) -> Any:
    """llama-server on `path` with `-c n_ctx -np slots`; it ends when the object does."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.kv_unified = n_ctx, slots, kv_unified
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
    params.warmup = params.fit_params = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [1], "n_predict": 1})  # stopped before its loop runs, it would wait for ever
    return server


def next_token(server: Any, prompt: list[int], vocabulary: int, *, reuse: bool = False) -> Tensor:
    """log p(next token | prompt), float64 (V,). `reuse` keeps the keys of the last prompt's common beginning."""
    question = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0, "cache_prompt": reuse}
    # The probabilities are those before sampling. What is sampled must be a character, or the answer has none: not the
    # end of the text, not a byte of a longer character. Token 2 is `!` in all our byte-level vocabularies.
    answer = server.handle_completions(question | {"logit_bias": [[2, 1e6]]})
    if "choices" not in answer:
        raise RuntimeError(json.dumps(answer))
    out = torch.full((vocabulary,), float("nan"), dtype=torch.float64)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        out[entry["id"]] = entry["logprob"]
    return out


def tokenize(server: Any, text: str) -> list[int]:
    """Token ids of `text`, with what the file says is to be added."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        ids: list[int] = json.load(answer)["tokens"]
    return ids
