"""The texts of an evaluation, and the check that no search or training has seen them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from longrope.data.documents import Document
from longrope.data.samples import require_disjoint, shared_names
from longrope.data.sources import Field, TextData, as_sources, read_all
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.models.texts import sources_or_books
from longrope.rope.scaling import RopeScaling


def read_texts(loaded: LoadedModel, data: TextData, field: Field | None = None) -> list[Document]:
    """The documents of `data`, each text once; the shipped books for evaluation where an embedded model has no `data`.

    Raises LongRopeError where there are none, or they cannot be read.
    """
    sources = sources_or_books(loaded.name, as_sources(data, field), "evaluation")
    return read_all(sources, tokenizer=loaded.tokenizer)


def check_unseen(
    recorded: RopeScaling | None,
    documents: Sequence[Document],
    scalings: Iterable[RopeScaling | None],
    allow_seen: bool,
) -> dict[str, Any]:
    """The documents that the search or training of a scaling has seen, as entries for the results' settings.

    `scalings` are those that are measured; the one that is `recorded` beside the model counts too. Empty where no
    document was seen. Raises LongRopeError where one was, unless `allow_seen`.
    """
    hashes = {value for scaling in (recorded, *scalings) for value in seen_documents(scaling)}
    if not allow_seen:
        hint = "evaluate on other documents, or give `allow_seen=True`, which the results will say"
        require_disjoint(hashes, documents, hint)
    names = shared_names(hashes, documents)
    warning = "measured on documents that the search or training of a method has seen"
    return {"seen_documents": names, "warnings": [f"{warning}: {', '.join(names)}"]} if names else {}


def seen_documents(scaling: RopeScaling | None) -> list[str]:
    """Hashes of the documents that the search and training of `scaling` used, from its provenance.

    Every `document_sha256` in the provenance counts: a hash, a list, or hashes by name. Raises LongRopeError where it
    has another form, because texts that were seen could pass for unseen.
    """
    if scaling is None:
        return []
    data = scaling.provenance.get("data")
    listed = isinstance(data, dict) and isinstance(data.get("document_sha256"), list)
    hashes: list[Any] = []
    for value in _values(scaling.provenance, "document_sha256"):
        hashes += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if (data is not None and not listed) or not all(isinstance(entry, str) for entry in hashes):
        raise LongRopeError(
            "the scaling's provenance should list the SHA-256 of its data; found something else", code="damaged-file"
        )
    return sorted(set(hashes))


def _values(value: Any, key: str) -> Iterable[Any]:
    """All values of the key `key` anywhere in a JSON value."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and key in value:
        yield value[key]
    for child in children:
        yield from _values(child, key)
