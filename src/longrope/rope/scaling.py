"""`RopeScaling`: the rescale factors of one model's RoPE by length, saved as JSON that is safe to read.

Search writes it; evaluation and export take it and nothing else. It holds numbers and their provenance; the angles are
computed in `angles.py`. No pickle: a file from a stranger is parsed, checked field by field and never executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from longrope.checks import LARGEST_FACTOR, positive_number, shown, whole_number
from longrope.errors import LongRopeError
from longrope.input_files import LARGEST_RECORD, refuse_special
from longrope.rope.geometry import RopeGeometry
from longrope.run_files import SCALING
from longrope.storage import sha256_text, write_json_atomic

SCHEMA = "longrope.scaling/1"
MAX_POSITION = 2**31 - 1
_FACTOR_BOUNDS = (1e-3, LARGEST_FACTOR)


@dataclass(frozen=True, repr=False)
class Window:
    """The rescale factors for sequences of up to `max_length` tokens.

    Raises LongRopeError, naming the field, when a value is out of range.
    """

    max_length: int
    """Tokens of the longest sequence this window is for."""
    factors: tuple[float, ...]
    """λ_i, one per rotary pair, highest frequency first: the angle becomes n·θ_i/λ_i."""
    start_tokens: int = 0
    """n̂: positions n < n̂ keep the original angle (LongRoPE Eq. 3)."""
    attention_factor: float = 1.0
    """m: multiplies cosines and sines, so attention logits scale with m²."""

    def __post_init__(self) -> None:
        """Check every field and store plain Python numbers, whatever came in (an array, a tensor, a list)."""
        given: Any = self.factors
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple) or not values:
            raise LongRopeError(
                f"factors must be a sequence of numbers, one per rotary pair; found {shown(given)}",
                code="invalid-scaling",
            )
        factors = tuple(positive_number(f"factors[{index}]", value) for index, value in enumerate(values))
        object.__setattr__(self, "max_length", whole_number("max_length", self.max_length, 1))
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "start_tokens", whole_number("start_tokens", self.start_tokens, 0))
        # Positions are 32-bit; a factor outside these bounds turns angles into noise and comes from a damaged file.
        if max(self.max_length, self.start_tokens) > MAX_POSITION:
            raise LongRopeError(
                f"max_length and start_tokens must be at most {MAX_POSITION}; "
                f"found {self.max_length}, {self.start_tokens}",
                code="invalid-scaling",
            )
        if not _FACTOR_BOUNDS[0] <= min(factors) <= max(factors) <= _FACTOR_BOUNDS[1]:
            raise LongRopeError(
                f"factors must lie in [{_FACTOR_BOUNDS[0]:g}, {_FACTOR_BOUNDS[1]:g}]; found {min(factors):g} to "
                f"{max(factors):g}",
                code="invalid-scaling",
            )
        object.__setattr__(self, "attention_factor", positive_number("attention_factor", self.attention_factor))

    def __repr__(self) -> str:
        factors = (
            f"{self.factors[0]:.4g} … {self.factors[-1]:.4g}" if len(self.factors) > 1 else f"{self.factors[0]:.4g}"
        )
        tokens = f", start_tokens={self.start_tokens}" if self.start_tokens else ""
        return (
            f"Window(max_length={self.max_length}, factors=({factors}), {len(self.factors)} pairs{tokens}, "
            f"attention_factor={self.attention_factor:.4g})"
        )

    @property
    def is_identity(self) -> bool:
        """True if this window is the original RoPE: all factors 1 and attention factor 1."""
        return self.attention_factor == 1.0 and all(factor == 1.0 for factor in self.factors)


@dataclass(frozen=True, repr=False)
class RopeScaling:
    """A scaling of one model's RoPE: a window for each range of lengths, shortest first, and their provenance.

    Raises LongRopeError when the windows do not fit the geometry or are not strictly increasing in `max_length`.
    """

    geometry: RopeGeometry
    windows: tuple[Window, ...]
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)
    """Any JSON object: search settings, hashes, versions, scores."""

    def __post_init__(self) -> None:
        """Check the windows against the geometry and each other, and that the provenance is a JSON object."""
        windows = tuple(self.windows)
        if not windows:
            raise LongRopeError("windows must hold at least one window; found none", code="invalid-scaling")
        for index, window in enumerate(windows):
            if len(window.factors) != self.geometry.pairs:
                raise LongRopeError(
                    f"windows[{index}].factors must hold {self.geometry.pairs} factors for rotary_dim"
                    f" {self.geometry.rotary_dim}; found {len(window.factors)}",
                    code="invalid-scaling",
                )
        lengths = [window.max_length for window in windows]
        if any(later <= earlier for earlier, later in pairwise(lengths)):
            raise LongRopeError(
                f"windows must have strictly increasing max_length; found {lengths}", code="invalid-scaling"
            )
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "provenance", _json_object(self.provenance))

    @classmethod
    def original(cls, geometry: RopeGeometry) -> RopeScaling:
        """The untouched model: one window of L tokens whose factors are all 1."""
        return cls(geometry, (Window(geometry.original_length, (1.0,) * geometry.pairs),))

    @classmethod
    def single(
        cls,
        geometry: RopeGeometry,
        target_length: int,
        factors: Iterable[float],
        start_tokens: int = 0,
        attention_factor: float = 1.0,
        provenance: dict[str, Any] | None = None,
    ) -> RopeScaling:
        """One window: the same factors at every length up to `target_length`."""
        window = Window(target_length, _as_tuple(factors), start_tokens, attention_factor)
        return cls(geometry, (window,), provenance or {})

    @classmethod
    def extended(
        cls,
        geometry: RopeGeometry,
        target_length: int,
        factors: Iterable[float],
        start_tokens: int = 0,
        attention_factor: float = 1.0,
        provenance: dict[str, Any] | None = None,
    ) -> RopeScaling:
        """Two windows: factors 1 up to L, then `factors` up to `target_length`, with one attention factor for both.

        One attention factor because no common runtime has two: with 1.0 short sequences are those of the original
        model. Raises LongRopeError when `target_length` is not above L.
        """
        long = Window(target_length, _as_tuple(factors), start_tokens, attention_factor)
        if long.max_length <= geometry.original_length:
            raise LongRopeError(
                f"target_length must be above the original window of {geometry.original_length} tokens;"
                f" found {long.max_length}",
                code="invalid-setting",
            )
        short = Window(geometry.original_length, (1.0,) * geometry.pairs, 0, attention_factor)
        return cls(geometry, (short, long), provenance or {})

    def __repr__(self) -> str:
        method = self.provenance.get("method")
        head = f"RopeScaling({self.geometry.original_length} → {self.target_length} tokens"
        lines = "".join(f"\n  {window!r}" for window in self.windows)
        return f"{head}, rotary_dim {self.geometry.rotary_dim}{f', {method}' if method else ''}:{lines})"

    @property
    def target_length(self) -> int:
        """L': tokens of the longest sequence that any window is for."""
        return self.windows[-1].max_length

    def window_for(self, length: int) -> Window:
        """The window for a sequence of `length` tokens: the smallest that is long enough.

        Raises LongRopeError when no window is.
        """
        length = whole_number("length", length, 1)
        for window in self.windows:
            if length <= window.max_length:
                return window
        raise LongRopeError(
            f"this scaling reaches {self.target_length} tokens; a sequence of {length} is too long",
            code="beyond-the-scaling",
        )

    def with_window(self, window: Window) -> RopeScaling:
        """The same scaling with `window` among its windows, in place of the one of the same `max_length`."""
        others = [other for other in self.windows if other.max_length != window.max_length]
        return replace(self, windows=tuple(sorted([*others, window], key=lambda one: one.max_length)))

    def check_fits(self, geometry: RopeGeometry) -> None:
        """Raise LongRopeError when this scaling was made for another rotary embedding than `geometry`."""
        names = ("rotary_dim", "base", "original_length")
        differing = [name for name in names if getattr(self.geometry, name) != getattr(geometry, name)]
        if differing:
            ours, theirs = (
                ", ".join(f"{name} {getattr(one, name):.15g}" for name in differing)
                for one in (self.geometry, geometry)
            )
            raise LongRopeError(
                f"the scaling is for {ours}; this model has {theirs}",
                code="wrong-geometry",
                hint="use a scaling made for this model",
            )

    def with_provenance(self, **more: Any) -> RopeScaling:
        """The same scaling with `more` added to its provenance."""
        return replace(self, provenance=self.provenance | more)

    def to_json(self) -> str:
        """The JSON text that `save` writes; floats come back from it bit for bit."""
        return json.dumps(self._document(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "rotary_dim": self.geometry.rotary_dim,
            "base": self.geometry.base,
            "original_length": self.geometry.original_length,
            "windows": [
                {
                    "max_length": window.max_length,
                    "factors": list(window.factors),
                    "start_tokens": window.start_tokens,
                    "attention_factor": window.attention_factor,
                }
                for window in self.windows
            ],
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, text: str, source: str = "the scaling") -> RopeScaling:
        """The scaling in `text`; `source` names it in errors.

        Raises LongRopeError when `text` is not JSON, has another schema, or has missing, unknown or wrong fields.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
            return cls._from_document(document)
        except LongRopeError as error:
            raise LongRopeError(f"{source}: {error}", code="damaged-file") from error
        except (ValueError, RecursionError) as error:
            raise LongRopeError(
                f"{source} is not a scaling: expected JSON, found {_reason(error)}", code="damaged-file"
            ) from error

    @classmethod
    def _from_document(cls, document: Any) -> RopeScaling:
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            found = f"schema {shown(schema)}" if schema is not None else "JSON without it"
            raise LongRopeError(f"expected a scaling with schema {SCHEMA!r}; found {found}", code="damaged-file")
        _expect_keys(
            "the scaling", document, {"schema", "rotary_dim", "base", "original_length", "windows", "provenance"}
        )
        if not isinstance(document["windows"], list):
            raise LongRopeError(f"windows must be a list; found {shown(document['windows'])}", code="damaged-file")
        windows = []
        for index, window in enumerate(document["windows"]):
            _expect_keys(f"windows[{index}]", window, {"max_length", "factors", "start_tokens", "attention_factor"})
            try:
                windows.append(Window(**window))
            except LongRopeError as error:
                raise LongRopeError(f"windows[{index}].{error}", code="invalid-scaling") from error
        geometry = RopeGeometry(**{key: document[key] for key in ("rotary_dim", "base", "original_length")})
        return cls(geometry, tuple(windows), document["provenance"])

    def save(self, path: Path | str) -> None:
        """Write the JSON to `path` in full or not at all. Raises LongRopeError when it cannot be written."""
        write_json_atomic(Path(path), self._document())

    @classmethod
    def load(cls, path: Path | str) -> RopeScaling:
        """Read what `save` wrote. Raises LongRopeError, with the path, when that is not a scaling."""
        refuse_special(path, LARGEST_RECORD)
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise LongRopeError(
                f"cannot read the scaling '{path}': {error.strerror}",
                code="missing-scaling",
                hint="longrope search leaves one in its output folder",
            ) from error
        except UnicodeDecodeError as error:
            raise LongRopeError(
                f"{path} is not a scaling: expected JSON, found a file that is not UTF-8 text", code="damaged-file"
            ) from error
        return cls.from_json(text, str(path))


def load_scaling(path: Path | str) -> RopeScaling:
    """Read a scaling from its file, or from a run folder or checkpoint that holds a `scaling.json`.

    JSON of numbers and text only: safe to read from strangers. Raises LongRopeError, with the path, when there is no
    scaling.
    """
    path = Path(path)
    return RopeScaling.load(path / SCALING if path.is_dir() else path)


def _as_tuple(factors: Iterable[float]) -> tuple[float, ...]:
    """The items of any sequence, array or tensor as Python numbers."""
    return tuple(factors.tolist() if hasattr(factors, "tolist") else factors)


def _json_object(value: Any) -> dict[str, Any]:
    """A copy of `value` as JSON gives it back (tuples become lists), so that what is saved equals what is loaded."""
    if not isinstance(value, dict):
        raise LongRopeError(f"provenance must be a JSON object; found {shown(value)}", code="damaged-file")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LongRopeError(f"provenance must be a JSON object; found {_reason(error)}", code="damaged-file") from error
    copy: dict[str, Any] = json.loads(text)
    return copy


def _expect_keys(where: str, value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict):
        raise LongRopeError(f"{where} must be a JSON object; found {shown(value)}", code="damaged-file")
    if missing := sorted(expected - value.keys()):
        raise LongRopeError(f"{where} lacks {', '.join(missing)}", code="damaged-file")
    if unknown := sorted(value.keys() - expected):
        raise LongRopeError(
            f"{where} has unknown keys: {shown(', '.join(unknown))}; expected only those of {SCHEMA!r}",
            code="damaged-file",
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise LongRopeError(
            f"expected every key once; found one twice among {shown(sorted(key for key, _ in pairs))}",
            code="damaged-file",
        )
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise LongRopeError(f"expected finite numbers; found {name}", code="damaged-file")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def numbers_sha256(scaling: RopeScaling) -> str:
    """SHA-256 of a scaling's numbers, whatever its provenance."""
    return sha256_text(replace(scaling, provenance={}).to_json())
