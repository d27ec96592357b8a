"""Runs in MLX-LM's environment: what its class of each family makes of a config with longrope, from a tiny model."""

import importlib
import inspect
import json
import sys
from pathlib import Path

from mlx_lm import __version__ as version
from mlx_lm.utils import MODEL_REMAPPING

job = json.loads(Path(sys.argv[1]).read_text())
LACKING = {  # what these classes want and the config of transformers has under another name, or has as a default
    "sliding_window_pattern": 2,
    "num_experts": 4,
    "mlp_bias": False,
    "post_norm": False,
    "qk_norm": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "shared_intermediate_size": 64,
    "rotary_dim": 8,
    "block_dim": 64,
    "block_ff_dim": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 16,
    "block_norm_eps": 1e-5,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1, 3],
    "conv_dim": 64,
}


def made(config):
    """How the rotary modules of a model of `config` turn: `read` by the factors, `plain` without, or the error."""
    family = config["model_type"]
    try:
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    except (ImportError, SystemExit):
        return "no class"
    wanted = inspect.signature(module.ModelArgs).parameters
    lacking = {name: value for name, value in LACKING.items() if name in wanted and name not in config}
    try:
        model = module.Model(module.ModelArgs.from_dict(config | lacking))
    except ValueError as error:
        return f"refused: {error}"
    except Exception as error:  # a size that is not found: no statement about RoPE
        return f"not built: {type(error).__name__}: {error}"
    kinds = {type(part).__name__ for _, part in model.named_modules()}
    return "read" if "SuScaledRoPE" in kinds else "plain" if "RoPE" in kinds else f"not built: {sorted(kinds)}"


families = {family: made(config) for family, config in job["configs"].items()}
Path(job["out"]).write_text(json.dumps({"version": version, "families": families}))
