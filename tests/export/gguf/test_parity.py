"""llama.cpp, really run on our GGUF files, against our own model: the next token's distribution after prompts of many
lengths in both regimes. Without the factors in the file, the same comparison fails by whole nats.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longrope.export.gguf.convert import write_llama
from longrope.export.gguf.keys import rope_keys
from longrope.export.gguf.patch import write_patched
from longrope.models.apply import apply_scaling
from longrope.models.checkpoint_files import EMBEDDED
from longrope.models.gguf.container import read_gguf
from longrope.models.loading import load_config, load_model, load_tokenizer
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import save_checkpoint, words
from tests.export.gguf.gguf_files import export, rewritten

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("tests.export.gguf.llama_cpp")

ORIGINAL, TARGET = 256, 2048
GEOMETRY = RopeGeometry.from_config(load_config(EMBEDDED))
# Short factors that are not 1, so that a file without them shows in the short regime too.
SHORT = Window(ORIGINAL, tuple(1 + 0.02 * i for i in range(32)), 0, 1.1)
LONG = Window(TARGET, tuple(closed.yarn(GEOMETRY, TARGET)), 0, 1.1)
SCALING = RopeScaling(GEOMETRY, (SHORT, LONG))
EXACT = 1e-3  # nats, for float32 weights and cache; 2e-4 was measured
HALF = 3e-2  # for float16 weights, with which llama.cpp rounds activations to float16; 8e-3 was measured


def reference(name: str | Path, scaling: RopeScaling, window: Window, ids: list[int]) -> Tensor:
    """log p(next token) after every prefix of `ids` with `window` at every length: float64 (T, V)."""
    model = load_model(str(name))
    with apply_scaling(model, scaling).using(window), torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def worst(
    server: object, expected: Tensor, ids: list[int], lengths: range | list[int], *, reuse: bool = False
) -> tuple[float, float]:
    """(share of prompts with the same most likely next token, largest difference of a log-probability)."""
    vocabulary = expected.shape[1]
    found = torch.stack([llama_cpp.next_token(server, ids[:length], vocabulary, reuse=reuse) for length in lengths])
    ours = expected[[length - 1 for length in lengths]]
    agreement = (found.argmax(-1) == ours.argmax(-1)).double().mean()
    assert not found.isnan().any()
    return float(agreement), float((found - ours).abs().max())


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """A text of the target's length, in tokens of the embedded model."""
    text = (words(300, 5) + " It was the 1st of May 1862, and nobody had come home; " + words(900, 6)) * 2
    return load_tokenizer(EMBEDDED)(text).input_ids[:TARGET]


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> tuple[Path, Path]:
    """The embedded model in float32 (ggml rounds activations to float16 where weights are), and its GGUF file."""
    folder = tmp_path_factory.mktemp("float32")
    load_model(EMBEDDED).save_pretrained(folder / "model")
    load_tokenizer(EMBEDDED).save_pretrained(folder / "model")
    export(folder / "model", SCALING, folder / "model.gguf")
    return folder / "model", folder / "model.gguf"


@pytest.mark.parametrize(
    ("n_ctx", "window", "lengths"),
    [
        (256, SHORT, [1, 2, 64, 200, 255]),
        (100, SHORT, [64, 255]),  # rounded up to 256
        (257, LONG, [1, 64, 255, 256, 257, 511]),  # rounded up to 512
        (2048, LONG, [64, 256, 257, 600, 2047]),
    ],
)
def test_the_context_s_size_decides_the_regime(n_ctx, window, lengths, exact, ids):
    model, path = exact
    expected = reference(model, SCALING, window, ids[: max(lengths)])
    agreement, difference = worst(llama_cpp.serve(path, n_ctx), expected, ids, lengths)
    assert agreement == 1.0
    assert difference < EXACT


@pytest.mark.parametrize(("kv_unified", "window"), [(False, SHORT), (True, LONG)])
def test_the_size_of_a_slot_decides(kv_unified, window, exact, ids):
    model, path = exact
    server = llama_cpp.serve(path, 512, slots=2, kv_unified=kv_unified)
    assert worst(server, reference(model, SCALING, window, ids[:200]), ids, [64, 200])[1] < EXACT


def test_the_shipped_weights(ids, tmp_path):
    export(EMBEDDED, SCALING, tmp_path / "half.gguf")
    expected = reference(EMBEDDED, SCALING, LONG, ids[:600])
    agreement, difference = worst(llama_cpp.serve(tmp_path / "half.gguf", TARGET), expected, ids, [64, 300, 600])
    assert agreement == 1.0
    assert difference < HALF


