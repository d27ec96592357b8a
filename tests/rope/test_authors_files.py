"""The three forms of the authors' factor files, and every file that is not one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.rope.authors_files import read_authors_factors
from longrope.rope.presets import preset
from tests.rope.test_geometry import LLAMA2_7B

FACTORS = preset("ft_la2_256k").windows[0].factors
TARGET = 262144


def _column(values: tuple[float, ...] | list[str]) -> str:
    return "".join(f"{value}\n" for value in values)


def _row(values: tuple[float, ...]) -> str:
    return ",".join(map(str, values)) + "\n"


@pytest.mark.parametrize(
    ("content", "start_tokens"),
    [
        (_column(FACTORS), 0),
        (_column(FACTORS).rstrip("\n"), 0),
        (_column(FACTORS).replace("\n", "\r\n") + "\r\n\r\n", 0),
        ("\ufeff" + _column(FACTORS), 0),
        (_row(FACTORS), 0),
        (_row(FACTORS) * 32, 0),
        (_row(FACTORS).replace(",", ", ") * 5, 0),
        (_column((16, *FACTORS)), 16),
        (_column((0.0, *FACTORS)), 0),
        (_column(["1.6e1", *map(str, FACTORS)]), 16),
    ],
    ids=["column", "no-newline", "crlf", "bom", "one-row", "32-rows", "spaces", "n-hat", "n-hat-0", "n-hat-exponent"],
)
def test_forms(tmp_path: Path, content: str, start_tokens: int) -> None:
    path = tmp_path / "256k.csv"
    path.write_bytes(content.encode())
    scaling = read_authors_factors(path, LLAMA2_7B, TARGET)
    (window,) = scaling.windows
    assert window.factors == FACTORS
    assert (window.max_length, window.start_tokens, window.attention_factor) == (TARGET, start_tokens, 1.0)
    assert scaling.geometry == LLAMA2_7B
    assert scaling.provenance["file"] == "256k.csv"
    assert len(scaling.provenance["sha256"]) == 64


def test_numpy_writes_the_same_forms(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "rows.csv", np.tile(FACTORS, (32, 1)), delimiter=",")
    np.savetxt(tmp_path / "column.csv", np.array(FACTORS))
    for name in ("rows.csv", "column.csv"):
        scaling = read_authors_factors(str(tmp_path / name), LLAMA2_7B, TARGET, attention_factor=1.2)
        assert scaling.windows[0].factors == FACTORS
        assert scaling.windows[0].attention_factor == 1.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 64 rescale factors in .*, found an empty file"),
        (b"\n \n", "found an empty file"),
        (
            _column(FACTORS[:63]).encode(),
            "expected 64 rescale factors .* or start tokens and 64 factors; found 63 numbers",
        ),
        (_column((1.0, 1.0, *FACTORS)).encode(), "found 66 numbers"),
        (_column((1.5, *FACTORS)).encode(), "expected a whole number of start tokens in line 1 .*, found 1.5"),
        (_column((-4, *FACTORS)).encode(), "start tokens in .* must be a whole number, 0 or more; found -4"),
        (_row(FACTORS[:63]).encode() * 32, "expected 64 factors in every row of .*, found 63 in row 1"),
        ((_row(FACTORS) + _row(FACTORS[:-1])).encode(), "found 63 in row 2"),
        ((_row(FACTORS) + _row((1.5, *FACTORS[1:]))).encode(), "row 2 different from row 1: factors per layer are not"),
        (_column((*FACTORS[:63], "nan")).encode(), "expected a number in line 64 of .*, found 'nan'"),  # type: ignore[arg-type]
        (_column((*FACTORS[:63], 0.0)).encode(), "every factor must be a finite number above 0; found 0.0"),
        (_column((*FACTORS[:63], -1.0)).encode(), "every factor must be a finite number above 0; found -1.0"),
        (_column([*map(str, FACTORS[:63]), "1e999"]).encode(), "every factor must be a finite number above 0"),
        (b"Call me Ishmael. Some years ago", "expected a number in line 1 of .*, found 'Call me Ishmael"),
        (b"1.0\n1_0\n", "expected a number in line 2 of .*, found '1_0'"),
        (b"\x80\x04\x95\x00\xff\xfe", "found a binary file"),
        (b"\x00" * 64, "expected a number in line 1"),
        (b"1.0\n" * (5 << 20), "found more than 16 MB"),
    ],
)
def test_refusals(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "factors.csv"
    path.write_bytes(content)
    with pytest.raises(LongRopeError, match=message) as caught:
        read_authors_factors(path, LLAMA2_7B, TARGET)
    assert caught.value.code in ("damaged-file", "invalid-number")
    assert re.search(re.escape(str(path)), str(caught.value))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"cannot read the factor file .*none\.csv: No such file"):
        read_authors_factors(tmp_path / "none.csv", LLAMA2_7B, TARGET)
