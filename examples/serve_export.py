"""Export a model with a longer window, reload it with plain transformers, and print the commands that serve it.

python examples/serve_export.py                            # the embedded model with YaRN, some seconds on a CPU
python examples/serve_export.py Qwen/Qwen2.5-7B-Instruct run/ qwen-128k/
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longrope as lr

TINY = str(Path(lr.__file__).parent / "assets/tiny")  # the embedded model: 1.7 million parameters, a window of 256


def main(name=TINY, scaling=None, output="extended"):
    scaling = lr.load_scaling(scaling) if scaling else lr.yarn(AutoConfig.from_pretrained(name), "2k")
    exported = lr.export_checkpoint(name, scaling, output)
    print(exported)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    print(f"reloaded: {model.config.max_position_embeddings} tokens, {model.config.rope_parameters['rope_type']}")
    ids = tokenizer("It was the best of times, it was", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0]))

    for serving in exported.servings:
        print(f"\n{serving.runtime}:", *serving.commands, sep="\n  ")
    for finding in lr.diagnose(output).failures():  # runtimes that would compute something else
        print(finding)


if __name__ == "__main__":
    main(*sys.argv[1:])
