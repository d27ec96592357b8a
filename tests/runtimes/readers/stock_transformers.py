"""Runs in an environment with some transformers: log-probabilities by its own classes, without longrope."""

import json
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers

job = json.loads(Path(sys.argv[1]).read_text())
warned = []
transformers.utils.logging.get_logger("transformers").addFilter(
    lambda record: warned.append(record.getMessage()) or True
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
answer = {"version": transformers.__version__, "prompts": {}, "warned": warned + [str(one.message) for one in caught]}
sources = "\n".join(
    file.read_text() for file in Path(transformers.__file__).parent.glob("models/**/configuration_*.py")
)
answer["model_types"] = [
    *transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES,
    *re.findall(r"^\s+model_type\s*=\s*\"([^\"]+)\"", sources, re.MULTILINE),
]


def logprobs(logits):
    return dict(enumerate(logits[0, -1].double().log_softmax(-1).tolist()))


with torch.no_grad():
    for length, ids in job["prompts"].items():
        answer["prompts"][length] = logprobs(model(input_ids=torch.tensor([ids]), use_cache=False).logits)
    start = torch.tensor([job["grown"][: job["crossing"]]])
    count = len(job["grown"]) - job["crossing"]
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),  # the BOS is no padding
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer["grown"] = dict(enumerate(output.scores[-1][0].double().log_softmax(-1).tolist()))
    answer["generated"] = output.sequences[0, job["crossing"] : -1].tolist()
Path(job["out"]).write_text(json.dumps(answer))
