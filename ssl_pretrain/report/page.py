"""One self-contained page of a run: no network, no scripts, nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ssl_pretrain.errors import WriteError
from ssl_pretrain.files import write_durably
from ssl_pretrain.report import html
from ssl_pretrain.report.folder import RunFolder, series
from ssl_pretrain.report.sections import Section

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #4a545e; --faint: #6b757e; --paper: #fff; --line: #dde2e6;
  --block: #f3f5f7; --note: #fff4d6; --on-note: #4d3a00; --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #aeb8c1; --faint: #8b959e; --paper: #15191d;
  --line: #353d44; --block: #20262c; --note: #4d3a00; --on-note: #ffe9b0; --link: #79b8ff } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 .8rem; max-width: 46rem; color: var(--soft) } ul { margin: .3rem 0 .8rem; padding-left: 1.2rem }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin-top: 1.2rem }
a { color: var(--link) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0 0 .8rem }
dt { color: var(--soft) } dd { margin: 0; font-weight: 600 }
.picture { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: #fff; margin-bottom: .8rem }
.picture img { display: block; max-width: 100%; height: auto; min-width: 34rem; margin: 0 auto }
.missing { background: var(--note); color: var(--on-note); padding: .6rem .9rem; border-radius: 6px; max-width: none }
pre { background: var(--block); padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap; margin: .5rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; width: 100% }
th { text-align: left; padding: .3rem .8rem .2rem 0; vertical-align: bottom }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; border-top: 1px solid var(--line) }
.numbers { width: auto; overflow-wrap: normal; font-variant-numeric: tabular-nums }
.numbers th + th, .numbers td + td { text-align: right }
.recipe th { padding-top: .9rem } .recipe td:nth-child(2) { font-family: ui-monospace, monospace }
.recipe td:nth-child(1) { white-space: nowrap } .default td { color: var(--faint) }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .5rem }
  .recipe td:nth-child(1) { white-space: normal; min-width: 7rem } }
@media print { body { max-width: none; font-size: 11pt } nav { display: none }
  .picture, .wide { overflow: visible } .picture img { min-width: 0 } .picture, tr { break-inside: avoid }
  h2, h2 + p { break-after: avoid } }
"""


class Part(NamedTuple):
    """A section of the page, its name, and its picture on disk where it has one."""

    name: str
    section: Section
    picture: Path | None


def write(run: RunFolder, parts: Sequence[Part], missing: Sequence[str] = ()) -> Path:
    """Writes RUN/report.html with these parts; `missing` says in lines what could not be drawn."""
    title = escape(run.name)
    notes = "".join(f'<p class="missing">{escape(line)}</p>\n' for line in missing)
    entries = [f'<li><a href="#{escape(part.name)}">{escape(part.section.heading)}</a></li>' for part in parts]
    contents = f'<nav aria-label="Contents"><ul>{"".join(entries)}</ul></nav>\n' if entries else ""
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_headline(run)}
{contents}{notes}{"".join(map(_section, parts))}</body>
</html>
"""
    path = run.folder / "report.html"
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise WriteError(f"cannot write the page {path}: {error.strerror or error}") from error
    return path


def _headline(run: RunFolder) -> str:
    """What came of the run, and how to load it."""
    card, train, data = _card(run.folder / "artefact"), run.recipe.train, run.recipe.top.data
    named = {"Method": run.recipe.method_name, "Backbone": run.recipe.backbone.name, "Data": data or "none"}
    if not card:
        return html.facts(named | _scores(run) | {"Weights": "none yet: they come with the first checkpoint"})
    images, folder = int(card["images"]), str((run.folder / "artefact").resolve())
    planned = train.steps or train.epochs * (images // train.batch_size)
    named |= {"Images": f"{images:,}", "Steps": f"{card['step']:,} of {planned:,}", **_scores(run), "Weights": folder}
    code = f"from ssl_pretrain import load_backbone\nbackbone = load_backbone({folder!r})"
    return f"{html.facts(named)}\n<pre>{escape(code)}</pre>"


def _card(folder: Path) -> dict[str, Any]:
    """What the artefact says of itself; nothing where there is none."""
    try:
        card: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["ssl_pretrain"]
    except (OSError, ValueError, KeyError):
        return {}
    return card


def _scores(run: RunFolder) -> dict[str, str]:
    """The last and the best probe, by the score that the recipe chooses `best/` by."""
    score = run.recipe.probe.score
    key = f"knn/{score}"
    probed = [line for line in run.lines if key in line]
    if not probed:
        return {"k-NN": "not probed"}
    last, best = probed[-1], max(probed, key=lambda line: line[key])
    low, high = last[f"{key}_low"], last[f"{key}_high"]
    words = (
        f"{score.replace('_', ' ')} {last[key]:.3f} (95 % interval {low:.3f} to {high:.3f}) at step {last['step']:,}"
    )
    better = {} if best is last else {"Best k-NN": f"{best[key]:.3f} at step {best['step']:,}, kept in best/"}
    shares = series(run.lines, "probe/share")[1]
    cost = {"Probes took": f"{100 * shares[-1]:.1f} % of the time"} if shares else {}
    return {"Final k-NN": words, **better, **cost}


def _section(part: Part) -> str:
    found, picture = part.section, ""
    if part.picture is not None:
        content = base64.b64encode(part.picture.read_bytes()).decode()
        picture = f'<div class="picture"><img alt="{escape(found.alt)}" src="data:image/png;base64,{content}"></div>\n'
    return f"""<h2 id="{escape(part.name)}">{escape(found.heading)}</h2>
<p>{escape(found.words)}</p>
{picture}{found.html}
"""
