"""Packing: what a row holds, which targets count, how the mix keeps to its shares, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from longrope.data.mix import CHUNKS, LONG, MEDIUM, PIECES, SHORT, parse_mix
from longrope.data.packing import IGNORED, PackedRows, SpecialTokens, pack
from longrope.data.tokens import TokenizedDocument
from longrope.errors import LongRopeError
from longrope.storage import sha256_text

N, L = 64, 16
BOTH = SpecialTokens(bos=1, eos=2)


def document(number: int, size: int) -> TokenizedDocument:
    """`size` tokens, no two documents sharing one: token 1000·number + place + 10."""
    ids = np.arange(size, dtype=np.int32) + 1000 * (number + 1)
    return TokenizedDocument(f"d{number}", sha256_text(f"{number} {size}"), ids)


DOCUMENTS = [document(number, size) for number, size in enumerate([5, 9, 14, 3, 20, 40, 61, 62, 200, 333])]


def packed(mix: str, **given: object) -> PackedRows:
    options = {"length": N, "short_length": L, "count": 12, "group": 1, "special_tokens": BOTH, "seed": 0}
    return pack(DOCUMENTS, parse_mix(mix), **(options | given))  # type: ignore[arg-type]


def texts(rows: PackedRows, index: int) -> list[list[int]]:
    """The tokens of a row, cut where positions restart."""
    ids, positions, _ = rows.tensors(index)
    starts = [*(positions == 0).nonzero().flatten().tolist(), N]
    return [ids[a:b].tolist() for a, b in pairwise(starts)]


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("long", {"long": 1.0}),
        ("short:0.3,long:0.7", {"short": 0.3, "long": 0.7}),
        ("long:6, short:2", {"short": 0.25, "long": 0.75}),
        ("pieces,medium", {"pieces": 0.5, "medium": 0.5}),
    ],
)
def test_mix(text: str, shares: dict[str, float]) -> None:
    assert parse_mix(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "longer", "long:0", "long:-1", "long:x", "long,long", "long:nan", "long:inf"])
def test_no_mix(text: str) -> None:
    with pytest.raises(LongRopeError, match="expected a mix"):
        parse_mix(text)


def test_the_special_tokens_of_a_tokenizer(
    bos_tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert SpecialTokens.of(bos_tokenizer) == SpecialTokens(0, 1)
    assert SpecialTokens.of(plain_tokenizer) == SpecialTokens(None, 1)
    assert [SpecialTokens(0, 1).count, SpecialTokens(None, 1).count, SpecialTokens(None, None).count] == [2, 1, 0]


@pytest.mark.parametrize("special_tokens", [BOTH, SpecialTokens(None, 2), SpecialTokens(None, None)])
def test_short_rows_hold_whole_documents(special_tokens: SpecialTokens) -> None:
    rows = packed("short", special_tokens=special_tokens)
    whole = {tuple(one.ids.tolist()) for one in DOCUMENTS if len(one.ids) + special_tokens.count <= L}
    for index in range(len(rows)):
        *ours, last = texts(rows, index)
        inner = [
            tuple(text[special_tokens.bos is not None : len(text) - (special_tokens.eos is not None)]) for text in ours
        ]
        assert set(inner) <= whole
        assert all(text[0] == special_tokens.bos for text in ours if special_tokens.bos is not None)
        assert all(text[-1] == special_tokens.eos for text in ours if special_tokens.eos is not None)
        assert rows.filled(index) == sum(map(len, ours)) + (len(last) if last[0] not in (0, 2) else 0)
        assert N - rows.filled(index) < min(map(len, whole)) + special_tokens.count  # nothing more would have fitted


def test_long_rows_are_full_segments() -> None:
    rows = packed("long", count=20)
    for index in range(20):
        (text,) = texts(rows, index)
        assert (len(text), text[0], text[-1]) == (N, 1, 2)
        inner = np.array(text[1:-1])
        assert (np.diff(inner) == 1).all()  # consecutive tokens of one document
        assert rows.scored(index) == N - 1
    names = {span.document for row in rows.rows for span in row.spans}
    assert {len(rows.documents[one].ids) for one in names} == {62, 200, 333}  # 61 + 2 is shorter than N


def test_pieces_and_medium() -> None:
    rows = packed("pieces")
    assert {len(text) for index in range(12) for text in texts(rows, index)} == {L}
    assert all(len(row.spans) == N // L for row in rows.rows)
    rows = packed("medium")
    used = {len(rows.documents[span.document].ids) for row in rows.rows for span in row.spans}
    assert used == {20, 40, 61}


@pytest.mark.parametrize("mix", ["short", "pieces", "medium", "long", "short:1,medium:1,long:2"])
def test_a_target_is_the_next_token_of_the_same_document(mix: str) -> None:
    rows = packed(mix)
    for index in range(len(rows)):
        ids, positions, targets = rows.tensors(index)
        scored = (targets != IGNORED).nonzero().flatten()
        assert len(scored) == rows.scored(index)
        assert (targets[scored] == ids[scored + 1]).all()
        assert (positions[scored + 1] == positions[scored] + 1).all()
        ends = (positions[1:] == 0).nonzero().flatten()
        assert (targets[ends] == IGNORED).all()
        assert targets[-1] == IGNORED


def test_shares_are_kept_all_along_and_groups_have_one_part() -> None:
    rows = packed("short:0.2,pieces:0.1,long:0.7", count=200, group=2)
    for stop in (40, 100, 200):
        tokens = dict.fromkeys((SHORT, PIECES, LONG), 0)
        for index in range(stop):
            tokens[rows.rows[index].part] += rows.filled(index)
        for part, share in ((SHORT, 0.2), (PIECES, 0.1), (LONG, 0.7)):
            assert abs(tokens[part] - share * sum(tokens.values())) <= 2 * N
    assert all(rows.rows[at].part == rows.rows[at + 1].part for at in range(0, 200, 2))
    assert rows.tokens_by_part == tokens


def test_every_document_of_a_part_comes_before_one_comes_again_and_cuts_move() -> None:
    rows = packed("long", count=40)
    places = [row.spans[0] for row in rows.rows]
    by_round = [places[at : at + 9] for at in range(0, 36, 9)]  # 1 of 62, 3 of 200, 5 of 333 tokens
    assert all(len({(one.document, one.start) for one in turn}) == 9 for turn in by_round)
    assert len({one.start for one in places}) > 9


def test_the_same_rows_whatever_order_documents_come_in() -> None:
    first = packed("short:1,long:1")
    mixed = [DOCUMENTS[at] for at in (7, 2, 9, 0, 1, 8, 5, 4, 3, 6, 7)]  # one of them twice
    again = pack(
        mixed, parse_mix("short:1,long:1"), length=N, short_length=L, count=12, group=1, special_tokens=BOTH, seed=0
    )
    assert first.rows == again.rows
    assert first.sha256 == again.sha256
    assert packed("short:1,long:1", seed=1).sha256 != first.sha256
    assert packed("short:1,long:1", special_tokens=SpecialTokens(None, 2)).sha256 != first.sha256


def test_only_documents_that_were_used_are_named() -> None:
    rows = packed("long", count=1)
    assert rows.document_hashes == (rows.documents[rows.rows[0].spans[0].document].sha256,)


@pytest.mark.parametrize(
    ("mix", "sizes", "message"),
    [
        ("long", [61, 20], "at least 64 tokens, found none among 2 .the longest, d0, 63"),
        ("short", [15, 40], "documents of 3 to 16 tokens"),
        ("medium", [14, 62], "documents of 17 to 63 tokens"),
        ("pieces", [14], "at least 17 tokens"),
        ("long", [], "no documents"),
    ],
)
def test_a_part_without_documents_is_refused(mix: str, sizes: list[int], message: str) -> None:
    documents = [document(number, size) for number, size in enumerate(sizes)]
    with pytest.raises(LongRopeError, match=message):
        pack(documents, parse_mix(mix), length=N, short_length=L, count=1, group=1, special_tokens=BOTH, seed=0)


@pytest.mark.parametrize("wrong", [{"length": 8}, {"short_length": 3}, {"count": 0}, {"count": 3, "group": 2}])
def test_lengths_that_leave_no_room_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(LongRopeError, match="expected a length"):
        packed("long", **wrong)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    part=st.sampled_from([SHORT, PIECES, MEDIUM, LONG]),
    seed=st.integers(0, 5),
)
def test_rows_never_overflow_and_spans_lie_in_their_documents(sizes: list[int], part: str, seed: int) -> None:
    documents = [document(number, size) for number, size in enumerate(sizes)]
    try:
        rows = pack(documents, {part: 1.0}, length=N, short_length=L, count=5, group=1, special_tokens=BOTH, seed=seed)
    except LongRopeError:
        return
    for index, row in enumerate(rows.rows):
        assert 0 < rows.filled(index) <= N
        assert all(0 <= span.start < span.stop <= len(rows.documents[span.document].ids) for span in row.spans)
        assert (rows.filled(index) == N) or part != LONG


@pytest.mark.parametrize("special_tokens", [BOTH, SpecialTokens(None, 2), SpecialTokens(None, None)])
def test_chunks_are_the_chain_of_all_documents_cut_at_the_row(special_tokens: SpecialTokens) -> None:
    """LongRoPE's training: documents between BOS and EOS, chained; positions and attention run through a row."""
    rows = packed("chunks", special_tokens=special_tokens, count=12)
    front = [] if special_tokens.bos is None else [special_tokens.bos]
    back = [] if special_tokens.eos is None else [special_tokens.eos]
    whole = {(*front, *one.ids.tolist(), *back) for one in DOCUMENTS}
    chain: list[int] = []
    for index in range(len(rows)):
        ids, positions, targets = rows.tensors(index)
        assert positions.tolist() == list(range(N))
        assert targets.tolist() == [*ids.tolist()[1:], IGNORED]
        assert (rows.filled(index), rows.scored(index)) == (N, N - 1)
        chain += ids.tolist()
    assert rows.round_tokens == {CHUNKS: sum(map(len, whole))}
    first, rest = chain[: rows.round_tokens[CHUNKS]], set(whole)
    while first:  # one round has every document once, whole
        document = next(one for one in rest if tuple(first[: len(one)]) == one)
        rest.remove(document)
        del first[: len(document)]
    assert not rest


