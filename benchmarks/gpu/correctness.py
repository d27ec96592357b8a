"""Stage a: the embedded model on the device, against the CPU's numbers in float32 that are computed beside it.

Scoring, the gradient in the factors, a training step, generation across the switch and an exported checkpoint, in
float32 and bfloat16, with each attention kernel that torch has. The window is YaRN's for four times the original one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, NotAvailableError, require_number
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import longrope as lr
from longrope.models.loading import LoadedModel, open_model
from longrope.search.objective import PerplexityObjective
from longrope.search.search_data import prepare_texts

MODEL, BOOK = "tiny", "book:an-american-tragedy"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TOLERANCES = {
    # Largest difference of a token's loss in nats, of the mean loss, and of the gradient relative to its own size.
    "float32": {"token": 0.02, "mean": 1e-4, "gradient": 0.02},
    "bfloat16": {"token": 1.0, "mean": 0.02, "gradient": 0.25},
}
SAME_TOKENS = {"float32": 1.0, "bfloat16": 0.5}
"""Share of greedy tokens that must be the CPU's, from the first on: in bfloat16 a near tie ends the agreement."""


@cache
def opened(device: str, dtype: str) -> LoadedModel:
    return open_model(MODEL, options=lr.LoadOptions(dtype=dtype, device=device))


def scaling_of(loaded: LoadedModel) -> lr.RopeScaling:
    return lr.yarn(loaded.model, 4 * loaded.geometry.original_length)


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Attention by this kernel alone. Raises NotAvailableError where it takes no such numbers here."""
    try:
        with sdpa_kernel([KERNELS[name]]):
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error) or "not supported" in str(error):
            raise NotAvailableError(f"{name}: no such kernel for these numbers") from error
        raise


def objective(device: str, dtype: str) -> PerplexityObjective:
    loaded = opened(device, dtype)
    length = scaling_of(loaded).target_length
    texts = prepare_texts(loaded, [BOOK], length, lr.SearchConfig(method="longrope", samples=1))
    handle = lr.apply_scaling(loaded.model, scaling_of(loaded))
    return PerplexityObjective(handle, texts["search", length])


def losses(device: str, dtype: str) -> Tensor:
    found = objective(device, dtype)
    (nll,) = found.nlls(scaling_of(opened(device, dtype)).windows[-1])
    return nll.double().cpu()


def gradient(device: str, dtype: str) -> tuple[float, Tensor]:
    found = objective(device, dtype)
    loss, by_factors = found.loss_and_gradient(scaling_of(opened(device, dtype)).windows[-1])
    return loss, torch.tensor(by_factors, dtype=torch.float64)


def training(device: str, dtype: str) -> dict[str, float]:
    """The loss and the gradient's norm of one training step."""
    loaded = open_model(MODEL, options=lr.LoadOptions(dtype="float32", device=device))
    scaling = scaling_of(loaded)
    config = lr.FinetuneConfig(length=scaling.target_length, steps=1, batch=1, warmup=0, bf16=dtype == "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        done = lr.finetune(
            loaded, scaling=scaling, data=BOOK, output_dir=Path(folder) / "run", config=config, cpu=device == "cpu"
        )
    return {name: done.summary["curve"][0][name] for name in ("loss", "grad_norm")}


def generated(device: str, dtype: str) -> list[int]:
    """24 greedy tokens after a prompt that ends 8 before the window does."""
    loaded = opened(device, dtype)
    ids = objective(device, dtype).ids[:, : loaded.geometry.original_length - 8].to(loaded.model.device)
    found = lr.generate(loaded.model, ids, scaling_of(loaded), max_new_tokens=24, eos_token_id=())
    tokens: list[int] = found[0, ids.shape[1] :].tolist()
    return tokens


cpu_losses, cpu_gradient, cpu_training, cpu_generated = map(cache, (losses, gradient, training, generated))


