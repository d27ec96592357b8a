"""Runs in OpenVINO's environment: exports the folder with optimum-intel, then reads prompts."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import openvino
import torch
from optimum.intel import OVModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
answer = {"version": openvino.__version__, "optimum": version("optimum-intel"), "prompts": {}}
precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
model = OVModelForCausalLM.from_pretrained(job["folder"], export=True, compile=True, ov_config=precision)


def logprobs(logits):
    return dict(enumerate(logits[0, -1].double().log_softmax(-1).tolist()))


def forward(ids, past, cache):
    positions = torch.arange(past, past + len(ids))[None]
    mask = torch.ones(1, past + len(ids), dtype=torch.long)
    return model(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )


for length, ids in job["prompts"].items():
    answer["prompts"][length] = logprobs(forward(ids, 0, None).logits)
ids, crossing = job["grown"], job["crossing"]
output = forward(ids[:crossing], 0, None)
for place in range(crossing, len(ids)):
    output = forward([ids[place]], place, output.past_key_values)
answer["grown"] = logprobs(output.logits)
Path(job["out"]).write_text(json.dumps(answer))