def test_chunks_are_of_the_documents_that_no_other_part_takes() -> None:
    rows = packed("short:0.5,chunks:0.5")
    short = {span.document for row in rows.rows if row.part == SHORT for span in row.spans}
    chained = {span.document for row in rows.rows if row.part == CHUNKS for span in row.spans}
    assert short
    assert chained
    assert not short & chained
    assert {len(rows.documents[index].ids) + 2 > L for index in chained} == {True}


def test_long_documents_have_bounds() -> None:
    """From 30 to 210 tokens: the document of 333 is left out, those below a row stand whole in one."""
    rows = packed("medium:0.5,long:0.5", long_from=30, long_to=210, count=24)
    sizes = {
        part: {len(rows.documents[span.document].ids) for row in rows.rows if row.part == part for span in row.spans}
        for part in (MEDIUM, LONG)
    }
    assert sizes == {MEDIUM: {20}, LONG: {40, 61, 62, 200}}
    for index, row in enumerate(rows.rows):
        for span, text in zip(row.spans, texts(rows, index), strict=False):
            ids = rows.documents[span.document].ids[span.start : span.stop].tolist()
            assert text == [1, *ids, 2]
            assert len(ids) == min(len(rows.documents[span.document].ids), N - 2)
    assert packed("long", long_from=N).sha256 == packed("long").sha256
    for wrong in ({"long_from": L - 1}, {"long_from": N + 1}, {"long_from": 40, "long_to": 39}):
        with pytest.raises(LongRopeError, match="`long_from`"):
            packed("long", **wrong)


def test_rounds_count_how_often_the_documents_of_a_part_come() -> None:
    rows = packed("medium:0.25,long:0.75", count=20)
    assert rows.round_tokens == {MEDIUM: 22 + 42 + 63, LONG: N + (200 // 62 + 333 // 62) * N}
    expected = {MEDIUM: 0.25 * 20 * N / rows.round_tokens[MEDIUM], LONG: 0.75 * 20 * N / rows.round_tokens[LONG]}
    assert rows.rounds({MEDIUM: 0.25, LONG: 0.75}, 20) == pytest.approx(expected)
