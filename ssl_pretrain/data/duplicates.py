"""Near-duplicates: images that show the same field again, though their bytes differ.

A field that was saved twice (another JPEG quality, size, brightness or focus, a stage that moved by a pixel) must not
stand on both sides of a probe. Three steps:

1. Candidates, by a 64-bit hash: the signs of 64 low frequencies of the image's cosine transform about their median
   (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, section 3.2.1). Here they are
   1..8 along each side: without 0, where the microscope's illumination lies, which all its fields share.
2. Proof, on thumbnails less their smooth background: they correlate as a whole, *and* so does every part that shows
   anything. Bright fields with the same dirt on the lens, but with a particle here or there, fail by the second rule.
3. Copies resemble each other all round. Where a chain of pairs joins images most of which are not alike, they are
   look-alikes (thousands of round cells, each cut out on black), and none of them is joined.

An image that shows next to nothing is never a near-duplicate: nothing could tell it from another empty field. Turned
or mirrored copies, crops, and fields that overlap in part are not found.

Shapes: N images, P pairs, H = W = 64 pixels of a thumbnail, h = w = 32, K parts of it, M numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
from PIL import Image

SIDE_PX = 64
"""Of a thumbnail; smaller images are not compared."""
HALF_PX = 32
RADIUS_BITS = 16
"""Hashes of unrelated images differ in 32 of 64 bits on average, and in 16 or fewer once in 26,000 pairs."""
CANDIDATES = 32
"""Nearest hashes that are looked at, an image; so that no data set costs more than this."""
FINE_PX, COARSE_PX = 1.0, 8.0
"""Sigmas of the two Gaussians whose difference is compared, in pixels of a thumbnail: the narrow one takes noise, JPEG
blocks and small shifts away, the wide one is the background."""
PARTS = 4
"""Along each side."""
FLOOR = 1.0
"""A part shows something from this standard deviation on, in grey levels of 255."""
WHOLE, PART = 0.9, 0.8
"""Least correlation of near-duplicates: over all, and over each part that shows something."""
MUTUAL = 0.5
"""Least share of the pairs in a family of copies that must be alike."""
BLOCK = 4096
HELD = 50_000
"""Candidate pairs whose details are held at a time: 400 MB at most."""


def thumbnail(image_HWC: np.ndarray) -> np.ndarray | None:
    """Grey, uint8 (64, 64), each pixel a mean, whatever the aspect; None for an image with a side below 64 px."""
    if min(image_HWC.shape[:2]) < SIDE_PX:
        return None
    small = Image.fromarray(image_HWC).convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return np.asarray(small)


def near(thumbnail_NHW: np.ndarray) -> np.ndarray:
    """The pairs of near-duplicates among thumbnails: int64 (P, 2), i < j, in ascending order."""
    return near_pairs(thumbnail_NHW, np.arange(len(thumbnail_NHW)))


def near_pairs(thumbnail_NHW: np.ndarray, place_M: np.ndarray) -> np.ndarray:
    """`near` among some of the thumbnails (M places), which are read a few at a time: int64 (P, 2), as places."""
    if len(place_M) < 2:
        return np.zeros((0, 2), np.int64)
    hash_M8 = _hashes(thumbnail_NHW, place_M)
    found = _candidates(hash_M8, hash_M8, min(CANDIDATES + 1, len(hash_M8)))  # an image finds itself too
    pair_P2 = np.sort(found, axis=1)
    pair_P2 = np.unique(pair_P2[pair_P2[:, 0] < pair_P2[:, 1]], axis=0)
    pair_P2 = place_M[pair_P2]
    confirmed: np.ndarray = pair_P2[_proven(thumbnail_NHW, thumbnail_NHW, pair_P2)]
    return confirmed


def near_across(query_QHW: np.ndarray, thumbnail_NHW: np.ndarray, place_M: np.ndarray) -> np.ndarray:
    """The near-duplicates of queries among some of the thumbnails, as (query, place): int64 (P, 2), in order."""
    if not len(query_QHW) or not len(place_M):
        return np.zeros((0, 2), np.int64)
    hash_Q8, hash_M8 = _hashes(query_QHW, np.arange(len(query_QHW))), _hashes(thumbnail_NHW, place_M)
    pair_P2 = _candidates(hash_Q8, hash_M8, min(CANDIDATES, len(hash_M8)))
    pair_P2 = np.column_stack([pair_P2[:, 0], place_M[pair_P2[:, 1]]])
    pair_P2 = pair_P2[np.lexsort(pair_P2.T[::-1])]
    confirmed: np.ndarray = pair_P2[_proven(query_QHW, thumbnail_NHW, pair_P2)]
    return confirmed


def _hashes(thumbnail_NHW: np.ndarray, place_M: np.ndarray) -> np.ndarray:
    blocks = [hashes(thumbnail_NHW[place_B]) for place_B in _blocks(place_M)]
    return np.ascontiguousarray(np.concatenate(blocks))


def _candidates(hash_Q8: np.ndarray, hash_N8: np.ndarray, count: int) -> np.ndarray:
    """(P, 2): each query with those of its nearest hashes that are near enough."""
    index = faiss.IndexBinaryFlat(hash_N8.shape[1] * 8)
    index.add(hash_N8)
    found = [np.zeros((0, 2), np.int64)]
    for place_B in _blocks(np.arange(len(hash_Q8))):
        bits_BJ, near_BJ = index.search(hash_Q8[place_B], count)
        query_P, at_P = np.nonzero(bits_BJ <= RADIUS_BITS)
        found.append(np.column_stack([place_B[query_P], near_BJ[query_P, at_P]]))
    return np.concatenate(found)


def _proven(a_NHW: np.ndarray, b_NHW: np.ndarray, pair_P2: np.ndarray) -> np.ndarray:
    """Which pairs show the same: bool (P)."""
    proofs = [np.zeros(0, np.bool_)]
    for start in range(0, len(pair_P2), HELD):
        a_P, b_P = pair_P2[start : start + HELD].T
        (a_K, at_P), (b_K, to_P) = np.unique(a_P, return_inverse=True), np.unique(b_P, return_inverse=True)
        a_Khw, b_Khw = detail(a_NHW[a_K]), detail(b_NHW[b_K])  # once an image
        proofs += [same(a_Khw[at_P[i_B]], b_Khw[to_P[i_B]]) for i_B in _blocks(np.arange(len(a_P)))]
    return np.concatenate(proofs)


def families(pair_P2: np.ndarray) -> tuple[list[list[int]], int]:
    """Copies of each other, two or more images a family; and how many images are look-alikes that are not joined.

    0 with 1, and 1 with 2, are a family (two of three pairs). A chain of five is not: 4 of 10 pairs.

    >>> families(np.array([[0, 1], [1, 2], [3, 4], [4, 5], [5, 6], [6, 7]]))
    ([[0, 1, 2]], 5)
    """
    root: dict[int, int] = {}

    def find(i: int) -> int:
        while root.setdefault(i, i) != i:
            i = root[i] = root[root[i]]
        return i

    for i, j in pair_P2.tolist():
        a, b = sorted((find(i), find(j)))
        root[b] = a
    members: dict[int, list[int]] = {}
    for i in sorted(root):
        members.setdefault(find(i), []).append(i)
    first, count = np.unique([find(i) for i in pair_P2[:, 0].tolist()], return_counts=True)
    pairs = dict(zip(first.tolist(), count.tolist(), strict=True))
    joined, alike = [], 0
    for head, family in members.items():
        possible = len(family) * min(len(family) - 1, CANDIDATES) / 2
        if pairs[head] >= MUTUAL * possible:
            joined.append(family)
        else:
            alike += len(family)
    return joined, alike


def copies(digests: Sequence[str], thumbnails: Sequence[np.ndarray | None]) -> tuple[list[int], int]:
    """For each image the first one that shows the same, by its bytes or as a near-duplicate; and, as `families`, how
    many are look-alikes. Images without a thumbnail are compared by their bytes alone.
    """
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    seen = [(i, thumbnail) for i, thumbnail in enumerate(thumbnails) if first[digests[i]] == i]
    numbers = [i for i, thumbnail in seen if thumbnail is not None]
    shown = [thumbnail for _, thumbnail in seen if thumbnail is not None]
    found, alike = families(near(np.stack(shown))) if shown else ([], 0)
    head = {numbers[member]: numbers[family[0]] for family in found for member in family}
    return [head.get(first[digest], first[digest]) for digest in digests], alike


def units(copy_N: Sequence[int], groups: Sequence[str]) -> list[int]:
    """Images that are copies or of one group, directly or through others, have the number of the first of them.

    >>> units([0, 1, 0, 3, 4], ["a", "", "b", "b", ""])
    [0, 1, 0, 0, 4]
    """
    root = list(range(len(copy_N)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    first: dict[str | int, int] = {}
    for i, (copy, group) in enumerate(zip(copy_N, groups, strict=True)):
        for name in (copy, group) if group else (copy,):
            a, b = sorted((find(i), find(first.setdefault(name, i))))
            root[b] = a
    return [find(i) for i in range(len(copy_N))]


def hashes(thumbnail_NHW: np.ndarray) -> np.ndarray:
    """The 64-bit hash of each thumbnail, uint8 (N, 8).

    With x, y of 32 x 32 pixels and u, v from 1 to 8, the sums over x and y of
    pixel(x, y) cos(pi (x + 1/2) u / 32) cos(pi (y + 1/2) v / 32), each of which is a bit: above their median or not.
    """
    wave_Ux = np.cos(np.pi / HALF_PX * np.outer(np.arange(1, 9), np.arange(HALF_PX) + 0.5)).astype(np.float32)
    sum_NM = (wave_Ux @ _halved(thumbnail_NHW) @ wave_Ux.T).reshape(-1, 64)
    return np.packbits(sum_NM > np.median(sum_NM, axis=1, keepdims=True), axis=1)


def same(a_Phw: np.ndarray, b_Phw: np.ndarray) -> np.ndarray:
    """Whether the details of two images are those of one field: bool (P)."""
    whole_P = correlation(a_Phw.reshape(-1, HALF_PX**2), b_Phw.reshape(-1, HALF_PX**2))
    a_PKM, b_PKM = _parts(a_Phw), _parts(b_Phw)
    shows_PK = np.maximum(a_PKM.std(axis=2), b_PKM.std(axis=2)) >= FLOOR
    alike_PK = correlation(a_PKM, b_PKM) >= PART
    same_P: np.ndarray = (whole_P >= WHOLE) & shows_PK.any(axis=1) & (alike_PK | ~shows_PK).all(axis=1)
    return same_P


def detail(thumbnail_NHW: np.ndarray) -> np.ndarray:
    """What is neither noise nor background: the difference of two Gaussian blurs, halved, float32 (N, h, w)."""
    fine, coarse = _blur(FINE_PX), _blur(COARSE_PX)
    made = [np.zeros((0, HALF_PX, HALF_PX), np.float32)]
    for block in _blocks(thumbnail_NHW):
        x = block.astype(np.float32)
        made.append(_halved(fine @ x @ fine.T - coarse @ x @ coarse.T))
    return np.concatenate(made)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, along the last axis; 0 where one is constant.

    Less their mean, (-1, 0, 1) and (-1, 1, 0): a product of 1 by norms of the square root of 2 each.

    >>> correlation(np.array([[0.0, 1, 2], [5, 5, 5]]), np.array([[0.0, 2, 1], [0, 1, 2]])).round(6)
    array([0.5, 0. ])
    """
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    r: np.ndarray = (a * b).sum(axis=-1) / np.maximum(norm, 1e-12)
    return r


def _blur(sigma_px: float) -> np.ndarray:
    """A Gaussian along one side as a matrix; its rows sum to 1, also at the borders."""
    place = np.arange(SIDE_PX)
    weight = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma_px**2))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), np.float32)


def _halved(x_NHW: np.ndarray) -> np.ndarray:
    """(N, H, W) -> (N, h, w): means of 2 x 2."""
    halved: np.ndarray = x_NHW.reshape(-1, HALF_PX, 2, HALF_PX, 2).mean(axis=(2, 4), dtype=np.float32)
    return halved


def _parts(x_Phw: np.ndarray) -> np.ndarray:
    """(P, h, w) -> (P, K, M): squares."""
    side = HALF_PX // PARTS
    x = x_Phw.reshape(-1, PARTS, side, PARTS, side).swapaxes(2, 3)
    return x.reshape(-1, PARTS * PARTS, side * side)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    """A few rows at a time, however many there are."""
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
