"""The standalone model against transformers' Llama, its causality, its pieces, its memory, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.chunked import in_pieces
from longrope.rope.closed_forms import ntk_aware
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.standalone.llama import as_llama, byte_tokenizer
from longrope.standalone.model import StandaloneModel
from longrope.standalone.sizes import ForwardCost, Sizes

BASE, TARGET = 64, 256


@pytest.fixture(scope="module")
def model() -> StandaloneModel:
    """Weights large enough that positions and norms matter."""
    model = StandaloneModel(96, 3, 3, BASE, rope_base=500.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8.0)
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def scaling(model: StandaloneModel) -> RopeScaling:
    geometry = model.sizes.geometry
    long = Window(TARGET, tuple(ntk_aware(geometry, TARGET).tolist()), start_tokens=3, attention_factor=1.2)
    return RopeScaling(geometry, (Window(BASE, (1.0,) * geometry.pairs), long))


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, BASE, BASE + 1, TARGET])
def test_llama_has_the_same_logits(model: StandaloneModel, scaling: RopeScaling, length: int) -> None:
    llama = as_llama(model)
    ids = tokens(length)
    if length <= BASE:
        torch.testing.assert_close(model(ids), llama(ids).logits, atol=1e-5, rtol=0)
    extended = model.with_scaling(scaling)
    apply_scaling(llama, scaling)
    with torch.inference_mode():
        expected = llama(ids).logits
    assert length == 1 or expected.std() > 0.1
    torch.testing.assert_close(extended(ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [33, TARGET])
def test_embeddings_give_llamas_hidden_states(model: StandaloneModel, scaling: RopeScaling, length: int) -> None:
    embeddings = torch.randn(2, length, 96, generator=torch.Generator().manual_seed(2))
    llama = as_llama(model)
    apply_scaling(llama, scaling)
    hidden = model.with_scaling(scaling)(embeddings)
    assert hidden.shape == embeddings.shape
    with torch.inference_mode():
        torch.testing.assert_close(hidden, llama.model(inputs_embeds=embeddings).last_hidden_state, atol=1e-5, rtol=0)


def test_each_forward_takes_its_own_window(model: StandaloneModel, scaling: RopeScaling) -> None:
    extended = model.with_scaling(scaling)
    short = tokens(BASE)
    assert torch.equal(extended(short), model(short))
    longer = tokens(BASE + 1)
    ones = model.with_scaling(RopeScaling.single(model.sizes.geometry, TARGET, (1.0,) * 16))
    assert (extended(longer) - ones(longer)).abs().max() > 0.1
    assert torch.equal(extended(short), model(short))  # nothing of the long window is left


@pytest.mark.parametrize("changed", [0, 5, 63, 64, 198])
def test_a_later_token_changes_nothing_earlier(model: StandaloneModel, scaling: RopeScaling, changed: int) -> None:
    extended = model.with_scaling(scaling)
    extended.piece = 50
    ids = tokens(200)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    before, after = extended(ids), extended(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("piece", [1, 99, 100, 101])
def test_pieces_change_nothing(model: StandaloneModel, scaling: RopeScaling, piece: int) -> None:
    whole, split = model.with_scaling(scaling), model.with_scaling(scaling)
    split.piece = piece
    ids = tokens(100).to(torch.uint8)  # bytes may come as bytes
    embeddings = torch.randn(2, 100, 96, generator=torch.Generator().manual_seed(3))
    for inputs in (ids, embeddings):
        torch.testing.assert_close(split(inputs), whole(inputs), atol=2e-6, rtol=1e-6)


def test_pieces_change_no_gradient(model: StandaloneModel) -> None:
    gradients = []
    for piece in (7, 64):
        model.piece = piece
        embeddings = torch.randn(2, BASE, 96, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(embeddings).square().sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().max() > 0.1


def test_in_pieces_slices_everything_alike() -> None:
    first, second = torch.arange(10.0)[None], torch.arange(10.0, 20.0)[None]
    assert torch.equal(in_pieces(lambda a, b: a * b, 3, first, second), first * second)


class _Sizes(TorchDispatchMode):
    """The most numbers that any tensor made in the block holds."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_nothing_grows_beyond_queries_keys_and_values() -> None:
    """No T×T tensor, no MLP activation of the whole sequence, nothing kept for a backward pass."""
    length, d_model = 2000, 32
    model = StandaloneModel(d_model, 2, 2, length)
    model.piece = 64
    embeddings = torch.randn(1, length, d_model)
    with _Sizes() as sizes:
        out = model(embeddings)
    assert sizes.largest == 3 * length * d_model
    assert out.grad_fn is None
    assert model.train()(embeddings).grad_fn is not None
    assert model.eval()(embeddings).grad_fn is None


def test_a_seed_is_a_model() -> None:
    drawn = [StandaloneModel(32, 2, 1, 16, seed=seed) for seed in (0, 0, 1)]
    with torch.random.fork_rng():
        torch.manual_seed(5)  # the global generator has no part in it
        drawn.append(StandaloneModel(32, 2, 1, 16))
    first, second, third, fourth = (model.lm_head.weight for model in drawn)
    assert torch.equal(first, second)
    assert torch.equal(first, fourth)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(model: StandaloneModel, scaling: RopeScaling, dtype: torch.dtype) -> None:
    ids = tokens(TARGET)
    extended = model.with_scaling(scaling)
    expected = extended(ids)
    found = extended.to(dtype)(ids)
    assert found.dtype == dtype
    bound = 0.15 if dtype == torch.bfloat16 else 1e-4
    assert (found - expected).abs().max() < bound * expected.abs().max()


