"""Every family of transformers works with every verb or is refused in one line, and docs/models.md says which."""

from __future__ import annotations

import pytest
import transformers

from tests.models import every_family
from tests.models.every_family import families, small_config
from tests.models.tried import PAGE, VERBS, WORKS, Row, page, try_family

FAST = ("llama", "deepseek_v3", "qwen3_5_text")
"""Those that a commit tries: the usual, an attention that reads the RoPE dictionary, three rows of positions."""
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
REFUSED = ("minimax", "moshi", "moss_transcribe_diarize", "phimoe", "recurrent_gemma")
"""A cache of its own, one that forgets, none; a RoPE that is not the config's, a config that cannot state one."""

NEEDS_COMPASS = pytest.mark.skipif("cohere_compass_text" not in families(), reason="a family of later releases")


def assert_no_fault(row: Row) -> None:
    """Works with every verb, or every verb refuses in the same line; no other error, no wrong number."""
    assert not row.fault or row.fault.startswith("not tried"), row
    assert row.fault or (set(row.verbs) == set(VERBS) and len(set(row.verbs.values())) == 1), row
    assert all("\n" not in says for says in row.verbs.values())


@pytest.mark.parametrize("family", FAST)
def test_families_of_every_commit(family):
    assert try_family(family) == Row(family, dict.fromkeys(VERBS, WORKS))


def test_a_family_without_rope_is_refused_by_every_verb():
    row = try_family("gpt2")
    assert set(row.verbs.values()) == {"no rotary position embedding"}
    assert set(row.verbs) == set(VERBS)


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_later_verb_would_find_is_said_by_the_first(family):
    row = try_family(family)
    assert_no_fault(row)
    assert WORKS not in row.verbs.values()


@NEEDS_COMPASS
@pytest.mark.parametrize("sliding", [None, ROPE])
def test_layer_types_with_and_without_rope(monkeypatch, sliding):
    """Layers that see the whole text are scaled; the others keep their RoPE, or stay without any."""
    own = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": sliding}}
    own["layer_types"] = ["sliding_attention", "full_attention"] * 2
    monkeypatch.setitem(every_family.OWN, "cohere_compass_text", own)
    assert try_family("cohere_compass_text").works


@NEEDS_COMPASS
def test_layer_types_without_rope_where_it_matters(monkeypatch):
    own = {"rope_parameters": {"full_attention": None, "sliding_attention": ROPE}}
    own["layer_types"] = ["sliding_attention", "full_attention"] * 2
    monkeypatch.setitem(every_family.OWN, "cohere_compass_text", own)
    row = try_family("cohere_compass_text")
    assert_no_fault(row)
    assert "none for layers that see the whole text" in row.reason


def test_families_are_those_of_transformers():
    assert {"llama", "qwen3_5", "ministral3"} <= set(families())
    assert small_config("qwen3_5").get_text_config().hidden_size == 64


@pytest.mark.slow
def test_the_page_is_what_was_tried():
    """`python -m tests.models.tried` writes it; another version of transformers has another page."""
    rows = [try_family(family) for family in families()]
    for row in rows:
        assert_no_fault(row)
    if f"transformers {transformers.__version__} " in PAGE.read_text("utf-8").replace("\n", " "):
        assert page(rows) == PAGE.read_text("utf-8")
