"""COCO's mean average precision, with intervals over test images and over seeds.

pycocotools matches detections to objects once a run. What a resample of the images would score then follows from how
often each image is drawn, without matching again.

Shapes: R resamples, U units, I images, D detections of a class, T IoU thresholds, C classes, S seeds.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.compare.data import Picture
from ssl_pretrain.compare.detector import Detections
from ssl_pretrain.errors import UsageError
from ssl_pretrain.probe import statistics
from ssl_pretrain.probe.statistics import Interval

F64 = NDArray[np.float64]
IOUS = tuple(0.5 + 0.05 * i for i in range(10))
RECALLS = np.linspace(0, 1, 101)
"""COCO reads precision at these recalls."""
MOST = 100
"""Detections of one class in one image that count, the best first."""
BLOCK = 8_000_000
"""Numbers in one array, however many detections there are: 64 MB."""
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Figures:
    """COCO's figures of one run, by pycocotools; None where no test image has the class, or none at all."""

    map: float
    """Mean over classes and IoU thresholds 0.5, 0.55... 0.95."""
    ap50: float
    ap75: float
    per_class: dict[str, float | None]
    """`map` of each class."""


@dataclass(frozen=True, eq=False)
class Matched:
    """One class: its detections on all test images, best first."""

    image_D: NDArray[np.int64]
    hit_TD: NDArray[np.bool_]
    """Whether it is matched to an object at each IoU threshold."""
    objects_I: NDArray[np.int64]
    """How many objects of the class each image has."""


def installed() -> None:
    """Raises `UsageError` where pycocotools is not there."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise UsageError('compare needs pycocotools: pip install "ssl-pretrain[compare]"') from error


def judge(test: Sequence[Picture], found: Sequence[Detections], classes: Sequence[str]) -> Figures:
    """COCO's figures for boxes of any size, as pycocotools gives them."""
    evaluated = _evaluated(test, found, len(classes))
    precision_TRC = _accumulated(evaluated)
    iou_50, iou_75 = (int(np.argmin(np.abs(np.array(IOUS) - iou))) for iou in (0.5, 0.75))
    per_class = {name: _mean(precision_TRC[:, :, c]) for c, name in enumerate(classes)}
    over_all, at_50, at_75 = (_mean(part) or 0.0 for part in (precision_TRC, *precision_TRC[[iou_50, iou_75]]))
    return Figures(over_all, at_50, at_75, per_class)


def matched(test: Sequence[Picture], found: Sequence[Detections], classes: int) -> list[Matched]:
    """What pycocotools matched, class by class, to be counted again and again."""
    evaluated = _evaluated(test, found, classes)
    images = len(test)
    result = []
    for c in range(classes):
        of_image = evaluated.evalImgs[c * images : (c + 1) * images]  # one area range
        rows = [(i, row) for i, row in enumerate(of_image) if row is not None]  # None: neither object nor detection
        image_D = np.array([i for i, row in rows for _ in row["dtScores"]], np.int64)
        score_D = np.array([score for _, row in rows for score in row["dtScores"]], np.float64)
        hit_TD = np.concatenate([np.zeros((len(IOUS), 0)), *(row["dtMatches"] for _, row in rows)], axis=1) > 0
        order_D = np.argsort(-score_D, kind="mergesort")  # as pycocotools has it
        objects_I = np.zeros(images, np.int64)
        for i, row in rows:
            objects_I[i] = len(row["gtIds"])
        result.append(Matched(image_D[order_D], hit_TD[:, order_D], objects_I))
    return result


def average_precision(matched_C: Sequence[Matched], times_RI: F64) -> F64:
    """Mean average precision (R) where image i counts `times_RI[:, i]` times, 1 for COCO's own.

    Precision at a recall is the best at that recall or any higher one, and that best one is always at a hit, so only
    hits are looked at. A class without an object in a resample does not count, nor does it in pycocotools.

    Two images with one object each; the detection of the first is a hit, and a better one of the second a miss:
    precision is 1/2 up to recall 1/2, which are 51 of 101 points. With the first image alone it is 1.

    >>> one = Matched(np.array([1, 0]), np.tile([[False, True]], (10, 1)), np.array([1, 1]))
    >>> average_precision([one], np.array([[1.0, 1.0], [2.0, 0.0]])).round(4)
    array([0.2525, 1.    ])
    """
    rounds, most = len(times_RI), max((len(matched.image_D) for matched in matched_C), default=0)
    if rounds > 1 and rounds * most > BLOCK:
        halves = np.array_split(times_RI, 2)
        return np.concatenate([average_precision(matched_C, half) for half in halves])
    sums_R, count_R = np.zeros(rounds), np.zeros(rounds)
    for matched in matched_C:
        objects_R = times_RI @ matched.objects_I
        there_R = objects_R > 0
        weight_RD = times_RI[:, matched.image_D]
        seen_RD = np.maximum(weight_RD.cumsum(axis=1), 1)
        precisions = [np.zeros(rounds)]
        for hit_D in matched.hit_TD:
            hits_RH = weight_RD[:, hit_D].cumsum(axis=1)
            best_RH = np.maximum.accumulate((hits_RH / seen_RD[:, hit_D])[:, ::-1], axis=1)[:, ::-1]
            recall_RH = hits_RH / np.maximum(objects_R, 1)[:, None]
            precisions.append(_at_recalls(best_RH, recall_RH))
        sums_R += np.where(there_R, np.sum(precisions, axis=0) / len(matched.hit_TD), 0)
        count_R += there_R
    return sums_R / np.maximum(count_R, 1)


