"""Features of whole images or of labelled objects, a search among them, and what to label next.

A field is far larger than the network's input. It is laid out in square windows that cover all of it, each is resized
to the input in one antialiased step, and the field's feature is the mean of theirs: nothing is cut off, and nothing
is squeezed out of its aspect. By default a window has the field's short side (two of them for 640 x 480 px).

Shapes: N images or objects, D width, Q queries, K chosen, W windows of an image, S side in pixels, M covered features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ssl_pretrain.artefact import weights_sha256
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data import pack, readers
from ssl_pretrain.data.decode import decode, decode_bytes
from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.probe import knn
from ssl_pretrain.probe.features import embed
from ssl_pretrain.probe.objects import crop, cut

NEIGHBOURS = 32
"""Of a row, among which pairs are looked for."""
PICTURE_PX = 96
"""Side of the small pictures of images that sheets and the projector show."""
WINDOWS_AT_A_TIME = 256


@dataclass(frozen=True, eq=False)
class Picked:
    """Some rows of an embedding, best first."""

    row_K: np.ndarray
    """int64."""
    value_K: np.ndarray
    """What they were picked by."""
    by: str
    """What that is: `similarity` or `distance`."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features and what they are of."""

    z_ND: np.ndarray
    """float32, each of length 1."""
    names: tuple[str, ...]
    """Paths relative to the data's folder, printable; an object has its number in the image behind a `#`."""
    picture_NSSC: np.ndarray
    """uint8 RGB: small pictures of images, the crops of objects."""
    about: dict[str, Any]
    """Backbone and hash of its weights, fingerprint of the data, how it was cut: plain JSON values."""
    problems: tuple[str, ...]
    """What is not in it, one line each."""
    labels: tuple[str, ...] = ()
    """The class of each object; empty for images."""
    images: tuple[str, ...] = ()
    """The image of each object; empty for images."""
    square_N3: np.ndarray | None = None
    """Left, top and side of each object's square in its image, in pixels; None for images."""


def embed_images(
    backbone: Backbone,
    data: Path,
    *,
    size_px: int | None = None,
    window_px: int | None = None,
    device: str | torch.device | None = None,
) -> Embedding:
    """Whole images of a pack, a folder or a file: the mean feature of the `windows` of each, scaled to length 1.

    size_px     side that each window is resized to; the backbone's input unless given
    window_px   side of the windows in the image's own pixels (a pack's are those it stores)

    What cannot be decoded is left out and said. Raises `DataError` when nothing is left, `UsageError` for sizes that
    make no sense.
    """
    side = size_px or backbone.input.size_px
    if side < 1 or (window_px is not None and window_px < 16):
        raise UsageError("embed: --size-px is 1 or more, --window-px 16 or more")
    names, hashes, pictures, features = list[str](), list[bytes](), list[np.ndarray](), list[np.ndarray]()
    problems, crops, counts = list[str](), list[np.ndarray](), list[int]()

    def flush() -> None:
        if counts:
            z_WD = embed(backbone, np.stack(crops), device=device)
            features.extend(_unit(part.mean(axis=0)) for part in np.split(z_WD, np.cumsum(counts)[:-1]))
            crops.clear()
            counts.clear()

    for name, digest, image_HWC in _images(data, problems):
        squares = windows(image_HWC.shape[0], image_HWC.shape[1], window_px)
        names.append(name)
        hashes.append(digest)
        pictures.append(_picture(image_HWC))
        crops.extend(crop(image_HWC, np.array(square, np.float64), side) for square in squares)
        counts.append(len(squares))
        if len(crops) >= WINDOWS_AT_A_TIME:
            flush()
    flush()
    if not names:
        raise DataError(f"no image in {escape(str(data))} can be used{f': {problems[0]}' if problems else ''}")
    sha256_N32 = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    how = f"mean over square windows of {f'{window_px} px' if window_px else 'the short side'}, covering the image"
    short_side_px = pack.manifest(data)["short_side_px"] if pack.is_pack(data) else None
    about = {**_about(backbone), "of": "images", "size_px": side, "crops": how}
    about["data"] = pack.fingerprint(sha256_N32, short_side_px)
    return Embedding(np.stack(features), tuple(names), np.stack(pictures), about, _said(problems))


