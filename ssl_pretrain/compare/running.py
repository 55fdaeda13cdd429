"""Runs a comparison: every start, fraction and seed once, then intervals and verdicts.

Shapes: S seeds, R resamples, I test images.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_pretrain.compare import PROTOCOL, Settings, data, judging, starts
from ssl_pretrain.compare.data import Labels, Picture
from ssl_pretrain.compare.detector import Detections, Trained, build, train
from ssl_pretrain.compare.judging import Figures
from ssl_pretrain.compare.starts import Start
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.files import write_durably
from ssl_pretrain.probe import statistics
from ssl_pretrain.probe.statistics import Interval

FAINT = 0.01
"""mAP below which a detector has learned too little for a verdict."""


@dataclass(frozen=True, eq=False)
class Run:
    """One detector, trained and judged."""

    figures: Figures
    curve: tuple[tuple[int, float], ...]
    """Steps done, and mAP."""
    loss: tuple[float, ...]
    order_sha256: str
    """Of the images shown, in order, with their flips and turns."""
    apart: float
    """How far the maps before the first step were from those of the start's artefact."""
    images: int
    objects: int
    seconds: float
    detections: tuple[Detections, ...]


@dataclass(frozen=True)
class Score:
    """One start at one fraction, over all seeds."""

    start: str
    map: Interval
    map_by_seed: tuple[float, ...]
    ap50: float
    ap75: float
    per_class: dict[str, float | None]
    curve: tuple[tuple[int, float], ...]
    """Steps done, and mAP, as means over seeds."""
    difference: Interval | None
    """mAP of the backbone less that of this start, on the same resamples; None for the backbone itself."""
    verdict: str
    """A sentence; empty for the backbone itself."""


@dataclass(frozen=True)
class AtFraction:
    """All starts at one fraction of the labels."""

    fraction: float
    images: int
    objects: int
    """Means over seeds, rounded."""
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Comparison:
    """All of it, the backbone first among its starts."""

    starts: tuple[str, ...]
    fractions: tuple[AtFraction, ...]
    settings: Settings
    data: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def verdicts(self) -> list[str]:
        """One sentence for each fraction and start."""
        return [score.verdict for at in self.fractions for score in at.scores if score.verdict]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values; never a NaN."""
        return {"protocol": PROTOCOL, **asdict(self), "verdicts": self.verdicts}


def compare(
    backbone: Path,
    labelled: LabelledSet,
    out: Path,
    settings: Settings,
    console: Console,
    *,
    against: Sequence[str] = (starts.RANDOM, starts.IMAGENET),
    device: torch.device | None = None,
) -> Comparison:
    """Fine-tunes a detector from this backbone and from others, and says whether the backbone helped.

    backbone   an artefact or run
    out        gets `runs/` (one result a run), `comparison.json` and `comparison.png`; the same call goes on there
    against    `random`, `imagenet`, and folders of artefacts or runs

    Raises `UsageError` for image labels, without pycocotools, and what `starts.resolve` raises; `DataError` when one
    side has no object; `WriteError`.
    """
    judging.installed()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compared, lines = starts.resolve(backbone, against, out / "starts")
    labels = data.load(labelled, settings.short_side_px, settings.point_px, settings.seed)
    for line in (labels.split, *lines, *labels.problems):
        console.print(line, highlight=False, markup=False)
    todo = [
        (start, fraction, settings.seed + i)
        for i in range(settings.seeds)
        for fraction in settings.fractions
        for start in compared
    ]
    runs: dict[tuple[str, float, int], Run] = {}
    with _live(console, settings.steps * len(todo)) as (bar, advance):
        for start, fraction, seed in todo:
            words = f"{start.name}, {100 * fraction:g} % of the labels, seed {seed}"
            bar(words)
            run, is_new = _run(start, fraction, seed, labels, settings, out / "runs", device, advance)
            runs[start.name, fraction, seed] = run
            how = f"{run.seconds:.0f} s" if is_new else "done before"
            console.print(f"{words}: mAP {run.figures.map:.3f} ({how})", highlight=False, markup=False)
    comparison = summarise(runs, compared, labels, labelled, settings, [*lines, *labels.problems])
    write_durably(out / "comparison.json", json.dumps(comparison.to_json(), indent=2).encode())
    return comparison


def summarise(
    runs: dict[tuple[str, float, int], Run],
    compared: Sequence[Start],
    labels: Labels,
    labelled: LabelledSet,
    settings: Settings,
    notes: Sequence[str],
) -> Comparison:
    """Intervals and verdicts of runs that are all there, by start, fraction and seed."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    times_RI = judging.resamples([picture.unit for picture in labels.test], settings.rounds, settings.seed)
    rows = []
    for fraction in settings.fractions:
        of_start = {start.name: [runs[start.name, fraction, seed] for seed in seeds] for start in compared}
        first = of_start[compared[0].name]
        images, objects = (round(float(np.mean(n))) for n in zip(*((r.images, r.objects) for r in first), strict=True))
        resampled = {name: _resampled(each, labels, times_RI) for name, each in of_start.items()}
        at = f"{100 * fraction:g} % of the labels ({images} images, {objects} objects)"
        scores = tuple(_score(name, compared[0].name, of_start, resampled, at, labels) for name in of_start)
        rows.append(AtFraction(fraction, images, objects, scores))
    about = {
        "source": f"{labelled.format}: {labelled.found}",
        "split": labels.split,
        "fingerprint": labels.fingerprint,
        "train_images": len(labels.train),
        "test_images": len(labels.test),
        "test_units": len({picture.unit for picture in labels.test}),
        "test_objects": sum(len(picture.label_N) for picture in labels.test),
    }
    return Comparison(tuple(start.name for start in compared), tuple(rows), settings, about, tuple(notes))


