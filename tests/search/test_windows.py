"""The windows of a search's scaling: the default can be exported, and what cannot is said before the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from longrope.callbacks import Callbacks
from longrope.errors import LongRopeError
from longrope.export.export import export_checkpoint
from longrope.models.loading import open_model
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.run import search_scaling
from tests.checkpoints import VOCABULARY, WINDOW, save_checkpoint, tokenizer
from tests.models.every_family import small_config, small_model

SHORT, LONG = [1.0 + 0.02 * pair for pair in range(16)], [1.0 + 0.25 * pair for pair in range(16)]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
SMALLEST = SearchConfig(method="gradient", steps=1, samples=1, continuation=False)


class Notes(Callbacks):
    """Remembers the notes, and that they came before the search."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.started = False

    def on_note(self, note: str) -> None:
        assert not self.started
        self.notes.append(note)

    def on_search_start(self, *_: Any) -> None:
        self.started = True


def searched(folder: Path, source: list[str], target: int, **settings: Any) -> tuple[RopeScaling, list[str]]:
    heard = Notes()
    config = SMALLEST.replace(**settings)
    scaling = search_scaling(folder, target_length=target, data=source, config=config, callbacks=heard)
    return scaling, heard.notes


def phi3(folder: Path) -> Path:
    rope = LONGROPE | {"original_max_position_embeddings": WINDOW}
    more = {"original_max_position_embeddings": WINDOW, "max_position_embeddings": 256}
    return save_checkpoint(folder, "Phi3Config", rope_parameters=rope, **more)


def test_a_model_extended_before_keeps_its_first_window(tmp_path, source):
    """Phi-3: two windows already. The third takes the place of the second, and the two are exported."""
    folder = phi3(tmp_path / "model")
    before = open_model(folder).checkpoint_scaling
    scaling, notes = searched(folder, source, 512)
    assert [window.max_length for window in scaling.windows] == [WINDOW, 512]
    assert scaling.windows[0] == before.windows[0]
    assert scaling.windows[1].attention_factor == before.windows[0].attention_factor
    assert any(f"texts of {WINDOW + 1} to 256 tokens get the factors that are found" in note for note in notes)
    done = export_checkpoint(folder, scaling, tmp_path / "out")
    assert done.unsupported == []
    assert done.verification.max_logit_error_untouched is not None


def test_a_recorded_scaling_keeps_all_its_windows(tmp_path, source):
    """The windows that a model was fine-tuned for in this package stay; the loss in an export is said before."""
    folder = save_checkpoint(tmp_path / "model")
    geometry = open_model(folder).geometry
    RopeScaling.extended(geometry, 128, [2.0] * geometry.pairs).save(folder / "scaling.json")
    scaling, notes = searched(folder, source, 256)
    assert [window.max_length for window in scaling.windows] == [WINDOW, 128, 256]
    assert any("will lose the windows to 128 tokens" in note for note in notes)


def test_nothing_is_said_where_nothing_is_lost(tmp_path, source):
    scaling, notes = searched(save_checkpoint(tmp_path / "model"), source, 256)
    assert (len(scaling.windows), notes) == (2, [])


def test_a_window_ends_where_the_attention_reads_the_original_length(tmp_path, source):
    """Ministral: the temperature of its attention reads L, which is where runtimes switch, too."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config = small_config("ministral3", rope_parameters=rope | {"llama_4_scaling_beta": 0.5}, vocab_size=VOCABULARY)
    small_model(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    scaling, notes = searched(tmp_path / "model", source, 512)
    assert [window.max_length for window in scaling.windows] == [64, 512]
    assert any("texts of 65 to 256 tokens" in note for note in notes)
    assert export_checkpoint(tmp_path / "model", scaling, tmp_path / "out").unsupported == []
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert (entry["llama_4_scaling_beta"], entry["original_max_position_embeddings"]) == (0.5, 64)


def test_a_family_that_cannot_state_a_scaling_is_refused_before_the_search(tmp_path, source, monkeypatch):
    from longrope.models import twin

    def passed_over(raw, config, scaling, read=()):
        return raw  # as a class does that reads none of it

    monkeypatch.setattr(twin, "superset_config", passed_over)
    heard = Notes()
    with pytest.raises(LongRopeError, match="no checkpoint of this family can state a scaling") as error:
        search_scaling(
            save_checkpoint(tmp_path / "model"), target_length=256, data=source, config=SMALLEST, callbacks=heard
        )
    assert (error.value.code, heard.started) == ("not-expressible", False)


def test_only_the_unified_form(tmp_path, source, monkeypatch):
    """A class that turns by the short factors at every length (Phi-3.5-MoE in transformers 5)."""
    from longrope.models import twin

    def short_alone(raw, config, scaling, read=()):
        stated = superset_config(raw, config, scaling, read)
        for key in ("rope_parameters", "rope_scaling"):
            stated[key]["long_factor"] = stated[key]["short_factor"]
        return stated

    monkeypatch.setattr(twin, "superset_config", short_alone)
    _, notes = searched(save_checkpoint(tmp_path / "model"), source, 256, attention_factor="1")
    assert any("hf-unified only" in note for note in notes)


def test_the_config_of_the_model_is_not_touched(tmp_path, source):
    folder = phi3(tmp_path / "model")
    loaded = open_model(folder)
    before = loaded.model.config.to_dict()
    search_scaling(loaded, target_length=512, data=source, config=SMALLEST)
    assert loaded.model.config.to_dict() == before
    assert AutoConfig.from_pretrained(folder).to_dict() == before
