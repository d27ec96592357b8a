"""The plan of a whole extension: shapes of families, what searches ask, what fits and what would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    HunYuanMoEV1Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from longrope.costs.advice import FIRST_TARGETS, beyond_searching
from longrope.costs.devices import Devices, gpu_table
from longrope.costs.flops_bytes import Flops, forward_flops
from longrope.costs.plan import CostPlan, CostRow, plan
from longrope.costs.search_cost import search_work, sized_objectives
from longrope.errors import LongRopeError
from longrope.models.config import USABLE
from longrope.models.loading import load_model, open_model
from longrope.models.model_dims import shape_of
from longrope.models.weightless import weightless
from longrope.recipes.schema import SearchStage
from longrope.recipes.yaml import load_recipe
from longrope.search.config import METHODS, SearchConfig
from longrope.search.initial import KNOT_FORMS
from longrope.search.log import read_log
from longrope.search.run import search
from longrope.search.search_data import prepare_texts
from longrope.search.start import MOST_RAMPS
from longrope.train.config import FinetuneConfig

GIGA = 1e9
LLAMA3 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of an 8B model, and nothing else."""
    folder = tmp_path_factory.mktemp("configs") / "llama3-8b"
    LLAMA3.save_pretrained(folder)
    return str(folder)


def only(planned: CostPlan, stage: str, name: str) -> CostRow:
    (row,) = (row for row in planned.rows if (row.stage, row.name) == (stage, name))
    return row


# Shapes: published sizes.


def shape_in(folder: Path, config: Any) -> Any:
    config.save_pretrained(folder)
    return shape_of("model", weightless(str(folder)))


def test_published_sizes(tmp_path: Path, llama3: str) -> None:
    assert shape_of("", weightless(llama3)).parameters == 8_030_261_248
    mistral = shape_in(tmp_path / "a", MistralConfig())
    assert (mistral.parameters, mistral.reaches) == (7_241_732_096, (4096,) * 32)
    mixtral = shape_in(tmp_path / "b", MixtralConfig())
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.experts
    assert 12.5e9 < mixtral.active_weights + mixtral.head_weights < 12.9e9
    deepseek = shape_in(tmp_path / "c", DeepseekV3Config())
    assert (deepseek.queries, deepseek.values, deepseek.heads_output) == (128 * 192, 128 * 128, 128 * 128)
    assert 36e9 < deepseek.active_weights + deepseek.head_weights < 37.5e9


def test_experts_by_layer_count_as_their_mean(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "head_dim": 16, "num_experts": 8}
    listed = shape_in(tmp_path / "list", HunYuanMoEV1Config(**small, moe_topk=[2, 4]))
    assert listed == shape_in(tmp_path / "one", HunYuanMoEV1Config(**small, moe_topk=3))
    assert listed.experts
    assert listed.active_weights < shape_in(tmp_path / "all", HunYuanMoEV1Config(**small, moe_topk=8)).active_weights


QWEN25_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)


def by_gradient(folder: Path, how: Any, **devices: Any) -> CostRow:
    settings = SearchConfig(method="gradient", layer_inputs=how)
    return only(plan(str(folder), "256k", Devices(**devices), searches=[settings]), "search", "gradient")


def test_qwen25_7b_at_256k_fits_a_card_of_80_gb(tmp_path: Path) -> None:
    QWEN25_7B.save_pretrained(tmp_path)
    kept, chosen = by_gradient(tmp_path, "keep", gpu="h100"), by_gradient(tmp_path, "auto", gpu="h100")
    offloaded, again = by_gradient(tmp_path, "offload", gpu="h100"), by_gradient(tmp_path, "recompute", gpu="h100")
    assert not kept.fits
    assert kept.peak_bytes == pytest.approx(82.8e9, rel=0.001)
    assert chosen == offloaded
    assert (chosen.fits, again.fits) == (True, True)
    assert chosen.peak_bytes == pytest.approx(34.0e9, rel=0.01)
    assert again.peak_bytes == pytest.approx(49.0e9, rel=0.01)
    assert "inputs of layers in 60 GB of host memory" in chosen.detail
    assert "inputs of layers made again, 10 of 28 held at once" in again.detail
    assert (kept.matrix_flops, kept.hours) == (offloaded.matrix_flops, offloaded.hours)
    assert 1.1 < again.hours / kept.hours < 1.34  # a forward more, of three and four and a half
    assert by_gradient(tmp_path, "auto", gpu="h200").detail == kept.detail  # it fits as it is


