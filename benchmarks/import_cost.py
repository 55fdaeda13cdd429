"""What an import costs: modules and milliseconds of `import ssl_pretrain`, and of a backbone against timm's own way.

    python benchmarks/import_cost.py [--model resnet18] [--json FILE]
    python benchmarks/import_cost.py --quick        # one round with a tiny model; its figures say nothing

Each contender runs in a process of its own, interleaved, after a round that warms the page cache. Both ways to a
backbone read the same safetensors file of an artefact made here; `load_backbone` also checks hashes and that the
backbone gives the maps it was exported with. Milliseconds are medians of the wall time inside of the process, from its
first line on: what Python itself takes to start is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import figures
from rich.console import Console
from rich.table import Table

from ssl_pretrain import artefact, backbones
from ssl_pretrain.errors import SslPretrainError

AROUND = """
import sys, time
before, began = set(sys.modules), time.perf_counter()
{body}
took = time.perf_counter() - began
import json
new = set(sys.modules) - before
print(json.dumps({{"ms": 1000 * took, "modules": len(new), "torch": "torch" in new}}))
"""
NAME = "import ssl_pretrain"
OURS, TIMMS = "load_backbone", "timm.create_model + load_state_dict"
BODIES = {
    NAME: "import ssl_pretrain",
    "import torch": "import torch",
    OURS: "from ssl_pretrain import load_backbone\nload_backbone({folder!r})",
    TIMMS: """import timm
from safetensors.torch import load_file
network = timm.create_model({model!r}, num_classes=0)
network.load_state_dict(load_file({folder!r} + "/model.safetensors"))
network.eval()""",
}
"""What each process does between two looks at the clock."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="of timm; it is drawn, nothing is downloaded")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.model, given.rounds = "test_resnet", 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = artefact.write(Path(scratch) / "artefact", backbones.create(given.model), {})
        seen = measured(folder, given.model, given.rounds, given.quick)
    rows = {name: row(name, seen) for name in seen}
    shown = Table("", "modules", "ms", "loads torch", f"times {TIMMS}", title=f"in fresh processes, {given.model}")
    for name, one in rows.items():
        ratio = figures.cell(one["vs_timm"])
        shown.add_row(name, str(one["modules"]), f"{one['ms']:,.1f}", "yes" if one["torch"] else "no", ratio)
    where, console = figures.machine(), Console(width=150)
    console.print(shown)
    console.print(figures.in_words(where), highlight=False)
    figures.write(given.json, {"machine": where, "model": given.model, "rounds": given.rounds, "found": rows})


def measured(folder: Path, model: str, count: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """What each process said of itself, by contender and round."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in BODIES}

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            one = fresh(BODIES[name].format(folder=str(folder), model=model))
            seen[name].append(one)
            return float(one["ms"])

        return run

    turns = {name: turn(name) for name in BODIES}
    if quick:  # no round to warm up: four processes are enough to see that it runs
        for run in turns.values():
            run()
        return seen
    figures.rounds(turns, count)
    return {name: each[1:] for name, each in seen.items()}


def fresh(body: str) -> dict[str, Any]:
    """What a new process finds of itself that does nothing but this."""
    done = subprocess.run([sys.executable, "-c", AROUND.format(body=body)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SslPretrainError(f"{body.splitlines()[0]}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(name: str, seen: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; the ratio within them."""
    ms_R = [one["ms"] for one in seen[name]]
    against = [one["ms"] for one in seen[TIMMS]]
    first = seen[name][0]
    return {
        "ms": statistics.median(ms_R),
        "modules": first["modules"],
        "torch": first["torch"],
        "vs_timm": figures.median_ratio(ms_R, against),
        "ms_of_rounds": ms_R,
    }


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
