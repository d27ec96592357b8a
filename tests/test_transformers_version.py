"""transformers releases that are not known to work are refused at the start, in one line that names the versions."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest

from longrope import transformers_version
from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling
from longrope.transformers_version import KNOWN, require_known_transformers, requirement
from tests.models.every_family import small_config


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Let `version` be what importlib finds of transformers."""

    def found(name: str) -> str:
        if name != "transformers":
            return metadata.version(name)
        if not version:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(transformers_version, "version", found)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.24.0", "5.24.7", "5.23.1rc1", "5.24.0.dev0"])
def test_a_known_release(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    require_known_transformers()


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.16.4", "5.25.0", "5.25.0.dev0", "5.100.0", "6.0.0", "x", ""])
def test_an_unknown_release(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    with pytest.raises(LongRopeError) as error:
        require_known_transformers()
    assert error.value.code == "unknown-transformers"
    assert f"expected transformers {KNOWN[0]} to {KNOWN[1]}" in str(error.value)
    assert f"found {version or 'none'}" in str(error.value)


@pytest.mark.parametrize("verb", ["search", "inspect", "doctor", "eval", "export"])
def test_every_verb_is_refused_at_its_start(monkeypatch: pytest.MonkeyPatch, cli, verb: str) -> None:
    install(monkeypatch, "5.25.0")
    refusal = cli(verb, "tiny", "--nonsense").refusal
    assert "found 5.25.0" in refusal
    assert f"pip install 'transformers{requirement()}'" in refusal


def test_help_needs_no_transformers(monkeypatch: pytest.MonkeyPatch, cli) -> None:
    install(monkeypatch, "")
    assert cli("--help").code == 0


def test_python_is_refused_too() -> None:
    """Before torch or transformers are imported."""
    script = (
        "import importlib.metadata as m, sys; own = m.version\n"
        "m.version = lambda name: '5.25.0' if name == 'transformers' else own(name)\n"
        "import longrope\n"
        "try:\n    longrope.apply_scaling\n"
        "except longrope.LongRopeError as error:\n    print(error.code, 'torch' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["unknown-transformers", "False"]


@pytest.mark.parametrize(("version", "refused"), [("5.20.2", True), ("5.21.0", False), ("5.24.0", False)])
def test_one_rope_per_layer_type(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    """Before 5.21 an UnboundLocalError in transformers, at the first text past L."""
    config = small_config("gemma3_text")
    geometry = RopeGeometry.from_config(config)
    scaling = RopeScaling.extended(geometry, 256, [2.0] * geometry.pairs)
    install(monkeypatch, version)
    with pytest.raises(LongRopeError, match=r"one RoPE per layer type; found 5\.20\.2") if refused else nullcontext():
        superset_config(config.to_dict(), config, scaling)
    llama = small_config("llama")
    superset_config(llama.to_dict(), llama, RopeScaling.extended(RopeGeometry.from_config(llama), 256, [2.0] * 8))


def test_pip_has_the_same_bounds() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert [each for each in project["dependencies"] if each.startswith("transformers")] == [
        f"transformers{requirement()}"
    ]
    assert requirement() == ">=5.17,<5.25"
