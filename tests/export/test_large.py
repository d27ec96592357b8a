"""Exports of models that are too large to be kept twice: shared weights, configs alone, and a proof of a few layers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longrope import file_links
from longrope.export import hf, verify
from longrope.export.export import export_checkpoint
from longrope.models.apply import scaled
from longrope.models.first_layers import first_layers
from longrope.models.loading import open_model
from longrope.rope.hf_config import superset_config
from longrope.storage import sha256_bytes
from tests.checkpoints import save_checkpoint
from tests.export.sources import SU, export, plain_logits, refusal, save_model, scaling_of, slow
from tests.models.families import ALL_FAMILIES, CODE_PATHS, tiny_config

WEIGHTS = "model.safetensors"
OTHERS = tuple(family for family in ALL_FAMILIES if family not in CODE_PATHS)
LONG = {"gemma3_text", "olmo3", "gpt_oss"}


@pytest.fixture
def source(tmp_path) -> Path:
    return save_model(tmp_path / "source", "llama")


def same_file(one: Path, other: Path) -> bool:
    return os.path.samestat(one.stat(), other.stat())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- weights on disk


def test_weights_are_links_and_the_export_says_so(source, tmp_path):
    done = export(source, scaling_of(source), tmp_path / "out")
    assert same_file(source / WEIGHTS, tmp_path / "out" / WEIGHTS)
    assert done.weights == "hard-linked"
    assert not same_file(source / "config.json", tmp_path / "out/config.json")
    copied = export(source, scaling_of(source), tmp_path / "own", copy_weights=True)
    assert copied.weights == "copied"
    assert (tmp_path / "own" / WEIGHTS).stat().st_nlink == 1
    assert (tmp_path / "own" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_the_source_outlives_its_export(source, tmp_path):
    """Nothing of ours writes into a linked file, whatever is done with the export; and each goes without the other."""
    scaling, out = scaling_of(source), tmp_path / "out"
    before = {path.name: (sha256_bytes(path.read_bytes()), path.stat().st_mode) for path in source.iterdir()}
    export(source, scaling, out)
    again = export(out, None, tmp_path / "phi3", target="phi3")
    assert again.weights == "rewritten"
    export(out, None, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with scaled(model, scaling):
        model.save_pretrained(out)
    assert (out / WEIGHTS).read_bytes() != (source / WEIGHTS).read_bytes()
    shutil.rmtree(out)
    assert before == {p.name: (sha256_bytes(p.read_bytes()), p.stat().st_mode) for p in source.iterdir()}
    shutil.rmtree(source)
    assert plain_logits(tmp_path / "again", 100)[0].isfinite().all()


def test_saving_into_an_export_parts_it_from_its_source(source, tmp_path):
    """safetensors up to 0.7 writes in place; the link is broken before it is called."""
    export(source, scaling_of(source), tmp_path / "out")
    whole = (source / WEIGHTS).read_bytes()
    file_links.separate(tmp_path / "out", "*.safetensors")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole
    (tmp_path / "out" / WEIGHTS).write_bytes(b"in place")
    assert (source / WEIGHTS).read_bytes() == whole
    assert not list((tmp_path / "out").glob(".longrope-*"))


def test_the_hubs_cache_of_links(source, tmp_path):
    """A snapshot has symbolic links to blobs: the export gets the blob's bytes, not a link that breaks."""
    cache = tmp_path / "models--owner--name"
    snapshot, blobs = cache / "snapshots/0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = blobs / sha256_bytes(path.read_bytes())
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    done = export(snapshot, scaling_of(snapshot), tmp_path / "out")
    weights = tmp_path / "out" / WEIGHTS
    assert done.weights == "hard-linked"
    assert not weights.is_symlink()
    assert same_file(weights, (snapshot / WEIGHTS).resolve())
    shutil.rmtree(cache)
    assert plain_logits(tmp_path / "out", 100)[0].isfinite().all()


