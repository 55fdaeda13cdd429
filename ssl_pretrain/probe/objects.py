"""Labelled objects as small square images, and who is independent of whom: what every probe looks at.

A detector sees objects, so features are judged on objects: each box or point of a labelled set becomes one crop. The
crops are cut once and can be embedded again and again while a backbone trains (`features`).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ssl_pretrain import rng
from ssl_pretrain.data import duplicates
from ssl_pretrain.data.decode import decode_bytes
from ssl_pretrain.data.files import Rejected, read_bytes
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, UsageError

MARGIN = 0.1
BANK_FRACTION = 0.65
OWN_SPLIT = "the data set's own"


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of a labelled set, cut out, and on which side of the probe each one is."""

    crops_NSSC: np.ndarray
    """uint8 RGB, N * S * S * 3 bytes: 31,285 objects take 0.4 GB at 64 px and 4.7 GB at 224 px."""
    label_N: np.ndarray
    """int64, index into `classes`."""
    image_N: np.ndarray
    """int64, index of its image in `LabelledSet.images`."""
    unit_N: np.ndarray
    """int64: images of one group (patient, slide), with the same bytes, or that are near-duplicates share a unit.
    Units, not objects, are independent: they are split as a whole, never vote for themselves, and are what the
    bootstrap resamples."""
    train_N: np.ndarray
    """bool: in the bank (and what a linear probe is trained on); see `query_N`."""
    square_N3: np.ndarray
    """float64: left, top and side of the square in its image, in pixels."""
    classes: tuple[str, ...]
    source: str
    """Which reader found what."""
    rule: str
    """How the squares were laid, in words."""
    split: str
    """How bank and queries were parted, in words."""
    seed: int
    fingerprint: str
    """Of image bytes, squares and labels; independent of folder and file names."""
    unreadable_images: int
    degenerate_objects: int
    """No area, not finite, or centred outside the image."""
    problems: tuple[str, ...]
    """What a reader of the score should know, one line each."""
    groups: int = 0
    """How many groups (patients, slides) the labels give; 0 where every image is its own. Only with groups is a split
    more than one by image."""
    repeated_images: int = 0
    """How many show the same as another one, by their bytes or as near-duplicates (`duplicates`)."""

    @property
    def size_px(self) -> int:
        """Side S of the crops."""
        return int(self.crops_NSSC.shape[1])

    @property
    def own_split(self) -> bool:
        """Whether the data set said itself what is the bank."""
        return self.split.startswith(OWN_SPLIT)

    @property
    def query_N(self) -> np.ndarray:
        """bool: what is not in the bank; everything where the bank is everything (`leave_one_out`)."""
        return self.train_N if self.train_N.all() else ~self.train_N


def leave_one_out(objects: Objects) -> Objects:
    """The same objects without a split: each is a query against the objects of all other units.

    Nothing is trained in k-NN and no unit votes for itself, so this is as fair as a split, and with every image as a
    query its intervals are narrower.
    """
    left_out = f"group out ({objects.groups} groups given)" if objects.groups else "image out"
    split = f"leave one {left_out}: each against all others"
    return replace(objects, train_N=np.ones_like(objects.train_N), split=split)


