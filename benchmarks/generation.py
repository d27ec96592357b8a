"""The switch between two windows: computing the cache again against turning its keys, quality and time.

    python benchmarks/generation.py --out benchmarks/results                 # four minutes of one core
    python benchmarks/generation.py --out runs/quick --documents 2 --repeats 1

Quality, on the embedded model and held-out books, with YaRN's windows and with factors searched for needles: a text is
read under the short window up to its limit, then the long window is needed. Under each treatment of the cache the true
continuation is scored, and each position's most likely token compared with that of the exact treatment. *stale* is what
transformers does for most families: nothing.
Time: one switch of a cache of T tokens, both ways in turn, and one ordinary decoding step, on the embedded model and on
a random Llama, in CPU seconds of one thread, which others on the machine disturb little. Not a test: nothing depends on
the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longrope.data.needles import NeedleSamples, draw_needles
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.models.cache_argument import with_cache
from longrope.models.generation.cache import fill, new_cache
from longrope.models.generation.generate import generate
from longrope.models.generation.rerotate import Rerotation
from longrope.models.loading import open_model
from longrope.models.scaled import ScaledModel
from longrope.models.texts import prepare_samples, sources_or_books
from longrope.provenance import record
from longrope.rope.closed_forms import yarn, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.run import search

TREATMENTS = ("recompute", "rerotate", "stale")
BINS = ((0, 16), (16, 64), (64, 256), (256, 1000))  # tokens after the switch
GREEDY = 48  # free tokens after the switch
AFTER = 32  # tokens of a needle's question and answer that come after the switch


def window(geometry: RopeGeometry, length: int) -> Window:
    """YaRN's window for `length` tokens; the original RoPE up to L."""
    if length <= geometry.original_length:
        return Window(length, (1.0,) * geometry.pairs)
    return Window(length, yarn(geometry, length), attention_factor=yarn_attention_factor(geometry, length))


def continued(scaled: ScaledModel, ids: Tensor, old: Window, new: Window, treatment: str) -> Tensor:
    """Logits (n, V) of the tokens of `ids` (1, T) after `old`'s limit, its cache treated as `treatment` says."""
    limit = old.max_length
    cache = new_cache(scaled.model)
    fill(scaled, cache, ids[:, :limit], new if treatment == "recompute" else old)
    if treatment == "rerotate":
        Rerotation(scaled).turn(cache, torch.arange(limit)[None], old, new)
    positions = torch.arange(limit, ids.shape[1])[None]
    with scaled.using(new) as model, torch.no_grad():
        logits: Tensor = model(ids[:, limit:], position_ids=positions, **with_cache(model, cache)).logits
    return logits[0]


def quality(scaled: ScaledModel, samples: Tensor, old: Window, new: Window) -> list[dict[str, Any]]:
    """Rows of NLL, its difference to exact, and agreement with exact, by tokens since the switch."""
    nll: dict[str, list[Tensor]] = {name: [] for name in TREATMENTS}
    top: dict[str, list[Tensor]] = {name: [] for name in TREATMENTS}
    for ids in samples[:, None]:
        for name in TREATMENTS:
            logits = continued(scaled, ids, old, new, name)[:-1]
            nll[name].append(F.cross_entropy(logits, ids[0, old.max_length + 1 :], reduction="none"))
            top[name].append(logits.argmax(-1))
    rows = []
    for name in TREATMENTS:
        for begin, end in BINS:
            losses, exact = (torch.stack(nll[which])[:, begin:end].double() for which in (name, "recompute"))
            agree = torch.stack(top[name])[:, begin:end] == torch.stack(top["recompute"])[:, begin:end]
            worse = (losses - exact).mean(dim=1)  # a mean per document: they are the independent trials
            rows.append(
                {
                    "treatment": name,
                    "from": begin + 1,
                    "to": end,
                    "nll": losses.mean().item(),
                    "worse": worse.mean().item(),
                    "worse_stderr": (worse.std() / len(worse) ** 0.5).item(),
                    "agreement": agree.double().mean().item(),
                }
            )
    return rows


def retrieval(scaled: ScaledModel, samples: NeedleSamples, old: Window, new: Window) -> dict[str, dict[str, float]]:
    """Answers about a needle that was read before the switch: share without an error, and NLL of an answer's token."""
    found = {}
    for name in TREATMENTS:
        right, losses = 0, []
        for ids, answer in zip(samples.ids[:, None], samples.answer_tokens, strict=True):
            logits = continued(scaled, ids, old, new, name)[-answer - 1 : -1]
            right += bool((logits.argmax(-1) == ids[0, -answer:]).all())
            losses.append(F.cross_entropy(logits, ids[0, -answer:]).item())
        found[name] = {"right": right / len(losses), "answer_nll": statistics.mean(losses)}
    return found


def greedy_agreement(scaled: ScaledModel, samples: Tensor, limit: int) -> dict[str, float]:
    """Free greedy tokens after the switch: the share equal to those of `recompute`, and how many before another."""
    found = {
        switch: [
            generate(scaled, ids[:, : limit - 1], max_new_tokens=GREEDY + 2, eos_token_id=(), switch=switch)
            for ids in samples[:, None]
        ]
        for switch in TREATMENTS[:2]
    }
    same = torch.stack(
        [(one == other)[0, limit + 1 :] for one, other in zip(found["recompute"], found["rerotate"], strict=True)]
    ).double()
    return {"agreement": same.mean().item(), "same_before_first": same.cumprod(dim=1).sum(dim=1).mean().item()}


