"""The Python of a Markdown page, run as written but for the model's name, lengths and budgets."""

from __future__ import annotations

import re
from pathlib import Path

import longrope
from tests.checkpoints import words

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "Qwen/Qwen2.5-7B-Instruct": str(Path(longrope.__file__).parent / "assets/tiny"),
    '"128k"': '"512"',
    '"32k"': '"256"',
    'method="gradient"': 'method="gradient", steps=1, samples=1, knots=4',
    "baselines=": "config=lr.EvalConfig(samples=1, trials=1, depths=1), baselines=",
    "steps=400": "steps=1, batch=1",
    "short:0.3,long:0.7": "long",
}


def run_python(page: str, folder: Path) -> int:
    """Run the Python blocks of `page` one after the other in `folder`, the working folder; returns their number."""
    for number, name in enumerate(("books", "held-out")):
        (folder / name).mkdir()
        (folder / name / "text.txt").write_text(words(3000, number), "utf-8")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        for written, small in SMALL.items():
            block = block.replace(written, small)
        exec(compile(block, page, "exec"), names)
    return len(blocks)
