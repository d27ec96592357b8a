"""Defaults are the papers'; every wrong value is one line; and the arguments that the Trainer gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.train.config import FinetuneConfig, LoraConfig
from longrope.train.trainer import training_arguments


def test_a_single_window_is_trained_as_longrope_does() -> None:
    config = FinetuneConfig(length=256)
    assert (config.shares, config.mixed) == ({"long": 1.0}, False)
    assert (config.rows_per_step, config.chosen_schedule, config.chosen_warmup) == (32, "linear", 20)
    assert (config.steps, config.learning_rate, config.weight_decay, config.max_grad_norm) == (400, 2e-5, 0, 1)


@pytest.mark.parametrize("mix", ["short:0.3,long:0.7", "pieces,long", "short,medium,long"])
def test_mixed_windows_are_trained_as_longrope2_does(mix: str) -> None:
    config = FinetuneConfig(length=256, mix=mix)
    assert config.mixed
    assert (config.rows_per_step, config.chosen_schedule, config.chosen_warmup) == (64, "cosine", 40)


def test_what_is_given_goes_before_the_defaults() -> None:
    config = FinetuneConfig(length=256, batch=4, schedule="constant", warmup=0)
    assert (config.rows_per_step, config.chosen_schedule, config.chosen_warmup) == (4, "constant", 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mix": "all"},
        {"length": 1},
        {"steps": 0},
        {"batch": 0},
        {"micro_batch": 0},
        {"seed": -1},
        {"save_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"schedule": "step"},
        {"warmup": -1},
        {"save_dtype": "int8"},
        {"fused_loss": "on"},
        {"context_parallel": 0},
        {"offload": True, "checkpointing": False},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError) as error:
        FinetuneConfig(**({"length": 256} | wrong))
    assert next(iter(wrong)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}])
def test_wrong_lora_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError, match=next(iter(wrong))) as error:
        LoraConfig(**wrong)
    assert error.value.code == "invalid-setting"


def test_the_trainers_arguments(tmp_path: Path) -> None:
    config = FinetuneConfig(length=256, mix="short,long", batch=12, micro_batch=3, trainer={"torch_compile": False})
    arguments = training_arguments(config, tmp_path, cpu=True)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.95, 1.0)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 4)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("cosine", 40)
    assert arguments.train_sampling_strategy == "sequential"
    assert arguments.optim == "adamw_torch_fused" or arguments.optim == "adamw_torch"


@pytest.mark.parametrize(
    ("config", "code", "named"),
    [
        ({"trainer": {"learning_rate": 1.0}}, "invalid-setting", "learning_rate"),
        ({"trainer": {"gradient_accumulation_steps": 2}}, "invalid-setting", "gradient_accumulation_steps"),
        ({"trainer": {"push_to_hub": True}}, "invalid-setting", "push_to_hub"),
        ({"trainer": {"use_liger_kernel": True}}, "invalid-setting", "use_liger_kernel"),
        ({"trainer": {"no_such": 1}}, "invalid-setting", "no_such"),
        ({"offload": True}, "invalid-setting", "offload"),
        ({"batch": 5, "micro_batch": 2}, "indivisible-batch", "`batch` that 2 divides"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, config: dict[str, Any], code: str, named: str) -> None:
    with pytest.raises(LongRopeError, match=named) as error:
        training_arguments(FinetuneConfig(length=256, **config), tmp_path, cpu=True)
    assert error.value.code == code
