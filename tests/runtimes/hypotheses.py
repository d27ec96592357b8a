"""A checkpoint whose windows and attention factor tell all hypotheses apart, and the log-probabilities of each.

Short factors are not 1, and the stated attention factor is not the one that the lengths give. A hypothesis is a window
(plain, short or long) and an attention factor (1, the stated one, the formula's), forced on the source model for every
length. A runtime computes one of them: the one that it agrees with to rounding, while the others are far away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longrope.doctor.checkpoint_config import ORIGINAL
from longrope.doctor.compare import RuntimeAtLength
from longrope.doctor.diagnose import diagnose
from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.checkpoint_files import RECORD
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import SCALING
from tests.checkpoints import save_checkpoint, tokenizer

L, TARGET = 256, 1024
STATED = 1.25
"""The attention factor of the checkpoints; the lengths give 1.118."""
LENGTHS = (64, 255, 256, 257, 300, 512, 1000)
"""Prompts below, at and above L."""
CROSSING, GROWN = 250, 270
"""A prompt that grows across L = 256, and the tokens that it ends with."""
NEAR, FAR = 5e-3, 0.02
"""Nats: the hypothesis that a runtime computes is nearer than the first, every other one further than the second."""


@dataclass(frozen=True)
class Case:
    """A source model on disk, its scaling and its export."""

    source: Path
    folder: Path
    scaling: RopeScaling

    @property
    def later(self) -> int:
        """Tokens that L lies after 256."""
        return self.scaling.geometry.original_length - L

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    @cached_property
    def hypotheses(self) -> dict[str, Window]:
        """Every window, for all lengths, by name: `short stated`, `long formula`, `plain 1`, …"""
        geometry, target = self.scaling.geometry, self.scaling.target_length
        short, long = (window.factors for window in self.scaling.windows)
        factors = {"plain": (1.0,) * geometry.pairs, "short": short, "long": long}
        ms = {"1": 1.0, "stated": STATED, "formula": su_attention_factor(geometry, target)}
        return {f"{w} {m}": Window(target, factors[w], attention_factor=ms[m]) for w in factors for m in ms}

    def expected(self, ids: list[int]) -> dict[str, np.ndarray]:
        """The log-probabilities (V,) of the token after `ids`, by hypothesis."""
        found = {}
        for name, window in self.hypotheses.items():
            apply_scaling(self.model, RopeScaling(self.scaling.geometry, (window,)))
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            found[name] = logits.double().log_softmax(-1).numpy()
        remove_scaling(self.model)
        return found

    def name(self, seen: dict[str, float], ids: list[int]) -> str:
        """The hypothesis that a runtime computed, `none` where it agrees with none.

        `seen` are its log-probabilities of tokens after `ids`.
        """
        tokens = [int(token) for token in seen]
        values = np.array(list(seen.values()))
        distance = {name: float(np.abs(values - row[tokens]).max()) for name, row in self.expected(ids).items()}
        near = [name for name, nats in distance.items() if nats < NEAR]
        first, second, *_ = sorted(distance.values())
        print(f"{self.folder.name}, {len(ids)} tokens: {near}, {first:.1e} nats, the next {second:.1e}")
        assert second > FAR, distance
        assert near or first > FAR, distance
        return near[0] if near else "none"

    def predicted(self, runtime: str) -> dict[int, str]:
        """The hypotheses that the doctor says `runtime` computes at the lengths that it shows; `none`: not served."""
        (finding,) = diagnose(self.folder, runtime=[runtime]).findings
        return {at.length: self._predicted(at, finding.factors) for at in finding.by_length}

    def _predicted(self, at: RuntimeAtLength, factors: dict[str, list[float]]) -> str:
        if at.window is None:
            return "none"
        values = factors["one" if at.window == "plain" else at.window]
        for name, window in self.hypotheses.items():
            same = np.allclose(window.factors, values, rtol=1e-5)
            if same and abs(window.attention_factor / at.attention_factor - 1) < 1e-5:
                return name
        raise AssertionError(f"the doctor's rotation at {at.length} is none of the hypotheses")


def make_case(folder: Path, config_class: str = "LlamaConfig", *, length: int = L, **export: Any) -> Case:
    """A random model with a window of `length` tokens, and its export to four times that."""
    shape = {"hidden_size": 128, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": length}
    source = save_checkpoint(folder / "source", config_class, **shape)
    geometry = RopeGeometry.from_config(AutoConfig.from_pretrained(source))
    short, long = np.linspace(1.2, 1.6, geometry.pairs), np.linspace(1.4, 4.5, geometry.pairs)
    windows = (Window(length, short, attention_factor=STATED), Window(4 * length, long, attention_factor=STATED))
    scaling = RopeScaling(geometry, windows)
    made = folder / export.get("target", "export")
    export_checkpoint(source, scaling, made, config=ExportConfig(**export))
    return Case(source, made, scaling)


def without_scaling(case: Case) -> Case:
    """The control: the export itself without its scaling, as plain RoPE for as many tokens.

    Older readers look for the base at the top level, and ONNX's builder takes a Phi-3 of two lengths for LongRoPE.
    """
    folder = case.folder.with_name(f"{case.folder.name}-control")
    if not folder.exists():
        shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns(SCALING))
        config = json.loads((folder / "config.json").read_text("utf-8"))
        for name in ("rope_scaling", "rope_parameters", RECORD):
            config.pop(name, None)
        config |= {"rope_theta": case.scaling.geometry.base, ORIGINAL: config["max_position_embeddings"]}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Case(case.source, folder, case.scaling)


def prompt(length: int) -> list[int]:
    """Token ids that a tokenizer gives back from their text: the BOS, then capitals by a fixed draw."""
    letters = tokenizer().convert_tokens_to_ids([chr(65 + place) for place in range(26)])
    return [0, *(letters[place] for place in np.random.default_rng(0).integers(26, size=length - 1))]


def run(python: Path, reader: str, case: Case, scratch: Path, **more: Any) -> Any:
    """The answer of the script `reader` in a runtime's environment, as JSON: log-probabilities by prompt, and more."""
    job = {
        "folder": str(case.folder),
        "scratch": str(scratch),
        "out": str(scratch / "answer.json"),
        "prompts": {str(length): prompt(length) for length in LENGTHS},
        "grown": prompt(GROWN + case.later),
        "crossing": CROSSING + case.later,
        "length": case.scaling.target_length,
    }
    scratch.mkdir(parents=True)
    (scratch / "job.json").write_text(json.dumps(job | more), "utf-8")
    script = Path(__file__).parent / "readers" / f"{reader}.py"
    # -P: a reader may be named as its runtime is.
    command = [str(python), "-P", str(script), str(scratch / "job.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    return json.loads((scratch / "answer.json").read_text("utf-8"))


def grown(case: Case, answer: dict[str, Any]) -> str:
    """The hypothesis after the text that grew across L; `none` where keys of two windows are mixed."""
    ids = prompt(GROWN + case.later)
    if "generated" in answer:  # by the runtime itself
        ids = ids[: CROSSING + case.later] + [int(token) for token in answer["generated"]]
    return case.name(answer["grown"], ids)


def assert_as_the_doctor_says(runtime: str, case: Case, seen: dict[str, dict[str, float]]) -> None:
    """At every length that was seen, the runtime computed what the doctor predicts there."""
    predicted = case.predicted(runtime)
    found = {length: case.name(seen[str(length)], prompt(length)) for length in LENGTHS}
    shown = {length: length if length in predicted else 64 if length < L else TARGET for length in LENGTHS}
    assert found == {length: predicted[shown[length]] for length in LENGTHS}