def test_with_scaling_leaves_the_model_alone(model: StandaloneModel, scaling: RopeScaling) -> None:
    extended = model.with_scaling(scaling)
    assert model.scaling == RopeScaling.original(model.sizes.geometry)
    with torch.no_grad():
        extended.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().max() > 0
    with pytest.raises(LongRopeError, match="use a scaling made for this model"):
        model.with_scaling(RopeScaling.original(RopeGeometry(64, 500.0, BASE)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 2, 16), "d_model must be a whole number, 1 or more"),
        ((64, 3, 2, 16), "d_model must be a multiple of n_heads; found 64 and 3"),
        ((6, 2, 2, 16), "must be even, a rotary pair is two dimensions; found 6 / 2 = 3"),
        ((64, 2, 0, 16), "num_layers must be a whole number"),
        ((64, 2, 2, 0), "base_length must be a whole number"),
        ((64, 2, 2, 1), "original_length must be a whole number, 2 or more"),
        ((64, 2, 2, 16.5), "base_length must be a whole number"),
    ],
)
def test_sizes_that_make_no_model(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        StandaloneModel(*sizes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 4, 95), r"expected embeddings \(batch, T, 96\) or token ids \(batch, T\); found torch.float32"),
        (torch.zeros(4, 96), "expected embeddings"),
        (torch.zeros(4, dtype=torch.long), "expected embeddings"),
        (torch.zeros(1, 4, 96, dtype=torch.long), "expected embeddings"),
        (torch.zeros(1, 0, 96), "expected embeddings"),
        (torch.zeros(1, 4, dtype=torch.bool), "expected embeddings"),
        (torch.zeros(1, 4, 96, dtype=torch.float64), "expected inputs like the model, torch.float32 on cpu"),
        (torch.zeros(1, 4, 96, device="meta"), "on cpu; found torch.float32 on meta"),
        (torch.tensor([[0, 256]]), "token ids are bytes, 0 to 255; found 0 to 256"),
        (torch.tensor([[-1, 3]]), "found -1 to 3"),
        (torch.zeros(1, BASE + 1, 96), "reaches 64 tokens; a sequence of 65 is too long"),
    ],
)
def test_inputs_that_do_not_fit(model: StandaloneModel, inputs: Tensor, message: str) -> None:
    with pytest.raises(LongRopeError, match=message) as raised:
        model(inputs)
    assert "\n" not in str(raised.value)


# The tokenizer.


def test_the_tokenizer_writes_bytes() -> None:
    tokenizer = byte_tokenizer(64)
    text = "Grüße, 世界 \n\t don't  <s></s> [UNK] 12\x07\x7f" + "".join(map(chr, range(1, 300)))
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


# The plan.


def test_the_plan_counts_what_there_is() -> None:
    model = StandaloneModel(64, 2, 3, 32)
    plan = model.plan(100, batch=2)
    assert model.sizes.weights == sum(weight.numel() for weight in model.parameters())
    matrices = sum(weight.numel() for name, weight in model.layers.named_parameters() if weight.dim() == 2)
    assert plan.matrix_flops == 2 * 2 * 100 * matrices
    assert plan.attention_flops == 3 * 2 * (2 * 2 * 100 * 100 * 64) // 2
    assert plan.flops == plan.matrix_flops + plan.attention_flops


def test_the_plan_of_two_million_tokens() -> None:
    plan = ForwardCost(Sizes(512, 8, 6, 4096), 2048 * 1024, batch=2)
    assert plan.embedding_numbers * 4 == 2 * 2097152 * 512 * 4
    text = str(plan)
    assert "2 × 2,097,152 tokens (2M)" in text
    for line in ("embeddings in", "keys and values of all layers", "peak of a forward", "bfloat16"):
        assert line in text
    for length, batch in ((0, 1), (4, 0)):
        with pytest.raises(LongRopeError, match="must be a whole number, 1 or more"):
            ForwardCost(plan.sizes, length, batch)


_LONG_FORWARD = """
import resource, time
import torch
from longrope import LongRoPEModel, RopeScaling
from longrope.rope.closed_forms import yarn
torch.set_num_threads(1)
torch.manual_seed(0)
model = LongRoPEModel(512, 8, 6, 4096)
geometry = model.sizes.geometry
model = model.with_scaling(RopeScaling.extended(geometry, 32768, yarn(geometry, 32768)))
embeddings = torch.randn(1, 32768, 512)
start = time.process_time()
out = model(embeddings)
assert out.shape == embeddings.shape and bool(out.isfinite().all())
seconds = time.process_time() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, model.plan(32768).peak_bytes(4))
"""


@pytest.mark.slow
def test_32k_tokens_on_a_cpu_in_under_4_gb() -> None:
    """The seed's model in a process of its own: peak resident memory, and that the plan foretells it."""
    ran = subprocess.run([sys.executable, "-c", _LONG_FORWARD], capture_output=True, text=True, check=True)
    seconds, peak, planned = map(float, ran.stdout.split())
    print(f"{seconds:.0f} s of one processor, {peak / 1e9:.2f} GB")
    assert peak < 4e9
    assert planned < peak < planned + 1.5e9  # Python, torch, transformers and the pieces
    assert seconds < 900
