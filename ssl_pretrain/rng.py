"""Randomness without state: every number is a hash of what it is for, the same bits on every machine.

The hash is Threefry-2x32 with 20 rounds: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. A key names a stream (`seed`, purpose, then whatever is folded in: epoch, image, view); a counter names a
number in it. Nothing is ever "used up", so the order in which numbers are asked for, and by whom, does not matter.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Key: TypeAlias = npt.NDArray[np.uint32]
"""Shape (..., 2): one stream of random numbers for each leading index."""

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)
# The high counter word says what a block is for, so that a folded key never equals a drawn number's bits.
# fold_in's data is below 2^63 and so keeps the top bit clear.
DRAW, SORT, SEED = np.uint32(0x80000000), np.uint32(0xA0000000), np.uint32(0xC0000000)


def threefry_2x32(key: Key, counter: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Threefry-2x32-20 of key (..., 2) and counter (..., 2), broadcast against each other -> (..., 2) uint32.

    >>> [f"{word:08x}" for word in threefry_2x32(np.zeros(2, np.uint32), np.zeros(2, np.uint32))]
    ['6b200159', '99ba4efe']
    """
    shape = np.broadcast_shapes(key.shape, counter.shape)[:-1]
    # Arrays of at least one dimension: they wrap silently, where numpy's scalars warn of overflow.
    k0, k1 = np.atleast_1d(key[..., 0]), np.atleast_1d(key[..., 1])
    schedule = (k0, k1, k0 ^ k1 ^ PARITY)
    x0 = np.broadcast_to(counter[..., 0] + k0, shape or (1,)).copy()
    x1 = np.broadcast_to(counter[..., 1] + k1, shape or (1,)).copy()
    for group in range(5):
        for rotation in ROTATIONS[:4] if group % 2 == 0 else ROTATIONS[4:]:
            x0 += x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 ^= x0
        x0 += schedule[(group + 1) % 3]
        x1 += schedule[(group + 2) % 3]
        x1 += np.uint32(group + 1)
    return np.stack([x0, x1], axis=-1).reshape(*shape, 2)


def key(seed: int, purpose: str) -> Key:
    """The key (2,) of everything that `purpose` ("views", "masks"...) draws in a run with this seed (0 to 2^63 - 1)."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    return fold_in(np.frombuffer(digest, dtype="<u4").astype(np.uint32), seed)


def fold_in(key: Key, data: int | npt.NDArray[np.integer]) -> Key:
    """Key (..., 2) and data (...) of integers from 0 to 2^63 - 1, broadcast -> a new key (..., 2) for each.

    Two data never give one key: for a fixed key the hash is a permutation of the counters.
    """
    data_ = np.asarray(data)
    if data_.dtype.kind not in "iu":
        raise TypeError(f"fold_in takes integers, not {data_.dtype}")
    if data_.size and (data_.min() < 0 or data_.max() >= 2**63):
        raise ValueError("fold_in takes integers from 0 to 2^63 - 1")
    return threefry_2x32(key, _words(data_.astype(np.uint64)))


def uniform(key: Key, count: int) -> npt.NDArray[np.float64]:
    """Key (..., 2) -> float64 (..., count): independent, uniform in [0, 1), multiples of 2^-53.

    Number `i` is the same whatever `count` is.
    """
    return (_bits(key, count, DRAW) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def permutation(key: Key, n: int) -> npt.NDArray[np.int64]:
    """Key (..., 2) -> int64 (..., n): a uniformly random order of 0..n-1, by sorting n 64-bit hashes."""
    return np.argsort(_bits(key, n, SORT), axis=-1, kind="stable").astype(np.int64)


def torch_seed(key: Key) -> int:
    """Key (2,) -> an integer from 0 to 2^63 - 1 for `torch.manual_seed`."""
    return int(_bits(key, 1, SEED)[0] >> np.uint64(1))


def _bits(key: Key, count: int, domain: np.uint32) -> npt.NDArray[np.uint64]:
    """Key (..., 2) -> uint64 (..., count): the blocks with counters (domain, 0), (domain, 1)..."""
    counter = np.stack([np.full(count, domain), np.arange(count, dtype=np.uint32)], axis=-1)
    words = threefry_2x32(key[..., None, :], counter)
    return (words[..., 0].astype(np.uint64) << np.uint64(32)) | words[..., 1]


def _words(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Uint64 (...) -> uint32 (..., 2): high word, low word."""
    return np.stack([value >> np.uint64(32), value & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)
