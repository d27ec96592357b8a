"""Rows whose positions skip ahead: rotated as at those positions, masked as one text, trained under the long window."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longrope.data.skips import skipping_positions
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, geometry_of, scaled
from longrope.models.loading import LoadedModel
from longrope.rope.scaling import RopeScaling
from longrope.train.config import FinetuneConfig
from longrope.train.finetune import finetune, packed_rows, training_windows
from longrope.train.trainer import StepRows, collate, rows_windows
from tests.checkpoints import WINDOW
from tests.train.runs import MIXED, TARGET, open_fresh, training, write_texts, yarn_scaling

REACH = 4 * TARGET


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("training") / "texts")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return open_fresh(checkpoint)


@pytest.fixture(scope="module")
def scaling(loaded: LoadedModel) -> RopeScaling:
    return yarn_scaling(loaded, length=REACH)


def test_a_row_is_what_transformers_computes_at_these_positions() -> None:
    """With YaRN of transformers; an empty cache keeps it from taking a skip for the border of a document."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": 64}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096, rope_parameters=yarn)).eval()
    ours = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=plain)).eval()
    ours.load_state_dict(theirs.state_dict())
    rotary: Any = theirs.model.rotary_emb
    factors = 1e4 ** -(torch.arange(0, 32, 2).double() / 32) / rotary.inv_freq.double()
    scaling = RopeScaling.extended(geometry_of(ours), 4096, factors.tolist(), 0, rotary.attention_scaling)
    handle, window = apply_scaling(ours, scaling), scaling.window_for(4096)
    ids, in_order = torch.randint(97, (2, 96)), torch.arange(96).expand(2, -1)
    skips = torch.stack([torch.from_numpy(skipping_positions(96, 4096, [0, row])) for row in range(2)])
    with torch.no_grad():
        wanted = theirs(input_ids=ids, position_ids=skips, past_key_values=DynamicCache()).logits
        without = ours(input_ids=ids, position_ids=in_order).logits
        handle.pin_window(window, positions=skips)
        found = ours(input_ids=ids, position_ids=in_order).logits
        with handle.using(window):
            assert handle.rotaries[0].positions is None
        again = ours(input_ids=ids, position_ids=in_order).logits
    assert torch.allclose(found, wanted, atol=2e-5)
    assert torch.equal(again, found)
    assert not torch.allclose(without, wanted, atol=1e-2)


def test_a_share_of_a_row_has_the_positions_of_its_tokens(loaded: LoadedModel, scaling: RopeScaling) -> None:
    """Processes that share a row pass the rotary module positions of their own tokens alone."""
    skips = torch.from_numpy(skipping_positions(TARGET, REACH, [0, 0]))[None]
    own = torch.tensor([[3, 4, 5, 200, 201]])
    with scaled(open_fresh(loaded.name).model, scaling) as handle:
        handle.pin_window(scaling.window_for(REACH), positions=skips)
        rotary = handle.rotaries[0]
        whole, share = (rotary(torch.zeros(1), at) for at in (torch.arange(TARGET)[None], own))
    for every, some in zip(whole, share, strict=True):
        assert torch.equal(every[:, own[0]], some)


def test_rows_of_the_new_window_skip_and_those_of_the_original_do_not(
    loaded: LoadedModel, scaling: RopeScaling, sources: Path
) -> None:
    settings = training(mix=MIXED, skip_to=REACH, steps=8)
    windows = training_windows(loaded, scaling, settings)
    assert {part: window.max_length for part, window in windows.items()} == {"short": WINDOW, "long": REACH}
    rows = packed_rows(loaded, [sources], settings, windows)
    made = StepRows(rows, 2, skip_to=REACH, seed=5)
    items = [made[place] for place in range(len(made))]
    skipping = [place for place, item in enumerate(items) if "skips" in item]
    assert skipping == [place for place, row in enumerate(rows.rows) if row.part == "long"]
    for place in skipping:
        assert items[place]["skips"].tolist() == skipping_positions(TARGET, REACH, [5, place]).tolist()
    assert collate([items[skipping[0]]])["skips"].shape == (1, TARGET)
    assert not any("skips" in StepRows(rows, 2)[place] for place in range(len(rows)))


