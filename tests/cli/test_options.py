"""Every setting of a configuration as an option: what the verb gets for the text of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longrope.cli.main import app
from longrope.costs.devices import Devices
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.export.config import ExportConfig
from longrope.models.config import LoadOptions
from longrope.search.config import SearchConfig
from longrope.train.config import FinetuneConfig

SEARCH = "search tiny --target-length 128k -o run"
FINETUNE = "finetune tiny --scaling s.json -o run --length 128k"


def given(line: str) -> dict[str, Any]:
    """The arguments of the verb's function for a command line."""
    _, bound, _ = app.parse_args(line.split())
    return bound.arguments


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        (
            f"{SEARCH} --samples 4 --seed 3 --attention-factor 1 --method longrope --population 8 --iterations 2 "
            "--patience 5 --start-tokens search --racing on --critical-dim 7 --max-factor 64",
            "config",
            SearchConfig(
                samples=4,
                seed=3,
                attention_factor="1",
                method="longrope",
                population=8,
                iterations=2,
                patience=5,
                start_tokens="search",
                racing=True,
                critical_dim=7,
                max_factor=64.0,
            ),
        ),
        (
            f"{SEARCH} --method hybrid --objective needle --needle-depth 0.5 --steps 3 --knots 8 --learning-rate 0.2 "
            "--no-continuation --learn-attention-factor --evaluations 33",
            "config",
            SearchConfig(
                method="hybrid",
                objective="needle",
                needle_depth="0.5",
                steps=3,
                knots=8,
                learning_rate=0.2,
                continuation=False,
                learn_attention_factor=True,
                evaluations=33,
            ),
        ),
        (
            f"{SEARCH} --dtype bfloat16 --device cuda:1 --attn-implementation eager --original-length 4k "
            "--trust-remote-code",
            "load",
            LoadOptions(
                dtype="bfloat16",
                device="cuda:1",
                attn_implementation="eager",
                original_length=4096,
                trust_remote_code=True,
            ),
        ),
        (
            "eval tiny --samples 1 --stride 2 --trials 3 --depths 4 --needles 5 --ruler-tasks vt,cwe --qa-file qa.json "
            "--threshold 80 --share 0.8 --tasks arc:25,own.yaml --task-limit 6 --task-batch 7",
            "config",
            EvalConfig(
                samples=1,
                stride=2,
                trials=3,
                depths=4,
                needles=5,
                ruler_tasks=("vt", "cwe"),
                qa_file=Path("qa.json"),
                threshold=80.0,
                share=0.8,
                tasks=(HarnessTask("arc", 25), HarnessTask("own.yaml")),
                task_limit=6,
                task_batch=7,
            ),
        ),
        (
            f"{FINETUNE} --mix short:0.3,long:0.7 --steps 2 --batch 3 --micro-batch 4 --learning-rate 1e-3 --schedule "
            "cosine --warmup 5 --weight-decay 0.1 --seed 6 --bf16 --no-checkpointing --context-parallel 2 --fused-loss "
            "off --deterministic --save-every 7 --save-dtype bfloat16",
            "config",
            FinetuneConfig(
                length=131072,
                mix="short:0.3,long:0.7",
                steps=2,
                batch=3,
                micro_batch=4,
                learning_rate=1e-3,
                schedule="cosine",
                warmup=5,
                weight_decay=0.1,
                seed=6,
                bf16=True,
                checkpointing=False,
                context_parallel=2,
                fused_loss="off",
                deterministic=True,
                save_every=7,
                save_dtype="bfloat16",
            ),
        ),
        (f"{FINETUNE} --offload", "config", FinetuneConfig(length=131072, offload=True)),
        (
            "export tiny -o out --to gguf --gguf model.gguf --allow-lossy",
            "config",
            ExportConfig(target="gguf", gguf=Path("model.gguf"), allow_lossy=True),
        ),
        ("export tiny -o out --fold-attention-factor", "config", ExportConfig(fold_attention_factor=True)),
        (
            "plan tiny --target-length 4k --gpu h200 --gpus 8 --dtype float32 --mfu 0.4 --attention-mfu 0.3 --tflops 9 "
            "--gpu-memory 24",
            "devices",
            Devices(gpu="h200", count=8, dtype="float32", mfu=0.4, attention_mfu=0.3, tflops=9.0, memory=24.0),
        ),
        (
            "plan tiny --target-length 4k --train-length 2k --train-steps 3 --train-batch 4 --mix pieces:1 --offload",
            "training",
            {"length": "2k", "steps": "3", "batch": "4", "mix": "pieces:1", "offload": True},
        ),
        ("extend --method cma --evaluations 22", "search", {"method": "cma", "evaluations": "22"}),
    ],
)
def test_options_of_a_configuration(line: str, name: str, wanted: Any) -> None:
    assert given(line)[name] == wanted


def test_nothing_given_is_the_default() -> None:
    assert "config" not in given(SEARCH)  # the verb's wrapper makes SearchConfig()
    assert given(FINETUNE)["config"] == FinetuneConfig(length=131072)


def test_options_that_are_given_more_than_once() -> None:
    arguments = given(f"{SEARCH} --data a.txt --data=b --samples 1 --samples 2")
    assert arguments["data"] == ["a.txt", "b"]
    assert arguments["config"].samples == 2  # the last one
    assert given("plan tiny --target-length 4k --method cma --method hybrid")["method"] == ["cma", "hybrid"]


def test_places_of_the_model_and_short_options() -> None:
    assert given("search --target-length 128k -o run tiny -v -q") == given(f"{SEARCH} --verbose --quiet")
    assert given("report a b -o page.html")["runs"] == [Path("a"), Path("b")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{SEARCH} --samples 0", "expected `samples` of at least 1, found '0'"),
        (f"{SEARCH} --critical-dim low", "expected a whole number for `critical_dim`, found 'low'"),
        (f"{SEARCH} --critical-dim -1", "expected `critical_dim` of at least 1, found '-1'"),
        (f"{SEARCH} --method simplex", "expected `method` to be"),
        (f"{SEARCH} --start-tokens few", "`start_tokens`"),
        (f"{SEARCH} --racing on --method hybrid", "`racing` is a setting of the methods"),
        (f"{SEARCH} --original-length 4g", "`original_length`"),
        (f"{FINETUNE} --schedule step", "expected `schedule`"),
        ("eval tiny --ruler-tasks vt,magic", "expected `ruler_tasks.1`"),
        ("plan tiny --target-length 4k --mfu 2", "expected `mfu`"),
        ("export tiny -o out --to magic", "expected `target`"),
    ],
)
def test_a_wrong_value_is_told_by_the_configuration(line: str, says: str) -> None:
    with pytest.raises(LongRopeError) as error:
        given(line)
    assert error.value.code in ("invalid-setting", "setting-of-another-method")
    assert says in str(error.value)
