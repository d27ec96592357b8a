"""The texts of a search, by split and length, and the objectives over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longrope.data.needles import Haystacks, NeedleSamples, draw_haystacks, draw_needles
from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import TextSource, read_all
from longrope.data.tokens import TokenizedDocument, bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.models.config import LayerInputs
from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.models.texts import check_vocabulary
from longrope.search.config import SearchConfig
from longrope.search.evaluator import OTHER, SEARCH, VALIDATION
from longrope.search.objective import NeedleObjective, PerplexityObjective, SampledObjective
from longrope.units import doubling_lengths

FAR = 512 * 1024  # tokens; the paper halves its budget beyond
VALIDATION_SAMPLES = 3

Texts = dict[tuple[str, int], Samples]


def prepare_texts(
    loaded: LoadedModel, sources: Sequence[TextSource], target_length: int, config: SearchConfig
) -> Texts:
    """The texts of every split and length that a search needs, drawn by seed.

    The search texts of one seed are the same for every method. Raises LongRopeError when the sources do not hold enough
    text.
    """
    config.require_target(target_length)
    drawing = _Drawing(loaded, tokenize(read_all(sources, tokenizer=loaded.tokenizer), loaded.tokenizer), config)
    chosen = config.chosen_objective
    if config.by_gradient:
        lengths = stage_lengths(loaded.context_length, target_length, config.continuation)
        split = _needle_stages if chosen == "needle" else _perplexity_stages
        return split(drawing, lengths, samples_of(config, chosen, target_length))
    texts: Texts = {(SEARCH, target_length): drawing.samples(chosen, target_length)}
    if config.method == "longrope2":
        texts[OTHER, target_length] = drawing.samples(config.other_objective, target_length)
    return texts


def samples_of(config: SearchConfig, objective: str, target_length: int) -> int:
    """The number of texts of `objective` that are scored."""
    default = 10 if objective == "needle" else 3 if target_length > FAR else 5
    return default if config.samples is None else config.samples


@dataclass(frozen=True)
class _Drawing:
    """Draws texts of a search from tokenized documents."""

    loaded: LoadedModel
    documents: Sequence[TokenizedDocument]
    config: SearchConfig

    def samples(self, objective: str, length: int) -> Samples:
        """The search texts of `objective`."""
        count = samples_of(self.config, objective, length)
        return (self.needles if objective == "needle" else self.plain)(length, count, self.config.seed)

    def plain(self, length: int, count: int, seed: int) -> Samples:
        """`count` texts of exactly `length` tokens."""
        bos = bos_of(self.loaded.tokenizer)
        samples = draw_samples(self.documents, length=length, count=count, seed=seed, bos_token_id=bos)
        check_vocabulary(self.loaded, samples.ids)
        return samples

    def needles(self, length: int, count: int, seed: int, haystacks: Haystacks | None = None) -> NeedleSamples:
        """`count` texts of exactly `length` tokens with a hidden number each, in `haystacks` of the documents."""
        samples = draw_needles(
            self.documents,
            self.loaded.tokenizer,
            length=length,
            count=count,
            seed=seed,
            depth=self.config.needle_depth,
            haystacks=haystacks,
        )
        check_vocabulary(self.loaded, samples.ids)
        return samples


def _perplexity_stages(drawing: _Drawing, lengths: Sequence[int], count: int) -> Texts:
    """Plain texts of every stage: one draw, cut for the shorter stages. A validation text overlaps no search text of
    any stage."""
    both = drawing.plain(lengths[-1], count + VALIDATION_SAMPLES, drawing.config.seed)
    texts: Texts = {}
    for length in lengths:
        texts[SEARCH, length] = Samples(both.ids[:count, :length], both.origins[:count], both.has_bos)
        texts[VALIDATION, length] = Samples(both.ids[count:, :length], both.origins[count:], both.has_bos)
    return texts


def _needle_stages(drawing: _Drawing, lengths: Sequence[int], count: int) -> Texts:
    """Texts with needles of every stage: the haystacks are the same; validation has its own, and its own keys, numbers
    and depths."""
    target_length, seed = lengths[-1], drawing.config.seed
    size = {"length": target_length, "count": count, "seed": seed}
    haystacks = draw_haystacks(drawing.documents, drawing.loaded.tokenizer, **size, more=VALIDATION_SAMPLES)
    apart = Haystacks(haystacks.origins[count:], haystacks.tokens)

    def both_splits(length: int) -> tuple[NeedleSamples, NeedleSamples]:
        searched = drawing.needles(length, count, seed, haystacks)
        return searched, drawing.needles(length, VALIDATION_SAMPLES, seed + 1, apart)

    whole = both_splits(target_length)  # first: an error at every length is reported for this one
    texts: Texts = {}
    for length in lengths:
        try:
            found = whole if length == target_length else both_splits(length)
        except LongRopeError as error:
            stages = ", ".join(map(str, lengths))
            raise LongRopeError(
                f"{error}, the first of the stages of {stages} tokens",
                code="too-short-text",
                hint="leave the stages out with `continuation=False`",
            ) from error
        texts[SEARCH, length], texts[VALIDATION, length] = found
    return texts


def stage_lengths(context_length: int, target_length: int, continuation: bool) -> list[int]:
    """The windows of a gradient search: 2, 4, … times the model's context length, up to L'; or L' alone."""
    return doubling_lengths(context_length, target_length)[1:] if continuation else [target_length]


def objectives_over(
    scaled: ScaledModel, texts: Texts, layer_inputs: LayerInputs = "keep"
) -> dict[tuple[str, int], SampledObjective]:
    """The objective of every split and length; `layer_inputs` is where their gradients keep the inputs of layers."""
    return {
        key: NeedleObjective(scaled, samples, layer_inputs)
        if isinstance(samples, NeedleSamples)
        else PerplexityObjective(scaled, samples, layer_inputs)
        for key, samples in texts.items()
    }


def data_provenance(texts: Texts) -> dict[str, Any]:
    """The documents that a search has seen, and the places in them."""
    hashes = {digest for samples in texts.values() for digest in samples.document_hashes}
    return {
        "document_sha256": sorted(hashes),
        "samples": [
            {"split": split, "length": length, **asdict(row)}
            for (split, length), samples in texts.items()
            for row in samples.origins
        ],
    }