def test_rows_that_skip_have_the_attention_factor_of_as_many_keys_as_they_have(
    loaded: LoadedModel, scaling: RopeScaling
) -> None:
    """Where the window's is the papers' √(1 + ln s / ln L), theirs is the same formula for N tokens."""
    su = math.sqrt(1 + math.log(REACH / WINDOW) / math.log(WINDOW))
    settings = training(mix=MIXED, skip_to=REACH)
    windows = training_windows(loaded, yarn_scaling(loaded, su, REACH), settings)
    used = rows_windows(windows, settings)
    wanted = math.sqrt(1 + math.log(TARGET / WINDOW) / math.log(WINDOW))
    assert used["long"].attention_factor == pytest.approx(wanted, rel=1e-12)
    assert used["long"] == replace(windows["long"], attention_factor=used["long"].attention_factor)
    assert used["short"] == windows["short"]
    assert rows_windows(windows, training(mix=MIXED)) == windows


def test_a_run_trains_the_window_that_its_rows_skip_to(
    checkpoint: Path, scaling: RopeScaling, sources: Path, tmp_path: Path
) -> None:
    """Other gradients than those of rows without skips, the same bits when run again, and a window of REACH tokens."""
    runs = {
        name: finetune(
            str(checkpoint), scaling=scaling, data=[sources], output_dir=tmp_path / name, config=settings, cpu=True
        )
        for name, settings in {
            "skips": training(steps=3, skip_to=REACH, micro_batch=2),
            "again": training(steps=3, skip_to=REACH, micro_batch=2),
            "whole": training(steps=3, micro_batch=2),
        }.items()
    }
    assert runs["skips"].losses == runs["again"].losses
    assert runs["skips"].losses[0] != runs["whole"].losses[0]
    (window,) = runs["skips"].scaling.windows
    assert (window.max_length, window.attention_factor) == (REACH, scaling.window_for(REACH).attention_factor)
    assert runs["skips"].summary["settings"]["skip_to"] == REACH
    share = math.sqrt(math.log(TARGET) / math.log(REACH))
    (recorded,) = runs["skips"].scaling.provenance["training"]
    for record in (runs["skips"].summary, recorded):
        assert record["row_attention_factors"] == {"long": pytest.approx(window.attention_factor * share)}
    assert "row_attention_factors" not in runs["whole"].summary


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"skip_to": 256}, "expected a `skip_to` above the length of 256 tokens, found 256"),
        ({"skip_to": 512, "mix": "medium,long"}, "positions do not begin anew"),
        ({"skip_to": 512, "long_from": 128}, "positions do not begin anew"),
        ({"skip_to": 512, "mix": "short"}, "the mix has none"),
    ],
)
def test_what_cannot_skip_is_refused(wrong: dict[str, Any], found: str) -> None:
    with pytest.raises(LongRopeError, match=found) as error:
        FinetuneConfig(**({"length": 256} | wrong))
    assert error.value.code == "invalid-setting"


def test_rows_that_skip_may_be_as_long_as_the_original_window(
    checkpoint: Path, loaded: LoadedModel, scaling: RopeScaling, sources: Path, tmp_path: Path
) -> None:
    """As PoSE trains; shorter ones are refused."""
    config = training(length=WINDOW, skip_to=REACH, steps=1)
    done = finetune(
        str(checkpoint), scaling=scaling, data=[sources], output_dir=tmp_path / "out", config=config, cpu=True
    )
    assert done.summary["tokens"] == {"long": 2 * WINDOW}
    with pytest.raises(LongRopeError, match=f"of at least the model's window of {WINDOW} tokens, found {WINDOW - 1}"):
        training_windows(loaded, scaling, config.replace(length=WINDOW - 1))


def test_a_window_that_does_not_reach_is_refused(
    checkpoint: Path, scaling: RopeScaling, sources: Path, tmp_path: Path
) -> None:
    config = training(skip_to=2 * REACH)
    with pytest.raises(LongRopeError, match=str(2 * REACH)):
        finetune(str(checkpoint), scaling=scaling, data=[sources], output_dir=tmp_path / "out", config=config, cpu=True)
    assert not (tmp_path / "out").exists()
