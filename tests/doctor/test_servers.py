"""The doctor's rows of vLLM and SGLang against their own rotary classes, taken from their wheels' source and run here.

The wheels are large (39 MB and 336 MB), so this is in the slow tier. Only the class and its one helper are executed,
with the configuration that the servers' `get_rope` hands them; no server is started.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
import typing
import zipfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longrope.doctor.checkpoint_config import read_checkpoint_config
from longrope.doctor.rules import behaviour
from longrope.doctor.table import runtimes
from tests.doctor.doctor_cases import BASE, CASES, ENTRY, LONG, PAIRS, SHORT, TARGET, L, superset, write_case

CLASS = "Phi3LongRoPEScaledRotaryEmbedding"
SERVERS = {
    "sglang": {
        "wheel": "sglang==0.5.23",
        "class": "sglang/srt/layers/rotary_embedding/rope_variant.py",
        "helper": "sglang/srt/layers/rotary_embedding/utils.py",
    },
    "vllm": {
        "wheel": "vllm==0.33.0",
        "class": "vllm/model_executor/layers/rotary_embedding/phi3_long_rope_scaled_rope.py",
        "helper": "vllm/model_executor/layers/rotary_embedding/common.py",
    },
}
STATED = {
    "by lengths": CASES["superset"],
    "mscale": {
        "model_type": "llama",
        **superset(ENTRY | {"attention_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}),
    },
    "two mscales": {"model_type": "llama", **superset(ENTRY | {"short_mscale": 1.0, "long_mscale": 1.5})},
    "m that is not read": CASES["m of 32"],
    "factor that is not read": CASES["factor of 8"],
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """The server's name and a namespace with its class, executed."""
    place = SERVERS[request.param]
    folder = tmp_path_factory.mktemp("wheel")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), place["wheel"]]
    subprocess.run(download, check=True)
    (wheel,) = folder.glob("*.whl")
    namespace: dict[str, Any] = {"torch": torch, "nn": torch.nn, "math": math}
    namespace |= {name: getattr(typing, name) for name in ("List", "Optional", "Tuple")}
    namespace["logger"] = SimpleNamespace(warning_once=lambda *_: None)
    with zipfile.ZipFile(wheel) as files:
        for path, name in ((place["helper"], "rotate_neox"), (place["class"], CLASS)):
            tree = ast.parse(files.read(path).decode())
            (node,) = [node for node in tree.body if getattr(node, "name", None) == name]
            exec(compile(ast.Module([node], []), path, "exec"), namespace)
    return request.param, namespace


def turned(server: tuple[str, dict[str, Any]], entry: dict[str, Any], length: int, engine: int):
    """cos and sin (length, D) that the server's class gives a text of `length` tokens."""
    namespace = server[1]
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=engine))
    namespace["get_current_vllm_config"] = lambda: config
    mscales = {key: entry[key] for key in ("short_mscale", "long_mscale") if key in entry}
    dims = 2 * PAIRS
    rotary = namespace[CLASS](dims, dims, TARGET, L, BASE, True, torch.float32, SHORT, LONG, **mscales)
    # A query of ones in the first half and zeros in the second comes out as cosines, then sines.
    query = torch.cat([torch.ones(length, PAIRS), torch.zeros(length, PAIRS)], dim=-1)
    out, _ = rotary(torch.arange(length), query, query.clone())
    return out[:, :PAIRS].double(), out[:, PAIRS:].double()


@pytest.mark.slow
@pytest.mark.parametrize("stated", STATED)
def test_the_class_turns_as_the_doctor_says(server, stated, tmp_path):
    folder = write_case(tmp_path / "model", STATED[stated])
    rows = {"sglang": ["sglang"], "vllm": ["vllm", "vllm-default"]}[server[0]]
    for row in rows:
        config = read_checkpoint_config(folder)
        says = behaviour(config, runtimes()[row].of(config.family), L, TARGET)
        for length in (30, L, L + 1, L + 2, 200):
            rotation = says.at(length)
            if rotation is None:
                assert length > L
                assert row == "vllm-default"
                continue
            cos, sin = turned(server, STATED[stated]["rope_parameters"], length, says.engine)
            np.testing.assert_allclose(torch.atan2(sin, cos)[1], rotation.frequencies, rtol=2e-6, atol=1e-9)
            np.testing.assert_allclose((cos**2 + sin**2).sqrt()[1], rotation.attention_factor, rtol=1e-6)


@pytest.mark.slow
def test_sglangs_token_at_the_switch_is_turned_like_the_first(server):
    """The off-by-one that the doctor notes; vLLM has none."""
    cos, sin = turned(server, {}, L + 1, TARGET)
    first = torch.allclose(cos[L], cos[0]) and torch.allclose(sin[L], sin[0])
    assert first == (server[0] == "sglang")
    (note,) = runtimes()["sglang"].notes
    assert "rotated like position 0" in note
