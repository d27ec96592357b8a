"""A GGUF file as a model folder of transformers: config.json and tokenizer, and its weights as safetensors.

For jobs that write a folder from the files of another, such as an export or a fine-tuning.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longrope.models.checkpoint_files import gguf_path, source_folder
from longrope.models.loading import load_config, load_model, load_tokenizer


@contextmanager
def model_folder(name: str, code: tuple[str, ...] = (), *, weights: bool = True) -> Iterator[Path]:
    """The folder with the files of the model `name`: its own, or for a GGUF file a temporary one.

    The weights of a GGUF file are dequantised once, to the dtype in which its numbers are exact. Without `weights`, a
    temporary folder has config.json and the tokenizer alone, and none are downloaded. `code` are further patterns of
    files to download. Raises LongRopeError when there is no such model.
    """
    if gguf_path(name) is None:
        yield source_folder(name, code, weights=weights)
        return
    with tempfile.TemporaryDirectory(prefix="longrope-dequantised-") as temporary:
        folder = Path(temporary)
        if weights:
            load_model(name, dtype="checkpoint").save_pretrained(folder)
        else:
            load_config(name).save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        yield folder
