"""Step 2: diameters of the primary and secondary granules of each image.

The average diameter that parts empty vesicles from vacuoles (`average_diameter_SG_PG`) is computed by none of the
data set's scripts. It can be read as the mean over both kinds pooled, or as the mean of the two kinds' means; both are
given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.neutrostruct.coco import Coco
from ssl_pretrain.data.neutrostruct.naming import link

Reading = Literal["pooled_mean", "class_means"]
READINGS: tuple[Reading, ...] = ("pooled_mean", "class_means")
AVERAGE = "average_diameter_SG_PG"
"""The published column of averages, in micrometres."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per image, in pixels; NaN where there is nothing to take the statistic of."""

    images: tuple[str, ...]
    count_I2: NDArray[np.int64]
    """Primary and secondary granules."""
    median_px_I: NDArray[np.float64]
    """Of both kinds, pooled."""
    average_px_I: Mapping[Reading, NDArray[np.float64]]
    """By both readings. `class_means` needs granules of both kinds."""
    pixels_per_um_I: NDArray[np.float64]


def exact_mean(values: Sequence[float]) -> float:
    """The mean, with one rounding of the sum: the same whatever the order. NaN of nothing.

    >>> exact_mean([0.1] * 10) == 0.1, exact_mean([1e16, 1.0, -1e16, 2.0])
    (True, 0.75)
    """
    return math.fsum(values) / len(values) if values else math.nan


def statistics(
    coco: Coco, parent_of: Mapping[str, str | None], diameter_N: NDArray[np.float64], scales: Mapping[str, float]
) -> Statistics:
    """The statistics of every image of `coco`, in its order: `diameter_N` in pixels, `scales` in pixels per um."""
    kind_N = np.array([parent_of[name] or "" for name in coco.classes] or [""])[coco.class_N]
    count_I2 = np.zeros((len(coco.images), 2), np.int64)
    median_I, pooled_I, means_I = (np.full(len(coco.images), math.nan) for _ in range(3))
    by_kind = [_by_image(coco.image_N[kind_N == kind], diameter_N[kind_N == kind]) for kind in ("primary", "secondary")]
    for i in range(len(coco.images)):
        primary, secondary = (found.get(i, []) for found in by_kind)
        count_I2[i] = len(primary), len(secondary)
        pooled_I[i] = exact_mean(primary + secondary)
        means_I[i] = exact_mean([exact_mean(primary), exact_mean(secondary)])
        if primary or secondary:
            median_I[i] = np.median(primary + secondary)
    linked = link(coco.images, scales)
    scale_I = np.array([scales[linked[name]] if name in linked else math.nan for name in coco.images])
    return Statistics(coco.images, count_I2, median_I, {"pooled_mean": pooled_I, "class_means": means_I}, scale_I)


def table(found: Statistics, average: Reading | None = None) -> tuple[list[str], list[list[str | float]]]:
    """Header and rows for `tables.write`: micrometres under the published names, pixels under names that end in `_px`.

    With `average`, that reading also stands under the published name, so that `convert` can take it from the file.
    """
    pooled, means = found.average_px_I["pooled_mean"], found.average_px_I["class_means"]
    px = {
        "mean_diameter": pooled,
        "median_diameter": found.median_px_I,
        "average_diameter_pooled_mean": pooled,
        "average_diameter_class_means": means,
    }
    columns = {name: values / found.pixels_per_um_I for name, values in px.items()}
    if average is not None:
        columns[AVERAGE] = found.average_px_I[average] / found.pixels_per_um_I
    columns |= {f"{name}_px": values for name, values in px.items()}
    header = ["image_name", "pixels_per_um", "primary", "secondary", *columns]
    rows: list[list[str | float]] = []
    for i, name in enumerate(found.images):
        numbers = [float(values[i]) for values in columns.values()]
        rows.append([name, float(found.pixels_per_um_I[i]), *(int(n) for n in found.count_I2[i]), *numbers])
    return header, rows


def _by_image(image_G: NDArray[np.int64], diameter_G: NDArray[np.float64]) -> dict[int, list[float]]:
    """The diameters of each image that has any."""
    order = np.argsort(image_G, kind="stable")
    places, starts = np.unique(image_G[order], return_index=True)
    groups = np.split(diameter_G[order], starts[1:])
    return {int(place): group.tolist() for place, group in zip(places, groups, strict=False)}
