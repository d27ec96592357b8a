"""Compare a scaling of your own with the closed forms: perplexity by context length.

python examples/compare_baselines.py                       # the embedded model, about a minute on a CPU
python examples/compare_baselines.py Qwen/Qwen2.5-7B-Instruct 4 held-out/
"""

import sys

import numpy as np

import longrope as lr


def my_scaling(geometry, ratio):
    """Rescale factors λ (D,): 1 for the fastest pair, the ratio s = L'/L for the slowest, geometric in between."""
    factors = ratio ** np.linspace(0.0, 1.0, geometry.pairs)
    return lr.RopeScaling.single(geometry, ratio * geometry.original_length, factors, attention_factor=1.05)


def main(name="tiny", ratio=4, held_out="book:les-miserables", **settings):
    found = lr.inspect_model(name)
    geometry = lr.RopeGeometry(found.rotary_dim, found.base, found.original_length)
    mine = my_scaling(geometry, int(ratio))
    results = lr.evaluate(
        name,
        data=held_out,
        lengths=[geometry.original_length, mine.target_length],
        scaling=mine,
        scaling_name="mine",
        baselines=["none", "pi", "ntk", "yarn"],
        config=lr.EvalConfig(**settings),
    )
    print(
        results
    )  # results.to_frame() is a pandas table; `longrope report` reads the file of results.save("eval.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