def _score(
    name: str,
    own: str,
    of_start: dict[str, list[Run]],
    resampled: dict[str, judging.F64],
    at: str,
    labels: Labels,
) -> Score:
    value_S = {key: np.array([run.figures.map for run in runs]) for key, runs in of_start.items()}
    runs, difference, words = of_start[name], None, ""
    if name != own:
        difference = judging.interval(value_S[own] - value_S[name], resampled[own] - resampled[name])
        sentence = _sentence(own, name, difference, len(runs), len(labels.test))
        if max(value_S[own].mean(), value_S[name].mean()) < FAINT:
            sentence = f"no verdict, as neither {own} nor {name} has learned to detect yet: give more --steps"
        words = f"{at}: {sentence}"
    whole = judging.interval(value_S[name], resampled[name])
    per_class = {c: [run.figures.per_class[c] for run in runs] for c in labels.classes}
    return Score(
        start=name,
        map=Interval(whole.value, max(whole.low, 0.0), min(whole.high, 1.0)),
        map_by_seed=tuple(float(value) for value in value_S[name]),
        ap50=float(np.mean([run.figures.ap50 for run in runs])),
        ap75=float(np.mean([run.figures.ap75 for run in runs])),
        per_class={c: None if values[0] is None else float(np.mean(np.array(values, float)))
                   for c, values in per_class.items()},
        curve=tuple((points[0][0], float(np.mean([value for _, value in points])))
                    for points in zip(*(run.curve for run in runs), strict=True)),
        difference=difference,
        verdict=words,
    )  # fmt: skip


def _sentence(own: str, other: str, difference: Interval, seeds: int, images: int) -> str:
    found, by = statistics.side(difference), difference.value
    numbers = f"{by:+.3f} mAP [{difference.low:+.3f}, {difference.high:+.3f}]"
    sentence = (
        f"{own} is not distinguishable from {other} with this much data: {numbers}"
        if found == "not distinguishable"
        else f"{own} is {found} than {other}: {numbers}"
    )
    if seeds == 1:
        return f"{sentence}; {images} test images and one seed, whose chance is not in the interval"
    return f"{sentence}; {images} test images, {seeds} seeds"


def _resampled(runs: Sequence[Run], labels: Labels, times_RI: judging.F64) -> judging.F64:
    """MAP of each seed on each resample (S, R)."""
    classes = len(labels.classes)
    return np.stack([
        judging.average_precision(judging.matched(labels.test, run.detections, classes), times_RI) for run in runs
    ])  # fmt: skip


