"""Is anything in the core path slower than it was? The ratios of today against those that are kept in `past.json`.

    python benchmarks/regression.py FILE [--keep] [--json FILE]    # a file that throughput.py --json has written
    python benchmarks/regression.py --quick                          # runs throughput.py --quick and compares nothing

Only ratios are kept (ours against lightly's loop, against stacked Kornia, and the efficiency), as seconds depend on the
machine; and only those of the same works on the same kind of device. Ends with 1 where one is lower than the past by
more than its tolerance. `--keep` adds today's ratios to the past, unless one is lower.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import figures
from rich.console import Console
from rich.table import Table

from ssl_pretrain.errors import DataError, SslPretrainError

PAST = Path(__file__).with_name("past.json")
TOLERANCE = {"efficiency": 0.03, "vs_lightly": 0.08, "vs_stacked": 0.08}
"""Share of the past ratio that today's may be lower by. Against peers it depends on how many cores their workers have,
and moves by some per cent between runs on a busy machine; the efficiency is one process against itself."""
RUNS = 9
"""That are kept of each ratio. Their median is the past: the best of many noisy runs would only be the luckiest."""
Ratios = dict[str, dict[str, float]]
Past = dict[str, dict[str, list[float]]]


def ratios(found: Mapping[str, Any]) -> Ratios:
    """Of this package, by work and device, from what `throughput.py` wrote; `DataError` where it did not."""
    try:
        gpus = found["machine"]["gpus"]
        kind = gpus[0] if gpus else "CPU"
        made = {f"{name} ({kind})": told(work["contenders"]["this package"]) for name, work in found["works"].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError("the figures are not what benchmarks/throughput.py --json writes: measure again") from error
    broken = [name for name, row in made.items() if not all(math.isfinite(v) and v > 0 for v in row.values())]
    if broken:
        raise DataError(f"a ratio of {broken[0]} is not a number above 0: measure again")
    return made


def told(row: Mapping[str, Any]) -> dict[str, float]:
    """The efficiency, and what `throughput.py --alone` leaves out where it is there.

    >>> told({"efficiency": 0.97, "mfu": None})
    {'efficiency': 0.97}
    """
    return {key: float(row[key]) for key in TOLERANCE if key == "efficiency" or key in row}


def slower(past: Past, now: Ratios) -> list[str]:
    """A line for each ratio that is lower than the median of the past by more than its tolerance.

    >>> slower({"a": {"efficiency": [0.9, 0.97, 0.98]}}, {"a": {"efficiency": 0.95}})
    []
    >>> slower({"a": {"efficiency": [0.9, 0.97, 0.98]}}, {"a": {"efficiency": 0.94}})
    ['a: efficiency is 0.940, and was 0.970: 3.1 % lower, and 3 % are tolerated']
    """
    found = []
    for name, row in now.items():
        for key, value in row.items():
            if not (runs := past.get(name, {}).get(key)):
                continue
            was = statistics.median(runs)
            if value < was * (1 - TOLERANCE[key]):
                lower, allowed = f"{100 * (1 - value / was):.1f} % lower", f"{100 * TOLERANCE[key]:.0f} % are tolerated"
                found.append(f"{name}: {key} is {value:.3f}, and was {was:.3f}: {lower}, and {allowed}")
    return found


def kept(past: Past, now: Ratios) -> Past:
    """The past with today's ratios behind it, the last `RUNS` of each.

    >>> kept({"a": {"efficiency": [0.97]}}, {"a": {"efficiency": 0.96}, "b": {"efficiency": 0.5}})
    {'a': {'efficiency': [0.97, 0.96]}, 'b': {'efficiency': [0.5]}}
    """
    made = {name: dict(row) for name, row in past.items()}
    for name, row in now.items():
        there = made.setdefault(name, {})
        for key, value in row.items():
            there[key] = [*there.get(key, []), round(value, 4)][-RUNS:]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("found", nargs="?", type=Path, metavar="FILE", help="what throughput.py --json wrote")
    parser.add_argument("--past", type=Path, default=PAST)
    parser.add_argument("--keep", action="store_true", help="add today's ratios to the past, unless one is lower")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick == (given.found is not None):
        raise SystemExit("give the file that benchmarks/throughput.py --json wrote, or --quick")
    past: Past = read(given.past).get("ratios", {}) if given.past.is_file() else {}
    found = quick() if given.quick else read(given.found)
    now, console = ratios(found), Console(width=150)
    worse = slower(past, now)
    console.print(table(past, now))
    console.print(figures.in_words(found["machine"]), highlight=False)
    figures.write(given.json, {"machine": found["machine"], "ratios": now, "past": past, "slower": worse})
    if found.get("settings", {}).get("quick"):
        console.print("measured with --quick: nothing is compared or kept")
        return
    if worse:
        raise SystemExit("\n".join(worse))
    if given.keep:
        figures.write(given.past, {"machine": found["machine"], "ratios": kept(past, now)})


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not what benchmarks/throughput.py --json writes")
    return found


def quick() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        script = Path(__file__).with_name("throughput.py")
        words = ["--quick", "--workers", "0", "--work", "SimCLR", "--json", str(out)]
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SslPretrainError(f"throughput.py --quick failed: {done.stderr.strip()[-300:]}")
        return read(out)


def table(past: Past, now: Ratios) -> Table:
    shown = Table("work", "ratio", "past", "now", "lowest tolerated", title="this package, ratios within rounds")
    for name, row in now.items():
        for key, value in row.items():
            runs = past.get(name, {}).get(key)
            was = statistics.median(runs) if runs else None
            least = None if was is None else was * (1 - TOLERANCE[key])
            shown.add_row(name, key, figures.cell(was, ".3f"), f"{value:.3f}", figures.cell(least, ".3f"))
    return shown


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
