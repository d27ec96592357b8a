"""A matplotlib figure as files, and as SVG inside a page, where it follows the page's colours and font.

Text stays text: the file is small, readers can search it, and the page's own font is used.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from longrope.report.figures.canvas import hover_texts
from longrope.report.styles import TONES, light

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_PNG_DPI = 220
_SETTINGS: dict[Any, Any] = {
    # A fixed salt: the same numbers give the same bytes.
    "svg.hashsalt": "longrope",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are shown as they are
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": light("ink"),
    "axes.labelcolor": light("ink"),
    "axes.edgecolor": light("quiet"),
    "xtick.color": light("quiet"),
    "ytick.color": light("quiet"),
    "xtick.labelcolor": light("ink"),
    "ytick.labelcolor": light("ink"),
    "grid.color": light("line"),
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.7,
    "figure.facecolor": light("paper"),
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
}


@contextmanager
def drawing() -> Iterator[None]:
    """A block with the settings of our figures: make and save them inside it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


class Drawing:
    """A finished figure, drawn once."""

    def __init__(self, figure: Figure) -> None:
        self._figure = figure

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG file, in the light colours on paper."""
        file = io.StringIO()
        with drawing():
            self._figure.savefig(file, format="svg", metadata={"Date": None})
        self._figure.set_layout_engine("none")  # laid out now; doing it again takes longer than drawing
        return file.getvalue()

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.png and `name`.svg to `folder`."""
        paths = [folder / f"{name}.png", folder / f"{name}.svg"]
        paths[1].write_text(self.svg, "utf-8")
        with drawing():
            self._figure.savefig(paths[0], dpi=_PNG_DPI, metadata={"Software": None})
        return paths

    def inline(self, name: str, title: str) -> str:
        """The figure as an `<svg>` element for a page that gives TONES as CSS variables.

        Every id begins with `name`, so that several figures live in one page; `title` is for screen readers.
        """
        ET.register_namespace("", _SVG)
        ET.register_namespace("xlink", _XLINK)
        root = ET.fromstring(self.svg)
        for parent in root.iter():
            for child in list(parent):
                # The ground is the page's own; styles would hold for all of the page.
                if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style") or child.get("id") == "patch_1":
                    parent.remove(child)
        texts = hover_texts(self._figure)
        for element in root.iter():
            if element.tag == f"{{{_SVG}}}g":
                key = element.attrib.pop("id", None)  # groups are never referred to
                if key in texts:
                    title_of(element, texts[key])
            if element.tag not in (f"{{{_SVG}}}text", f"{{{_SVG}}}title"):
                element.text = None
            element.tail = None  # white space between elements
            for key, value in element.attrib.items():
                element.set(key, _rewritten(key, value, name))
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        for key in ("width", "height", "version"):
            root.attrib.pop(key, None)
        root.attrib |= {"role": "img", "aria-label": title, "style": f"aspect-ratio: {width:g} / {height:g}"}
        return ET.tostring(root, encoding="unicode")


def title_of(element: ET.Element, text: str) -> None:
    """Give an element a text that browsers show over it."""
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = text
    element.insert(0, title)


_VARIABLES = {values[0]: f"var(--{name})" for name, values in TONES.items()}
_COLOUR = re.compile("|".join(map(re.escape, _VARIABLES)), re.IGNORECASE)


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{_XLINK}}}href":
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family: [^;]*;?", "", value)
        value = _COLOUR.sub(lambda match: _VARIABLES[match[0].lower()], value)
    return value
