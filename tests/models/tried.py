"""Every family tried with every verb, and the page docs/models.md that says what came of it.

    python -m tests.models.tried [FAMILY …]

With families it prints their rows; without, it tries all of them and writes the page (some minutes).
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

import longrope
from longrope.errors import LongRopeError, one_line
from longrope.models.generation.cache import prefill
from longrope.models.generation.generate import generate
from longrope.models.loading import load_config, open_model
from longrope.rope.geometry import RopeGeometry
from tests.checkpoints import tokenizer, words
from tests.models.every_family import VOCABULARY, WINDOW, families, small_config, small_model

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
TARGET = 4 * WINDOW
VERBS = ("inspect", "search", "eval", "export", "generate")
WORKS = "works"
_SECONDS = 120  # of computing, for one family; the clock would count what else the machine does
_DRAFT = "a draft model: its layers read the keys and values of another model, and it computes nothing alone"
_SOUND = "its config holds two models of text, one that reads and one that makes sound; neither has RoPE"
_CANNOT = {
    "gemma3n": "needs the package timm for its images; its text model is `gemma3n_text`",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _SOUND,
    "musicgen_melody": _SOUND,
}
_NO_ROPE = "no rotary position embedding"
_TEXT = words(3000, 1)


@dataclass(frozen=True)
class Row:
    """A family, and for every verb `works` or the refusal in one line; `fault` is what is neither."""

    family: str
    verbs: dict[str, str]
    fault: str = ""

    @property
    def works(self) -> bool:
        return not self.fault and all(says == WORKS for says in self.verbs.values())

    @property
    def reason(self) -> str:
        """The refusal that comes first, without the paths and numbers of this try."""
        return self.fault or next((says for says in self.verbs.values() if says != WORKS), "")


class _TooLong(BaseException):
    pass


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def try_family(family: str) -> Row:
    """Run every verb on a tiny random model of `family`, each on its own."""
    verbs: dict[str, str] = {}
    if family in _CANNOT:
        return Row(family, verbs, f"not tried: {_CANNOT[family]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            with _limited():
                model = _saved(family, folder / "model")
                (folder / "text.txt").write_text(_TEXT, "utf-8")
                for verb, job in _JOBS.items():
                    try:
                        job(model, folder)
                    except LongRopeError as error:
                        verbs[verb] = _plain(one_line(error))
                    else:
                        verbs[verb] = WORKS
        except _TooLong:
            return Row(family, verbs, f"not tried: more than {_SECONDS} s")
        except Exception as error:  # the model cannot be made small, or a verb raises what is no refusal
            return Row(family, verbs, _plain(f"not tried: {one_line(error)}") if not verbs else one_line(error))
    return Row(family, verbs)


def _saved(family: str, folder: Path) -> Path:
    config = small_config(family)
    model = small_model(config)
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None], use_cache=False)
    model.save_pretrained(folder)
    if config.get_text_config() is not config:
        config.save_pretrained(folder)  # of the model with images or sound, as it is published
    tokenizer().save_pretrained(folder)
    return folder


def _inspect(model: Path, folder: Path) -> None:
    longrope.inspect_model(model)


def _search(model: Path, folder: Path) -> None:
    config = longrope.SearchConfig(method="gradient", steps=1, samples=1, continuation=False, attention_factor="1")
    data = [str(folder / "text.txt")]
    longrope.search_scaling(model, target_length=TARGET, data=data, config=config, output_dir=folder / "run")


def _evaluate(model: Path, folder: Path) -> None:
    """Perplexity in one pass, and tokens scored after a text that was read into a cache, in one part and in two."""
    data = [str(folder / "text.txt")]
    config = longrope.EvalConfig(samples=1)
    found = longrope.evaluate(model, scaling=_scaling(model), data=data, lengths=[WINDOW, TARGET], config=config)
    assert found.rows
    assert all(0 <= row.value < float("inf") for row in found.rows)
    with longrope.scaled(_loaded(model), _scaling(model)) as handle:
        ids = _ids(TARGET - 20)
        with torch.no_grad():
            logits = handle.model(input_ids=ids, use_cache=False).logits.float()
        expected = -torch.log_softmax(logits, -1)[0, -21:-1].gather(1, ids[0, -20:, None])[:, 0]
        window = handle.scaling.window_for(TARGET)
        for chunk in (None, WINDOW):
            read = prefill(handle, ids[:, :-20], window, chunk_size=chunk)
            for _ in range(2):  # the text is as it was after the first time
                torch.testing.assert_close(read.score(ids[:, -20:]), expected, atol=5e-3, rtol=1e-3)


def _export(model: Path, folder: Path) -> None:
    done = longrope.export_checkpoint(model, _scaling(model), folder / "out")
    assert done.verification is not None


def _generate(model: Path, folder: Path) -> None:
    """Greedy tokens across the switch with a cache are those without one, if transformers' own are."""
    scaling, loaded = _scaling(model), _loaded(model)
    ids = _ids(WINDOW - 6)
    if not torch.equal(_without_cache(loaded, ids), loaded.generate(ids, **_GREEDY)):
        raise LongRopeError(
            "generate of transformers gives other tokens with a cache than without one", code="cannot-generate"
        )
    with longrope.scaled(loaded, scaling) as handle:
        found = generate(handle, ids, max_new_tokens=14, eos_token_id=())
        assert torch.equal(found, _without_cache(handle.model, ids)), "cached text differs across the switch"


_GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": VOCABULARY, "pad_token_id": 0}
_JOBS: dict[str, Callable[[Path, Path], None]] = dict(
    zip(VERBS, (_inspect, _search, _evaluate, _export, _generate), strict=True)
)


def _loaded(model: Path) -> Any:
    return open_model(model).model


def _scaling(model: Path) -> Any:
    geometry = RopeGeometry.from_config(load_config(str(model)))
    factors = torch.linspace(1.0, 4.5, geometry.pairs, dtype=torch.float64)
    return longrope.RopeScaling.extended(geometry, TARGET, factors)


def _ids(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (1, length), generator=torch.Generator().manual_seed(1))


def _without_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(14):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def _plain(message: str) -> str:
    """A message without the paths of this try, as a cell of a table."""
    message = re.sub(r"/\S*/(model|out|run)\b\S*", "the model", message)
    if re.search(r"rotary position embeddings \(RoPE\)|has no rotary module", message):
        return _NO_ROPE
    return message.replace("|", "/")[:220]


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    rope = [row for row in rows if row.reason != _NO_ROPE and not row.fault.startswith("not tried")]
    works = [row.family for row in rope if row.works]
    part = [row for row in rope if not row.works]
    none = [row.family for row in rows if row.reason == _NO_ROPE]
    untried = [row for row in rows if row.fault.startswith("not tried")]
    table = "\n".join(f"| `{row.family}` | {row.reason} |" for row in part)
    names = "\n".join(f"- `{row.family}`: {row.fault.removeprefix('not tried: ')}" for row in untried)
    about = (
        f"What every causal language model of transformers {transformers.__version__} does with longrope, found by"
        " trying: a tiny random model of each family, made by code from its default config, goes through `inspect`,"
        " `search`, `eval`, `export` (whose proof compares with the source) and generation across the switch between"
        " windows. `python -m tests.models.tried` writes this page, and a slow test compares it. A family works with"
        " all of them, or every verb, `inspect` first, refuses it in the same line. A published checkpoint may have"
        " settings that the default config of its family has not; they are looked at in the same way. Models that are"
        " already in a GGUF file are on [their own page](gguf.md)."
    )
    return f"""# Models

{textwrap.fill(about, 120)}

## Works with every verb ({len(works)} families)
{_list(works)}

## Refused by every verb ({len(part)} families)
| family | why |
|---|---|
{table}

## No rotary position embedding ({len(none)} families)
Refused by every verb:
{_list(none)}

## Not tried
{names or "None."}
"""


def _list(names: list[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in names) + ".", 120, break_on_hyphens=False)


def main(names: list[str]) -> None:
    """Print the rows of `names`, or write the page."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for family in names or families():
        row = try_family(family)
        print(row.family, WORKS if row.works else f"{row.verbs} {row.fault}", flush=True)
        rows.append(row)
    if not names:
        PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
