"""transformers' remark on the keys of a config that other runtimes read, and that it rightly passes over."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_REMARK = "Unrecognized keys in `rope_parameters`"
_OF_OTHERS = {"short_mscale", "long_mscale", "mscale_all_dim"}
"""Keys that an export states for vLLM, SGLang and ONNX Runtime GenAI, and for a family's own attention."""


@contextmanager
def keys_of_others_unremarked() -> Iterator[None]:
    """Keep back, in the block, the remark on keys that an export states for other runtimes; other keys are named."""
    logger = logging.getLogger("transformers.modeling_rope_utils")

    def kept(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith(_REMARK) and set(re.findall(r"'(\w+)'", text.rpartition(":")[2])) <= _OF_OTHERS)

    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)
