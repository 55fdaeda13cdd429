"""Draws a run folder: every section of its page, by the code and the networks that trained it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
from rich.console import Console

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.named import named, names
from ssl_pretrain.report import page
from ssl_pretrain.report.folder import opened
from ssl_pretrain.report.sheet import STYLE, write

KIND = "report.sections"


def draw(run: Path, console: Console) -> list[Path]:
    """Draws what the run folder has into RUN/pictures and writes RUN/report.html; returns the files written.

    What cannot be drawn (yet) is said on the console and on the page. Raises `UsageError` where there is no run and
    `WriteError` where the folder cannot be written.
    """
    folder = opened(run, console)
    made: list[page.Part] = []
    missing: dict[str, list[str]] = {}
    sections = {name: named(KIND, name) for name in names(KIND)}
    with matplotlib.style.context(["default", STYLE]):  # a user's own matplotlibrc could break the layout
        for name in sorted(sections, key=lambda name: (sections[name].PLACE, name)):
            try:
                found = sections[name].section(folder)
            except SslPretrainError as error:
                missing.setdefault(str(error), []).append(name)
                continue
            if found is not None:
                path = run / "pictures" / f"{name}.png"
                made.append(page.Part(name, found, None if found.figure is None else write(path, found.figure)))
    lines = [f"no {_listed(sections)}: {reason}" for reason, sections in missing.items()]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return [*(part.picture for part in made if part.picture is not None), page.write(folder, made, lines)]


def _listed(words: list[str]) -> str:
    """As in a sentence.

    >>> _listed(["views", "maps", "images"])
    'views, maps or images'
    """
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
