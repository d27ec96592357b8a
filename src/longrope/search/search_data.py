"""The texts of a search, by split and length, and the objectives over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from longrope.data.needles import Haystacks, NeedleSamples, draw_haystacks, draw_needles
from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import TextSource, read_all
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel, check_vocabulary
from longrope.models.scaled import ScaledModel
from longrope.search.config import SearchConfig
from longrope.search.evaluator import OTHER, SEARCH, VALIDATION
from longrope.search.objective import NeedleObjective, PerplexityObjective, SampledObjective
from longrope.units import doubling_lengths

FAR = 512 * 1024  # tokens; the paper halves its budget beyond
VALIDATION_SAMPLES = 3

AnySamples = Samples | NeedleSamples
Texts = dict[tuple[str, int], AnySamples]


def prepare_texts(
    loaded: LoadedModel, sources: Sequence[TextSource], target_length: int, options: SearchConfig
) -> Texts:
    """The texts of every split and length that a search needs, drawn by seed.

    The search texts of one seed are the same for every method. Raises LongRopeError when the sources do not hold enough
    text.
    """
    documents = tokenize(read_all(sources), loaded.tokenizer)
    far = target_length > FAR

    def draw(objective: str, length: int, count: int, seed: int, haystacks: Haystacks | None = None) -> AnySamples:
        samples: AnySamples
        if objective == "needle":
            samples = draw_needles(
                documents,
                loaded.tokenizer,
                length=length,
                count=count,
                seed=seed,
                depth=options.needle_depth,
                haystacks=haystacks,
            )
        else:
            bos = bos_of(loaded.tokenizer)
            samples = draw_samples(documents, length=length, count=count, seed=seed, bos_token_id=bos)
        check_vocabulary(loaded, samples.ids)
        return samples

    def count(objective: str) -> int:
        return (10 if objective == "needle" else 3 if far else 5) if options.samples is None else options.samples

    chosen = options.chosen_objective
    texts: Texts = {}
    if not options.by_gradient:
        texts[SEARCH, target_length] = draw(chosen, target_length, count(chosen), options.seed)
        if options.method == "longrope2":
            other = options.other_objective
            texts[OTHER, target_length] = draw(other, target_length, count(other), options.seed)
        return texts
    lengths = stage_lengths(loaded.context_length, target_length, options.continuation)
    first = count(chosen)
    # One draw, cut for the shorter stages: a validation text overlaps no search text of any stage.
    if chosen == "needle":  # other keys and numbers, too; the needle's depth is spread over each split
        size = {"length": target_length, "count": first, "seed": options.seed}
        haystacks = draw_haystacks(documents, loaded.tokenizer, **size, more=VALIDATION_SAMPLES)
        apart = Haystacks(haystacks.origins[first:], haystacks.tokens)

        def both_splits(length: int) -> tuple[AnySamples, AnySamples]:
            searched = draw(chosen, length, first, options.seed, haystacks)
            return searched, draw(chosen, length, VALIDATION_SAMPLES, options.seed + 1, apart)

        whole = both_splits(target_length)  # first: what is wrong at every length is said of this one
        for length in lengths:
            try:
                found = whole if length == target_length else both_splits(length)
            except LongRopeError as error:
                stages = ", ".join(map(str, lengths))
                raise LongRopeError(
                    f"{error}, the first of the stages of {stages} tokens; leave continuation out (--no-continuation)"
                ) from error
            texts[SEARCH, length], texts[VALIDATION, length] = found
        return texts
    both = draw(chosen, target_length, first + VALIDATION_SAMPLES, options.seed)
    assert isinstance(both, Samples)
    for length in lengths:
        texts[SEARCH, length] = Samples(both.ids[:first, :length], both.origins[:first], both.has_bos)
        texts[VALIDATION, length] = Samples(both.ids[first:, :length], both.origins[first:], both.has_bos)
    return texts


def stage_lengths(reach: int, target_length: int, continuation: bool) -> list[int]:
    """The windows a gradient search goes through: 2, 4, … times what the model reaches, up to L'; or L' alone."""
    return doubling_lengths(reach, target_length)[1:] if continuation else [target_length]


def objectives_over(scaled: ScaledModel, texts: Texts) -> dict[tuple[str, int], SampledObjective]:
    """What answers for every split and length."""
    return {
        key: (NeedleObjective if isinstance(samples, NeedleSamples) else PerplexityObjective)(scaled, samples)  # type: ignore[arg-type]
        for key, samples in texts.items()
    }


def data_provenance(texts: Texts) -> dict[str, Any]:
    """Which documents, and which places of them, a search has seen."""
    hashes = {digest for samples in texts.values() for digest in samples.document_hashes}
    return {
        "document_sha256": sorted(hashes),
        "samples": [
            {"split": split, "length": length, **asdict(row)}
            for (split, length), samples in texts.items()
            for row in samples.origins
        ],
    }