def embed_objects(
    backbone: Backbone,
    data: Path,
    *,
    size_px: int | None = None,
    point_px: int = 80,
    device: str | torch.device | None = None,
) -> Embedding:
    """Every labelled object of a folder that a reader knows, cut as the probe cuts it (`objects.cut`)."""
    labelled = readers.read(data)
    whole = replace(labelled, images=tuple(replace(image, split=None) for image in labelled.images))
    objects = cut(whole, size_px or backbone.input.size_px, point_px=point_px)
    paths = [escape(image.path.relative_to(data).as_posix()) for image in labelled.images]
    images = tuple(paths[i] for i in objects.image_N)
    first = np.r_[True, objects.image_N[1:] != objects.image_N[:-1]]
    start_N = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    names = tuple(f"{image}#{i}" for image, i in zip(images, np.arange(len(first)) - start_N, strict=True))
    about = {**_about(backbone), "of": "objects", "size_px": objects.size_px, "crops": objects.rule}
    about["data"] = objects.fingerprint
    lost = [f"{objects.unreadable_images} labelled images cannot be used"] if objects.unreadable_images else []
    return Embedding(
        embed(backbone, objects.crops_NSSC, device=device), names, objects.crops_NSSC, about, tuple(lost),
        tuple(objects.classes[i] for i in objects.label_N), images, objects.square_N3,
    )  # fmt: skip


def like(
    backbone: Backbone,
    made: Embedding,
    image: Path,
    count: int = 9,
    *,
    window_px: int | None = None,
    device: str | torch.device | None = None,
) -> Picked:
    """What is most like an image, which is embedded as those of `made` were; `window_px` is what they were given.

    Among objects the image is taken for one object: all of it, padded to a square by its edge pixels. Raises
    `DataError` for an image that cannot be read.
    """
    size_px = int(made.about["size_px"])
    try:
        image_HWC = decode(image)
    except Rejected as error:
        raise DataError(f"{escape(str(image))} cannot be searched with: {error.reason}, {error.detail}") from error
    height, width = image_HWC.shape[:2]
    squares = np.array(windows(height, width, window_px), np.float64)
    if made.about["of"] == "objects":
        squares = _around(image_HWC)[None]
    z_WD = embed(backbone, np.stack([crop(image_HWC, square, size_px) for square in squares]), device=device)
    row_1K, similarity_1K = nearest(made.z_ND, _unit(z_WD.mean(axis=0))[None], count)
    return Picked(row_1K[0], similarity_1K[0], "similarity")


def select(made: Embedding, count: int, labelled: Embedding | None = None) -> Picked:
    """What to label next: `count` that are far from each other and from what is labelled (`farthest_first`).

    Without labelled ones the first is the one nearest to the mean.
    """
    start = int((made.z_ND @ made.z_ND.mean(axis=0)).argmax()) if labelled is None else labelled.z_ND
    row_K, far_K = farthest_first(made.z_ND, count, start)
    return Picked(row_K, far_K, "distance")


def alike(made: Embedding, count: int) -> Picked:
    """The `count` pairs that are most like each other, the two of a pair one after the other: near-duplicates that a
    hash of the pixels does not know, such as turned or partly overlapping fields.

    Of each row its 32 nearest are looked at. Raises `UsageError` for fewer than two rows.
    """
    if count < 1 or len(made.z_ND) < 2:
        raise UsageError("pairs that are alike: give a count of 1 or more, and at least two images")
    row_NK, similarity_NK = nearest(made.z_ND, made.z_ND, NEIGHBOURS + 1)
    first_P, second_P = np.repeat(np.arange(len(row_NK)), row_NK.shape[1]), row_NK.ravel()
    once_P = first_P < second_P
    # a pair may stand among the nearest of its second row alone
    swapped_P = first_P > second_P
    pair_P2 = np.concatenate(
        [np.column_stack([first_P, second_P])[once_P], np.column_stack([second_P, first_P])[swapped_P]]
    )
    similarity_P = np.concatenate([similarity_NK.ravel()[once_P], similarity_NK.ravel()[swapped_P]])
    pair_P2, at_P = np.unique(pair_P2, axis=0, return_index=True)
    best_K = np.argsort(-similarity_P[at_P], kind="stable")[:count]
    return Picked(pair_P2[best_K].ravel(), np.repeat(similarity_P[at_P][best_K], 2), "similarity")


def windows(height: int, width: int, window_px: int | None = None) -> list[tuple[int, int, int]]:
    """Left, top and side of the fewest squares that cover an image, evenly spread; they overlap where they must.

    A window is never larger than the image's short side, which is also what it is unless given.

    >>> windows(480, 640)
    [(0, 0, 480), (160, 0, 480)]
    >>> windows(400, 600, 300)
    [(0, 0, 300), (300, 0, 300), (0, 100, 300), (300, 100, 300)]
    """
    side = min(window_px or height, height, width)
    lefts, tops = (
        np.linspace(0, length - side, math.ceil(length / side)).round().astype(int).tolist()
        for length in (width, height)
    )
    return [(left, top, side) for top in tops for left in lefts]


