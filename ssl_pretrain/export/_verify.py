"""`export --verify`: the consumer, built in a process of its own, must give the maps that the artefact promises.

Equal counts of tensors prove nothing: in a YOLO that loaded nothing, half of the tensors equal the pretrained ones, as
normalisation layers are born alike. So maps are compared, and a consumer that loaded nothing must fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssl_pretrain import __version__
from ssl_pretrain.artefact import MapBackbone, apart, load_backbone
from ssl_pretrain.errors import NotProven, SslPretrainError, UsageError
from ssl_pretrain.export import Arrived, probe
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import named

REPORT = "export_report.json"
CONTROL = 1e-2
"""Least difference that a consumer must show which loaded nothing; else the comparison says nothing."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
"""A consumer must not fetch anything: it would no longer be this artefact that is judged."""


def verify(target: str, folder: Path, console: Console, python: str = sys.executable) -> dict[str, Any]:
    """Lets a new process build the consumer of an exported folder, and prints what it found.

    python   the interpreter of an environment that has the consumer and this package

    Writes `export_report.json` into the folder and returns its content. Raises `NotProven` where the maps differ,
    `UsageError` where the consumer is not installed or cannot take the backbone.
    """
    (folder / REPORT).unlink(missing_ok=True)
    command = [python, "-m", "ssl_pretrain.export._verify", target, str(folder)]
    with tempfile.TemporaryDirectory() as settings:  # Ultralytics would write its own into the user's configuration
        env = {**os.environ, **OFFLINE, "YOLO_CONFIG_DIR": settings}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise UsageError(f"--python {python}: {error.strerror or error}; give the interpreter of an environment "
                             "that has the consumer and ssl_pretrain") from error  # fmt: skip
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    if done.returncode == UsageError.exit_code:
        raise UsageError(f"not verified: {said}")
    if done.returncode or not (folder / REPORT).is_file():
        raise NotProven(f"{target}: the consumer could not be built: {said}")
    report: dict[str, Any] = json.loads((folder / REPORT).read_text())
    console.print(table(report))
    if not report["equal"]:
        raise NotProven(f"{target}: {report['verdict']}; see {folder / REPORT}")
    return report


def examine(target: str, folder: Path) -> dict[str, Any]:
    """Builds the consumer in this process and compares it; the content of the report."""
    promised = load_backbone(folder)  # which refuses files that are not what was exported
    arrived = named("export", target).arrive(folder)
    return {
        "target": target, "consumer": arrived.consumer, "route": arrived.route, **judged(promised, folder, arrived),
        "initialised": arrived.initialised, "parameters": arrived.parameters, "random": list(arrived.random),
        "trained": arrived.trained, "notes": list(arrived.notes),
        "weights_sha256": promised.card["weights_sha256"], "version": __version__,
    }  # fmt: skip


def judged(promised: MapBackbone, folder: Path, arrived: Arrived) -> dict[str, Any]:
    """Whether all maps of the consumer are the artefact's, and those of one that loaded nothing are not."""
    expected = probe(folder, promised.input).maps
    if not arrived.maps or arrived.maps.keys() != arrived.fresh.keys() or not arrived.maps.keys() <= expected.keys():
        raise NotProven(
            f"the consumer shows {', '.join(arrived.maps) or 'no maps'}: the artefact has {', '.join(expected)}"
        )
    maps = {
        name: {"difference": apart(found, expected[name]), "control": apart(arrived.fresh[name], expected[name])}
        for name, found in arrived.maps.items()
    }
    worst = max(maps, key=lambda name: maps[name]["difference"])
    lost = maps[worst]["difference"] > arrived.tolerance
    blind = min(figures["control"] for figures in maps.values()) < CONTROL
    verdict = (
        f"the weights did not arrive: {worst} is {maps[worst]['difference']:.1e} apart" if lost
        else "not proven: a consumer that loaded nothing gives the same maps" if blind
        else "the weights arrived"
    )  # fmt: skip
    return {"equal": not (lost or blind), "verdict": verdict, "tolerance": arrived.tolerance, "maps": maps}


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    title = f"{report['consumer']}: {report['verdict']}"
    shown = Table("", "", show_header=False, title=title, title_justify="left", title_style="bold")
    shown.add_row("loaded by", escape(report["route"]))
    for name, figures in report["maps"].items():
        shown.add_row(name, f"{figures['difference']:.1e} apart (at most {report['tolerance']:.0e}); "
                            f"a consumer that loaded nothing: {figures['control']:.1e}")  # fmt: skip
    share = report["initialised"] / max(report["parameters"], 1)
    shown.add_row("initialised", f"{share:.1%} of {report['parameters']:,} parameters")
    if report["random"]:
        shown.add_row("random", escape(", ".join(report["random"])))
    if report["trained"]:
        shown.add_row("trained", escape(report["trained"]))
    for note in report["notes"]:
        shown.add_row("note", escape(note))
    return shown


def _main(target: str, folder: Path) -> int:
    """Writes the report; what goes wrong is the last line of stderr."""
    try:
        report = examine(target, folder)
    except SslPretrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_durably(folder / REPORT, json.dumps(report, indent=2).encode())
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2])))
