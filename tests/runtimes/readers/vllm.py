"""Runs in vLLM's environment, on a CPU: log-probabilities after every prompt, and along a text that it generates."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
import vllm
from vllm import LLM, SamplingParams

job = json.loads(Path(sys.argv[1]).read_text())
options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False} | job["options"]
model = LLM(job["folder"], **options)
answer = {"version": vllm.__version__, "prompts": {}, "serves": model.llm_engine.model_config.max_model_len}


def completion(ids, count):
    asked = SamplingParams(max_tokens=count, logprobs=20, temperature=0.0, ignore_eos=True)
    (output,) = model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    return [{token: top.logprob for token, top in step.items()} for step in output.outputs[0].logprobs], list(
        output.outputs[0].token_ids
    )


for length, ids in job["prompts"].items():
    if int(length) < answer["serves"]:
        answer["prompts"][length] = completion(ids, 1)[0][0]
if len(job["grown"]) <= answer["serves"]:
    steps, tokens = completion(job["grown"][: job["crossing"]], len(job["grown"]) - job["crossing"])
    answer["grown"] = steps[-1]
    answer["generated"] = tokens[:-1]
Path(job["out"]).write_text(json.dumps(answer))