def nearest(z_ND: np.ndarray, query_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` (or all) most alike of each query, as rows of z (Q, K), and their cosine similarity, falling.

    Features are of length 1. The search is exact (FAISS, flat inner product).

    >>> z = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    >>> found, similarity = nearest(z, z[:1], 2)
    >>> found.tolist(), similarity.round(3).tolist()
    ([[0, 1]], [[1.0, 0.6000000238418579]])
    """
    if count < 1:
        raise UsageError(f"nearest: the count is {count}, give 1 or more")
    similarity_QK, found_QK = knn.search(z_ND, query_QD, min(count, len(z_ND)))
    return found_QK, similarity_QK


def farthest_first(z_ND: np.ndarray, count: int, start: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy k-centre: again and again the row that is farthest from all that is covered, int64 (K), and how far.

    Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985: at most twice the best radius; as a
    choice of what to label, Sener and Savarese, "Active learning for CNNs: a core-set approach", 2018, algorithm 1.
    Distances are Euclidean, sqrt(2 - 2 cos) between features of length 1. Of equally far rows the first is taken.

    start       the first row to choose (its distance is infinite), or the features (M, D) that are covered already

    On a line, from 0: first the far end, then what is farthest from both ends.

    >>> farthest_first(np.array([[0.0], [1], [4], [10]]), 3, 0)
    (array([0, 3, 2]), array([inf, 10.,  4.]))
    >>> farthest_first(np.array([[0.0], [1], [4], [10]]), 2, np.array([[9.0]]))
    (array([0, 2]), array([9., 4.]))
    """
    if not 1 <= count <= len(z_ND):
        raise UsageError(f"{count} are to be selected of {len(z_ND)}: give a number from 1 to {len(z_ND)}")
    z_ND = np.asarray(z_ND, np.float64)
    square_N = (z_ND * z_ND).sum(axis=1)

    def away(z_D: np.ndarray) -> np.ndarray:
        gap_N: np.ndarray = np.sqrt(np.maximum(square_N + z_D @ z_D - 2 * z_ND @ z_D, 0))
        return gap_N

    gap_N = np.full(len(z_ND), np.inf)
    if isinstance(start, int | np.integer):
        chosen, far = [int(start)], [np.inf]
    else:
        chosen, far = list[int](), list[float]()
        for covered_D in np.asarray(start, np.float64):
            gap_N = np.minimum(gap_N, away(covered_D))
    while True:
        for i in chosen[-1:]:
            gap_N = np.minimum(gap_N, away(z_ND[i]))
        if len(chosen) == count:
            return np.array(chosen, np.int64), np.array(far)
        left_N = np.where(np.isin(np.arange(len(z_ND)), chosen), -1.0, gap_N)  # a copy is as near as what is chosen
        chosen.append(int(left_N.argmax()))
        far.append(float(gap_N[chosen[-1]]))


def _about(backbone: Backbone) -> dict[str, Any]:
    return {"backbone": backbone.name, "weights_sha256": weights_sha256(backbone)}


def _said(problems: list[str]) -> tuple[str, ...]:
    return (f"{len(problems)} images are left out, the first is {problems[0]}",) if problems else ()


def _images(data: Path, problems: list[str]) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Name, SHA-256 and pixels of each image of a pack, a folder or a file."""
    if pack.is_pack(data):
        opened = pack.open_pack(data)
        for i, name in enumerate(opened.paths):
            yield name, opened.sha256_N32[i].tobytes(), opened.image(i)
        return
    listing = scan([data])
    for name in listing.names:
        try:
            content = read_bytes(listing.root / name)
            yield escape(name), hashlib.sha256(content).digest(), decode_bytes(content).pixels
        except Rejected as error:
            problems.append(f"{escape(name)}: {error.reason}, {error.detail}")


def _picture(image_HWC: np.ndarray) -> np.ndarray:
    """All of an image, as large as fits, on white."""
    small = ImageOps.pad(Image.fromarray(image_HWC), (PICTURE_PX, PICTURE_PX), Image.Resampling.BOX, color="white")
    return np.array(small)


def _around(image_HWC: np.ndarray) -> np.ndarray:
    """The square around all of an image: left, top, side."""
    height, width = image_HWC.shape[:2]
    side = max(height, width)
    return np.array([(width - side) / 2, (height - side) / 2, side], np.float64)


def _unit(z_D: np.ndarray) -> np.ndarray:
    return np.asarray(z_D / max(float(np.linalg.norm(z_D)), 1e-12), np.float32)