def test_a_machine_without_a_gpu_has_no_other_memory(tmp_path: Path) -> None:
    QWEN25_7B.save_pretrained(tmp_path)
    assert "made again" in by_gradient(tmp_path, "auto", gpu="cpu", memory=60).detail
    with pytest.raises(LongRopeError, match="`layer_inputs` offload is for GPUs"):
        by_gradient(tmp_path, "offload", gpu="cpu")


def test_layers_that_slide_attend_less(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    shape = shape_in(tmp_path, Gemma3TextConfig(num_hidden_layers=6, layer_types=types, sliding_window=512))
    assert shape.reaches == (512,) * 5 + (None,)
    assert shape.attended_pairs(4096) == 4096**2 / 2 + 5 * (512 * 4096 - 512**2 / 2)
    assert shape.attended_pairs(256) == 6 * 256**2 / 2


# The evaluations of searches.


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_those_of_the_search(method: str) -> None:
    loaded = open_model("tiny")
    options = SearchConfig(method=method, samples=2)
    texts = prepare_texts(loaded, ["book:an-american-tragedy"], 1024, options)
    sized = sized_objectives(loaded.context_length, 1024, options)
    assert {key: tuple(samples.ids.shape) for key, samples in texts.items()} == {
        key: (objective.count, objective.length) for key, objective in sized.items()
    }


def test_the_papers_searches_make_1344_evaluations() -> None:
    loaded = open_model("tiny")
    for method, samples in (("longrope", 5), ("longrope2", 10)):
        work = search_work(loaded, 2048, SearchConfig(method=method))
        assert (work.evaluations, work.token_passes) == (1344, 1344 * samples * 2048)
        assert work.tokens > work.token_passes  # the baselines
        assert not work.by_gradient
        alone = search_work(loaded, 2048, SearchConfig(method=method, baselines=False))
        assert alone.token_passes == work.token_passes
        assert work.tokens - alone.tokens == 5 * samples * 2048  # all but the model as it is


@pytest.mark.parametrize(
    "options",
    [
        SearchConfig(method="longrope", population=8, iterations=2, samples=2),
        SearchConfig(method="cma", evaluations=20, samples=2),
        SearchConfig(method="gradient", steps=6, samples=2),
    ],
    ids=lambda options: options.method,
)
def test_a_search_makes_the_evaluations_that_were_planned(
    options: SearchConfig, tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    loaded = open_model(str(checkpoint))
    planned = search_work(loaded, 128, options)
    result = search(loaded, 128, [str(texts / "search.txt")], tmp_path / "run", options)
    # The compass search ends where no ramp is better; the plan has the most that it may try, each on one text.
    ramps = MOST_RAMPS - _ramps_tried(tmp_path / "run") if options.method != "longrope" else 0
    assert 0 <= ramps < MOST_RAMPS
    assert planned.evaluations - result.evaluations == ramps
    assert planned.token_passes - result.token_passes == 128 * ramps


def _ramps_tried(run: Path) -> int:
    """Of a search in one stage: what it asked about the first text alone, less the two closed forms."""
    rows = read_log(run / "search.jsonl")[1]
    return sum(row.request.get("samples") == [0] and row.gradient is None for row in rows) - len(KNOT_FORMS)


def test_in_a_search_by_needles_the_head_runs_only_for_answers() -> None:
    loaded = open_model("tiny")
    shape, device = shape_of("tiny", loaded.model), Devices(gpu="h100")
    work = search_work(loaded, 2048, SearchConfig(method="longrope", objective="needle", samples=5))
    flops = work.flops(shape)
    assert flops.matrices == pytest.approx((1344 + 6) * 5 * forward_flops(shape, 2048, 1).matrices)
    assert work.time(shape, device).total == pytest.approx(device.seconds(flops))
    gradient, whole = (
        search_work(loaded, 2048, SearchConfig(method="gradient", objective=objective, samples=5)).flops(shape)
        for objective in ("needle", "perplexity")
    )
    assert gradient.matrices < whole.matrices
    assert gradient.attention == whole.attention


def test_evaluations_requested_at_once_are_shared_by_the_devices() -> None:
    loaded = open_model("tiny")
    shape = shape_of("tiny", loaded.model)
    one, eight = Devices(gpu="h100"), Devices(gpu="h100", count=8)
    evolution = search_work(loaded, 2048, SearchConfig(method="longrope"))
    alone = evolution.time(shape, one).total
    assert evolution.time(shape, eight).total == pytest.approx(alone / 8, rel=0.02)
    assert alone == pytest.approx(one.seconds(evolution.flops(shape)))
    gradient = search_work(loaded, 2048, SearchConfig(method="gradient"))
    assert gradient.time(shape, eight).total > gradient.time(shape, one).total / 2  # one step after the other
    in_pairs = evolution.time(shape, eight, processes=2)  # four replicas of two devices each
    assert in_pairs.compute == pytest.approx(alone / 8, rel=0.02)
    pair = evolution.time(shape, Devices(gpu="h100", count=2), processes=2)
    assert in_pairs.exchange == pytest.approx(pair.exchange / 4, rel=0.02)
    assert pair.exchange > 0


# Devices.


def test_rates_and_memory() -> None:
    devices = Devices(gpu="h100", mfu=0.5, attention_mfu=0.25)
    assert devices.seconds(Flops(989e12, 0)) == pytest.approx(2)
    assert devices.seconds(Flops(0, 989e12)) == pytest.approx(4)
    assert Devices(mfu=0.25).chosen_attention_mfu == 0.2
    assert Devices(gpu="h100", tflops=1.0, mfu=1.0).seconds(Flops(1e12, 0)) == 1
    assert Devices(memory=10).holds(USABLE * 10 * GIGA)
    assert not Devices(memory=10).holds(USABLE * 10 * GIGA + 1)
    assert Devices(gpu="h100", dtype="float32").peak_tflops < devices.peak_tflops


def test_every_gpu_of_the_table_has_its_source() -> None:
    assert {"a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "cpu"} <= gpu_table().keys()
    for name, gpu in gpu_table().items():
        assert gpu["source"]
        assert gpu["memory"] > 0
        for dtype in ("bfloat16", "float16", "float32"):
            assert Devices(gpu=name, dtype=dtype).peak_tflops > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpu": "h1000"},
        {"count": 0},
        {"dtype": "int4"},
        {"mfu": 0.0},
        {"attention_mfu": 1.5},
        {"tflops": float("nan")},
        {"tflops": float("inf")},
        {"memory": -1.0},
    ],
)
def test_devices_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError) as error:
        Devices(**wrong)
    assert error.value.code == "invalid-setting"
    assert next(iter(wrong)) in str(error.value).lower()


