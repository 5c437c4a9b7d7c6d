"""A report as one HTML file without links to others: text, tables and figures, in light and dark, on narrow screens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; --bar: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9aa4af; --page: #0d1117; --line: #30363d; --bar: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 0.3rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.4rem; }
p { margin: 0.4rem 0; } .soft { color: var(--soft); font-size: 0.9rem; }
.headline { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1rem 0; padding: 0; list-style: none; }
.headline li { flex: 1 1 9rem; padding: 0.7rem 0.9rem; background: var(--bar); border-radius: 8px; }
.headline b { display: block; font-size: 1.35rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 0.8rem 0; } figcaption { color: var(--soft); font-size: 0.9rem; }
img { max-width: 100%; height: auto; padding: 6px; background: #ffffff; border-radius: 8px; }
"""


def paragraph(text: str, soft: bool = False) -> str:
    """Returns a paragraph. Args: soft: for a note, in a paler colour."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def headline(numbers: dict[str, str]) -> str:
    """Returns the large numbers at the top: name → value."""
    items = "".join(f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in numbers.items())
    return f'<ul class="headline">{items}</ul>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table that scrolls by itself on a narrow screen."""
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="wide" tabindex="0"><table><thead>{row(columns, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def figure(png: bytes, description: str) -> str:
    """Returns a figure that is part of the page. Args: description: its caption, and its text for a screen reader."""
    data, text = base64.b64encode(png).decode(), escape(description)
    image = f'<img src="data:image/png;base64,{data}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    """Returns a section of the page."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def page(title: str, *parts: str) -> str:
    """Returns the whole file."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'  # else a browser asks the server for one
    style = f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = f"<main><h1>{escape(title)}</h1>{''.join(parts)}</main>"
    return f'<!doctype html><html lang="en"><head>{head}{icon}{style}</head><body>{body}</body></html>\n'
