"""Pieces of HTML, escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def facts(named: Mapping[str, str]) -> str:
    """Names and values below each other.

    >>> facts({"a<b": "1"})
    '<dl><dt>a&lt;b</dt><dd>1</dd></dl>'
    """
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in named.items())}</dl>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table whose first column is text, and whose others are numbers, to the right, unless it is all text.

    >>> table(["class"], [["a&b"]]).splitlines()[2:]
    ['<tbody>', '<tr><td>a&amp;b</td></tr>', '</tbody></table></div>']
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def items(lines: Sequence[str]) -> str:
    """A list.

    >>> items(["one"])
    '<ul><li>one</li></ul>'
    """
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