# The whole plan.


def test_a_plan_of_an_8b_model_without_weights(llama3: str) -> None:
    planned = plan(llama3, 131072, Devices(gpu="h100", count=8))
    assert [(row.stage, row.name) for row in planned.rows] == [
        *(("search", method) for method in METHODS),
        ("finetune", "longrope"),
        ("finetune", "longrope2"),
        *(("evaluate", suite) for suite in ("perplexity", "passkey", "needle", "ruler")),
    ]
    longrope, mixed = only(planned, "finetune", "longrope"), only(planned, "finetune", "longrope2")
    assert longrope.tokens == 32 * (400 * 65536 + 600 * 131072)
    assert mixed.tokens == pytest.approx(10e9, rel=0.001)
    perplexity = only(planned, "evaluate", "perplexity")
    assert perplexity.tokens == 10 * (8192 + 16384 + 32768 + 65536 + 131072)
    assert perplexity.devices == 1
    evolution = only(planned, "search", "longrope")
    once = forward_flops(planned.shape, 131072)
    assert evolution.matrix_flops == pytest.approx((1344 + 6) * 5 * once.matrices)
    assert evolution.attention_flops == pytest.approx((1344 + 6) * 5 * once.attention)
    assert evolution.memory["weights"] == 2 * 8_030_261_248
    assert evolution.fits
    assert not evolution.advice


def test_a_loaded_model_is_planned_for_like_its_name() -> None:
    """A `PreTrainedModel` needs no tokenizer, and keeps its mode."""
    model = load_model("tiny").train()
    named, given = (plan(one, 2048, searches=[], trainings=[]).rows for one in ("tiny", model))
    assert given == named
    assert model.training


def test_the_papers_cost_of_an_evaluation(tmp_path: Path) -> None:
    """LongRoPE: one evaluation at 2,048k tokens takes about 50 minutes on 8 A100, with the 3 samples used there."""
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    planned = plan(str(tmp_path), 2048 * 1024, Devices(gpu="a100-80", count=8), searches=[SearchConfig()], trainings=[])
    hours = planned.rows[0].hours / 678  # 672 candidates and 6 baselines
    assert 30 < hours * 60 < 75