def cut(
    labelled: LabelledSet,
    size_px: int,
    *,
    margin: float = MARGIN,
    point_px: int = 80,
    bank_fraction: float = BANK_FRACTION,
    seed: int = 0,
    workers: int | None = None,
) -> Objects:
    """Cuts every labelled object of a data set as a `size_px` square, antialiased (Pillow, bilinear as in the views).

    The square around a box has the side max(w, h) * (1 + 2 * margin): the aspect ratio stays, and a rim of the
    surrounding, 10 % of the longer side by default, tells the object from its background. A point gets `point_px`
    pixels around it. A labelled image becomes its whole self, padded to a square: a centre crop could lose the one
    particle that the label means. Beyond the image its edge pixels go on: black would be a sharp feature that no view
    of the pretraining has, and would tell the network where in the field an object lay.

    The split is the data set's own where it has one: test images are the queries (val ones when no test is labelled),
    the others are the bank, and images in no split are left out, as are images of the bank that repeat a query image.
    Otherwise a permutation of the units, keyed by `seed` and by the images' bytes (not their names), puts
    `bank_fraction` of them into the bank; of up to 100 permutations the first that has the rare classes on both sides.

    `workers` threads decode (default: up to 8), each image once. Raises `DataError` when no objects are left on one of
    the sides, `UsageError` for sizes that make no sense.
    """
    if min(size_px, point_px) < 1 or min(margin, seed) < 0 or not 0 < bank_fraction < 1:
        raise UsageError("cut: size_px, point_px are 1 or more, margin, seed 0 or more, bank_fraction between 0 and 1")
    fields, degenerate = _lay(labelled, margin, point_px)
    crops_NSSC = _filled(fields, size_px, workers or min(8, os.cpu_count() or 1))
    hashed = [field for field in fields if field.digest]
    copies, alike = duplicates.copies([f.digest for f in hashed], [f.thumbnail for f in hashed])
    units = duplicates.units(copies, [f.image.group for f in hashed])
    for field, copy, unit in zip(hashed, copies, units, strict=True):
        field.copy, field.unit = copy, unit
    groups = _groups(hashed)
    parted, split, problems = _part(hashed, bank_fraction, seed, groups)
    repeated = len(parted) - len({field.copy for field in parted})
    good, failed = [field for field in parted if not field.fault], [field.fault for field in fields if field.fault]
    repeats = [len(field.label_M) for field in good]
    objects = Objects(
        crops_NSSC=_closed_up(crops_NSSC, fields, good),
        label_N=np.concatenate([np.zeros(0, np.int64), *(field.label_M for field in good)]),
        image_N=np.repeat(np.array([field.index for field in good], np.int64), repeats),
        unit_N=np.repeat(np.array([field.unit for field in good], np.int64), repeats),
        train_N=np.repeat(np.array([field.bank for field in good], bool), repeats),
        square_N3=np.concatenate([np.zeros((0, 3)), *(field.square_M3 for field in good)]),
        classes=labelled.classes,
        source=f"{labelled.format}: {labelled.found}",
        rule=_rule(labelled.kind, margin, point_px),
        split=split,
        seed=seed,
        fingerprint=_fingerprint(hashed),
        unreadable_images=len(failed),
        degenerate_objects=degenerate,
        problems=(*problems, *_repeats(parted, repeated, alike), *_losses(labelled, failed, degenerate)),
        groups=groups,
        repeated_images=repeated,
    )
    return _checked(objects)


