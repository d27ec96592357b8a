"""The fingerprint of a model's weights, by which a resumed search recognises its model."""

from __future__ import annotations

import hashlib

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

_VALUES = 256  # values looked at per tensor


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every parameter's name, shape, dtype and 256 evenly spaced values: milliseconds for any model.

    It differs for another model, checkpoint or dtype, and after any training; a change of single weights may escape it.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    # Weights that share a tensor are there once; a device map that has moved them away has each under its own name.
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in parameters}
    for name, parameter in sorted(parameters.items()):
        if parameter.is_meta and name in tied:
            continue
        owner, _, key = name.rpartition(".")
        with align_module_device(model.get_submodule(owner)):  # loads weights that a device_map has moved away
            flat = model.get_submodule(owner).get_parameter(key).detach().flatten()
            places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
            values = flat[places.to(flat.device)].double().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(values.astype("<f8").tobytes())
    return digest.hexdigest()
