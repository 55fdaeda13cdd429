"""The recipe, with the reason for each value that was chosen by itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ssl_pretrain.report.sections import Section
from ssl_pretrain.train.recipe import written

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 110


def section(run: RunFolder) -> Section:
    """Every value of `recipe.yaml` and where it came from."""
    path = run.folder / "recipe.yaml"
    words = (
        f"Every value of {path} and where it came from; the file can be run again. Where auto chose a value, its "
        "reason stands beside it."
    )
    return Section("Recipe", words, html=rows(path.read_text(encoding="utf-8")))


def rows(text: str) -> str:
    r"""`recipe.yaml` as rows of key, value and origin.

    >>> rows("seed: 0    # default").splitlines()[1]
    '<tr class="default"><td>seed</td><td>0</td><td>default</td></tr>'
    """
    lines = []
    for name, value, origin in written(text):
        key = name.rpartition(".")[2]
        if not value:
            lines.append(f'<tr><th colspan="3">{escape(key)}</th></tr>')
            continue
        kind = origin.partition(":")[0]
        style = f' class="{kind}"' if kind in ("default", "auto") else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (key, value, origin))
        lines.append(f"<tr{style}>{cells}</tr>")
    return "\n".join(['<div class="wide"><table class="recipe">', *lines, "</table></div>"])
