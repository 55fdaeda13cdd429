"""Labelled images as a detector is trained and tested on them: two sides, nested fractions, batches.

Shapes: N boxes of an image (x0, y0, x1, y1), U units, C classes, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain import rng
from ssl_pretrain.data import duplicates
from ssl_pretrain.data.decode import decode_bytes
from ssl_pretrain.data.files import Rejected, read_bytes
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, UsageError

TRAIN_FRACTION = 0.65
"""Of the units, where the data set has no split of its own; as the probe has it."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One labelled image in memory."""

    pixels_HWC: NDArray[np.uint8]
    """RGB, at the size that it is trained at; smaller images are as they are."""
    truth_N4: NDArray[np.float64]
    """In pixels of the file, inside the image."""
    label_N: NDArray[np.int64]
    """From 1: 0 is the background."""
    size_px: tuple[int, int]
    """Width and height of the file."""
    digest: str
    """SHA-256 of the file."""
    unit: int
    """Images of one group (patient, slide) or with the same bytes share a unit, and units are never taken apart."""

    @property
    def scale_4(self) -> NDArray[np.float64]:
        """Pixels of `pixels_HWC` by pixels of the file, for x, y, x, y."""
        height, width = self.pixels_HWC.shape[:2]
        return np.array([width / self.size_px[0], height / self.size_px[1]] * 2)

    @property
    def box_N4(self) -> NDArray[np.float64]:
        """In pixels of `pixels_HWC`."""
        return self.truth_N4 * self.scale_4


@dataclass(frozen=True, eq=False)
class Labels:
    """What a detector is trained and tested on. Pictures are in the order of their digests, not of their names."""

    classes: tuple[str, ...]
    train: tuple[Picture, ...]
    test: tuple[Picture, ...]
    split: str
    """How the two were parted, in words."""
    fingerprint: str
    """Of image bytes, boxes, labels and sides; independent of folder and file names."""
    problems: tuple[str, ...]

    @property
    def median_side_px(self) -> float:
        """Median over the training boxes of the square root of their area, at the size they are trained at."""
        extents = [picture.box_N4[:, 2:] - picture.box_N4[:, :2] for picture in self.train]
        return float(np.median(np.sqrt(np.concatenate(extents).prod(axis=1))))


@dataclass(frozen=True)
class Shown:
    """How one image is shown in a step."""

    index: int
    turns: int
    """Quarter turns, counterclockwise."""
    flip: bool
    """Left to right, before it is turned."""


def load(labelled: LabelledSet, short_side_px: int, point_px: int, seed: int) -> Labels:
    """Decodes the labelled images, shorter side at most `short_side_px` (never enlarged), and parts them.

    The split is the data set's own where it has one: test images are tested on (val ones when no test is labelled),
    all others are trained on. Otherwise a permutation of the units, keyed by `seed` and by the images' bytes, trains
    on 65 % of them; of up to 100 permutations the first that has every class on both sides. Images without an object
    take part, as they do in a detector's training. A point becomes a square of `point_px` pixels of the file.
    Raises `UsageError` for image labels and `DataError` when one side has no object.
    """
    if labelled.kind == "image":
        raise UsageError(f"{labelled.found}: a detector is trained on boxes or points; compare cannot use image labels")
    problems = list(labelled.problems[:1])
    number = {name: i for i, name in enumerate(labelled.classes, 1)}
    pictures: list[Picture] = []
    images: list[LabelledImage] = []
    faults: list[str] = []
    lost = 0
    for image in labelled.images:
        try:
            data = read_bytes(image.path)
            decoded = decode_bytes(data, short_side_px)
        except Rejected as error:
            faults.append(f"{image.path.name}: {error.reason}, {error.detail}")
            continue
        if decoded.original_hw != image.size_px[::-1]:
            faults.append(f"{image.path.name}: its labels are for another size, {image.size_px}")
            continue
        truth_N4, sound_N = _boxes(image, labelled.kind, point_px)
        lost += int((~sound_N).sum())
        label_N = np.array([number[name] for name in image.labels], np.int64)[sound_N]
        digest = hashlib.sha256(data).hexdigest()
        pictures.append(Picture(decoded.pixels, truth_N4[sound_N], label_N, image.size_px, digest, -1))
        images.append(image)
    if faults:
        problems.append(f"{len(faults)} labelled images cannot be used, the first one is {faults[0]}")
    if lost:
        problems.append(f"{lost} objects have no area or lie outside their image")
    return _parted(labelled.classes, pictures, images, seed, problems)


