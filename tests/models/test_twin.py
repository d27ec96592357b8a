"""The config that states a scaling, read as a checkpoint's is."""

from __future__ import annotations

import logging

from longrope.models.loading import open_model
from longrope.models.twin import stated_config
from longrope.rope.closed_form_scalings import yarn


def test_keys_of_our_own_are_not_remarked_on(checkpoint, caplog):
    """YaRN's attention factor is not the default one, so the config has keys that transformers warns of."""
    loaded = open_model(str(checkpoint))
    with caplog.at_level(logging.WARNING, logger="transformers.modeling_rope_utils"):
        config = stated_config(loaded.model, yarn(loaded.geometry, 4 * loaded.geometry.original_length))
    assert config.rope_parameters["short_mscale"] == config.rope_parameters["attention_factor"]
    assert not [record for record in caplog.records if "Unrecognized" in record.getMessage()]
    assert not logging.getLogger("transformers.modeling_rope_utils").filters
