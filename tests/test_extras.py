"""The extra ops: numbers worked by hand, independence of the batch, range; how they are made and where they go."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import names
from ssl_pretrain.views import CHAIN, ViewSpec, extras
from ssl_pretrain.views.extras import Extra, create, kornia_op, placed
from ssl_pretrain.views.extras.defocus import Defocus, discs
from ssl_pretrain.views.extras.dust import MOST, Dust
from ssl_pretrain.views.extras.illumination import Illumination
from ssl_pretrain.views.extras.sensor_noise import SensorNoise, deviates
from ssl_pretrain.views.extras.stain import DARKEST, DYES, Stain
from ssl_pretrain.views.extras.white_balance import WhiteBalance
from ssl_pretrain.views.plan import plan

OPS = [name for name in names("views.extras") if name != "kornia_op"]
STRONG: list[Extra] = [
    Stain(p=1, alpha=1, beta=1, dyes="giemsa"),
    WhiteBalance(p=1, gain=4),
    Illumination(p=1, gradient=1, vignette=1),
    Defocus(p=1, radius_px=(0, 7)),
    SensorNoise(p=1, shot=1, read=1),
    SensorNoise(p=1, mono=True),
    Dust(p=1, most=MOST, radius=(0.001, 1), opacity=(0, 1)),
]
ALL = [*(create(name, {"p": 1.0}) for name in OPS), *STRONG]


def title(op: Extra) -> str:
    return repr(op)


def rows(op: Extra, ids: Any, size_px: int = 32) -> torch.Tensor:
    """(N, P) as the plan draws them."""
    spec = ViewSpec("view", size_px, (0.2, 1.0), chain=(op,))
    ids_B = np.asarray(ids)
    drawn = plan([spec], ids_B, np.full((len(ids_B), 2), 64), epoch=2, seed=5)
    return torch.from_numpy(drawn.extra(0, 0)[:, 0, 1:].copy())


def row(op: Extra, *u: float, size_px: int = 32) -> torch.Tensor:
    """(1, P) of these draws."""
    return torch.from_numpy(op.parameters(np.array([u]), size_px).astype(np.float32))


def pictures(count: int, size_px: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed))


# Every op


def test_every_op_is_tried() -> None:
    assert {type(op) for op in ALL} == {type(create(name, {})) for name in OPS} and len(OPS) >= 6


@pytest.mark.parametrize("op", ALL, ids=title)
@pytest.mark.parametrize("size_px", [1, 4, 33])
def test_values_stay_in_range(op: Extra, size_px: int) -> None:
    row_NP = torch.cat([rows(op, range(20), size_px), row(op, *[0.0] * op.draws), row(op, *[1 - 2**-53] * op.draws)])
    count = len(row_NP)
    ones = torch.ones(count, 3, size_px, size_px)
    for x in (ones, 0 * ones, ones / 2, pictures(count, size_px), pictures(count, size_px).round()):
        y = op.apply(x.clone(), row_NP)
        assert y.shape == x.shape and y.dtype == torch.float32
        assert y.isfinite().all() and y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("op", ALL, ids=title)
def test_a_view_is_the_same_in_any_batch(op: Extra) -> None:
    x, row_NP = pictures(7), rows(op, range(7))
    together = op.apply(x.clone(), row_NP)
    apart = torch.cat([op.apply(x[i : i + 1].clone(), row_NP[i : i + 1]) for i in range(7)])
    if isinstance(op, Defocus):
        # A convolution in groups adds up in another order for another number of groups.
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    else:
        assert torch.equal(together, apart)
    backwards = op.apply(x.flip(0), row_NP.flip(0)).flip(0)
    torch.testing.assert_close(together, backwards, atol=1e-6 * isinstance(op, Defocus), rtol=0)


@pytest.mark.parametrize("op", ALL, ids=title)
def test_parameters_are_the_same_in_any_batch(op: Extra) -> None:
    assert torch.equal(rows(op, [9, 4, 70])[1:], rows(op, [4, 70, 1, 2])[:2])
    assert rows(op, [3]).shape == (1, len(op.columns))
    assert len(rows(op, range(20)).unique(dim=0)) > 15, "some radii are below half a pixel, which is one"


@pytest.mark.parametrize("op", ALL, ids=title)
def test_apply_draws_nothing_and_reads_nothing_back(op: Extra) -> None:
    state = torch.get_rng_state()
    x, row_NP = pictures(2), rows(op, range(2))
    assert torch.equal(op.apply(x.clone(), row_NP), op.apply(x.clone(), row_NP))
    assert torch.equal(torch.get_rng_state(), state)
    # Tensors without values: one that is read, or that is made on the CPU meanwhile, stops it.
    assert op.apply(x.to("meta"), row_NP.to("meta")).device.type == "meta"


@pytest.mark.parametrize("op", ALL, ids=title)
def test_a_view_whose_channels_share_memory(op: Extra) -> None:
    gray = pictures(2)[:, :1]
    assert torch.equal(
        op.apply(gray.expand(2, 3, 32, 32), rows(op, [0, 1])), op.apply(gray.repeat(1, 3, 1, 1), rows(op, [0, 1]))
    )


@pytest.mark.parametrize("name", OPS)
def test_defaults_are_gentle(name: str) -> None:
    op = create(name, {})
    assert op.p == 0.5
    x = torch.full((40, 3, 32, 32), 0.5)
    change = (op.apply(x.clone(), rows(op, range(40))) - x).abs()
    assert change.mean() < 0.1 and change.max() < 0.3


# Stain


@settings(deadline=None, max_examples=30)
@given(
    u=st.lists(st.floats(0, 0.999), min_size=6, max_size=6),
    alpha=st.floats(0, 0.5),
    beta=st.floats(0, 0.3),
    dyes=st.sampled_from(["hed", "giemsa"]),
)
def test_stain_is_deconvolution_pixel_by_pixel(u: list[float], alpha: float, beta: float, dyes: Any) -> None:
    op = Stain(1.0, alpha, beta, dyes)
    x = pictures(1, 4)
    first, second = (np.array(dye) / math.hypot(*dye) for dye in DYES[dyes][:2])
    third = np.cross(first, second) if dyes == "giemsa" else np.array(DYES["hed"][2])
    third = third / math.hypot(*third)
    ours = op.apply(x, row(op, *u))[0].double().numpy()
    for i, j in itertools.product(range(4), repeat=2):
        pixel = x[0, :, i, j].double().numpy()
        density = -np.log((pixel + DARKEST) / (1 + DARKEST))
        amounts = np.linalg.solve(np.stack([first, second, third], axis=1), density)
        amounts = [a * (1 - alpha + 2 * alpha * u[k]) - beta + 2 * beta * u[3 + k] for k, a in enumerate(amounts)]
        light = np.exp(-(amounts[0] * first + amounts[1] * second + amounts[2] * third)) * (1 + DARKEST) - DARKEST
        np.testing.assert_allclose(ours[:, i, j], light.clip(0, 1), atol=3e-6)


def test_stain_of_no_strength_changes_nothing() -> None:
    op = Stain(1.0, alpha=0, beta=0)
    x = torch.cat([pictures(3), torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])
    torch.testing.assert_close(op.apply(x, rows(op, range(5))), x, atol=1e-6, rtol=0)


def test_stain_scales_one_dye_and_leaves_the_others() -> None:
    op = Stain(1.0, alpha=0.2, beta=0)
    more_eosin = row(op, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5)

    def pixel(haematoxylin: float, eosin: float) -> torch.Tensor:
        # Both rows of Ruifrok and Johnston's are of length 1 but for rounding.
        density = [haematoxylin * h / 0.998298 + eosin * e / 0.998549 for h, e in zip(*DYES["hed"][:2], strict=True)]
        return torch.tensor([(1 + DARKEST) * math.exp(-d) - DARKEST for d in density]).view(1, 3, 1, 1)

    torch.testing.assert_close(op.apply(pixel(0.7, 0), more_eosin), pixel(0.7, 0), atol=1e-5, rtol=0)
    torch.testing.assert_close(op.apply(pixel(0, 1), more_eosin), pixel(0, 1.2), atol=1e-5, rtol=0)
    torch.testing.assert_close(op.apply(pixel(0.4, 0.5), more_eosin), pixel(0.4, 0.6), atol=1e-5, rtol=0)


def test_stain_shift_tints_the_empty_field() -> None:
    op = Stain(1.0, alpha=0, beta=0.1)
    # Eosin everywhere: green loses most, exp(-0.1 * 0.99).
    y = op.apply(torch.ones(1, 3, 2, 2), row(op, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5))[0, :, 0, 0]
    torch.testing.assert_close(y, torch.tensor([0.9930, 0.9053, 0.9890]), atol=2e-4, rtol=0)


# White balance


def test_white_balance_of_a_constant() -> None:
    op = WhiteBalance(1.0, gain=1.25)
    y = op.apply(torch.full((1, 3, 2, 2), 0.5), row(op, 1.0, 0.0))
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([0.625, 0.5, 0.4]))
    assert torch.equal(op.apply(torch.full((1, 3, 2, 2), 0.5), row(op, 0.5, 0.5)), torch.full((1, 3, 2, 2), 0.5))


def test_white_balance_gains_are_log_uniform() -> None:
    gains = rows(WhiteBalance(1.0, gain=1.5), range(2000)).double()
    assert (gains[:, 1] == 1).all()
    for c in (0, 2):
        share = gains[:, c].log() / math.log(1.5) / 2 + 0.5
        assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(gains[:, 0], gains[:, 2])[0, 1]) < 0.08


# Illumination


def test_illumination_by_hand() -> None:
    op = Illumination(1.0, gradient=0.4, vignette=0.2)
    white = torch.ones(1, 3, 2, 2)
    # Light from the right, half of the largest loss: 0.2 from side to side, so 0.05 and 0.15 at a quarter of the way;
    # no vignette.
    y = op.apply(white, row(op, 0.0, 0.5, 0.0))
    torch.testing.assert_close(y[0, 0], torch.tensor([[0.85, 0.95], [0.85, 0.95]]))
    # From below: y grows downwards.
    y = op.apply(white, row(op, 0.25, 0.5, 0.0))
    torch.testing.assert_close(y[0, 2], torch.tensor([[0.85, 0.85], [0.95, 0.95]]))
    # From the lower right corner: all of the loss from corner to corner.
    y = op.apply(white, row(op, 0.125, 0.5, 0.0))
    torch.testing.assert_close(y[0, 0], torch.tensor([[0.85, 0.9], [0.9, 0.95]]))
    # A vignette of 0.1 in the corners, where r = 1; the pixels' centres are halfway, r^2 = 1/4.
    y = op.apply(white, row(op, 0.0, 0.0, 0.5))
    torch.testing.assert_close(y, torch.full_like(y, 0.975))
    y = op.apply(white, row(op, 0.0, 0.5, 0.5))
    torch.testing.assert_close(y[0, 1], 0.975 * torch.tensor([[0.85, 0.95], [0.85, 0.95]]))


def test_illumination_only_darkens_and_is_the_same_in_all_channels() -> None:
    op = Illumination(1.0, gradient=0.3, vignette=0.2)
    x = pictures(30, 41) * 0.9 + 0.1
    factor = op.apply(x.clone(), rows(op, range(30), 41)) / x
    assert factor.max() <= 1 + 1e-6 and factor.min() >= 0.7 * 0.8
    torch.testing.assert_close(factor[:, 0], factor[:, 1])
    torch.testing.assert_close(factor[:, 0], factor[:, 2])
    # Twice the mean of a gradient is the sum of two opposite pixels; with the vignette r is the same there.
    radius = Illumination(1.0, gradient=0, vignette=0.2)
    y = radius.apply(torch.ones(5, 3, 41, 41), rows(radius, range(5), 41))
    assert y[:, :, 20, 20].min() > 1 - 1e-6
    for turned in (y.flip(-1), y.flip(-2), y.transpose(-1, -2)):
        torch.testing.assert_close(turned, y, atol=1e-6, rtol=0)


# Defocus


@pytest.mark.parametrize("radius", [1.0, 1.7, 2.5, 4.0, 6.3])
def test_defocus_of_a_point_is_a_disc(radius: float) -> None:
    op = Defocus(1.0, (radius, radius))
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    y = op.apply(point, row(op, 0.3)).double()[0]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])
    at = torch.arange(31.0).double() - 15
    assert y[0].sum() == pytest.approx(1, abs=1e-5)
    assert (y[0] * at).sum() == pytest.approx(0, abs=1e-5)
    # A disc's mean of x^2 + y^2 is r^2 / 2; binning into pixels adds 1/12 per axis (Sheppard, where discs are large).
    moment = (y[0] * (at.square() + at.square()[:, None])).sum()
    assert moment == pytest.approx(radius**2 / 2 + 1 / 6, abs=0.12)
    # The share of each pixel that is covered, by brute force.
    fine = (np.arange(31 * 40) + 0.5) / 40 - 15.5
    covered = np.hypot(fine, fine[:, None]) < radius
    share = covered.reshape(31, 40, 31, 40).mean((1, 3)) / (math.pi * radius**2)
    np.testing.assert_allclose(y[0].numpy(), share, atol=0.01 / radius**2)


def test_defocus_grows_smoothly_with_the_radius() -> None:
    kernels = discs(torch.linspace(0.5, 4, 351), 4)
    spread = (kernels * (torch.arange(-4, 5.0).square() + torch.arange(-4, 5.0).square()[:, None])).sum((1, 2))
    step = spread.diff()
    # 0.01 px more of radius is about 0.01 r more of moment, never a jump of a ring of pixels (0.5 and more).
    assert step.min() > -0.01 and step.max() < 0.12
    assert spread[0] == 0 and spread[-1] == pytest.approx(8 + 1 / 6, rel=0.03)


def test_defocus_below_half_a_pixel_is_nothing() -> None:
    op = Defocus(1.0, (0.0, 0.5))
    assert torch.equal(op.apply(pictures(4), rows(op, range(4))), pictures(4))
    wider = Defocus(1.0, (0.0, 3.0))
    assert torch.equal(wider.apply(pictures(1), row(wider, 0.0)), pictures(1))


@pytest.mark.parametrize("size_px", [1, 2, 3, 5, 6, 20])
def test_defocus_mirrors_at_the_border_however_small_the_view(size_px: int) -> None:
    op = Defocus(1.0, (5.2, 5.2))
    x = pictures(2, size_px)
    kernel = discs(torch.tensor([5.2]), 5)[0].double().numpy()
    expected = [[ndimage.convolve(plane, kernel, mode="mirror") for plane in view] for view in x.double().numpy()]
    np.testing.assert_allclose(op.apply(x, row(op, 0.5).repeat(2, 1)).numpy(), expected, atol=1e-5)


def test_each_view_has_its_own_radius() -> None:
    op = Defocus(1.0, (0.5, 6.0))
    y = op.apply(pictures(1).repeat(3, 1, 1, 1), torch.tensor([[0.5], [2.0], [6.0]]))
    spread = y.std((1, 2, 3))
    assert torch.equal(y[0], pictures(1)[0]) and spread[0] > 2 * spread[1] > 3 * spread[2]


# Sensor noise


def words(count: int) -> torch.Tensor:
    """Random ones, and some that are neighbours of the first."""
    drawn = np.random.default_rng(0).integers(0, 2**24, (count, 2))
    drawn[1:5] = drawn[0] + np.array([(1, 0), (0, 1), (1, 1), (2, 0)])
    drawn[5:8] = (0, 0), (1, 0), (0, 1)
    return torch.from_numpy(drawn.astype(np.int32))


def test_deviates_are_the_hash_that_they_say_they_are() -> None:
    some = words(10)
    ours = deviates(some, 300)
    mask = 2**32 - 1

    def rounds(h: int) -> int:
        h = (h ^ h >> 16) * 0x7FEB352D & mask
        return (h ^ h >> 15) * 0x846CA68B & mask

    for (k0, k1), i in itertools.product(some.tolist(), (0, 1, 2, 255, 299)):
        h = rounds((i * 0x9E3779B1 + k0 * 0x85EBCA6B) & mask)
        h = rounds(h ^ (k1 * 0x85EBCA6B & mask))
        h ^= h >> 16
        second = (h ^ h >> 15) * 0x9E3779B1 & mask
        second ^= second >> 16
        total = sum(h.to_bytes(4, "little")) + sum(second.to_bytes(4, "little"))
        z = (total - 1020) / math.sqrt(8 * 65535 / 12)
        assert ours[some.tolist().index([k0, k1]), i].item() == pytest.approx(z, abs=1e-6)


def test_deviates_are_nearly_normal() -> None:
    z = deviates(words(40), 30_000).double().numpy()
    many = math.sqrt(z.size)
    assert abs(z.mean()) < 4 / many and abs(z.var() - 1) < 4 * math.sqrt(2) / many
    assert abs(stats.skew(z, axis=None)) < 4 * math.sqrt(6) / many
    # The sum of 8 bytes: -1.2 / 8.
    assert stats.kurtosis(z, axis=None) == pytest.approx(-0.15, abs=4 * math.sqrt(24) / many)
    # Every view by itself.
    assert np.abs(z.mean(1)).max() < 4.5 / math.sqrt(30_000)
    assert np.abs(z.var(1) - 1).max() < 4.5 * math.sqrt(2 / 30_000)
    for view in z[:8]:
        assert stats.kstest(view[:4000], "norm").pvalue > 1e-3
    assert 4 < np.abs(z).max() < 4.94


def test_deviates_are_independent() -> None:
    size = 64
    z = deviates(words(40), 3 * size * size).double().numpy()
    between_views = np.corrcoef(z) - np.eye(len(z))
    assert np.abs(between_views).max() < 5 / math.sqrt(z.shape[1])
    # Right, below, diagonally, two off, a channel on; of the values and of their squares.
    for lag in (1, 2, 3, 4, size - 1, size, size + 1, 2 * size, size * size, 2 * size * size):
        for a in (z, (z * z - 1) / math.sqrt(1.85)):
            product = a[:, lag:] * a[:, :-lag]
            assert abs(product.mean()) < 4 / math.sqrt(product.size), lag
    # Not a stretch of another view's noise, either: a shift that lines them up would show as a peak.
    for other in range(1, 8):
        across = np.fft.ifft(np.fft.fft(z[0]) * np.fft.fft(z[other]).conj()).real / z.shape[1]
        assert np.abs(across).max() < 6 / math.sqrt(z.shape[1])


def test_noise_has_the_standard_deviation_that_it_says() -> None:
    op = SensorNoise(1.0, shot=0.1, read=0.05)
    for level in (0.3, 0.6):
        x = torch.full((1, 3, 128, 128), level)
        for shot, read in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
            noise = op.apply(x.clone(), row(op, 0.1, 0.2, shot, read)) - x
            expected = math.sqrt((0.1 * shot) ** 2 * level + (0.05 * read) ** 2)
            assert noise.std().item() == pytest.approx(expected, rel=0.02)
            assert abs(noise.mean().item()) < 4 * expected / math.sqrt(noise.numel())
    black = torch.zeros(1, 3, 32, 32)
    assert torch.equal(op.apply(black.clone(), row(op, 0.1, 0.2, 1.0, 0.0)), black)


def test_noise_of_a_camera_without_colours() -> None:
    x = pictures(2)[:, :1].repeat(1, 3, 1, 1)
    mono, colour = SensorNoise(1.0, mono=True), SensorNoise(1.0)
    y = mono.apply(x.clone(), rows(mono, [0, 1]))
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2]) and not torch.equal(y, x)
    y = colour.apply(x.clone(), rows(colour, [0, 1]))
    assert not torch.equal(y[:, 0], y[:, 1]) and not torch.equal(y[:, 1], y[:, 2])


def test_noise_words_are_whole_in_float32() -> None:
    drawn = rows(SensorNoise(1.0), range(500))[:, :2]
    assert torch.equal(drawn, drawn.round()) and drawn.max() < 2**24 and drawn.max() > 0.98 * 2**24
    assert row(SensorNoise(1.0), *[1 - 2**-53] * 4)[0, 0] == 2**24 - 1


# Dust


def speck(x: float, y: float, radius: float, opacity: float, ring: float) -> torch.Tensor:
    """One speck; the others are there with no opacity."""
    return torch.tensor([[x, y, radius, opacity, ring] + [0.5, 0.5, 0.1, 0.0, 0.0] * (MOST - 1)])


def test_dust_darkens_inside_its_radius_only() -> None:
    y = Dust(1.0).apply(torch.full((1, 3, 100, 100), 0.8), speck(0.305, 0.605, 0.1, 0.5, 0.0))[0]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])
    at = torch.arange(100.0) + 0.5
    t = ((at - 30.5).square() + (at[:, None] - 60.5).square()) / 100
    assert (y[0][t >= 1.001] == 0.8).all() and (y[0][t < 0.9] < 0.8).all()
    assert y[0, 60, 30] == pytest.approx(0.4) and y[0].min() == y[0, 60, 30]
    # Half of the radius away: t = 1/4, so 1 - 0.5 * (3/4)^2.
    assert y[0, 60, 35] == pytest.approx(0.8 * (1 - 0.5 * 0.5625), abs=1e-5)


def test_a_ring_is_clear_in_the_middle() -> None:
    y = Dust(1.0).apply(torch.ones(1, 3, 101, 101), speck(0.5, 0.5, 30 / 101, 0.4, 1.0))[0, 0]
    assert y[50, 50] == 1 and y.min() == pytest.approx(0.6, abs=1e-3)
    # Darkest at t = 1/3: 17.3 pixels of 30.
    assert y[50, 50:].argmin() == 17
    assert y[50, 80:].min() == 1


def test_two_specks_multiply() -> None:
    op = Dust(1.0)
    both = speck(0.5, 0.5, 0.3, 0.5, 0.0)
    both[0, 5:10] = torch.tensor([0.6, 0.5, 0.2, 0.3, 1.0])
    one, other = speck(0.5, 0.5, 0.3, 0.5, 0.0), speck(0.6, 0.5, 0.2, 0.3, 1.0)
    torch.testing.assert_close(op.apply(pictures(1), both), op.apply(op.apply(pictures(1), one), other))


def test_dust_counts_and_ranges() -> None:
    op = Dust(1.0, most=3, radius=(0.02, 0.08), opacity=(0.2, 0.3), rings=0.25)
    x, y, radius, opacity, ring = rows(op, range(3000)).view(-1, MOST, 5).unbind(2)
    there = opacity > 0
    assert not there[:, 3].any() and there[:, 0].all() and (there[:, 1] | ~there[:, 2]).all()
    for count in (1, 2, 3):
        assert (there.sum(1) == count).float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    assert (opacity[there] >= 0.2).all() and (opacity[there] <= 0.3).all()
    assert radius.min() >= 0.02 and radius.max() <= 0.08
    assert set(ring.unique().tolist()) == {0.0, 1.0} and ring.mean().item() == pytest.approx(0.25, abs=0.02)
    for place in (x, y):
        assert stats.kstest(place[:, 0].numpy(), "uniform").pvalue > 1e-3


# Place in the chain


def test_ops_are_put_where_the_light_meets_them() -> None:
    stain, blur, noise, white = Stain(), Defocus(), SensorNoise(), WhiteBalance()
    for order in itertools.permutations((stain, blur, noise)):
        chain: tuple[str | Extra, ...] = CHAIN
        for op in order:
            chain = placed(chain, op)
        assert chain == (stain, "blur", blur, "jitter", "gray", "solarize", noise)
    assert placed(placed(CHAIN, blur), white)[1:3] == (blur, white), "ops of one place keep their order"
    assert placed(placed(CHAIN, Dust()), stain)[:2] == (Dust(), stain)
    assert placed((), noise) == (noise,)
    assert placed((noise,), stain) == (stain, noise)
    assert placed(("jitter", "gray"), blur) == (blur, "jitter", "gray")
    assert placed(("blur",), stain) == (stain, "blur") and placed(("blur",), blur) == ("blur", blur)


# Made by name


def test_create() -> None:
    assert create("stain", {}) == Stain()
    assert create("defocus", {"p": 1, "radius_px": [1, 2]}) == Defocus(1.0, (1.0, 2.0))
    assert isinstance(create("defocus", {"radius_px": [1, 2]}).__dict__["radius_px"], tuple)
    assert create("stain", {"dyes": "giemsa", "alpha": 0.1}) == Stain(alpha=0.1, dyes="giemsa")
    assert hash(create("dust", {"opacity": [0.1, 0.2]})) == hash(Dust(opacity=(0.1, 0.2)))


def test_kornias_classes_are_made_by_the_module_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def of(name: str, options: dict[str, Any]) -> Extra:
        asked.append((name, options))
        return Dust()

    monkeypatch.setattr(kornia_op, "of", of)
    assert create("RandomJPEG", {"p": 0.3}) == Dust()
    assert asked == [("RandomJPEG", {"p": 0.3})]


WRONG: list[tuple[str, Any, str]] = [
    ("stian", {}, "no extra op is called 'stian' (did you mean 'stain'?); there are: defocus, dust,"),
    ("Stain", {}, "did you mean 'stain'"),
    ("RandomJPG", {}, "did you mean 'RandomJPEG'"),
    ("kornia_op", {}, "no extra op is called 'kornia_op'"),
    ("annotations", {}, "no extra op is called 'annotations'"),
    ("stain", {"alfa": 0.1}, "unknown key 'alfa' under 'stain' (did you mean 'alpha'?)"),
    ("stain", {"alpha": "much"}, "stain.alpha: Expected a float. Got value: much"),
    ("stain", {"alpha": None}, "stain.alpha holds nothing"),
    ("stain", {"alpha": 1.5}, "stain.alpha is 1.5: it is a number between 0 and 1"),
    ("stain", {"beta": -0.1}, "stain.beta is -0.1"),
    ("stain", {"dyes": "gram"}, "stain.dyes: Expected a Literal"),
    ("stain", {"p": 1.1}, "stain.p is 1.1: it is a number between 0 and 1"),
    ("stain", {"p": math.nan}, "stain.p is nan"),
    ("stain", [0.1], "'stain' is a section: it holds keys and values"),
    ("dust", {"p": -0.1}, "dust.p is -0.1"),
    ("dust", {"most": 5}, "dust.most is 5: it is a number between 1 and 4"),
    ("dust", {"most": 2.5}, "dust.most: Expected a int"),
    ("dust", {"radius": [0.0, 0.1]}, "dust.radius is (0.0, 0.1)"),
    (
        "dust",
        {"opacity": [0.5, 0.1]},
        "dust.opacity is (0.5, 0.1): it is a range, the lower end first, between 0 and 1",
    ),
    ("dust", {"rings": 2}, "dust.rings is 2"),
    ("defocus", {"radius_px": [1, 2, 3]}, "defocus.radius_px: Expected a tuple with 2 elements"),
    ("defocus", {"radius_px": 3}, "defocus.radius_px: Expected a tuple"),
    ("defocus", {"radius_px": [1, 99]}, "defocus.radius_px is (1.0, 99.0)"),
    ("white_balance", {"gain": 0.9}, "white_balance.gain is 0.9: it is a number between 1 and 4"),
    ("illumination", {"gradient": 2}, "illumination.gradient is 2"),
    ("illumination", {"vignette": -1}, "illumination.vignette is -1"),
    ("sensor_noise", {"shot": 2}, "sensor_noise.shot is 2"),
    ("sensor_noise", {"read": -1}, "sensor_noise.read is -1"),
    ("sensor_noise", {"mono": 3}, "sensor_noise.mono: Expected a bool"),
]


@pytest.mark.parametrize(("name", "options", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_in_one_line(name: str, options: Any, says: str) -> None:
    with pytest.raises(UsageError) as error:
        create(name, options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_op_in_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "negative.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar, Literal\n"
        "from ssl_pretrain.views.extras import Extra, Floats, within\n"
        "@dataclass(frozen=True)\n"
        "class Negative(Extra):\n"
        "    share: float = 1.0\n"
        "    def parameters(self, u_NU, size_px):\n"
        "        return u_NU\n"
        "    def apply(self, x_NCSS, row_NP):\n"
        "        return x_NCSS + self.share * (1 - 2 * x_NCSS)\n"
    )
    monkeypatch.setattr(extras, "__path__", [*extras.__path__, str(tmp_path)])
    op = create("negative", {"share": 0.75})
    assert torch.equal(op.apply(torch.zeros(1, 3, 2, 2), rows(op, [0])), torch.full((1, 3, 2, 2), 0.75))
    assert op.place == "camera"
    with pytest.raises(UsageError, match="unknown key 'shere' under 'negative'"):
        create("negative", {"shere": 1})
