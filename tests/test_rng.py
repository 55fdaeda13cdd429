"""The counter-based randomness: the published answers, uniformity, independence of neighbours, permutations."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from ssl_pretrain import rng

# Random123's kat_vectors, threefry2x32 20 rounds: key, counter, answer
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]

PINNED_KEY = ["0x690f1f5c", "0x6efeffb7"]
PINNED_UNIFORM = [0.7495853563940835, 0.34967537544418625, 0.8883145357836726]
PINNED_ORDER = [3, 5, 4, 1, 6, 7, 2, 0]
PINNED_SEED = 5795670591166192751


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN)
def test_threefry_known_answers(key, counter, answer):
    got = rng.threefry_2x32(np.array(key, np.uint32), np.array(counter, np.uint32))
    assert tuple(got.tolist()) == answer


def test_threefry_is_vectorised_without_mixing():
    keys, counters, answers = (np.array(column, np.uint32) for column in zip(*KNOWN, strict=True))
    assert np.array_equal(rng.threefry_2x32(keys, counters), answers)
    grid = rng.threefry_2x32(keys[:, None], counters)
    assert grid.shape == (3, 3, 2)
    assert np.array_equal(grid[np.arange(3), np.arange(3)], answers)


def test_the_bits_are_pinned():
    """A change of these numbers changes every run that is resumed with a newer version."""
    key = rng.fold_in(rng.key(7, "views"), 3)
    assert [hex(word) for word in rng.key(0, "views").tolist()] == PINNED_KEY
    assert rng.uniform(key, 3).tolist() == PINNED_UNIFORM
    assert rng.permutation(key, 8).tolist() == PINNED_ORDER
    assert rng.torch_seed(key) == PINNED_SEED


def test_same_in_another_process():
    """No `hash()`, no global state: PYTHONHASHSEED does not matter."""
    code = "from ssl_pretrain import rng; print(rng.uniform(rng.fold_in(rng.key(5, 'x'), 2**40), 2).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(rng.uniform(rng.fold_in(rng.key(5, "x"), 2**40), 2).tolist())}


def test_fold_in_broadcasts_and_tells_all_data_apart():
    keys = rng.fold_in(rng.key(0, "a"), np.arange(6).reshape(2, 3))
    assert keys.shape == (2, 3, 2)
    assert np.array_equal(keys[1, 2], rng.fold_in(rng.key(0, "a"), 5))
    pairs = rng.fold_in(keys[:, :1], np.arange(4))
    assert pairs.shape == (2, 4, 2)
    assert np.array_equal(pairs[1, 3], rng.fold_in(keys[1, 0], 3))
    data = np.array([0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1])
    assert len({tuple(k) for k in rng.fold_in(rng.key(0, "a"), data).tolist()}) == len(data)


@pytest.mark.parametrize("data", [-1, 2**63, np.array([0, -5])])
def test_fold_in_refuses_what_it_cannot_tell_apart(data):
    with pytest.raises(ValueError, match="from 0"):
        rng.fold_in(rng.key(0, "a"), data)
    with pytest.raises(TypeError, match="integers"):
        rng.fold_in(rng.key(0, "a"), np.array([0.5]))


def test_seeds_and_purposes_give_other_numbers():
    firsts = {rng.uniform(rng.key(seed, purpose), 1)[0] for seed in range(50) for purpose in ("views", "masks", "x")}
    assert len(firsts) == 150


def test_a_number_does_not_depend_on_how_many_are_drawn():
    key = rng.key(1, "a")
    assert np.array_equal(rng.uniform(key, 5), rng.uniform(key, 100)[:5])


def test_a_folded_key_is_no_drawn_number():
    key = rng.key(1, "a")
    drawn = set(rng._bits(key, 1000, rng.DRAW).tolist())
    folded = {int(hi) << 32 | int(lo) for hi, lo in rng.fold_in(key, np.arange(1000))}
    assert not drawn & folded


def test_uniform():
    u = rng.uniform(rng.key(0, "uniform"), 200_000)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    bits = (rng._bits(rng.key(0, "bits"), 20_000, rng.DRAW)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize("level", ["epoch", "image", "view", "draw", "seed"])
def test_neighbours_are_independent(level):
    """First numbers of keys that differ by one in one level: uniform in the square, uncorrelated."""
    n = np.arange(40_000)
    if level == "draw":
        u = rng.uniform(rng.key(0, "a"), len(n))
    elif level == "seed":
        u = np.array([rng.uniform(rng.key(seed, "a"), 1)[0] for seed in range(4000)])
    else:
        steps = {"epoch": (n, 5, 1), "image": (3, n, 1), "view": (3, 5, n)}[level]
        key = rng.key(0, "views")
        for step in steps:
            key = rng.fold_in(key, step)
        u = rng.uniform(key, 1)[..., 0]
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / np.sqrt(len(u))
    cells = np.histogram2d(u[:-1:2], u[1::2], bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-3


def test_permutation():
    orders = rng.permutation(rng.fold_in(rng.key(0, "order"), np.arange(24_000)), 4)
    assert orders.shape == (24_000, 4) and orders.dtype == np.int64
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    counts = [int((orders == order).all(axis=1).sum()) for order in itertools.permutations(range(4))]
    assert sum(counts) == 24_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_permutation_of_many_none_and_one():
    key = rng.key(0, "order")
    order = rng.permutation(key, 100_000)
    assert np.array_equal(np.sort(order), np.arange(100_000))
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 5 / np.sqrt(100_000)
    assert rng.permutation(key, 0).shape == (0,)
    assert rng.permutation(key, 1).tolist() == [0]


def test_torch_seed():
    seeds = [rng.torch_seed(rng.fold_in(rng.key(0, "torch"), step)) for step in range(2000)]
    assert len(set(seeds)) == 2000 and min(seeds) >= 0 and max(seeds) < 2**63
    assert max(seeds) > 2**62
