"""How much memory one evaluation takes, and how much one gradient in the factors: the peaks of two processes.

    python benchmarks/search_memory.py                        # the embedded model, 4,096 tokens; a minute on one core
    python benchmarks/search_memory.py --wide --length 16384  # random weights in Llama 3's proportions; some minutes

Each measures the resident memory after the model and its text are there, then one loss, or one loss and gradient, and
the highest resident memory until then. Linux; glibc is told to give back what is freed, of which it would keep
much. `--wide` makes logits in pieces of an eighth of the usual size, as small beside its layers as a large model's are.
Not a test: nothing depends on the numbers.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longrope.models import chunked
from longrope.models.apply import apply_scaling
from longrope.models.config import LoadOptions
from longrope.models.loading import load_tokenizer, open_model
from longrope.models.texts import sources_or_books
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.search_data import objectives_over, prepare_texts

MIB = 2**20
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(what: str, model: str, length: int, dtype: str, logits: int) -> None:
    chunked.LOGITS_BUDGET //= logits
    loaded = open_model(model, options=LoadOptions(dtype=dtype))
    options = SearchConfig(method="longrope", samples=1)
    texts = prepare_texts(loaded, sources_or_books("tiny", [], "search"), length, options)
    scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    objective = objectives_over(scaled, texts)["search", length]
    window = Window(length, tuple(yarn(loaded.geometry, length).tolist()))
    before = resident()
    if what == "scoring":
        objective.loss(window)
    else:
        objective.loss_and_gradient(window)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{what}: {before / MIB:.0f} MiB before, {peak / MIB:.0f} MiB at its peak, {(peak - before) / MIB:.0f} more")


def make_wide(folder: Path) -> None:
    """A model of random weights in the proportions of Llama-3-8B, a quarter as wide and deep, that reads as `tiny`."""
    tokenizer = load_tokenizer("tiny")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--wide", action="store_true", help="a model of random weights in its place")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--logits", type=int, default=1, help="logits in pieces of this part of the usual size")
    parser.add_argument("--only", choices=["scoring", "gradient"], help="this one, in this process")
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.model, args.length, args.dtype, args.logits)
        return
    with TemporaryDirectory() as folder:
        more = []
        if args.wide:
            make_wide(Path(folder))
            more = ["--model", folder, "--logits", "8"]
        for what in ("scoring", "gradient"):
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], *more, "--only", what], check=True, env=os.environ | GLIBC
            )


if __name__ == "__main__":
    main()
