"""Every file of a checkpoint is a regular file inside its folder, for every verb that reads one; or one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.models.checkpoint_files import INDEX, source_folder
from longrope.models.loading import load_model, open_model
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.conftest import Ran

SECRET = "a secret of this machine"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A file that blocks its reader fails the test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, and `outside/secret` beside it."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text(SECRET)
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / "outside/model.safetensors")
    return tmp_path / "model"


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8).save(tmp_path / "scaling.json")
    return tmp_path / "scaling.json"


def link(name: str, to: str = "../outside/secret") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        depth = name.count("/")
        (folder / name).symlink_to(to if to.startswith("/") else "../" * depth + to)

    return make


def index(name: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        names = list(json.loads((folder / "config.json").read_text()))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names[:2], name)}))
        (folder / "model.safetensors").unlink()

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def directory(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


OUTSIDE = "is a link out of its folder"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        f"link-{name}": (link(name), OUTSIDE)
        for name in (
            "config.json",
            "vocab-secret.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "generation_config.json",
            "chat_template.jinja",
            "additional_chat_templates/a.jinja",
            "LICENSE",
            "NOTICE.md",
            "merges.txt",
            "processor_config.json",
            "scaling.json",
            "model.safetensors",
            "modeling_own.py",
        )
    },
    "link-to-an-absolute-path": (link("vocab.txt", "/etc/hostname"), OUTSIDE),
    "link-to-a-device": (link("vocab.txt", "/dev/zero"), OUTSIDE),
    "link-to-weights-outside": (link("model.safetensors", "../outside/model.safetensors"), OUTSIDE),
    "link-to-nothing": (link("vocab.txt", "../outside/none"), "vocab.txt"),
    "link-to-itself": (link("vocab.txt", "vocab.txt"), "vocab.txt"),
    "link-to-a-folder": (link("vocab.json", "../outside"), OUTSIDE),
    "pipe-tokenizer": (pipe("tokenizer.json"), "named pipe"),
    "pipe-weights": (pipe("model.safetensors"), "named pipe"),
    "pipe-config": (pipe("config.json"), "named pipe"),
    "pipe-licence": (pipe("LICENSE"), "named pipe"),
    "folder-tokenizer": (directory("tokenizer.json"), "found a folder"),
    "folder-weights": (directory("model.safetensors"), "found a folder"),
    "folder-config": (directory("config.json"), "found a folder"),
    "index-above": (index("../outside/model.safetensors"), "weight_map of file names"),
    "index-absolute": (index("/etc/hostname"), "weight_map of file names"),
    "index-below": (index("below/model.safetensors"), "weight_map of file names"),
    "index-dots": (index(".."), "weight_map of file names"),
    "index-windows": (index("..\\outside\\model.safetensors"), "weight_map of file names"),
    "index-number": (index(3), "weight_map of file names"),
    "index-list": (index(["model.safetensors"]), "weight_map of file names"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_inside_is_refused_by_every_verb(
    case: str, model: Path, scaling: Path, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    spoil, says = BAD[case]
    spoil(model)
    out = tmp_path / "out"
    for arguments in (
        ("inspect", model),
        ("plan", model, "--target-length", 128),
        ("search", model, "--target-length", 128, "--data", "book:les-miserables", "-o", out),
        ("eval", model, "--lengths", 64, "--data", "book:les-miserables"),
        ("export", model, "--scaling", scaling, "-o", out),
        ("doctor", model),
        ("fix-config", model, "--scaling", scaling, "--to", "hf"),
    ):
        said = cli(*arguments).refusal
        assert says in said, arguments
        assert SECRET not in said
    assert not out.exists()
    with pytest.raises(LongRopeError):
        open_model(model)
    with pytest.raises(LongRopeError):
        source_folder(str(model))


def hub_snapshot(model: Path, root: Path) -> Path:
    """The checkpoint as the hub's cache keeps it: `snapshots/REVISION/NAME` are links to `blobs/HASH`."""
    repository = root / "models--owner--name"
    snapshot = repository / "snapshots/0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_cache_and_links_within_are_fine(
    model: Path, scaling: Path, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    snapshot = hub_snapshot(model, tmp_path / "hub")
    (model / "really").mkdir()
    (model / "tokenizer.json").rename(model / "really/tokenizer.json")
    (model / "tokenizer.json").symlink_to("really/tokenizer.json")
    (model / "tokenizer").mkdir()  # a folder that is no file of the checkpoint
    (model / "runs").symlink_to("/tmp")
    (tmp_path / "linked").symlink_to(model)  # the folder itself may be reached by a link
    for number, folder in enumerate((snapshot, model, tmp_path / "linked")):
        ran = cli("export", folder, "--scaling", scaling, "-o", tmp_path / f"out{number}")
        assert ran.code == 0, ran.err
        written = tmp_path / f"out{number}/tokenizer.json"
        assert written.is_file()
        assert not written.is_symlink()


@pytest.mark.parametrize("where", ["blob", "blobs", "beside"])
def test_a_false_hub_cache_is_refused(where: str, model: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(model, tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    if where == "blob":
        link(os.readlink(snapshot / "tokenizer.json").rpartition("/")[2], str(tmp_path / "outside/secret"))(blobs)
    elif where == "blobs":
        blobs.rename(tmp_path / "outside/blobs")
        blobs.symlink_to(tmp_path / "outside/blobs")
    else:
        link("tokenizer.json", "../../secret")(snapshot)
        (snapshot.parents[1] / "secret").write_text(SECRET)
    with pytest.raises(LongRopeError, match="is a link out of its folder") as error:
        load_model(str(snapshot))
    assert error.value.code == "not-inside"


def test_a_runs_checkpoint_is_inside_its_run(model: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").symlink_to(model)
    assert OUTSIDE in cli("inspect", tmp_path / "run").refusal
