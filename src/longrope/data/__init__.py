"""Data: text documents, their tokens, and samples of exactly L' tokens. Knows tokenizers, never a model."""

from __future__ import annotations

from longrope.data.books import ShippedBook, shipped_books
from longrope.data.documents import Document, drop_duplicates
from longrope.data.samples import SampleOrigin, Samples, assert_disjoint, draw_places, draw_samples
from longrope.data.sources import read_all, read_documents
from longrope.data.tokens import TokenizedDocument, bos_of, tokenize

__all__ = [
    "Document",
    "SampleOrigin",
    "Samples",
    "ShippedBook",
    "TokenizedDocument",
    "assert_disjoint",
    "bos_of",
    "draw_places",
    "draw_samples",
    "drop_duplicates",
    "read_all",
    "read_documents",
    "shipped_books",
    "tokenize",
]