def nested_order(pictures: Sequence[Picture], seed: int) -> list[int]:
    """The units of the training side in the order in which growing fractions take them.

    A permutation keyed by `seed`, in which those come first that bring a class that none before them has: so every
    class is kept in a small fraction where that can be, and the images of 10 % are among those of 30 %.
    """
    units = list(dict.fromkeys(picture.unit for picture in pictures))
    classes: dict[int, set[int]] = {unit: set() for unit in units}
    for picture in pictures:
        classes[picture.unit].update(picture.label_N.tolist())
    drawn = [units[i] for i in rng.permutation(rng.key(seed, "compare fractions"), len(units))]
    seen: set[int] = set()
    first = []
    for unit in drawn:
        if classes[unit] - seen:
            seen |= classes[unit]
            first.append(unit)
    return first + [unit for unit in drawn if unit not in set(first)]


def fraction_of(pictures: Sequence[Picture], fraction: float, seed: int) -> list[Picture]:
    """The pictures of the first `fraction` of the units in `nested_order`, at least one unit."""
    order = nested_order(pictures, seed)
    taken = set(order[: max(1, round(fraction * len(order)))])
    return [picture for picture in pictures if picture.unit in taken]


def batch(count: int, step: int, batch_size: int, seed: int) -> list[Shown]:
    """Which of `count` images a step shows, and how: a pure function, the same for all that are compared.

    Every epoch is a new permutation. Whether a batch is turned by a quarter is drawn for all of it (images of both
    orientations would be filled up to squares, a third more work); half turns and flips are drawn image by image.
    """
    order, views = rng.key(seed, "compare order"), rng.key(seed, "compare views")
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = {place // count for place in places}
    permuted = {epoch: rng.permutation(rng.fold_in(order, epoch), count) for epoch in epochs}
    drawn = rng.uniform(rng.fold_in(views, step), 1 + 2 * batch_size) < 0.5
    return [
        Shown(
            int(permuted[place // count][place % count]),
            turns=int(drawn[0]) + 2 * int(drawn[1 + 2 * i]),
            flip=bool(drawn[2 + 2 * i]),
        )
        for i, place in enumerate(places)
    ]


def turned(
    pixels_HWC: NDArray[np.uint8], box_N4: NDArray[np.float64], turns: int, flip: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """An image and its boxes, flipped left to right and then turned counterclockwise by quarter turns.

    A box at the left of the upper edge of a 4 x 2 image: flipped it is at the right, turned at the upper left.

    >>> image = np.zeros((2, 4, 3), np.uint8)
    >>> turned(image, np.array([[0.0, 0.0, 1.0, 2.0]]), 0, True)[1]
    array([[3., 0., 4., 2.]])
    >>> turned(image, np.array([[3.0, 0.0, 4.0, 2.0]]), 1, False)[1]
    array([[0., 0., 2., 1.]])
    """
    x0_N, y0_N, x1_N, y1_N = box_N4.T
    if flip:
        pixels_HWC = pixels_HWC[:, ::-1]
        x0_N, x1_N = pixels_HWC.shape[1] - x1_N, pixels_HWC.shape[1] - x0_N
    for _ in range(turns):
        width = pixels_HWC.shape[1]
        pixels_HWC = np.rot90(pixels_HWC)
        x0_N, y0_N, x1_N, y1_N = y0_N, width - x1_N, y1_N, width - x0_N
    return np.ascontiguousarray(pixels_HWC), np.stack([x0_N, y0_N, x1_N, y1_N], axis=1)


def _boxes(image: LabelledImage, kind: str, point_px: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes (N, 4) inside the image, and which of them are sound (N)."""
    box_N4 = np.asarray(image.boxes_N4, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):  # what is not finite compares as unsound
        if kind == "point":
            centre_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2
            box_N4 = np.concatenate([centre_N2 - point_px / 2, centre_N2 + point_px / 2], axis=1)
        box_N4 = box_N4.clip(0, [*image.size_px] * 2)
        sound_N: NDArray[np.bool_] = np.all(box_N4[:, 2:] > box_N4[:, :2], axis=1)
    return box_N4, sound_N


def _parted(
    classes: tuple[str, ...], pictures: list[Picture], images: list[LabelledImage], seed: int, problems: list[str]
) -> Labels:
    thumbnails = [duplicates.thumbnail(picture.pixels_HWC) for picture in pictures]
    copies, _ = duplicates.copies([picture.digest for picture in pictures], thumbnails)
    unit_of = duplicates.units(copies, [image.group for image in images])
    rows = [(Picture(p.pixels_HWC, p.truth_N4, p.label_N, p.size_px, p.digest, unit), image.split)
            for p, image, unit in zip(pictures, images, unit_of, strict=True)]  # fmt: skip
    rows.sort(key=lambda row: row[0].digest)
    given = {split.lower() for _, split in rows if split is not None}
    asked = {"test"} if "test" in given else given & {"val"}
    if asked and given - asked:
        test = [p for p, split in rows if split is not None and split.lower() in asked]
        train = [p for p, split in rows if split is not None and split.lower() not in asked]
        words = f"the data set's own: {', '.join(sorted(given - asked))} to train, {', '.join(sorted(asked))} to test"
        if len(train) + len(test) < len(rows):
            problems.append(f"{len(rows) - len(train) - len(test)} labelled images are in no split and are left out")
        shared = {picture.unit for picture in test}
        kept = [picture for picture in train if picture.unit not in shared]
        if len(kept) < len(train):
            problems.append(f"{len(train) - len(kept)} training images are copies of a test image, or of its "
                            "group, and are left out")  # fmt: skip
        train = kept
    else:
        all_of_them = [picture for picture, _ in rows]
        units = _train_units(all_of_them, len(classes), seed)
        train = [picture for picture in all_of_them if picture.unit in units]
        test = [picture for picture in all_of_them if picture.unit not in units]
        words = f"{len(units)} of {len({p.unit for p in all_of_them})} units to train, the others to test, seed {seed}"
    return _checked(classes, train, test, words, problems)


def _train_units(pictures: Sequence[Picture], classes: int, seed: int) -> set[int]:
    """Of up to 100 keyed permutations, the training side of the one that lacks the fewest classes on a side."""
    units = list(dict.fromkeys(picture.unit for picture in pictures))
    row = {unit: i for i, unit in enumerate(units)}
    has_UC = np.zeros((len(units), classes + 1), bool)
    for picture in pictures:
        has_UC[row[picture.unit], picture.label_N] = True
    count = min(max(round(TRAIN_FRACTION * len(units)), 1), max(len(units) - 1, 0))
    fewest, best = classes + 1, list(range(count))
    for attempt in range(100):
        order = rng.permutation(rng.fold_in(rng.key(seed, "compare split"), attempt), len(units))
        both_C = has_UC[order[:count]].any(axis=0) & has_UC[order[count:]].any(axis=0)
        lacking = int(((has_UC.sum(axis=0) > 1) & ~both_C).sum())
        if lacking < fewest:
            fewest, best = lacking, order[:count].tolist()
        if fewest == 0:
            break
    return {units[i] for i in best}


def _checked(
    classes: tuple[str, ...], train: list[Picture], test: list[Picture], words: str, problems: list[str]
) -> Labels:
    """The labels, with a line on classes that one side lacks; `DataError` when a side has no object."""
    sides = []
    for name, pictures in (("train", train), ("test", test)):
        found = np.unique(np.concatenate([np.zeros(0, np.int64), *(picture.label_N for picture in pictures)]))
        if len(found) == 0:
            raise DataError(f"{words}: no object to {name} with; compare needs labelled objects on both sides")
        sides.append({classes[i - 1] for i in found})
    for side, other, what in ((0, 1, "tested but never trained on"), (1, 0, "in no test image, so without a score")):
        lacking = sorted(sides[other] - sides[side])
        if lacking:
            problems.append(f"{what}: {', '.join(lacking)}")
    parts = [
        f"{side} {p.digest}".encode() + p.truth_N4.tobytes() + p.label_N.tobytes()
        for side, pictures in (("train", train), ("test", test))
        for p in pictures
    ]
    fingerprint = hashlib.sha256(b"".join(sorted(hashlib.sha256(part).digest() for part in parts))).hexdigest()[:16]
    return Labels(classes, tuple(train), tuple(test), words, fingerprint, tuple(problems))
