"""Which checkpoint, without labels? How well RankMe, alpha-ReQ and LiDAR rank the checkpoints that k-NN has judged.

    python benchmarks/choosing.py runs/quality/*_paper_* runs/quality/*_auto_* [--json FILE]
    python benchmarks/choosing.py --quick        # trains a little on drawn fields first; its figures say nothing

Reads what `quality.py --probes 6` (or any run with `probe.data`) left in `metrics.jsonl`. Spearman's rank correlation
with balanced accuracy, within each run; and what a choice by that figure would have cost against the best checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from ssl_pretrain import pretrain
from ssl_pretrain.errors import SslPretrainError

SCORE = "knn/balanced_accuracy"
FIGURES = {"rankme": 1, "alpha_req": -1, "lidar": 1}
"""By name; -1 where the literature wants it low: alpha-ReQ's decay should come down to 1."""
LEAST = 3
"""Checkpoints that a run must have to say anything."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.runs = [quick(Path("runs/choosing_quick"))]
    curves = {folder.name: curve(folder) for folder in given.runs if (folder / "metrics.jsonl").is_file()}
    found = {name: verdicts(steps) for name, steps in curves.items() if len(steps) >= LEAST}
    if not found:
        raise SystemExit(f"no run with {LEAST} probes among these; give folders of runs, or --quick")
    Console(width=150).print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


def quick(out: Path) -> Path:
    """A run of 6 steps."""
    recipe = {"backbone": "resnet18", "method": {"name": "simclr", "size_px": 32}, "probe": {"data": "synthetic:8:1"}}
    words = ("--train.steps", "6", "--train.batch_size", "8", "--probe.every_epochs", "1", "--probe.size_px", "32")
    return pretrain(recipe, data="synthetic:12", out=out, words=words).folder


def curve(folder: Path) -> list[dict[str, float]]:
    """The steps of a run that have both a score and the label-free figures."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values: dict[str, Any] = json.loads(line)
        by_step.setdefault(values["step"], {}).update(values)
    wanted = {SCORE, *(f"health/{name}" for name in FIGURES)}
    return [values for _, values in sorted(by_step.items()) if wanted <= values.keys()]


def verdicts(steps: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each figure: its rank correlation with the score, and what choosing by it (or the last one) loses."""
    score_T = np.array([values[SCORE] for values in steps])
    last = {"correlation": spearman(np.arange(len(steps)), score_T), "lost": float(score_T.max() - score_T[-1])}
    found = {"the last": {**last, "checkpoints": len(steps)}}
    for name, sign in FIGURES.items():
        figure_T = sign * np.array([values[f"health/{name}"] for values in steps])
        lost = float(score_T.max() - score_T[figure_T.argmax()])
        found[name] = {"correlation": spearman(figure_T, score_T), "lost": lost}
    return found


def spearman(a_T: np.ndarray, b_T: np.ndarray) -> float:
    """Rank correlation; 0 where all are alike."""
    a_T, b_T = rankdata(a_T) - (len(a_T) + 1) / 2, rankdata(b_T) - (len(b_T) + 1) / 2
    length = float(np.sqrt((a_T @ a_T) * (b_T @ b_T)))
    return float(a_T @ b_T) / length if length else 0.0


def table(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    shown = Table("run", "checkpoints", title="Spearman with k-NN balanced accuracy; points lost by that choice")
    names = ("the last", *FIGURES)
    for name in names:
        shown.add_column(name, justify="right")
    for run, figures in found.items():
        shown.add_row(run, str(figures["the last"]["checkpoints"]), *(_cell(figures[name]) for name in names))
    middle = {
        name: {
            key: float(np.mean([figures[name][key] for figures in found.values()])) for key in ("correlation", "lost")
        }
        for name in names
    }
    shown.add_section()
    shown.add_row("mean", "", *(_cell(middle[name]) for name in names))
    return shown


def _cell(figures: dict[str, float]) -> str:
    return f"{figures['correlation']:+.2f} ({100 * figures['lost']:.1f})"


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
