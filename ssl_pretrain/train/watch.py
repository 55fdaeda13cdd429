"""What rank 0 looks at between steps: the probe, figures without labels, drift, and pictures. Nothing here trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import ssl_pretrain
from ssl_pretrain import artefact
from ssl_pretrain.errors import WriteError
from ssl_pretrain.named import named
from ssl_pretrain.train.journal import Journal
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.pace import Pace

if TYPE_CHECKING:
    from ssl_pretrain.train.run import Run

FIELDS = 4
"""Whose maps TensorBoard shows."""


def look(run: Run, journal: Journal, pace: Pace) -> None:
    """Probes and measures where it is due."""
    if not run.fabric.is_global_zero or not pace.due(run.step):
        return
    with journal.aside(), pace.spending():
        journal.record(run.step, run.checkup.seldom(), "health")
        if run.drift is not None:
            journal.record(run.step, run.drift(run.method.backbone), "drift")
        _judge(run, journal)
    journal.record(run.step, pace.figures(), "probe")


def _judge(run: Run, journal: Journal) -> None:
    """Probes the backbone, and keeps the artefact of the best score."""
    if run.probe is None:
        return
    run.scores = run.probe(run.method.backbone)
    journal.probe(run.step, run.scores)
    found = run.scores[run.recipe.probe.score]
    run.stale += 1
    if found > run.best:
        run.stale = 0
        try:
            artefact.write(run.folder / "best", run.method.backbone, origin(run))
            run.best = found
        except WriteError as error:  # the next probe that is better than the best that was kept tries again
            journal.say(f"{error}; training goes on")
    _method_pictures(run, journal)
    _feature_pictures(run, journal, run.probe)


def _feature_pictures(run: Run, journal: Journal, probe: OnlineProbe) -> None:
    """Maps of four fields and the confusion matrix for TensorBoard, as the report draws them."""
    sheet, network = named("report", "sheet"), named("report", "network")
    maps, confusion = named("report.sections", "maps"), named("report.sections", "confusion")
    title, classes = f"step {run.step}", [row.name for row in probe.last.classes]
    drawn = maps.figure(title, run.method.backbone, network.fields(run.pack, FIELDS))
    journal.figure(run.step, "maps", sheet.pixels(drawn))
    journal.figure(run.step, "confusion", sheet.pixels(confusion.figure(title, probe.last.confusion_CC, classes)))


def enough(run: Run) -> bool:
    """Whether the run should end early: `probe.patience` probes in a row were no better; the same on every rank."""
    patience = run.recipe.probe.patience
    if patience is None or run.step % run.feed.steps_per_epoch:  # asking at each step would cost a message
        return False
    stale: int = run.fabric.broadcast(run.stale)
    return stale >= patience


def first_views(run: Run, journal: Journal) -> None:
    """The views of the first step, as the network is given them."""
    views = next(run.feed.views(0))
    for name, crops_VBCSS in views.crops.items():
        pictured = crops_VBCSS[:, :8].transpose(0, 1).flatten(0, 1)
        journal.pictures(0, f"views/{name}", pictured, run.feed.fed, columns=max(2, crops_VBCSS.shape[0]))


def _method_pictures(run: Run, journal: Journal) -> None:
    run.method.eval()
    with torch.no_grad():
        for name, images in run.method.pictures(run.feed.draw(run.feed.ids(0)[:8], epoch=0)).items():
            journal.pictures(run.step, name, images, run.feed.fed, columns=3)
    run.method.train()


def origin(run: Run) -> Mapping[str, Any]:
    """What an artefact's card says of where it comes from."""
    return {
        "method": run.recipe.method_name,
        "step": run.step,
        "images": len(run.pack),
        "pack": run.pack.fingerprint,
        "seed": run.recipe.top.seed,
        "recipe": run.recipe.flat(),
        "scores": dict(run.scores),
        "version": ssl_pretrain.__version__,
        **({"changes": run.changes} if run.changes else {}),
    }