def _run(
    start: Start,
    fraction: float,
    seed: int,
    labels: Labels,
    settings: Settings,
    folder: Path,
    device: torch.device,
    advance: Callable[[int, float], None],
) -> tuple[Run, bool]:
    """The run from its file, or else trained and written; and whether it is new."""
    pictures = data.fraction_of(labels.train, fraction, seed)
    key = _key(start, fraction, seed, labels, settings)
    stem = f"{fraction:g}-{seed}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    before = _read(folder / stem)
    if before is not None:
        advance(settings.steps, before.loss[-1])
        return before, False
    began = time.monotonic()
    classes = len(labels.classes)
    detector, far = build(
        start, settings.detector, classes, labels.median_side_px, settings.short_side_px, settings.channels, seed
    )
    trained = train(
        detector,
        pictures,
        labels.test,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        device=device,
        evaluate_at=[round(settings.steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)],
        judge=partial(_map, labels),
        progress=lambda _, loss: advance(1, loss),
    )
    return _written(folder / stem, key, start, trained, far, pictures, labels, time.monotonic() - began), True


def _map(labels: Labels, found: Sequence[Detections]) -> float:
    return judging.judge(labels.test, found, labels.classes).map


def _key(start: Start, fraction: float, seed: int, labels: Labels, settings: Settings) -> dict[str, Any]:
    """What a result depends on; not how often or where it was asked for."""
    common = ("detector", "steps", "batch_size", "short_side_px", "lr", "channels", "evaluations")
    given = asdict(settings)
    return {
        "protocol": PROTOCOL,
        "start": start.identity,
        "pretrained": start.pretrained,
        "data": labels.fingerprint,
        "fraction": fraction,
        "seed": seed,
        **{name: given[name] for name in common},
    }


def _written(
    stem: Path,
    key: dict[str, Any],
    start: Start,
    trained: Trained,
    far: float,
    pictures: Sequence[Picture],
    labels: Labels,
    seconds: float,
) -> Run:
    """Judges the run and writes it: the detections first, as the JSON says that both are there."""
    run = Run(
        figures=judging.judge(labels.test, trained.detections, labels.classes),
        curve=trained.curve,
        loss=trained.loss,
        order_sha256=trained.order_sha256,
        apart=far,
        images=len(pictures),
        objects=sum(len(picture.label_N) for picture in pictures),
        seconds=seconds,
        detections=trained.detections,
    )
    buffer, found = io.BytesIO(), trained.detections
    np.savez_compressed(
        buffer,
        count_I=np.array([len(each.score_D) for each in found]),
        box_D4=np.concatenate([each.box_D4 for each in found]),
        score_D=np.concatenate([each.score_D for each in found]),
        label_D=np.concatenate([each.label_D for each in found]),
    )
    write_durably(stem.with_name(f"{stem.name}.npz"), buffer.getbuffer())
    plain = {name: value for name, value in vars(run).items() if name not in ("figures", "detections")}
    content = {"start": start.name, **asdict(run.figures), **plain, "key": key}
    write_durably(stem.with_name(f"{stem.name}.json"), json.dumps(content, indent=1).encode())
    return run


def _read(stem: Path) -> Run | None:
    """A finished run; None where there is none, or one that cannot be read, which is then made again."""
    try:
        plain = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
        # In memory: numpy leaves a torn file open.
        with np.load(io.BytesIO(stem.with_name(f"{stem.name}.npz").read_bytes())) as stored:
            ends = np.cumsum(stored["count_I"])[:-1]
            columns = [np.split(stored[name], ends) for name in ("box_D4", "score_D", "label_D")]
        figures = Figures(plain["map"], plain["ap50"], plain["ap75"], plain["per_class"])
        return Run(
            figures=figures,
            curve=tuple((int(step), float(value)) for step, value in plain["curve"]),
            loss=tuple(plain["loss"]),
            order_sha256=plain["order_sha256"],
            apart=plain["apart"],
            images=plain["images"],
            objects=plain["objects"],
            seconds=plain["seconds"],
            detections=tuple(Detections(*each) for each in zip(*columns, strict=True)),
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


@contextmanager
def _live(console: Console, steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[int, float], None]]]:
    """One live line over all runs; yields what names the run, and what counts its steps. Nothing where no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True,
                        disable=not console.is_terminal)  # fmt: skip
    task = progress.add_task("", total=steps, text="")

    def name(words: str) -> None:
        progress.update(task, description=words)

    def advance(done: int, loss: float) -> None:
        progress.update(task, advance=done, text=f"loss {loss:.2f}")

    with progress:
        yield name, advance
