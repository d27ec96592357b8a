"""Runs in the environment of ONNX Runtime GenAI: builds the folder with its model builder, then reads prompts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

job = json.loads(Path(sys.argv[1]).read_text())
out = Path(job["scratch"]) / "onnx"
command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", job["folder"], "-o", str(out)]
built = subprocess.run([*command, "-p", "fp32", "-e", "cpu", "-c", job["scratch"]], capture_output=True, text=True)
answer = {"version": og.__version__, "refused": "", "prompts": {}}
if built.returncode != 0:
    answer["refused"] = built.stderr.strip().splitlines()[-1]
    Path(job["out"]).write_text(json.dumps(answer))
    sys.exit()
model = og.Model(str(out))


def logprobs(generator):
    row = np.asarray(generator.get_logits()).reshape(-1).astype(np.float64)
    row -= row.max()
    return dict(enumerate((row - np.log(np.exp(row).sum())).tolist()))


def reader():
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=job["length"], do_sample=False)
    return og.Generator(model, params)


for length, ids in job["prompts"].items():
    generator = reader()
    generator.append_tokens(np.array([ids], dtype=np.int32))
    answer["prompts"][length] = logprobs(generator)
generator = reader()
generator.append_tokens(np.array([job["grown"][: job["crossing"]]], dtype=np.int32))
for token in job["grown"][job["crossing"] :]:
    generator.append_tokens(np.array([[token]], dtype=np.int32))
answer["grown"] = logprobs(generator)
Path(job["out"]).write_text(json.dumps(answer))
