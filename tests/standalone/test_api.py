"""LongRoPEModel: the seed's example, training, extension, and the checkpoint that the commands work on."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from longrope import LongRoPEModel, RopeScaling, load_data
from longrope.data.sources import read_all
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.search.config import SearchConfig
from longrope.standalone.api import draw_rows, next_byte_loss
from tests.checkpoints import words
from tests.train.runs import Recorded

BASE, TARGET = 64, 256
SMALL = SearchConfig(method="gradient", steps=1, samples=1, continuation=False)

# The example of the README that this API comes from, as it stands there.
SEED = """
data_path = "path/to/your/dataset"
d_model = 512
n_heads = 8
num_layers = 6
base_length = 4096
target_length = 2048 * 1024

data = load_data(data_path)
model = LongRoPEModel(d_model, n_heads, num_layers, base_length)
model = model.extend_context(data, target_length)

input_ids = torch.randn(2, target_length, d_model)
output = model(input_ids)
print(output.shape)  # Expected shape: (batch_size, target_length, d_model)
"""


@pytest.fixture(scope="module")
def books() -> list:
    return read_all(["book:an-american-tragedy"])


@pytest.fixture(scope="module")
def trained(books) -> LongRoPEModel:
    model = LongRoPEModel(32, 1, 2, BASE)
    losses = model.fit(books, steps=300, batch=8, learning_rate=1e-2)
    assert len(losses) == 300
    assert losses[-1] < 2.5 < losses[0]
    return model


@pytest.fixture(scope="module")
def extended(trained, books) -> LongRoPEModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a trained model and a short target: nothing to warn of
        return trained.extend_context(books, TARGET)


def held_out(length: int, count: int = 16) -> Tensor:
    text = read_all(["book:the-diary-of-samuel-pepys"])[0].text.encode()
    return draw_rows([np.frombuffer(text, np.uint8)], length + 1, count, np.random.default_rng(5))


def test_the_seeds_example(tmp_path, monkeypatch, capsys):
    """As written, only smaller: two million tokens take a GPU (benchmarks/seed_example.py)."""
    monkeypatch.chdir(tmp_path)
    folder = Path("path/to/your/dataset")
    folder.mkdir(parents=True)
    (folder / "one.txt").write_text(words(500, 1))
    with gzip.open(folder / "two.txt.gz", "wt") as file:
        file.write(words(500, 2))
    smaller = {"d_model": "32", "num_layers": "2", "base_length": "128", "target_length": "256"}
    program = "import torch\nfrom longrope import LongRoPEModel, load_data\n" + SEED
    for name, value in smaller.items():
        program, replaced = re.subn(rf"^{name} = .*$", f"{name} = {value}", program, flags=re.MULTILINE)
        assert replaced == 1
    with pytest.warns(UserWarning, match="this model is untrained: 5.* nats per byte"):
        exec(compile(program, "seed", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 256, 32])\n"


def test_load_data_reads_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("another")
    assert [document.text for document in load_data(tmp_path)] == ["one text", "another"]
    assert [document.text for document in load_data(str(tmp_path / "b.txt.gz"))] == ["another"]
    with pytest.raises(LongRopeError, match="there is no file or folder of that name"):
        load_data(tmp_path / "missing.txt")


def test_the_extension_is_worth_it(trained, extended):
    """Held-out text of 4× the window: the searched factors beat the original RoPE and hold on to the short window."""
    geometry = trained.sizes.geometry
    original = trained.with_scaling(RopeScaling.single(geometry, TARGET, (1.0,) * geometry.pairs))
    rows = held_out(TARGET)
    assert float(next_byte_loss(extended, rows)) < float(next_byte_loss(original, rows)) - 0.05
    assert extended.scaling.target_length == TARGET
    assert extended.scaling.provenance["objective"] == "perplexity"
    assert extended.scaling.windows[0].max_length == BASE


def test_extending_repeats_bit_for_bit(trained, books, tmp_path):
    runs = [trained.extend_context(books, 128, SMALL, output_dir=tmp_path / name) for name in ("a", "b")]
    assert runs[0].scaling.windows == runs[1].scaling.windows
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"search.jsonl", "scaling.json", "search.json"}
    with pytest.raises(LongRopeError) as error:
        trained.extend_context(books, 128, SMALL, output_dir=tmp_path / "a")
    assert error.value.code == "output-exists"


def test_keywords_of_the_last_release(trained, books, tmp_path):
    with pytest.warns(DeprecationWarning, match="use (config|output_dir)") as found:
        trained.extend_context(books, 128, options=SMALL, out=tmp_path / "run")
    assert len(found) == 2
    assert (tmp_path / "run/scaling.json").is_file()
    with pytest.raises(TypeError, match="budget"):
        trained.extend_context(books, 128, budget=SMALL)


def test_an_extended_model_is_extended_again(extended, books):
    further = extended.extend_context(books, 2 * TARGET, SMALL)
    assert further.scaling.windows[:2] == extended.scaling.windows
    assert [window.max_length for window in further.scaling.windows] == [BASE, TARGET, 2 * TARGET]
    ids = held_out(TARGET, 1)
    assert torch.equal(further(ids[:, :TARGET]), extended(ids[:, :TARGET]))
    with pytest.raises(LongRopeError) as error:
        further.to_hf()
    assert error.value.code == "not-expressible"


def test_an_extended_model_is_fine_tuned_at_its_length(extended, books):
    tuned = extended.with_scaling(extended.scaling)
    tuned.fit(books, steps=15, batch=4, length=TARGET, learning_rate=3e-3)
    rows = held_out(TARGET)
    assert float(next_byte_loss(tuned, rows)) < float(next_byte_loss(extended, rows))
    assert not tuned.training


def test_fit_repeats_bit_for_bit(books):
    recorded = Recorded()

    def run(seed: int) -> list[float]:
        return LongRoPEModel(16, 1, 1, 32).fit(books, steps=5, batch=2, seed=seed, callbacks=recorded)

    first = run(0)
    assert [(progress.step, progress.loss) for progress in recorded.progress] == list(enumerate(first, start=1))
    assert recorded.started == [(5, 0)]
    assert run(0) == first != run(1)


def test_a_save_keeps_the_class_and_the_extension(extended, tmp_path):
    extended.save(tmp_path / "model")
    loaded = LongRoPEModel.load(tmp_path / "model")
    assert type(loaded) is LongRoPEModel
    ids = held_out(TARGET, 1)[:, :TARGET]
    assert torch.equal(loaded(ids), extended(ids))


def test_to_hf(trained, extended):
    ids = held_out(TARGET, 2)
    for model, lengths in ((trained, (BASE,)), (extended, (BASE, BASE + 1, TARGET))):
        llama = model.to_hf()
        assert isinstance(llama, LlamaForCausalLM)
        for length in lengths:
            with torch.inference_mode():
                expected = llama(ids[:, :length]).logits
            # Beyond the window transformers' angles are rounded to float32, ours are not.
            torch.testing.assert_close(model(ids[:, :length]), expected, atol=1e-5 if length <= BASE else 1e-3, rtol=0)
        apply_scaling(llama, model.scaling)  # that was the whole difference
        with torch.inference_mode():
            exact = llama(ids[:, :length]).logits
        torch.testing.assert_close(model(ids[:, :length]), exact, atol=2e-5, rtol=0)


def test_the_tools_verbs_take_the_checkpoint(trained, extended, cli, tmp_path):
    (tmp_path / "text.txt").write_text(read_all(["book:the-diary-of-samuel-pepys"])[0].text[:20_000])
    trained.to_hf(tmp_path / "plain")
    extended.to_hf(tmp_path / "long")
    assert json.loads((tmp_path / "long/scaling.json").read_text())["windows"][1]["max_length"] == TARGET
    assert "# LongRoPEModel with a context window of 256 tokens" in (tmp_path / "long/README.md").read_text()
    data = ("--data", tmp_path / "text.txt")
    budget = ("--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1)
    for arguments in (
        ("inspect", tmp_path / "plain"),
        ("inspect", tmp_path / "long"),
        ("search", tmp_path / "plain", "--target-length", 128, *data, *budget, "-o", tmp_path / "run"),
        ("eval", tmp_path / "long", *data, "--samples", 2, "--lengths", "64,256"),
        ("export", tmp_path / "plain", "--scaling", tmp_path / "run/scaling.json", "-o", tmp_path / "exported"),
    ):
        ran = cli(*arguments)
        assert ran.code == 0, (arguments, ran.err)


def test_a_folder_that_is_in_use_stays(trained, extended, tmp_path):
    (tmp_path / "mine").write_text("x")
    for model in (trained, extended):
        with pytest.raises(LongRopeError) as error:
            model.to_hf(tmp_path)
        assert error.value.code == "output-exists"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_long_search_says_so(books):
    model = LongRoPEModel(512, 8, 6, 64)
    with (
        pytest.warns(UserWarning, match="this model is untrained"),
        pytest.warns(UserWarning, match=r"texts of 2M tokens, 2.7e\+16 FLOPs each"),
        pytest.raises(LongRopeError, match="need 5 samples of 2097152"),
    ):
        model.extend_context(books, 2048 * 1024)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, data: model.extend_context(data, BASE), "above the model's window of 64"),
        (lambda model, data: model.extend_context(data, 0), "a length must be a positive whole number"),
        (lambda model, data: model.extend_context(data, 2**20), "need 5 samples of 1048576 consecutive tokens"),
        (lambda model, data: model.extend_context("nowhere.txt", 128), "no text at 'nowhere.txt'"),
        (lambda model, data: model.extend_context([], 128), "at least one source of text"),
        (lambda model, data: model.fit(data, length=BASE + 1), "a sequence of 65 is too long"),
        (lambda model, data: model.fit(data, steps=0), "steps must be a whole number"),
        (lambda model, data: model.fit(data, learning_rate=0.0), "learning_rate must be a finite number above 0"),
        (lambda model, data: model.fit([1]), "expected `data` as a str"),
    ],
)
def test_bad_input(trained, books, call, message):
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    with pytest.raises(LongRopeError, match=message) as raised:
        call(trained, books)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())


def test_texts_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("x")
    data = load_data(tmp_path)
    model = LongRoPEModel(16, 1, 1, 32)
    with pytest.raises(LongRopeError) as error:
        model.fit(tmp_path)  # a folder is read as load_data does
    assert error.value.code == "too-short-text"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one byte tells nothing about training
        with pytest.raises(LongRopeError, match="need 5 samples of 64 consecutive tokens"):
            model.extend_context(data, 64)


def test_a_loss_that_is_lost(books):
    model = LongRoPEModel(16, 1, 1, 32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(LongRopeError, match="the loss became nan at step 1") as error:
        model.fit(books, steps=2)
    assert error.value.code == "not-finite"
    assert not model.training
