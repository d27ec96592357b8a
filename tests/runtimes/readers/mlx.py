"""Runs in MLX-LM's environment: log-probabilities after every prompt, and after a text that grows token by token."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import __version__ as version
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

job = json.loads(Path(sys.argv[1]).read_text())
model, _ = load_model(Path(job["folder"]))
model.set_dtype(mx.float32)


def logprobs(logits):
    row = logits[0, -1].astype(mx.float32)
    row = row - mx.logsumexp(row)
    return dict(enumerate(row.tolist()))


answer = {"version": version, "prompts": {}}
for length, ids in job["prompts"].items():
    answer["prompts"][length] = logprobs(model(mx.array([ids])))
cache = make_prompt_cache(model)
model(mx.array([job["grown"][: job["crossing"]]]), cache=cache)
for token in job["grown"][job["crossing"] :]:
    logits = model(mx.array([[token]]), cache=cache)
answer["grown"] = logprobs(logits)
Path(job["out"]).write_text(json.dumps(answer))
