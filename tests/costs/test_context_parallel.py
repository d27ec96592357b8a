"""The costs of texts that devices share: links, the exchange of keys and values, and what then fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from longrope.costs.context_parallel import exchange_seconds, fewest_sharing, shared_seconds
from longrope.costs.devices import Devices, gpu_table, links, networks
from longrope.costs.flops_bytes import forward_flops, gradient_flops
from longrope.costs.plan import CostPlan, plan
from longrope.errors import LongRopeError
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.peak_bytes import GATHERED, gradient_bytes, scoring_bytes, shared_bytes
from longrope.models.weightless import weightless
from longrope.search.config import SearchConfig
from tests.costs.test_plan import LLAMA3, only

EIGHT = Devices(count=8)
M = 2**20


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("configs") / "llama3-8b"
    LLAMA3.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shape(llama3: str) -> ModelShape:
    return shape_of("8b", weightless(llama3))


def test_every_gpu_has_one_link_and_every_link_its_source() -> None:
    connected = [gpu for link in links().values() for gpu in link.gpus]
    assert sorted(connected) == sorted(gpu_table())
    assert all("https://" in link.source and link.rate > 1e9 for link in links().values())
    assert networks() == ["infiniband", "infiniband-hdr", "ethernet", "ethernet-25"]
    assert Devices().link.name == "nvlink4"
    with pytest.raises(LongRopeError, match="expected a network of infiniband"):
        Devices(network="token-ring")


def test_the_exchange_is_a_ring_over_the_slowest_link() -> None:
    size = 8e9
    assert exchange_seconds(size, EIGHT, 1) == 0
    inside = size * 7 / 8 / (0.8 * 450e9)
    assert exchange_seconds(size, EIGHT, 8) == pytest.approx(inside + 2 * 7 * 3.4e-6)
    # Four machines: each of 8 rings brings an eighth of what is elsewhere over its own 400 Gbit/s.
    network = size * 3 / 4 / (8 * 0.8 * 50e9)
    own = size * 31 / 32 / (0.8 * 450e9)
    assert exchange_seconds(size, Devices(count=32), 32) == pytest.approx(
        max(network, own) + 2 * (27 * 3.4e-6 + 4 * 14e-6)
    )
    slow = Devices(count=32, network="ethernet")  # 100 Gbit/s for all eight of a machine
    assert exchange_seconds(size, slow, 32) == pytest.approx(
        size * 3 / 4 / (0.8 * 12.5e9) + 2 * (27 * 3.4e-6 + 4 * 50e-6)
    )
    machines = Devices(gpu="cpu", count=4, network="ethernet")
    assert exchange_seconds(size, machines, 4) == pytest.approx(size * 3 / 4 / (0.8 * 12.5e9) + 2 * 4 * 50e-6, rel=1e-3)


@pytest.mark.parametrize("gradient", [False, True])
def test_bytes_and_seconds_of_a_share(shape: ModelShape, gradient: bool) -> None:
    size, flops = (gradient_bytes, gradient_flops) if gradient else (scoring_bytes, forward_flops)
    assert shared_bytes(shape, M, 2, gradient=gradient, processes=1) == size(shape, M, 2)
    row = 2 * M * (1024 + 1024)  # bytes of the keys and values of 8 heads of 128, bfloat16
    for processes in (2, 8, 64):
        found = shared_bytes(shape, M, 2, gradient=gradient, processes=processes)
        assert found.pop(GATHERED) == (3 if gradient else 1.5) * row + 24 * M
        assert found == size(shape, M // processes, 2)
        time = shared_seconds(shape, M, Devices(count=64), gradient=gradient, processes=processes)
        assert time.compute == EIGHT.seconds(flops(shape, M)) / processes
        each = exchange_seconds(row, Devices(count=64), processes)
        assert time.exchange == pytest.approx((3 if gradient else 1) * 32 * each)


def searched(model: str, devices: Devices, shared: int, method: str = "gradient") -> CostPlan:
    config = SearchConfig.model_validate(
        {"method": method} | ({"layer_inputs": "keep"} if method == "gradient" else {})
    )
    return plan(model, 2 * M, devices, searches=[config], trainings=[], context_parallel=shared)


def test_what_fits_nowhere_fits_when_it_is_shared(llama3: str, shape: ModelShape) -> None:
    one = only(searched(llama3, Devices(count=32), 1), "search", "gradient")
    assert not one.fits
    assert "every text shared by 32 GPUs (`context_parallel` 32)" in one.advice
    assert fewest_sharing(shape, 2 * M, Devices(), gradient=True) == 32
    planned = searched(llama3, Devices(count=32), 32)
    shared = only(planned, "search", "gradient")
    assert shared.fits
    assert (shared.devices, shared.tokens) == (32, one.tokens)
    offloaded = plan(llama3, 2 * M, Devices(), searches=[SearchConfig()], trainings=[]).rows[0]
    assert "`context_parallel` 8)" in offloaded.advice  # with layer inputs in host memory
    assert 0 < shared.exchange_hours < 0.05 * shared.hours
    texts = plan(llama3, 2 * M, Devices(count=1), searches=[SearchConfig()], trainings=[]).rows[0]
    assert shared.hours - shared.exchange_hours == pytest.approx(texts.hours / 32)
    assert any("every text and every row of training is shared by 32 GPUs" in line for line in planned.assumptions)
    slow = only(searched(llama3, Devices(count=32, network="ethernet"), 32), "search", "gradient")
    assert slow.exchange_hours > 10 * shared.exchange_hours
    suites = {row.name for row in planned.rows if row.stage == "evaluate"}
    assert suites == {"perplexity", "passkey", "needle"}  # the model generates in RULER
    evaluated = only(planned, "evaluate", "perplexity")
    assert evaluated.fits
    assert evaluated.devices == 32


def test_a_model_larger_than_a_device_is_not_helped(tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**{**LLAMA3.to_dict(), "head_dim": None, **large}).save_pretrained(tmp_path / "70b")
    shape = shape_of("70b", weightless(str(tmp_path / "70b")))
    assert fewest_sharing(shape, M, Devices(), gradient=False) is None  # 141 GB of weights
    assert fewest_sharing(shape, M, Devices(gpu="b200"), gradient=False) is not None
    row = only(searched(str(tmp_path / "70b"), Devices(count=8), 8, "longrope"), "search", "longrope")
    assert not row.fits
    assert "every text shared" not in row.advice