def resamples(unit_I: Sequence[int], rounds: int, seed: int) -> F64:
    """How often each round draws each image (R, I): whole units with replacement, as many as there are."""
    units, at_I = np.unique(np.asarray(unit_I), return_inverse=True)
    return np.concatenate([times_RU[:, at_I] for times_RU in statistics.resamples(len(units), rounds, seed)])


def interval(value_S: F64, value_SR: F64) -> Interval:
    """The mean over seeds and its 95 % interval, over test images and over seeds.

    value_S     of each seed on all test images
    value_SR    of each seed on each resample, the same for all seeds

    Both uncertainties are independent, so their half widths add as squares: percentiles of the resampled mean, and
    Student's t of the seeds. One seed says nothing of the second, which is then left out.

    Two seeds, 0.2 and 0.4, that no resample changes: 0.3 +- 12.706 * 0.1414 / 1.414.

    >>> interval(np.array([0.2, 0.4]), np.array([[0.2, 0.2], [0.4, 0.4]])).high.__round__(3)
    1.571
    """
    mean, seeds = float(value_S.mean()), len(value_S)
    low, high = (float(edge) for edge in np.percentile(value_SR.mean(axis=0), [2.5, 97.5]))
    of_seeds = 0.0
    if seeds > 1:
        of_seeds = STUDENT_975[seeds - 2] * float(value_S.std(ddof=1)) / math.sqrt(seeds)
    return Interval(
        mean, mean - math.hypot(max(mean - low, 0), of_seeds), mean + math.hypot(max(high - mean, 0), of_seeds)
    )


def _at_recalls(best_RH: F64, recall_RH: F64) -> F64:
    """Mean over `RECALLS` of the precision at the first hit with that recall, 0 beyond the last (R)."""
    rounds, hits = best_RH.shape
    if hits == 0:
        return np.zeros(rounds)
    padded_RH = np.column_stack([best_RH, np.zeros(rounds)])
    return np.array([
        row[np.searchsorted(recall, RECALLS, side="left")].mean()
        for row, recall in zip(padded_RH, recall_RH, strict=True)
    ])  # fmt: skip


def _mean(precision: F64) -> float | None:
    """Of what is there: pycocotools marks the rest by -1."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def _evaluated(test: Sequence[Picture], found: Sequence[Detections], classes: int) -> Any:
    """A `COCOeval` after matching, with one area range that holds all."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [(i, box, label, 1.0) for i, picture in enumerate(test)
               for box, label in zip(picture.truth_N4, picture.label_N, strict=True)]  # fmt: skip
    guesses = [(i, box, label, score) for i, each in enumerate(found)
               for box, label, score in zip(each.box_D4, each.label_D, each.score_D, strict=True)]  # fmt: skip
    sides = []
    with _silent():
        for rows in (objects, guesses):
            side = COCO()
            side.dataset = {
                "images": [{"id": i} for i in range(len(test))],
                "categories": [{"id": c} for c in range(1, classes + 1)],
                "annotations": [_annotation(i, *row) for i, row in enumerate(rows, 1)],
            }
            side.createIndex()
            sides.append(side)
        evaluated = COCOeval(*sides, "bbox")
        # Microscopy has no reason for COCO's 32 and 96 px, and each range costs as much again.
        evaluated.params.areaRng, evaluated.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluated.params.maxDets = [MOST]
        evaluated.evaluate()
    return evaluated


def _annotation(number: int, image: int, box_4: F64, label: int, score: float) -> dict[str, Any]:
    """Numbered from 1: pycocotools takes a match with object 0 for none."""
    x0, y0, x1, y1 = (float(edge) for edge in box_4)
    width, height = x1 - x0, y1 - y0
    return {
        "id": number, "image_id": image, "category_id": int(label), "bbox": [x0, y0, width, height],
        "area": width * height, "iscrowd": 0, "score": float(score),
    }  # fmt: skip


def _accumulated(evaluated: Any) -> F64:
    """Precision (T, 101, C) of a `COCOeval`; -1 for classes without an object."""
    with _silent():
        evaluated.accumulate()
    precision: F64 = evaluated.eval["precision"][:, :, :, 0, 0]
    return precision


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