def test_across_file_systems_there_is_a_copy(source, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refused)
    done = export(source, scaling_of(source), tmp_path / "out")
    assert done.weights == "copied"
    assert (tmp_path / "out" / WEIGHTS).stat().st_nlink == 1


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_on_a_second_file_system(source, tmp_path):
    other = Path("/dev/shm") / f"longrope-{os.getpid()}"
    try:
        done = export(source, scaling_of(source), other)
        elsewhere = os.stat("/dev/shm").st_dev != source.stat().st_dev
        assert done.weights == ("copied" if elsewhere else "hard-linked")
        assert (other / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_other_faults_of_a_link_are_not_passed_over(source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    assert refusal(export, source, scaling_of(source), tmp_path / "out").code == "output-not-writable"
    assert not (tmp_path / "out").exists()


def test_a_file_system_with_clones(source, tmp_path, monkeypatch):
    """Btrfs and XFS share blocks until one side is written: here the kernel's call is stood in for by a copy."""
    calls = []

    def ficlone(target: int, request: int, origin: int) -> int:
        calls.append(request)
        os.write(target, os.pread(origin, 1 << 30, 0))
        return 0

    monkeypatch.setattr("fcntl.ioctl", ficlone)
    done = export(source, scaling_of(source), tmp_path / "out")
    assert calls == [0x40049409]
    assert done.weights == "cloned"
    assert (tmp_path / "out" / WEIGHTS).stat().st_nlink == 1


def test_a_read_only_source(source, tmp_path):
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    try:
        done = export(source, scaling_of(source), tmp_path / "out")
        assert done.weights == "hard-linked"
        assert (source / WEIGHTS).stat().st_mode & 0o777 == 0o444
        folded = export(source, scaling_of(source, 1.2), tmp_path / "folded", fold_attention_factor=True)
        assert folded.weights == "rewritten"
        shutil.rmtree(tmp_path / "out")
    finally:
        source.chmod(0o755)


def test_the_installed_package_is_never_linked_to(tmp_path):
    scaling = open_model("tiny-512x").checkpoint_scaling
    done = export("tiny", scaling, tmp_path / "out", proof="none")
    assert done.weights == "copied"


def test_a_fold_links_the_files_in_which_nothing_changes(tmp_path):
    """Of three shards the queries are in one."""
    source = save_model(tmp_path / "source", "llama")
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind = 1 if "embed" in name else 2 if "self_attn" in name else 3
        shards.setdefault(f"model-{kind:05}-of-00003.safetensors", {})[name] = tensor
    for file, held in shards.items():
        save_file(held, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    done = export(source, scaling_of(source, 1.2), tmp_path / "out", fold_attention_factor=True)
    assert done.weights == "hard-linked and rewritten"
    linked = [same_file(source / file, tmp_path / "out" / file) for file in sorted(shards)]
    assert linked == [True, False, True]
    plain = export(source, scaling_of(source), tmp_path / "plain")
    assert plain.weights == "hard-linked"
    assert all(same_file(source / file, tmp_path / "plain" / file) for file in shards)


# --- config only


def test_a_pull_requests_files(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    scaling = scaling_of(source)
    done = export(source, scaling, tmp_path / "out", config_only=True)
    # tokenizer_config.json limited texts to the old window; the tokenizer itself is as it was.
    assert names(tmp_path / "out") == {"config.json", "scaling.json", "README.md", "tokenizer_config.json"}
    assert (done.verification is not None, done.weights) == (True, "not in this folder")
    assert done.servings == []
    whole = export(source, scaling, tmp_path / "whole")
    for name in ("config.json", "tokenizer_config.json", "scaling.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.verification == done.verification
    # Laid over the source, they are the export.
    for path in (tmp_path / "out").iterdir():
        shutil.copyfile(path, source / path.name)
    assert torch.equal(plain_logits(source, 200)[0], plain_logits(tmp_path / "whole", 200)[0])


def damaged(*arguments):
    config = superset_config(*arguments)
    for key in ("rope_scaling", "rope_parameters"):
        config[key]["attention_factor"] = 1.5
    return config


@pytest.mark.parametrize("settings", [{"config_only": True}, {"proof": "rotary"}], ids=str)
def test_the_proof_can_fail(settings, source, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "superset_config", damaged)
    assert refusal(export, source, scaling_of(source), tmp_path / "out", **settings).code == "differs"
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together(source, tmp_path):
    for settings in (
        {"config_only": True, "target": "phi3"},
        {"config_only": True, "target": "gguf"},
        {"config_only": True, "fold_attention_factor": True},
        {"config_only": True, "copy_weights": True},
        {"copy_weights": True, "target": "phi3"},
        {"copy_weights": True, "target": "gguf"},
        {"proof": "none", "target": "gguf"},
    ):
        error = refusal(export, source, scaling_of(source), tmp_path / "out", **settings)
        assert error.code == "setting-of-another-target", settings
    arguments = (source, scaling_of(source), tmp_path / "out")
    assert refusal(export, *arguments, proof="half").code == "invalid-setting"
    for settings in ({"target": "gguf"}, {"target": "hf", "proof": "none"}):
        error = refusal(export_checkpoint, *arguments, config=hf.ExportConfig(**settings), device="cpu")
        assert error.code == "setting-of-another-target"
    assert refusal(export_checkpoint, *arguments, device="cuda:99").code == "invalid-setting"
    assert not (tmp_path / "out").exists()


# --- the proof


@pytest.fixture
def loaded(monkeypatch) -> list[int]:
    """The number of layers of every model that a proof loads."""
    found: list[int] = []
    load = verify.load_model

    def counting(*arguments, **settings):
        model = load(*arguments, **settings)
        found.append(sum(name.endswith(("self_attn", ".attention")) for name, _ in model.named_modules()))
        return model

    monkeypatch.setattr(verify, "load_model", counting)
    return found


@pytest.mark.parametrize("family", [*CODE_PATHS, *slow(*OTHERS)])
def test_a_proof_of_the_first_layers(family, tmp_path, loaded):
    more = {"num_hidden_layers": 6}
    if family in LONG:
        more["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    if family == "smollm3":
        more["no_rope_layers"] = [1, 1, 0] * 2
    source = save_model(tmp_path / "source", family, **more)
    done = export(source, scaling_of(source, SU), tmp_path / "out", proof="rotary")
    expected = 3 if family in LONG or family == "smollm3" else 2
    assert done.verification is not None
    assert done.verification.layers == (expected, 6)
    assert loaded == [expected, expected]
    card, config = (tmp_path / "out/README.md").read_text(), json.loads((tmp_path / "out/config.json").read_text())
    said = f"of the first {expected} of 6 layers"
    assert said in card
    assert said in config["longrope"]["proof"]
    assert config["num_hidden_layers"] == 6
    whole = export(source, scaling_of(source, SU), tmp_path / "whole")
    assert (loaded[2:], whole.verification.layers) == ([6, 6], None)
    assert plain_logits(tmp_path / "out", 100)[0].equal(plain_logits(tmp_path / "whole", 100)[0])


@pytest.mark.parametrize(
    ("kinds", "count"),
    [("ff", 2), ("ssf", 3), ("sfsf", 2), ("fsss", 2), ("sssfsssf", 4), ("ffff", 2), ("f", 1)],
)
def test_one_layer_of_each_kind(kinds, count):
    types = [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in kinds]
    config = tiny_config("gemma3_text", num_hidden_layers=len(kinds), layer_types=types)
    before = config.to_dict()
    short, found = first_layers(config)
    assert found == count
    assert (short.num_hidden_layers, short.layer_types) == (count, types[:count])
    assert config.to_dict() == before


@pytest.mark.parametrize("settings", [{"target": "phi3"}, {"fold_attention_factor": True}], ids=str)
def test_first_layers_of_weights_that_change(settings, tmp_path):
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=4)
    scaling = scaling_of(source, 1.2)
    done = export(source, scaling, tmp_path / "out", proof="rotary", **settings)
    assert done.verification.layers == (2, 4)


def test_no_proof_is_written_down(source, tmp_path, loaded):
    done = export(source, scaling_of(source), tmp_path / "out", proof="none")
    assert (done.verification, loaded) == (None, [])
    assert "**Not proved**" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/config.json").read_text())["longrope"]["proof"] == "none"
    assert done.to_json()["verification"] is None
