"""The report on disk: `index.html`, which opens anywhere without a network, `report.md`, and the plots as .png."""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from ..files import whole
from ..run_folder import Problem
from ..terminal import printable
from .plots import DARK, LIGHT, PLOTS, draw
from .rows import Row, Section
from .tables import (
    MISTAKE_COLUMNS,
    as_text,
    cells,
    columns,
    difference_lines,
    heading,
    markdown,
    markdown_table,
    mistake_cells,
    notes,
)

__all__ = ["write_report"]

SHIPPED = "Runs that came with the package"
STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f8fa; --card: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --card: #161b22; --ink: #e6edf3; --faint: #9198a1; --line: #30363d; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 64rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
summary { margin-top: 2.5rem; cursor: pointer; color: var(--faint); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
td:first-child { white-space: normal; }
.notes, figcaption { color: var(--faint); } .notes { font-size: .9rem; } .notes p { margin: .3rem 0; }
figure { margin: 1.5rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; } figcaption { margin-top: .6rem; }
""".strip()


def write_report(sections: Iterable[Section], problems: Iterable[Problem], out: Path) -> Path:
    """Write the report of all sections into `out`.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = list(sections)
    problems = [*problems, *(problem for section in sections for problem in section.problems)]
    page, text = ["<h1>Results</h1>"], ["# Results", ""]
    for section in sections:
        if not section.shipped:
            _add(section, page, text, out)
    if problems:
        what = [printable(f"{problem.folder}: {problem.what}") for problem in problems]
        lines = "".join(f"<li>{escape(line)}</li>" for line in what)
        page += ["<h2>Missing, unfinished or damaged</h2>", f"<ul>{lines}</ul>"]
        text += ["## Missing, unfinished or damaged", "", *(f"- {as_text(line)}" for line in what), ""]
    if shipped := [section for section in sections if section.shipped]:
        page.append(f"<details><summary>{SHIPPED}</summary>")
        text += [f"# {SHIPPED}", ""]
        for section in shipped:
            _add(section, page, text, out)
        page.append("</details>")
    title = escape(", ".join(dict.fromkeys(section.data for section in sections)))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Results: {title}</title>'
    html = f'<!doctype html>\n<html lang="en">\n<head>{head}\n<style>{STYLE}</style></head>\n<body>\n'
    _write(out / "index.html", (html + "\n".join(page) + "\n</body>\n</html>\n").encode())
    _write(out / "report.md", ("\n".join(text).rstrip() + "\n").encode())
    return out / "index.html"


def _add(section: Section, page: list[str], text: list[str], out: Path) -> None:
    """Add a section's table and plots to the page and to the text."""
    page += [f"<h2>{escape(heading(section))}</h2>", _table(section)]
    text += [f"## {as_text(heading(section))}", "", markdown(section)]
    name = _slug(section.data) + ("-shipped" if section.shipped else "")
    for plot in PLOTS:
        light = draw(plot, section, LIGHT)
        if light is None:
            continue
        file = f"{name}-{plot.name}.png"
        _write(out / file, light)
        caption = section.worded(plot.caption)
        page.append(_figure(caption, light, draw(plot, section, DARK)))
        text += [f"![{caption}]({file})", ""]
        if plot.name == "mistakes" and (mistakes := mistake_cells(section)):
            page.append(_grid(MISTAKE_COLUMNS, ([f"<td>{escape(cell)}</td>" for cell in row] for row in mistakes)))
            text += [markdown_table(MISTAKE_COLUMNS, (map(as_text, row) for row in mistakes)), ""]


def _table(section: Section) -> str:
    small = [*notes(section.rows), *difference_lines(section.differences)]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in small)
    names = columns(section)
    grid = _grid(map(section.worded, names), (_cells(row, names) for row in section.rows))
    return f'{grid}\n<div class="notes">{paragraphs}</div>'


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cells(row: Row, names: Iterable[str]) -> Iterator[str]:
    found, tags = cells(row), {"network": "code", "accuracy, %": "b"}
    for name in names:
        cell, tag = escape(found[name]), tags.get(name)
        yield f"<td><{tag}>{cell}</{tag}></td>" if tag else f"<td>{cell}</td>"


def _figure(caption: str, light: bytes, dark: bytes) -> str:
    caption, (bright, night) = escape(caption), map(_inline, (light, dark))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{night}">'
    image = f'<picture>{source}<img alt="{caption}" src="{bright}"></picture>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _slug(name: str) -> str:
    """The name as part of a file's name; where it cannot be that as it is, with a hash that tells it from others."""
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60]
    return slug if slug == name else f"{slug}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _write(file: Path, content: bytes) -> None:
    with whole(file) as partial:
        partial.write_bytes(content)
