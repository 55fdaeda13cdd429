"""Draws the pictures of a run and its page.

ssl-pretrain report RUN
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    from ssl_pretrain.report.pictures import draw

    parser = new_parser("report", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    given = parsed(parser, words)
    for path in draw(given.run, console):
        console.print(str(path), highlight=False)