def test_a_quantised_file_with_the_scaling_added(exact, ids, tmp_path):
    model, _ = exact
    write_llama(tmp_path / "plain.gguf", str(model), {"llama.context_length": (4, ORIGINAL)}, {})
    quantised = rewritten(tmp_path / "plain.gguf", tmp_path / "q8.gguf", quantise=gguf.GGMLQuantizationType.Q8_0)
    export(model, SCALING, tmp_path / "long.gguf", gguf=quantised)
    for n_ctx, window in ((256, SHORT), (2048, LONG)):
        expected = reference(model, SCALING, window, ids[:300])
        lengths = [64, 255] if n_ctx == 256 else [64, 255, 256, 257, 300]
        agreement, difference = worst(llama_cpp.serve(tmp_path / "long.gguf", n_ctx), expected, ids, lengths)
        assert agreement == 1.0
        assert difference < 0.5  # 0.2 is Q8_0 itself; without the factors it is 2 and more


def without_factors(path: Path, out: Path) -> Path:
    """`path` with every key of the scaling, but without the two tensors."""
    with out.open("wb") as file:
        write_patched(read_gguf(path), file, "llama", rope_keys("llama", SCALING, SCALING, []), {})
    return out


@pytest.mark.parametrize(("n_ctx", "window"), [(256, SHORT), (2048, LONG)])
def test_a_file_without_the_factors_is_noticed(n_ctx, window, exact, ids, tmp_path):
    model, path = exact
    server = llama_cpp.serve(without_factors(path, tmp_path / "without.gguf"), n_ctx)
    assert worst(server, reference(model, SCALING, window, ids[:200]), ids, [64, 200])[1] > 1.0


def renamed(path: Path, out: Path, architecture: str) -> Path:
    """The GGUF `path` as another architecture of the same tensors, whose scales are all 1."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            name = f"{architecture}.{name.removeprefix('llama.')}" if name.startswith("llama.") else name
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for name in ("logit_scale", "embedding_scale", "residual_scale"):
        writer.add_float32(f"{architecture}.{name}", 1.0)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral3", "minicpm", "granite", "granitemoe", "deci"])
def test_other_graphs_apply_the_factors(architecture, exact, ids, tmp_path):
    model, path = exact
    other = renamed(path, tmp_path / "other.gguf", architecture)
    for n_ctx, window in ((256, SHORT), (2048, LONG)):
        expected = reference(model, SCALING, window, ids[:200])
        assert worst(llama_cpp.serve(other, n_ctx), expected, ids, [64, 200])[1] < EXACT


@pytest.mark.slow
def test_refact_loads_the_factors_and_ignores_them(exact, ids, tmp_path):
    path = renamed(exact[1], tmp_path / "refact.gguf", "refact")
    short, long = (llama_cpp.next_token(llama_cpp.serve(path, n_ctx), ids[:200], 2048) for n_ctx in (256, 2048))
    assert torch.equal(short, long)


@pytest.mark.slow
def test_every_fourth_length(exact, ids):
    """Top-1 agreement of at least 99.9 % over some 500 prompts, inside, around and far past the window."""
    model, path = exact
    for n_ctx, window, lengths in ((256, SHORT, range(1, 256, 4)), (2048, LONG, range(3, 2048, 4))):
        expected = reference(model, SCALING, window, ids[: lengths[-1]])
        agreement, difference = worst(llama_cpp.serve(path, n_ctx), expected, ids, lengths, reuse=True)
        print(f"-c {n_ctx}: {len(lengths)} prompts, top-1 agreement {agreement:.2%}, max |Δ log p| {difference:.1e}")
        assert agreement >= 0.999
        assert difference < EXACT


def randomise_biases(path: Path) -> None:
    """Biases begin as zeros, which would hide an error in their order."""
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("config_class", "dtype", "more"),
    [
        ("LlamaConfig", torch.float32, {"num_key_value_heads": 1, "attention_bias": True, "rms_norm_eps": 1e-5}),
        ("MistralConfig", torch.bfloat16, {"sliding_window": None, "head_dim": 32, "rope_theta": 5e4}),
        ("Qwen2Config", torch.float32, {"tie_word_embeddings": True, "vocab_size": 320}),
    ],
)
def test_other_models_written_whole(config_class, dtype, more, tmp_path):
    folder = save_checkpoint(tmp_path / "model", config_class, dtype, max_position_embeddings=256, **more)
    randomise_biases(folder / "model.safetensors")
    geometry = RopeGeometry.from_config(load_config(str(folder)))
    scaling = RopeScaling.extended(geometry, 1024, torch.linspace(1, 4.5, geometry.pairs), 0, 1.2)
    export(folder, scaling, tmp_path / "model.gguf")
    ids = [(i * 7919 + 13) % 300 for i in range(400)]
    server = llama_cpp.serve(tmp_path / "model.gguf", 1024)
    expected = reference(folder, scaling, scaling.windows[1], ids)
    assert worst(server, expected, ids, [64, 300, 400])[1] < (EXACT if dtype is torch.float32 else 0.1)
