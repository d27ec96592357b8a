"""RULER's variable tracking: which variables got a value through a chain (scripts/data/synthetic/variable_tracking.py).

One chain of four hops in repeated sentences, behind one solved example of at most 500 tokens.
"""

from __future__ import annotations

import random
import string

from longrope.evaluation.ruler.niah import NOISE
from longrope.evaluation.ruler.samples import Sample

HOPS = 4
EXAMPLE_TOKENS = 500
SMALLEST = 5  # lines of noise: places for the chain
PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find"
    " all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of"
    " variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
)


def example(size: int, rng: random.Random) -> Sample:
    """A solved sample with `size` lines of noise; its variables have three letters, the asked-for chain's five."""
    sample = _chain(size, 3, rng)
    return Sample(f"{sample.prompt} {' '.join(sample.answers)}\n\n", sample.answers)


def make(size: int, rng: random.Random, solved: str) -> Sample:
    """A sample with `size` lines of noise behind the example `solved`."""
    sample = _chain(size, 5, rng)
    return Sample(solved + sample.prompt, sample.answers)


def _chain(size: int, letters: int, rng: random.Random) -> Sample:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    first, *others = names
    value = str(rng.randint(10_000, 99_998))
    steps = [f"VAR {first} = {value}"]
    steps += [f"VAR {name} = VAR {before} " for name, before in zip(others, names, strict=False)]
    lines = [NOISE] * size
    for already, (place, step) in enumerate(zip(sorted(rng.sample(range(size), len(steps))), steps, strict=True)):
        lines.insert(place + already, step)
    prompt = PROMPT.format(context="\n".join(lines), value=value, count=len(names))
    return Sample(prompt, tuple(names))
