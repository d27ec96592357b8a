"""A whole report as Markdown, for a pull request or a model card: the same verdict, numbers, limits and tables."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from longrope.export.markdown import code_span
from longrope.export.markdown import plain as escaped
from longrope.report.page import Chapter, Report
from longrope.report.sections import Exhibit
from longrope.report.tables import Table


def render_markdown(report: Report, version: str, figures: Path) -> str:
    """The text of `report`, made by `version` of longrope; `figures` is the folder of its figures from there."""
    several = len(report.chapters) > 1
    parts = [f"# {plain(report.title)}"]
    for chapter in report.chapters:
        parts += _chapter(chapter, figures, level=3 if several else 2, titled=several)
    parts.append(f"Made by longrope {version} from the files of the run{'s' * several}.")
    return "\n\n".join(parts) + "\n"


def _chapter(chapter: Chapter, figures: Path, *, level: int, titled: bool) -> list[str]:
    head = "#" * level
    parts = [f"## {plain(chapter.name)}"] * titled
    parts += [f"**{plain(line)}**" if place == 0 else plain(line) for place, line in enumerate(chapter.verdict)]
    parts.append(plain(chapter.lede))
    parts += _list([f"{fact.term}: {'; '.join(fact.lines)}" for fact in chapter.about])
    parts += _list([f"{one.label}: {one.value}" + (f" ({one.note})" if one.note else "") for one in chapter.numbers])
    if chapter.warnings:
        parts.append(f"{head} Before you use it")
        for group in chapter.warnings:
            parts += [f"**{plain(group.heading)}**", *_list(group.items)]
    for exhibit in chapter.exhibits:
        parts += _exhibit(exhibit, figures, head)
    if chapter.facts:
        parts.append(f"{head} How it was made")
        for fact in chapter.facts:
            lines = [code_span(line) if fact.code else plain(line) for line in fact.lines]
            parts.append(f"**{plain(fact.term)}**  \n" + "  \n".join(lines))
    return parts


def _exhibit(exhibit: Exhibit, figures: Path, head: str) -> list[str]:
    parts = [f"{head} {plain(exhibit.title)}"]
    if exhibit.drawing is not None:
        parts.append(f"![{plain(exhibit.title)}]({quote(str(figures / exhibit.name))}.png)")
    if exhibit.caption:
        parts.append(plain(exhibit.caption))
    for table in exhibit.tables:
        body = f"{plain(table.caption)}\n\n{_table(table)}"
        parts.append(f"<details><summary>The numbers</summary>\n\n{body}\n\n</details>" if exhibit.folded else body)
    return parts


def _list(items: list[str] | tuple[str, ...]) -> list[str]:
    """The items as one list; nothing for none."""
    return ["\n".join(f"- {plain(item)}" for item in items)] if items else []


def _table(table: Table) -> str:
    """A table as GitHub reads it; the run's own line is strong."""
    rows = [[plain(head) for head in table.head], ["---", *["---:"] * (len(table.head) - 1)]]
    for line in table.lines:
        label = f"**{plain(line.label)}**" if line.strong else plain(line.label)
        rows.append([label, *(plain(str(cell)) for cell in line.cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plain(text: str) -> str:
    """`text` of a report, escaped in full: its sentences are our own, with names from files in them."""
    return escaped(text, longest=10_000)