def test_what_does_not_fit_says_what_would(llama3: str, tmp_path: Path) -> None:
    def trained(**given: Any) -> CostRow:
        settings = FinetuneConfig(length=131072, offload=given.pop("offload", False))
        shared = given.pop("context_parallel", 1)
        devices = Devices(**{"gpu": "h100", "count": 8} | given)
        planned = plan(llama3, 131072, devices, searches=[], trainings=[settings], context_parallel=shared)
        return only(planned, "finetune", "given")

    row = trained()
    assert not row.fits
    assert "`offload`" in row.advice
    assert "context parallel over 2 devices" in row.advice
    assert "h200" in row.advice
    assert trained(offload=True).fits
    assert trained(context_parallel=2).fits
    assert trained(gpu="h200").fits
    alone = trained(count=1)
    assert not alone.fits
    assert alone.memory["states"] == 8 * row.memory["states"] == 16 * 8_030_261_248
    assert "GPUs" in alone.advice

    def searched(length: int, model: str = llama3, how: Any = "keep") -> CostRow:
        settings = SearchConfig(method="gradient", layer_inputs=how)
        return plan(model, length, Devices(), searches=[settings], trainings=[]).rows[0]

    assert searched(131072).fits
    gradient = searched(262144)
    assert not gradient.fits
    assert "`layer_inputs` offload" in gradient.advice
    assert searched(262144, how="auto").fits
    far = searched(2**21, how="auto")
    assert not far.fits
    assert "`layer_inputs`" not in far.advice
    assert 'spread over 2 GPUs of a machine (in Python: a model loaded with device_map="balanced")' in gradient.advice
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**{**LLAMA3.to_dict(), "head_dim": None, **large}).save_pretrained(tmp_path / "70b")
    assert "spread over 8 GPUs of a machine (--device auto)" in searched(131072, str(tmp_path / "70b")).advice
    assert "spread over" not in searched(2**21).advice
    assert "h200" in gradient.advice
    assert "128k tokens" in gradient.advice


def test_advice_counts_from_the_window_that_the_model_has(tmp_path: Path) -> None:
    """As Llama 3.1: trained with 8k tokens, extended to 128k."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    LlamaConfig(**{**LLAMA3.to_dict(), "max_position_embeddings": 131072, "rope_parameters": rope}).save_pretrained(
        tmp_path
    )

    def said(target: str) -> str:
        settings = [SearchConfig(samples=1, steps=1, continuation=False)]
        return plan(str(tmp_path), target, Devices(memory=10**6), searches=settings, trainings=[]).recommendation

    assert said("256k").startswith("Recommended: search --method gradient")
    assert "times the window" not in said("256k")
    assert "At 16 times the window" in said("2M")
    assert said("2M").endswith("the papers train too (extend --recipe longrope).")  # longrope2 begins with 128k
    assert beyond_searching(8192, 8192, 131072).endswith("(extend --recipe longrope2 or longrope).")
    assert beyond_searching(8192, 262144, 4194304).endswith("the papers train too.")


@pytest.mark.parametrize("name", FIRST_TARGETS)
def test_the_recipes_begin_where_the_advice_says(name: str) -> None:
    first = load_recipe(name, 8192).stages[0]
    assert isinstance(first, SearchStage)
    assert first.target == FIRST_TARGETS[name] * 8192


def test_plans_that_cannot_be(llama3: str, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="above the model's window of 8192"):
        plan(llama3, 8192)
    with pytest.raises(LongRopeError, match="divides 8") as error:
        plan(llama3, 131072, Devices(count=8), context_parallel=3)
    assert error.value.code == "invalid-setting"
    with pytest.raises(LongRopeError, match="expected a `skip_to` of at most 131072 for training, found 262144"):
        plan(llama3, 131072, trainings=[FinetuneConfig(length=16384, skip_to=262144)])
    with pytest.raises(LongRopeError, match=r"no config|config\.json"):
        plan(str(tmp_path), 131072)


def test_a_plan_is_shown_and_its_json_names_everything(llama3: str, tmp_path: Path) -> None:
    planned = plan(llama3, "16k", searches=[SearchConfig(method="cma")], trainings=[])
    head, recommended, row = repr(planned).splitlines()[:3]
    assert head.endswith(
        "8k -> 16k tokens on 1 × NVIDIA H100 SXM 80 GB (the default; choose yours with `gpu`), bfloat16"
    )
    assert recommended.startswith("Recommended: search --method cma")
    assert row.startswith("search cma ")
    assert " GPU-hours fits" in row
    assert max(map(len, repr(planned).splitlines()[2:])) <= 80
    planned.save(tmp_path / "plan.json")
    found = planned.to_json()
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(found))
    assert found["devices"]["peak_tflops"] == 989
    assert found["rows"][0]["peak_bytes"] == sum(found["rows"][0]["memory"].values())
    assert any("assumed, not measured" in line for line in found["assumptions"])
