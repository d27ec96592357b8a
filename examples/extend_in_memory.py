"""Extend a model in memory: search a scaling, measure it, apply it, generate, export.

python examples/extend_in_memory.py                        # the embedded model, about a minute on a CPU
python examples/extend_in_memory.py Qwen/Qwen2.5-7B-Instruct 128k books/ held-out/ qwen-128k/
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import longrope as lr

SEEN, HELD_OUT = "book:an-american-tragedy", "book:les-miserables"
TINY = str(Path(lr.__file__).parent / "assets/tiny")  # the embedded model: 1.7 million parameters, a window of 256


def main(name=TINY, length="1k", books=SEEN, held_out=HELD_OUT, out="extended", texts=10, **budget):
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(name)

    config = lr.SearchConfig(method="gradient", **budget)
    scaling = lr.search_scaling(model, tokenizer, target_length=length, data=books, config=config)
    print(scaling)

    lr.apply_scaling(model, scaling)  # the model uses it from here on; lr.remove_scaling(model) takes it away
    config = lr.EvalConfig(samples=texts)
    print(lr.evaluate(model, tokenizer, data=held_out, lengths=length, baselines=["none", "yarn"], config=config))

    prompt = tokenizer("It was the best of times, it was", return_tensors="pt").input_ids.to(model.device)
    print(tokenizer.decode(lr.generate(model, prompt, max_new_tokens=20)[0]))

    exported = lr.export_checkpoint(name, scaling, out)  # reloaded with plain transformers; raises if its logits differ
    print(exported)


if __name__ == "__main__":
    main(*sys.argv[1:])
