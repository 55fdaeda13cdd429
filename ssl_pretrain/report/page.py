"""One self-contained page of a run: no network, no scripts, nothing beside it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_pretrain.errors import WriteError
from ssl_pretrain.files import write_durably
from ssl_pretrain.report import recipe, records
from ssl_pretrain.train.recipe import Recipe

CAPTIONS = {
    "views": (
        "What the method sees",
        "Source images with the crops of their views (numbers), and the views as the network is given them. Views of "
        "one image should still show the same objects; if they do not, set views.window_px or a larger scale. Where "
        "nothing is left of a view, the colour jitter is too strong for these images.",
    ),
    "curves": (
        "How training went",
        "A loss that stays at the dashed line says that nothing is learned. The k-NN is the figure to trust: it asks "
        "the features themselves, on labelled objects; its band is the 95 % interval.",
    ),
    "neighbours": (
        "What the features hold to be alike",
        "Labelled objects (left), each with the objects of other images that the backbone holds to be most like it.",
    ),
    "reconstructions": (
        "What the decoder draws",
        "From the patches that the encoder saw, at the newest checkpoint. Under norm_pix_loss it draws texture only: "
        "each patch is given the brightness and contrast of the image.",
    ),
}
"""Heading and a few words on how to read it, by the name of the picture."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2126; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 .8rem; max-width: 46rem; color: #4a545e }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0 }
dt { color: #4a545e } dd { margin: 0; font-weight: 600 }
.picture { overflow-x: auto; border: 1px solid #dde2e6; border-radius: 6px }
.picture img { display: block; max-width: 100%; min-width: 40rem }
.missing { background: #fff4d6; color: #4d3a00; padding: .6rem .9rem; border-radius: 6px; max-width: none }
pre { background: #f3f5f7; padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .88rem; width: 100% }
th { text-align: left; padding: .9rem .5rem .2rem 0 } td { padding: .1rem .5rem .1rem 0; vertical-align: top;
  border-top: 1px solid #eceff1 } td:nth-child(2) { font-family: ui-monospace, monospace }
.default td { color: #7b858e } summary { cursor: pointer }
"""


def write(run: Path, pictures: Sequence[Path], missing: Sequence[str] = ()) -> Path:
    """Writes RUN/report.html with these pictures inside it; `missing` says in lines what could not be drawn."""
    resolved = recipe(run)
    title = escape(f"{resolved.method_name} on {resolved.backbone.name}")
    notes = "".join(f'<p class="missing">{escape(line)}</p>\n' for line in missing)
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_headline(run, resolved)}
{notes}{"".join(_section(path) for path in pictures)}<h2>Recipe</h2>
<p>Every value of {escape(str(run / "recipe.yaml"))} and where it came from; the file can be run again.</p>
{_table((run / "recipe.yaml").read_text(encoding="utf-8"))}
</body>
</html>
"""
    path = run / "report.html"
    try:
        write_durably(path, html.encode())
    except OSError as error:
        raise WriteError(f"cannot write the page {path}: {error.strerror or error}") from error
    return path


def _headline(run: Path, resolved: Recipe) -> str:
    """What came of the run, and how to load it."""
    card, train, data = _card(run / "artefact"), resolved.train, resolved.top.data
    facts = {"Method": resolved.method_name, "Backbone": resolved.backbone.name, "Data": data or "none"}
    if not card:
        return _facts(facts | _scores(run) | {"Weights": "none yet: they come with the first checkpoint"})
    images, folder = int(card["images"]), str((run / "artefact").resolve())
    planned = train.steps or train.epochs * (images // train.batch_size)
    facts |= {"Images": f"{images:,}", "Steps": f"{card['step']:,} of {planned:,}", **_scores(run), "Weights": folder}
    code = f"from ssl_pretrain import load_backbone\nbackbone = load_backbone({folder!r})"
    return f"{_facts(facts)}\n<pre>{escape(code)}</pre>"


def _card(folder: Path) -> dict[str, Any]:
    """What the artefact says of itself; nothing where there is none."""
    try:
        card: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["ssl_pretrain"]
    except (OSError, ValueError, KeyError):
        return {}
    return card


def _scores(run: Path) -> dict[str, str]:
    key = "knn/balanced_accuracy"
    probed = [line for line in records(run) if key in line]
    if not probed:
        return {"k-NN": "not probed"}
    last, best = probed[-1], max(probed, key=lambda line: line[key])
    low, high = last[f"{key}_low"], last[f"{key}_high"]
    words = f"balanced accuracy {last[key]:.3f} (95 % interval {low:.3f} to {high:.3f}) at step {last['step']:,}"
    better = {} if best is last else {"Best k-NN": f"{best[key]:.3f} at step {best['step']:,}, kept in best/"}
    return {"Final k-NN": words, **better}


def _facts(facts: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in facts.items())}</dl>"


def _section(path: Path) -> str:
    heading, words = CAPTIONS.get(path.stem, (path.stem, ""))
    content = base64.b64encode(path.read_bytes()).decode()
    return f"""<h2>{escape(heading)}</h2>
<p>{escape(words)}</p>
<div class="picture"><img alt="{escape(heading)}" src="data:image/png;base64,{content}"></div>
"""


def _table(text: str) -> str:
    r"""`recipe.yaml` as rows of key, value and origin; a line of another form stands as it is.

    >>> _table("seed: 0    # default")
    '<table>\n<tr class="default"><td>seed</td><td>0</td><td>default</td></tr>\n</table>'
    """
    rows = []
    for line in filter(str.strip, text.splitlines()):
        found = re.fullmatch(r" *([^\s:]+):\s*(.*?)(?:\s+# (recipe|command line|default))?", line)
        key, value, origin = found.groups() if found else ("", line, None)
        if not value:
            rows.append(f'<tr><th colspan="3">{escape(key)}</th></tr>')
            continue
        kind = ' class="default"' if origin == "default" else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (key, value, origin or ""))
        rows.append(f"<tr{kind}>{cells}</tr>")
    return "\n".join(["<table>", *rows, "</table>"])