def median_times(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each action, taken in turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            began = time.process_time()
            action()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def times(scaled: ScaledModel, length: int, old: Window, new: Window, repeats: int) -> dict[str, float]:
    """Seconds of one switch of a cache of `length` tokens, both ways, and of one step that follows it."""
    model = scaled.model
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    cache: DynamicCache = new_cache(model)
    fill(scaled, cache, ids, old)
    rerotation = Rerotation(scaled)
    positions = torch.arange(length)[None]

    def step() -> None:
        with scaled.using(new), torch.no_grad():
            model(ids[:, :1], position_ids=torch.tensor([[length]]), **with_cache(model, cache))
        cache.crop(-1)

    actions = {
        "recompute": lambda: fill(scaled, new_cache(model), ids, new),
        "rerotate": lambda: rerotation.turn(cache, positions, old, new),
        "step": step,
    }
    return median_times(actions, repeats)


def random_llama(limit: int) -> LlamaForCausalLM:
    """4 layers of width 512, 8 heads of 64 and 4 of keys, random weights: for times only."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=limit,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tables(results: dict[str, Any]) -> str:
    lines = [
        "| switch | treatment | tokens after it | NLL | worse than exact by | same most likely token |",
        "|---|---|---|---|---|---|",
    ]
    for case in results["quality"]:
        for row in case["rows"]:
            worse = "–" if row["treatment"] == "recompute" else f"{row['worse']:+.4f} ± {row['worse_stderr']:.4f}"
            lines.append(
                f"| {case['name']} | {row['treatment']} | {row['from']}–{row['to']} | {row['nll']:.4f} | {worse} "
                f"| {100 * row['agreement']:.1f} % |"
            )
    lines += [
        "",
        f"| switch | greedy, {GREEDY} tokens: the same as recompute | before the first that differs |",
        "|---|---|---|",
    ]
    for case in results["quality"]:
        greedy = case["greedy"]
        lines.append(
            f"| {case['name']} | {100 * greedy['agreement']:.1f} % | {greedy['same_before_first']:.1f} tokens |"
        )
    lines += [
        "",
        "| switch | needle answered: recompute | rerotate | stale | NLL of its answer: recompute | rerotate | stale |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["quality"]:
        answered = [f"{100 * case['retrieval'][name]['right']:.0f} %" for name in TREATMENTS]
        losses = [f"{case['retrieval'][name]['answer_nll']:.3f}" for name in TREATMENTS]
        lines.append(f"| {case['name']} | {' | '.join(answered + losses)} |")
    lines += [
        "",
        "| model | cached tokens | recompute, ms | rerotate, ms | one step, ms | recompute / rerotate |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["times"]:
        taken = row["seconds"]
        ms = " | ".join(f"{1000 * taken[name]:.1f}" for name in ("recompute", "rerotate", "step"))
        lines.append(f"| {row['model']} | {row['tokens']} | {ms} | {taken['recompute'] / taken['rerotate']:.0f} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--needles", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = open_model("tiny")
    length = loaded.geometry.original_length
    target = 8 * length
    documents = read_all(sources_or_books("tiny", [], "evaluation"))
    texts = tokenize(documents, loaded.tokenizer)
    samples = prepare_samples(loaded, documents, length=target, count=args.documents, seed=args.seed)

    pairs = [
        (f"YaRN, {limit // length}× to 8×", window(loaded.geometry, limit), window(loaded.geometry, target))
        for limit in (length, 2 * length, 4 * length)
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = SearchConfig(method="gradient", objective="needle", samples=6)
        searched = search(loaded, target, [], Path(folder) / "search", options).scaling
    pairs.append(("searched, 1× to 8×", *searched.windows))
    cases = []
    for name, old, new in pairs:
        limit = old.max_length
        scaled = apply_scaling(loaded.model, RopeScaling(loaded.geometry, (old, new)))
        ids = samples.ids[:, : limit + 1 + BINS[-1][1]]
        needles = draw_needles(
            texts, loaded.tokenizer, length=limit + AFTER, count=args.needles, seed=args.seed, digits=5
        )
        cases.append(
            {
                "name": f"{name}, at {limit}",
                "rows": quality(scaled, ids, old, new),
                "greedy": greedy_agreement(scaled, ids, limit),
                "retrieval": retrieval(scaled, needles, old, new),
            }
        )
        print(json.dumps(cases[-1]), flush=True)

    taken = []
    for name, model, lengths in (("embedded", loaded.model, (256, 1024)), ("random", None, (256, 1024, 4096))):
        for limit in lengths:
            chosen = random_llama(limit) if model is None else model
            geometry = RopeGeometry(geometry_of(chosen).rotary_dim, geometry_of(chosen).base, limit)
            old, new = window(geometry, limit), window(geometry, 8 * limit)
            scaled = apply_scaling(chosen, RopeScaling(geometry, (old, new)))
            taken.append({"model": name, "tokens": limit, "seconds": times(scaled, limit, old, new, args.repeats)})
            remove_scaling(chosen)
            print(json.dumps(taken[-1]), flush=True)

    hardware = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    settings = {
        "documents": args.documents,
        "needles": args.needles,
        "seed": args.seed,
        "repeats": args.repeats,
        "ratio": 8,
    }
    results = {"quality": cases, "times": taken, "settings": settings, "hardware": hardware, **record()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "generation.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "generation.md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
