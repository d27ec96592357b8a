"""Runs in the environment of mistral.rs: log-probabilities after every prompt, and along a text that it generates."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["MISTRALRS_CPU_KV_F32"] = "1"
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which
from transformers import AutoTokenizer

job = json.loads(Path(sys.argv[1]).read_text())
answer = {"version": version("mistralrs"), "refused": "", "prompts": {}}
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
template = Path(job["scratch"]) / "chat.jinja"
template.write_text("{{ messages[0]['content'] }}")
try:
    plain = Which.Plain(job["folder"], dtype=ModelDType.F32)
    runner = Runner(which=plain, no_paged_attn=True, prefix_cache_n=0, jinja_explicit=str(template))
except Exception as error:
    answer["refused"] = str(error).strip().splitlines()[0]
    Path(job["out"]).write_text(json.dumps(answer))
    sys.exit()


def completion(ids, count):
    """The log-probabilities of `count` tokens after `ids`, and those tokens."""
    text = tokenizer.decode(ids[1:])  # the BOS is put before it
    assert tokenizer(text).input_ids == ids
    request = ChatCompletionRequest(
        messages=text, model="default", logprobs=True, top_logprobs=20, max_tokens=count, temperature=0.0
    )
    content = runner.send_chat_completion_request(request).choices[0].logprobs.content
    steps = [{top.token: top.logprob for top in step.top_logprobs} for step in content]
    return steps, [max(step, key=step.get) for step in steps]


for length, ids in job["prompts"].items():
    answer["prompts"][length] = completion(ids, 1)[0][0]
steps, tokens = completion(job["grown"][: job["crossing"]], len(job["grown"]) - job["crossing"])
answer["grown"] = steps[-1]
answer["generated"] = tokens[:-1]
Path(job["out"]).write_text(json.dumps(answer))
