"""Exports on the hub: only when asked, with huggingface_hub's own token, and never over files that are there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from longrope.errors import LongRopeError
from longrope.export import push
from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from tests.export.sources import save_model, scaling_of

TEST = "owner/name"


def answer(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} of the hub", response=response)


class Hub:
    """A stand-in for HfApi: its repositories, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[str]] = {}
        self.calls: list[str] = []
        self.token = True
        self.fault: Exception | None = None

    def whoami(self) -> None:
        self.calls.append("whoami")
        if not self.token:
            raise LocalTokenNotFoundError("Token is required")

    def list_repo_files(self, name: str) -> list[str]:
        if name not in self.repositories:
            raise answer(404, RepositoryNotFoundError)
        return self.repositories[name]

    def create_repo(self, name: str, *, private: bool) -> None:
        assert private
        assert name not in self.repositories
        self.calls.append(f"create {name}")
        self.repositories[name] = [".gitattributes"]

    def upload_folder(self, *, repo_id, folder_path, commit_message, create_pr, ignore_patterns) -> SimpleNamespace:
        found = sorted(path.name for path in Path(folder_path).iterdir())
        return self._uploaded(repo_id, [name for name in found if not name.startswith(".")], create_pr)

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message, create_pr) -> SimpleNamespace:
        assert Path(path_or_fileobj).is_file()
        return self._uploaded(repo_id, [path_in_repo], create_pr)

    def _uploaded(self, name: str, files: list[str], create_pr: bool) -> SimpleNamespace:
        if self.fault is not None:
            raise self.fault
        self.calls.append(f"{'pull request' if create_pr else 'commit'} of {', '.join(files)}")
        if not create_pr:
            self.repositories[name] += files
        address = f"https://hub.test/{name}"
        return SimpleNamespace(
            commit_url=f"{address}/commit/1", pr_url=f"{address}/discussions/1" if create_pr else None
        )


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: found)
    return found


@pytest.fixture
def source(tmp_path) -> Path:
    return save_model(tmp_path / "source", "llama")


def pushed(source: Path, out: Path, name: str | None = TEST, **settings: object):
    config = ExportConfig(proof="rotary", **settings)
    return export_checkpoint(source, scaling_of(source), out, config=config, push=name)


def refused(*arguments: object, **settings: object) -> LongRopeError:
    with pytest.raises(LongRopeError) as error:
        pushed(*arguments, **settings)
    return error.value


def test_never_without_being_asked(hub, source, tmp_path):
    done = pushed(source, tmp_path / "out", None)
    assert (done.pushed, hub.calls) == ("", [])


def test_a_new_repository(hub, source, tmp_path):
    done = pushed(source, tmp_path / "out")
    files = "README.md, config.json, generation_config.json, model.safetensors, scaling.json"
    assert hub.calls == ["whoami", f"create {TEST}", f"commit of {files}"]
    assert done.pushed == f"https://hub.test/{TEST}/commit/1"
    assert done.to_json()["pushed"] == done.pushed


def test_files_that_are_there_are_left_to_a_pull_request(hub, source, tmp_path):
    hub.repositories = {TEST: ["config.json"], "owner/empty": [".gitattributes"]}
    done = pushed(source, tmp_path / "out", config_only=True)
    assert hub.calls == ["whoami", "pull request of README.md, config.json, scaling.json"]
    assert done.pushed == f"https://hub.test/{TEST}/discussions/1"
    assert pushed(source, tmp_path / "whole", "owner/empty").pushed.endswith("/commit/1")
    assert not any(call.startswith("create") for call in hub.calls)


def test_refused_before_any_work(hub, source, tmp_path):
    out = tmp_path / "out"
    for name in ("name", "a/b/c", ""):
        assert refused(source, out, name).code == "invalid-setting"
    assert hub.calls == []
    assert refused(source, out, config_only=True).code == "no-such-repository"
    hub.token = False
    error = refused(source, out)
    assert (error.code, "hf auth login" in str(error)) == ("no-token", True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("fault", "code"), [(answer(403), "no-token"), (answer(500), "hub-fault"), (OSError("no route"), "hub-fault")]
)
def test_an_upload_that_fails_leaves_the_export(fault, code, hub, source, tmp_path):
    hub.fault = fault
    error = refused(source, tmp_path / "out")
    assert error.code == code
    assert f"{tmp_path / 'out'} is whole, but was not pushed to {TEST}" in str(error)
    assert f"hf upload {TEST} {tmp_path / 'out'}" in str(error)
    assert (tmp_path / "out/config.json").is_file()


def test_a_single_file(hub, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    address = push.push(tmp_path / "model.gguf", push.find_destination(TEST), "message")
    assert address.endswith("/commit/1")
    assert hub.calls[-1] == "commit of model.gguf"
