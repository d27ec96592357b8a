"""vLLM's own server on a CPU: the numbers and replies of the checkpoint that it serves, and the doctor's verdict on it.

    python -m pytest -m slow tests/evaluation/server/test_vllm.py -rP

Slow: vLLM is downloaded once into an environment of its own (`tests/runtimes/environments.py`), and each of the three
servers takes a minute to start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from longrope.data.books import read_book
from longrope.doctor.server import diagnose_server
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.results import EvalResults, EvalRow
from longrope.evaluation.run import evaluate
from longrope.export.config import ExportConfig
from longrope.export.export import export_checkpoint
from longrope.models.loading import open_model
from longrope.rope.scaling import RopeScaling, Window
from tests.runtimes.environments import FAR_TOO_LARGE, VLLM, environment

pytestmark = pytest.mark.slow

L, TARGET, SERVED = 256, 16_384, 1024
CONFIG = EvalConfig(samples=2, trials=2, depths=2, ruler_tasks=("niah_single_1",))
LENGTHS = (512, SERVED)
SUITES = ("perplexity", "passkey", "needle", "ruler")
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": L},
}
"""RoPE parameters in the place of the checkpoint's, for --hf-overrides."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the embedded model of 512 times its window: it finds passkeys at 1,024 tokens.

    Its short factors are not 1, and its generation_config.json states a repetition penalty, as Qwen2.5's does.
    """
    searched = open_model("tiny-512x").checkpoint_scaling
    assert searched is not None
    long = searched.window_for(TARGET)
    short = tuple(1.2 + 0.02 * pair for pair in range(len(long.factors)))
    windows = (
        Window(L, short, attention_factor=long.attention_factor),
        Window(TARGET, long.factors, attention_factor=long.attention_factor),
    )
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    export_checkpoint("tiny-512x", RopeScaling(searched.geometry, windows), folder, config=ExportConfig())
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"repetition_penalty": 2.0}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(read_book("les-miserables").text[50_000:110_000], "utf-8")
    return path


@contextmanager
def vllm_serves(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM server on `folder`, which is up; it and its workers end with the block."""
    python = environment(VLLM, less=FAR_TOO_LARGE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The wheel's `vllm serve` looks for a distribution named vllm and stops; this is the server that it starts.
    command = [
        str(python),
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--port",
        str(port),
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        str(SERVED),
        *options,
    ]
    with log.open("wb") as written:
        server = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=written, stderr=written, start_new_session=True
        )
    try:
        _wait_until_up(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_up(server: subprocess.Popen[bytes], root: str, log: Path) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{root}/health", timeout=10):
            return
        time.sleep(1)
    raise AssertionError(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


def compared(rows: tuple[EvalRow, ...]) -> dict[Any, EvalRow]:
    """The rows that a server's evaluation has too, by their names."""
    kept = [row for row in rows if row.metric != "answer_logprob" and row.detail.get("rule") != "relative"]
    return {(row.suite, row.length, row.metric, json.dumps(row.detail, sort_keys=True)): row for row in kept}


def test_vllm_gives_the_numbers_of_the_checkpoint(checkpoint: Path, text: Path, tmp_path: Path, cli: Any) -> None:
    """Perplexity to rounding, on texts that fill the server's context too, and the same replies; then the doctor."""
    output = tmp_path / "served.json"
    options: list[Any] = ["--suite", ",".join(SUITES), "--lengths", ",".join(map(str, LENGTHS)), "--data", text]
    options += ["--samples", 2, "--trials", 2, "--depths", 2, "--ruler-tasks", "niah_single_1", "-o", output]
    with vllm_serves(checkpoint, tmp_path / "vllm.log") as address:
        ran = cli("eval", address, "--tokenizer", checkpoint, *options)
        assert ran.code == 0, ran.err
        by_default = diagnose_server(checkpoint, address)
        ran = cli("doctor", checkpoint, "--server", address, "--lengths", "257,1023")
    assert ran.code == 0, ran.out + ran.err
    assert "applies the scaling at every length that was compared" in " ".join(ran.out.split())
    print(by_default.to_json())
    # One window for the whole engine, the long one where --max-model-len is above L: short texts are turned by it too.
    assert by_default.verdict == "applies the long factors at every length"
    assert {at.length: at.as_expected for at in by_default.lengths} == {128: False, 256: False, 257: True, 1023: True}
    assert max(min(at.distances.values()) for at in by_default.lengths) < 1e-3
    found = EvalResults.load(output)
    assert found.settings["server_context"] == SERVED
    assert found.settings["tokenizer_compared"] is True
    served = compared(found.rows)
    local = compared(evaluate(str(checkpoint), data=str(text), suites=SUITES, lengths=LENGTHS, config=CONFIG).rows)
    assert list(served) == list(local)
    for name, row in local.items():
        exact = row.suite != "perplexity"
        assert served[name].value == (row.value if exact else pytest.approx(row.value, rel=1e-3)), name
    for suite in ("passkey", "needle", "ruler"):
        assert max(row.value for row in local.values() if row.suite == suite and row.metric != "effective_length") > 0


@pytest.mark.parametrize("other", OTHERS)
def test_another_rotation_in_vllm_is_told(other: str, checkpoint: Path, tmp_path: Path) -> None:
    """The same weights, served with another RoPE by --hf-overrides."""
    overrides = json.dumps({"rope_parameters": OTHERS[other]})
    with vllm_serves(checkpoint, tmp_path / "vllm.log", "--hf-overrides", overrides) as address:
        found = diagnose_server(checkpoint, address, lengths=[257, 1023])
    print(found.to_json())
    assert not found.right
    if other == "plain":
        assert found.verdict == "applies no scaling: plain RoPE at every length"
    else:
        assert [at.near for at in found.lengths] == [(), ()]
        assert all(at.found.startswith("another rotation, nearest to the long factors") for at in found.lengths)
