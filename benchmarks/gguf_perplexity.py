"""Perplexity in llama.cpp itself: a GGUF file as it is, with llama.cpp's own YaRN, and with longrope's factors in it.

    python benchmarks/gguf_perplexity.py --scaling run/scaling.json --length 16k          # SmolLM2, which is fetched
    python benchmarks/gguf_perplexity.py --model model.gguf --scaling yarn --length 12k --tokens 64

Every text has exactly `--length` tokens, and its last `--tokens` ones are scored, each after all tokens before it, in a
context of that size: llama.cpp is asked for log p of the true token. A token that is a part of a character has none
there and is left out, for every method alike. The file without a scaling states the length as its window, because
llama-server takes no longer prompt. With `--scaling yarn` the factors in the file are those of YaRN: then the
last two methods are the same RoPE by two ways, and their difference is that of the implementations.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.data.samples import draw_samples
from longrope.data.sources import read_all
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.results import mean_and_stderr
from longrope.export.config import GGUF, ExportConfig
from longrope.export.gguf.export import export_gguf
from longrope.export.gguf.keys import UINT32
from longrope.export.gguf.llama_cpp import LlamaCpp, llama_cpp_package
from longrope.export.gguf.patch import write_patched
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.rope import rope_of
from longrope.models.loading import config_and_scaling, load_tokenizer
from longrope.provenance import record
from longrope.rope.baselines import closed_form_method
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic
from longrope.units import parse_length

FETCH = Path(__file__).resolve().parent.parent / "scripts/smollm2.py"
BOOKS = ["book:les-miserables", "book:the-diary-of-samuel-pepys"]


def score(runtime: LlamaCpp, prompt: Sequence[int], token: int) -> float | None:
    """log p(token | prompt) before sampling, None where llama.cpp gives none for a part of a character."""
    question = {
        "prompt": list(prompt),
        "n_predict": 1,
        "n_probs": 1,
        "temperature": 0,
        "cache_prompt": True,
        "logit_bias": [[token, 1e6]],
    }
    answer = runtime.server.handle_completions(question)
    if "choices" not in answer:
        raise LongRopeError(f"llama.cpp answers {json.dumps(answer)[:200]}", code="runtime-fault")
    content = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    return float(content[0]["logprob"]) if content and content[0]["id"] == token else None


def measure(path: Path, texts: Sequence[Sequence[int]], tokens: int, threads: int, **rope: Any) -> dict[str, Any]:
    """The losses of the last `tokens` of each text, in nats."""
    length = len(texts[0])
    runtime = LlamaCpp(path, length, threads, **rope)
    began = time.perf_counter()
    losses: list[list[float | None]] = []
    for text in texts:
        scored = [score(runtime, text[:place], text[place]) for place in range(length - tokens, length)]
        losses.append([None if found is None else -found for found in scored])
    return {"losses": losses, "seconds": time.perf_counter() - began}


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Perplexity over all scored tokens; the standard error is between texts, where there are several."""
    texts = [[loss for loss in text if loss is not None] for text in measured["losses"]]
    every = [loss for text in texts for loss in text]
    means = [statistics.fmean(text) for text in texts]
    _, error = mean_and_stderr(means)
    nll = statistics.fmean(every)
    return measured | {"tokens": len(every), "nll": nll, "nll_stderr": error, "perplexity": math.exp(nll)}


def scaling_of(given: str, model: str, length: int) -> RopeScaling:
    """A scaling.json, or a closed form by its name."""
    if given.endswith(".json"):
        return RopeScaling.load(given)
    _, geometry, _ = config_and_scaling(model)
    window = closed_form_method(given, geometry, length).window(length)
    return RopeScaling.single(geometry, length, window.factors, 0, window.attention_factor)


def run(
    model: str, scaling: RopeScaling, length: int, texts: Sequence[Sequence[int]], tokens: int, threads: int
) -> dict[str, Any]:
    """The three methods on the same texts."""
    original = scaling.geometry.original_length
    yarn = {
        "rope_scaling_type": llama_cpp_package().llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_YARN,
        "rope_freq_scale": original / length,
        "yarn_orig_ctx": original,
    }
    source = read_gguf(Path(model))
    architecture = rope_of(source).architecture
    with tempfile.TemporaryDirectory() as folder:
        plain, patched = Path(folder) / "plain.gguf", Path(folder) / "patched.gguf"
        with plain.open("wb") as file:
            write_patched(source, file, architecture, {f"{architecture}.context_length": (UINT32, length)}, {})
        export_gguf(model, scaling, patched, ExportConfig(target=GGUF))
        return {
            "none": summary(measure(plain, texts, tokens, threads)),
            "llama.cpp yarn": summary(measure(plain, texts, tokens, threads, **yarn)),
            "longrope": summary(measure(patched, texts, tokens, threads)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a GGUF file; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--scaling", default="yarn", help="a scaling.json, or a closed form: pi, ntk, yarn, …")
    parser.add_argument("--length", default="16k", help="tokens of a text, and the size of the context")
    parser.add_argument("--tokens", type=int, default=256, help="scored at the end of each text")
    parser.add_argument("--samples", type=int, default=2, help="texts")
    parser.add_argument("--data", action="append", help="texts that the scaling was not searched on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gguf_perplexity.json"))
    given = parser.parse_args()
    model, length = given.model, parse_length(given.length)
    if model is None:
        fetched = subprocess.run([sys.executable, str(FETCH)], check=True, stdout=subprocess.PIPE, text=True)
        model = fetched.stdout.strip()
    tokenizer = load_tokenizer(model)
    documents = tokenize(read_all(given.data or BOOKS), tokenizer)
    samples = draw_samples(documents, length=length, count=given.samples, seed=0, bos_token_id=bos_of(tokenizer))
    texts = np.asarray(samples.ids).tolist()
    scaling = scaling_of(given.scaling, model, length)
    methods = run(model, scaling, length, texts, given.tokens, given.threads)
    settings = {"model": Path(model).name, "length": length, "scored": given.tokens, "data": given.data or BOOKS}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings | {"scaling": json.loads(scaling.to_json())}, "methods": methods} | record()
    write_json_atomic(given.out, result)
    for name, found in methods.items():
        print(f"{name:15} perplexity {found['perplexity']:.2f}, {found['tokens']} tokens, {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
