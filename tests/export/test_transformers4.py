"""Our exports in transformers 4.57.1, really loaded: the same logits as ours at lengths inside, at and past the switch.

The test makes a second virtual environment with that version and lends it this one's torch. Slow: it downloads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longrope.data.sources import read_all
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.loading import load_model, load_tokenizer
from longrope.rope.closed_forms import su_attention_factor, yarn
from longrope.rope.scaling import RopeScaling
from tests.export.sources import SU, TARGET, WINDOW, export, ids, save_model, scaled_logits, scaling_of

pytestmark = pytest.mark.slow

VERSION = "4.57.1"
SWITCH, LONGEST = 256, 2048
LENGTHS = (200, SWITCH, SWITCH + 1, LONGEST)
FAMILIES = ("mixtral", "qwen2", "qwen3", "stablelm", "glm", "gpt_neox", "cohere", "gemma3_text", "olmo3", "phi3")
READER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__ == sys.argv[1]
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder, texts, out in json.loads(sys.argv[2]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        save_file({n: model(x, use_cache=False).logits.contiguous() for n, x in load_file(texts).items()}, out)
"""


@dataclass(frozen=True)
class Old:
    """transformers 4.57.1 in a virtual environment of its own."""

    python: Path

    def logits(self, folders: list[Path], texts: dict[str, Tensor], scratch: Path) -> list[dict[str, Tensor]]:
        """The logits that it computes from each folder: length -> (1, length, vocabulary)."""
        save_file(texts, scratch / "texts.safetensors")
        jobs = [
            (str(folder), str(scratch / "texts.safetensors"), str(scratch / f"{number}.safetensors"))
            for number, folder in enumerate(folders)
        ]
        command = [str(self.python), "-c", READER, VERSION, json.dumps(jobs)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return [load_file(out) for _, _, out in jobs]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Old:
    home = tmp_path_factory.mktemp("transformers4")
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install_it = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={VERSION}"]
    ran = subprocess.run(install_it, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"transformers {VERSION} cannot be installed here: {ran.stderr[-300:]}")
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    theirs = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # Behind its own packages: torch comes from here, transformers and its dependencies from there.
    (theirs / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Old(python)


@pytest.fixture(scope="module")
def embedded() -> tuple[RopeScaling, RopeScaling, dict[str, Tensor]]:
    """Two scalings of the embedded model to 2,048 tokens, m as runtimes compute it and m = 1, and real texts."""
    geometry = geometry_of(load_model("tiny"))
    factors = yarn(geometry, LONGEST)
    m = su_attention_factor(geometry, LONGEST)
    tokenizer = load_tokenizer("tiny")
    text = read_all(["book:les-miserables"])[0].text[:40_000]
    tokens = tokenizer(text, return_tensors="pt").input_ids
    texts = {str(length): tokens[:, :length].clone() for length in LENGTHS}
    return (
        RopeScaling.extended(geometry, LONGEST, factors, attention_factor=m),
        RopeScaling.extended(geometry, LONGEST, factors),
        texts,
    )


def installed_logits(scaling: RopeScaling, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    model = load_model("tiny")
    apply_scaling(model, scaling)
    with torch.inference_mode():
        return {length: model(text, use_cache=False).logits for length, text in texts.items()}


def top1_agreement(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())


def assert_parity(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float) -> None:
    """Top-1 agreement of at least 99.9 %, and no logit further away than `allowed` of the largest."""
    for length, mine in ours.items():
        agreement, error = top1_agreement(mine, theirs[length]), float((mine - theirs[length]).abs().max())
        print(f"{name} at {length} tokens: top-1 agreement {agreement:.4%}, largest logit difference {error:.2g}")
        assert agreement >= 0.999, (name, length, agreement)
        assert error <= allowed * float(mine.abs().max()), (name, length, error)


def test_every_form_of_the_embedded_model(old, embedded, tmp_path):
    su, one, texts = embedded
    forms = {
        "hf": (su, {}),
        "hf, m = 1": (one, {}),
        "hf-unified": (su, {"target": "hf-unified"}),
        "phi3": (su, {"target": "phi3"}),
        "hf, m = 1 folded": (one, {"fold_attention_factor": True}),
        "phi3, m = 1 folded": (one, {"target": "phi3", "fold_attention_factor": True}),
    }
    folders = [export("tiny", scaling, tmp_path / name, **options).path for name, (scaling, options) in forms.items()]
    for (name, (scaling, options)), theirs in zip(forms.items(), old.logits(folders, texts, tmp_path), strict=True):
        if options.get("target") == "hf-unified":
            long = scaling.windows[-1]
            scaling = RopeScaling(scaling.geometry, (long,))
        # The embedded model is stored in bfloat16, to which folded weights are rounded.
        assert_parity(name, installed_logits(scaling, texts), theirs, 2e-2 if "folded" in name else 1e-3)


def test_every_family(old, tmp_path):
    """Partial rotation, interleaved pairs, experts, one RoPE per layer type: legacy keys have other names in each."""
    texts = {str(length): ids(length).contiguous() for length in (20, WINDOW, WINDOW + 1, TARGET)}
    ours, folders = {}, []
    for family in FAMILIES:
        source = save_model(tmp_path / family, family)
        scaling = scaling_of(source, SU)
        folders.append(export(source, scaling, tmp_path / f"{family}-out").path)
        ours[family] = dict(zip(texts, scaled_logits(source, scaling, *map(int, texts)), strict=True))
    for family, theirs in zip(FAMILIES, old.logits(folders, texts, tmp_path), strict=True):
        assert_parity(family, ours[family], theirs, 1e-4)


def test_without_the_legacy_keys_it_differs(old, embedded, tmp_path):
    """A folder that transformers 5 saved is plain RoPE there, and a length in the dictionary alone never
    switches; transformers says nothing in either case."""
    su, _, texts = embedded
    whole = export("tiny", su, tmp_path / "whole").path
    drops = {"saved by 5": ("rope_scaling", "rope_theta"), "length inside": ("original_max_position_embeddings",)}
    folders = []
    for name, keys in drops.items():
        shutil.copytree(whole, tmp_path / name)
        path = tmp_path / name / "config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
        path.write_text(json.dumps(config))
        folders.append(tmp_path / name)
    ours = installed_logits(su, texts)
    for name, theirs in zip(drops, old.logits(folders, texts, tmp_path), strict=True):
        agreement = top1_agreement(ours[str(LONGEST)], theirs[str(LONGEST)])
        print(f"{name}: top-1 agreement at {LONGEST} tokens {agreement:.2%}")
        assert agreement < 0.99
