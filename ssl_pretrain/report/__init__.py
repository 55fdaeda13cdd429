"""What a run looks like: its pictures, and one page that holds them all. Reads a run folder, changes nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

from ssl_pretrain.errors import UsageError
from ssl_pretrain.train.recipe import Recipe, load


def recipe(run: Path) -> Recipe:
    """The resolved recipe of a run; `UsageError` in one line where the folder is none."""
    if (run / "recipe.yaml").is_file():
        return load(run / "recipe.yaml")
    if not run.is_dir():
        raise UsageError(f"there is no run folder {run}")
    inside = sorted(path.parent.name for path in run.glob("*/recipe.yaml"))
    near = f"; runs in it: {', '.join(inside[:8])}" if inside else ""
    raise UsageError(f"{run} is not the folder of a run: it has no recipe.yaml{near}")


def records(run: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in the order they were written; one that a crash cut off is left out."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def series(lines: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key.

    >>> series([{"step": 1, "train/loss": 2.0}, {"step": 1, "knn/accuracy": 0.5}], "train/loss")
    ([1], [2.0])
    """
    having = [line for line in lines if key in line]
    return [line["step"] for line in having], [line[key] for line in having]