def _filled(fields: list[_Field], size_px: int, workers: int) -> np.ndarray:
    """The crops (N, S, S, 3) of all fields, each decoded once; those of a field with a fault are left undefined."""
    ends = np.cumsum([len(field.label_M) for field in fields], dtype=np.int64)
    crops_NSSC = np.empty((int(ends[-1]) if fields else 0, size_px, size_px, 3), np.uint8)
    places = [crops_NSSC[end - len(field.label_M) : end] for field, end in zip(fields, ends, strict=True)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # Decoding puts the process-wide warning filters aside and back; several threads at it would mix them up.
        warnings.simplefilter("ignore")
        list(pool.map(_fill, fields, places))
    return crops_NSSC


@dataclass
class _Field:
    """One labelled image on its way: M objects that can be cut."""

    index: int
    image: LabelledImage
    square_M3: np.ndarray
    label_M: np.ndarray
    digest: str = ""
    """SHA-256 of the file; empty when it cannot be read."""
    fault: str = ""
    """What was wrong with it, or nothing."""
    thumbnail: np.ndarray | None = None
    copy: int = -1
    """Fields that show the same share it."""
    unit: int = -1
    bank: bool = False


def _lay(labelled: LabelledSet, margin: float, point_px: int) -> tuple[list[_Field], int]:
    """The images with at least one sound object, their squares and labels; and how many objects are not sound."""
    number = {name: index for index, name in enumerate(labelled.classes)}
    fields: list[_Field] = []
    degenerate = 0
    for index, image in enumerate(labelled.images):
        square_N3, sound_N = _squares(image, labelled.kind, margin, point_px)
        label_N = np.array([number[name] for name in image.labels], np.int64)
        degenerate += int((~sound_N).sum())
        if sound_N.any():
            fields.append(_Field(index, image, square_N3[sound_N], label_N[sound_N]))
    return fields, degenerate


def _squares(image: LabelledImage, kind: str, margin: float, point_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Left, top and side of the square around each object (N, 3), and whether the object is sound (N)."""
    width, height = image.size_px
    if kind == "image":
        box_N4, grow = np.tile([0.0, 0.0, width, height], (len(image.labels), 1)), 1.0
    else:
        box_N4, grow = np.asarray(image.boxes_N4, np.float64).reshape(-1, 4), 1 + 2 * margin
    with np.errstate(invalid="ignore"):  # infinity less infinity; compares as unsound
        centre_N2, extent_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2, box_N4[:, 2:] - box_N4[:, :2]
        # An object centred outside its image would be a crop of nothing but repeated edge.
        sound_N = ((centre_N2 >= 0) & (centre_N2 < (width, height))).all(axis=1)
        if kind == "point":
            side_N = np.full(len(box_N4), float(point_px))
        else:
            side_N = extent_N2.max(axis=1, initial=0) * grow
            sound_N &= (extent_N2 > 0).all(axis=1)
        return np.column_stack([centre_N2 - side_N[:, None] / 2, side_N]), sound_N


def _part(fields: list[_Field], bank_fraction: float, seed: int, groups: int) -> tuple[list[_Field], str, list[str]]:
    """Sets `bank` of each field; returns those that take part, the split in words, and problems."""
    given = {field.image.split.lower() for field in fields if field.image.split is not None}
    queries = {"test"} if "test" in given else given & {"val"}
    if not queries or not given - queries:
        bank, units = _keyed_bank(fields, bank_fraction, seed)
        for field in fields:
            field.bank = field.unit in bank
        by = f"by group ({groups} groups given)" if groups else "by image"
        return fields, f"{by}: {len(bank)} of {units} units into the bank, seed {seed}", []
    problems = []
    parted = [field for field in fields if field.image.split is not None]
    for field in parted:
        field.bank = (field.image.split or "").lower() not in queries
    if len(parted) < len(fields):
        problems.append(f"{len(fields) - len(parted)} labelled images are in no split and are left out")
    asked = [field for field in parted if not field.bank]
    copies, digests = {field.copy for field in asked}, {field.digest for field in asked}
    leaked = [field for field in parted if field.bank and field.copy in copies]
    if leaked:
        same = sum(field.digest in digests for field in leaked)
        found = f"{same} byte-identical to it, {len(leaked) - same} near-duplicates"
        problems.append(f"{len(leaked)} images of the bank repeat a query image ({found}) and are left out")
        parted = [field for field in parted if not (field.bank and field.copy in copies)]
    both = {field.image.group for field in parted if field.bank} & {field.image.group for field in asked} - {""}
    if both:
        problems.append(f"{len(both)} groups have images on both sides of the data set's own split")
    words = f"{OWN_SPLIT}: {', '.join(sorted(given - queries))} as bank, {', '.join(sorted(queries))} as queries"
    return parted, words, problems


def _keyed_bank(fields: list[_Field], bank_fraction: float, seed: int) -> tuple[set[int], int]:
    """The units of the bank, and how many there are at all.

    Of up to 100 permutations the first is taken that has every class on both sides (classes of one unit aside), or
    the one that lacks the fewest: by chance alone the rare classes are often missing on one side.
    """
    # By content, so that other file names or another order of the images give the same split.
    units = list(dict.fromkeys(field.unit for field in sorted(fields, key=lambda field: field.digest)))
    has_UC = np.zeros((len(units), 1 + max((int(field.label_M.max()) for field in fields), default=0)), bool)
    row = {unit: i for i, unit in enumerate(units)}
    for field in fields:
        has_UC[row[field.unit], field.label_M] = True
    count = min(max(round(bank_fraction * len(units)), 1), max(len(units) - 1, 0))
    stream = rng.key(seed, "objects split")
    fewest, best = len(has_UC[0]) + 1 if len(units) else 0, np.zeros(0, np.int64)
    for attempt in range(100):
        order = rng.permutation(rng.fold_in(stream, attempt), len(units))
        both_C = has_UC[order[:count]].any(axis=0) & has_UC[order[count:]].any(axis=0)
        lacking = int(((has_UC.sum(axis=0) > 1) & ~both_C).sum())
        if lacking < fewest:
            fewest, best = lacking, order[:count]
        if fewest == 0:
            break
    return {units[i] for i in best}, len(units)


def _groups(fields: list[_Field]) -> int:
    """How many groups are given; 0 where no two images share one."""
    given = [field.image.group for field in fields if field.image.group]
    return len(set(given)) if len(set(given)) < len(given) else 0


def _repeats(parted: list[_Field], repeated: int, alike: int) -> list[str]:
    """What was found out about images that show the same."""
    lines = []
    if repeated:
        same = len(parted) - len({field.digest for field in parted})
        found = f"{same} byte-identical to it, {repeated - same} near-duplicates"
        lines.append(f"{repeated} images repeat another one ({found}) and share its unit")
    if alike:
        lines.append(f"{alike} images look much alike, yet too few pairs of them for copies; they stay independent")
    return lines


def _losses(labelled: LabelledSet, failed: list[str], degenerate: int) -> list[str]:
    """What is not in the score, one line each."""
    lines = []
    if labelled.problems:
        lines.append(
            f"{len(labelled.problems)} problems while reading the labels, the first one is {labelled.problems[0]}"
        )
    if failed:
        lines.append(f"{len(failed)} labelled images cannot be used, the first one is {failed[0]}")
    if degenerate:
        lines.append(f"{degenerate} objects have no area or lie outside their image")
    return lines


def _fill(field: _Field, crops_MSSC: np.ndarray) -> None:
    """Reads and decodes one image, writes its crops, and notes its hash, thumbnail, and what was wrong."""
    name = field.image.path.name
    try:
        content = read_bytes(field.image.path)
        field.digest = hashlib.sha256(content).hexdigest()
        image_HWC = decode_bytes(content).pixels
    except Rejected as error:
        field.fault = f"{name}: {error.reason}, {error.detail}"
        return
    height, width = image_HWC.shape[:2]
    if (width, height) != tuple(field.image.size_px):
        field.fault = f"{name}: is {width}x{height}, its labels are for {field.image.size_px}"
        return
    field.thumbnail = duplicates.thumbnail(image_HWC)
    for square_3, crop_SSC in zip(field.square_M3, crops_MSSC, strict=True):
        crop_SSC[:] = crop(image_HWC, square_3, len(crop_SSC))


def _closed_up(crops_NSSC: np.ndarray, fields: list[_Field], good: list[_Field]) -> np.ndarray:
    """The crops of the good fields, moved together in place: they may fill half of the memory."""
    kept, start, end = {field.index for field in good}, 0, 0
    for field in fields:
        begin, start = start, start + len(field.label_M)
        if field.index in kept:
            if end < begin:
                crops_NSSC[end : end + start - begin] = crops_NSSC[begin:start]
            end += start - begin
    return crops_NSSC[:end]


def crop(image_HWC: np.ndarray, square_3: np.ndarray, size_px: int) -> np.ndarray:
    """The square (left, top, side) of an image as (S, S, 3), in one antialiased step; its edge goes on beyond it."""
    x, y, side = (float(value) for value in square_3)
    left, top, right, bottom = math.floor(x), math.floor(y), math.ceil(x + side), math.ceil(y + side)
    rows = np.arange(top, bottom).clip(0, image_HWC.shape[0] - 1)
    columns = np.arange(left, right).clip(0, image_HWC.shape[1] - 1)
    patch = Image.fromarray(np.ascontiguousarray(image_HWC[rows[:, None], columns]))
    box = (x - left, y - top, min(x - left + side, patch.width), min(y - top + side, patch.height))
    small = patch.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return np.asarray(small)


def _rule(kind: str, margin: float, point_px: int) -> str:
    beyond = "edge pixels repeated beyond the image"
    if kind == "point":
        return f"{point_px} px square around each point, {beyond}"
    if kind == "image":
        return f"whole image, padded to a square, {beyond}"
    return f"square of {1 + 2 * margin:g} x the longer side around each box, {beyond}"


def _fingerprint(fields: list[_Field]) -> str:
    """16 hex digits; the order of the images does not count."""
    parts = [field.digest.encode() + field.square_M3.tobytes() + field.label_M.tobytes() for field in fields]
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(part).digest() for part in parts))).hexdigest()[:16]


def _checked(objects: Objects) -> Objects:
    """The objects, with a line on classes that the bank lacks; `DataError` when one side is empty."""
    train_N, label_N = objects.train_N, objects.label_N
    if not train_N.any() or train_N.all():
        why = f" ({objects.problems[0]})" if objects.problems else ""
        raise DataError(
            f"{objects.source}: {int(train_N.sum())} objects in the bank, {int((~train_N).sum())} queries{why}; "
            "a probe needs objects of at least two images that are independent of each other"
        )
    lacking = np.setdiff1d(label_N[~train_N], label_N[train_N])
    if len(lacking) == 0:
        return objects
    names = ", ".join(objects.classes[i] for i in lacking)
    line = f"no object in the bank, so no query can be right: {names} ({int(np.isin(label_N, lacking).sum())} queries)"
    return replace(objects, problems=(*objects.problems, line))