def check_scoring(device: str, dtype: str) -> dict[str, Any]:
    found, expected, allowed = losses(device, dtype), cpu_losses("cpu", "float32"), TOLERANCES[dtype]
    token = require_number(float((found - expected).abs().max()))
    mean = require_number(float((found.mean() - expected.mean()).abs()))
    agrees = token <= allowed["token"] and mean <= allowed["mean"]
    return {"loss": float(found.mean()), "token_difference": token, "mean_difference": mean, "agrees": agrees}


def check_gradient(device: str, dtype: str) -> dict[str, Any]:
    (loss, found), (_, expected) = gradient(device, dtype), cpu_gradient("cpu", "float32")
    error = require_number(float((found - expected).norm() / expected.norm()))
    return {"loss": loss, "relative_error": error, "agrees": error <= TOLERANCES[dtype]["gradient"]}


def check_training(device: str, dtype: str) -> dict[str, Any]:
    found, expected = training(device, dtype), cpu_training("cpu", "float32")
    difference = require_number(abs(found["loss"] - expected["loss"]))
    ratio = require_number(found["grad_norm"] / expected["grad_norm"])
    allowed = TOLERANCES[dtype]
    agrees = difference <= allowed["mean"] and abs(ratio - 1) <= allowed["gradient"]
    return found | {"loss_difference": difference, "grad_norm_ratio": ratio, "agrees": agrees}


def check_generation(device: str, dtype: str) -> dict[str, Any]:
    found, expected = generated(device, dtype), cpu_generated("cpu", "float32")
    same = next((at for at, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), len(found))
    return {"tokens": len(found), "same_from_the_first": same, "agrees": same >= SAME_TOKENS[dtype] * len(found)}


def check_export(device: str, dtype: str) -> dict[str, Any]:
    """Logits of an exported checkpoint, loaded by plain transformers, and of the model under the scaling, inside the
    original window and beyond."""
    loaded = opened(device, dtype)
    scaling = lr.yarn(loaded.model, 4 * loaded.geometry.original_length)
    ids, errors = objective(device, dtype).ids.to(loaded.model.device), {}
    with tempfile.TemporaryDirectory() as folder:
        done = lr.export_checkpoint(MODEL, scaling, Path(folder) / "out", config=lr.ExportConfig(allow_lossy=True))
        plain = AutoModelForCausalLM.from_pretrained(done.path, dtype=loaded.model.dtype).to(device).eval()
    expressed = float(plain.model.rotary_emb.attention_scaling)
    with torch.inference_mode():
        for length in (loaded.geometry.original_length, scaling.target_length):
            window = scaling.window_for(length)
            same = lr.RopeScaling.single(loaded.geometry, length, window.factors, 0, expressed)
            with lr.scaled(loaded.model, same):
                ours = loaded.model(ids[:, :length]).logits.float()
            theirs = plain(ids[:, :length]).logits.float()
            errors[str(length)] = require_number(float((ours - theirs).abs().max() / ours.abs().max()))
    return {"relative_error": errors, "agrees": max(errors.values()) <= (1e-3 if dtype == "float32" else 0.05)}


CHECKS = {
    "scoring": check_scoring,
    "gradient": check_gradient,
    "training": check_training,
    "generation": check_generation,
    "export": check_export,
}


def run(arguments: argparse.Namespace, seconds: float) -> None:
    ledger = Ledger(arguments, "correctness", seconds)
    device = arguments.device
    kernels = ["flash", "math"] if arguments.small else list(KERNELS)
    for dtype in ("bfloat16", "float32"):
        for what in CHECKS:
            for name in kernels if what in ("scoring", "gradient") else ("chosen by torch",):

                def work(what: str = what, name: str = name, dtype: str = dtype) -> dict[str, Any]:
                    reference = {"scoring": cpu_losses, "gradient": cpu_gradient}.get(what)
                    if reference is not None:
                        reference("cpu", "float32")  # with the CPU's own kernels
                    if name not in KERNELS:
                        return CHECKS[what](device, dtype)
                    with kernel(name):
                        return CHECKS[what](device, dtype)

                ledger.measure(f"{what}, {dtype}, {name}", work)
