"""The fused engine against the reference, part by part and whole; the batch does not matter, and no image breaks it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_pretrain.views import CHAIN, ViewSpec, fused, reference
from ssl_pretrain.views.colour import stages, yiq_turn
from ssl_pretrain.views.plan import COLOUR_OPS, COLUMNS, INDEX, canvas_px, plan

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIMCLR = ViewSpec(
    "simclr",
    64,
    (0.2, 1.0),
    count=2,
    vflip_p=0.5,
    turn_p=0.75,
    blur_p=0.5,
    jitter_p=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    gray_p=0.2,
)
DINO = [
    replace(SIMCLR, name="global", scale=(0.4, 1.0), vflip_p=0, turn_p=0, brightness=0.4, contrast=0.4, saturation=0.2,
            hue=0.1, solarize_p=0.2),
    replace(SIMCLR, name="local", size_px=32, scale=(0.05, 0.4), count=4, vflip_p=0, turn_p=0, brightness=0.4,
            contrast=0.4, saturation=0.2, hue=0.1),
]  # fmt: skip
GEOMETRY = ViewSpec("geometry", 64, (0.05, 1.0), count=4, vflip_p=0.5, turn_p=0.75, rotate_p=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def field(i: int, height: int = 240, width: int = 320) -> Tensor:
    """Something like a bright microscope field: shaded background, coloured discs, sensor noise; uint8 (H, W, 3)."""
    rng = np.random.default_rng(i)
    y, x = np.mgrid[:height, :width]
    image = (0.75 + 0.15 * x / width)[..., None] * rng.uniform(0.85, 1.05, 3)
    for _ in range(25):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 30)
        disc = 1 / (1 + np.exp((np.hypot(y - cy, x - cx) - r) / 1.5))
        image += disc[..., None] * rng.uniform(-0.5, 0.1, 3)
    image += rng.normal(0, 0.02, image.shape)
    return torch.from_numpy((255 * image.clip(0, 1)).round().astype(np.uint8))


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def both(specs: list[ViewSpec], images: list[Tensor], epoch: int = 0) -> dict[str, Tensor]:
    """Spec name -> difference of the engines (V, B, 3, S, S), as a share of full scale."""
    p = plan(specs, np.arange(len(images)), np.array([image.shape[:2] for image in images]), epoch, 0)
    ours, theirs = (engine.render(p, images, (0, 0, 0), (1, 1, 1)) for engine in (fused, reference))
    assert list(ours) == list(theirs) == [spec.name for spec in specs]
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        assert ours[name].min() >= -1e-6 and ours[name].max() <= 1 + 1e-6
    return {name: (ours[name] - theirs[name]).abs() for name in ours}


def row_of(**values: float) -> np.ndarray:
    row = np.zeros(len(COLUMNS), dtype=np.float32)
    start = {"brightness": 1, "contrast": 1, "saturation": 1, "order_1": 1, "order_2": 2, "order_3": 3}
    for name, value in (start | values).items():
        row[INDEX[name]] = value
    return row


# Geometry


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("crop", [(0, 0, 90, 120), (5, 7, 31, 100), (80, 110, 10, 10), (3, 3, 1, 117), (3, 3, 87, 1)])
def test_geometry_is_exact(crop, flips, turn):
    box = dict(zip(("top", "left", "height", "width"), crop, strict=True))
    row = row_of(**box, hflip=flips[0], vflip=flips[1], turn=turn)
    image = noise(90, 120)
    got = fused.geometry(GEOMETRY, row, image)
    assert (got - reference.geometry(GEOMETRY, row, image)[0]).abs().max() < 2e-6


@pytest.mark.parametrize("size", [(7, 7), (64, 64), (65, 63), (128, 640), (700, 900)])
def test_resize_is_torchs_antialiased(size):
    """Directly against `F.interpolate`, so that a slip shared by both engines is seen."""
    image = noise(*size)
    got = fused.geometry(GEOMETRY, row_of(height=size[0], width=size[1]), image)
    chw = image.permute(2, 0, 1)[None].float() / 255
    want = F.interpolate(chw, (64, 64), mode="bilinear", antialias=True, align_corners=False)[0]
    assert (got - want).abs().max() < 2e-6


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size_px", [64, 4, 2, 1])
def test_blur_is_exact(size_px, sigma):
    spec = replace(GEOMETRY, size_px=size_px, blur_sigma=(0.1, 2.0), chain=("blur",))
    row = row_of(height=50, width=60, blur=1, sigma=sigma, turn=1)
    taps = fused.blur_taps(size_px, 2 * min(6, size_px - 1) + 1, sigma)
    got = fused.blur(fused.geometry(spec, row, noise(50, 60)), taps)
    assert (got - reference.view(spec, row, noise(50, 60))[0]).abs().max() < 1e-6


ANGLES = [-math.pi, -2.0, -math.pi / 2, -0.3, 1e-3, 0.5, math.pi / 4, math.pi / 2, 3.0]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("turned", [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)])
@pytest.mark.parametrize("crop", [(20, 30, 40, 60), (0, 0, 90, 120), (80, 0, 10, 14), (3, 3, 1, 117)])
def test_rotation_is_exact(crop, turned, angle):
    box = dict(zip(("top", "left", "height", "width"), crop, strict=True))
    row = row_of(**box, hflip=turned[0], vflip=turned[1], turn=turned[2], angle=angle)
    got = fused.geometry(GEOMETRY, row, noise(90, 120))
    assert got.shape == (3, 64, 64)
    # the reference turns by an angle in float32 degrees
    assert (got - reference.geometry(GEOMETRY, row, noise(90, 120))[0]).abs().max() < 1e-4


@pytest.mark.parametrize(("quarters", "angle"), [(1, math.pi / 2), (2, math.pi), (3, -math.pi / 2)])
def test_a_rotation_by_right_angles_is_a_turn(quarters, angle):
    """Away from the crop's border, where a turn sees nothing of what lies beyond."""
    box = {"top": 20.0, "left": 30.0, "height": 50.0, "width": 70.0}
    turned, rotated = (
        fused.geometry(GEOMETRY, row_of(**box, **how), noise(90, 120)) for how in ({"turn": quarters}, {"angle": angle})
    )
    assert (turned - rotated)[:, 3:-3, 3:-3].abs().max() < 1e-5


def test_rotation_leaves_no_empty_corner_and_shows_the_mirror_image():
    white = torch.full((40, 50, 3), 255, dtype=torch.uint8)
    for angle in ANGLES:
        x = fused.geometry(GEOMETRY, row_of(height=40, width=50, angle=angle), white)
        assert (x - 1).abs().max() < 1e-5
    left_half_black = white.clone()
    left_half_black[:, :25] = 0
    x = fused.geometry(GEOMETRY, row_of(height=40, width=50, angle=math.pi / 4), left_half_black)
    # turned by 45 degrees counter-clockwise, the left half is the lower left triangle
    assert x[:, -1, 0].max() < 1e-5 and x[:, 0, -1].min() > 1 - 1e-5
    assert x[:, 50, 10].max() < 1e-5 and x[:, 10, 50].min() > 1 - 1e-5


@pytest.mark.parametrize("degrees", [5.0, 30.0, 180.0])
@pytest.mark.parametrize("size_px", [1, 8, 63, 64])
def test_the_canvas_holds_every_corner(size_px, degrees):
    spec = replace(GEOMETRY, size_px=size_px, rotate_degrees=degrees)
    worst = max(abs(math.cos(math.radians(d))) + abs(math.sin(math.radians(d))) for d in np.linspace(0, degrees, 200))
    assert canvas_px(spec) >= size_px * worst and (canvas_px(spec) - size_px) % 2 == 0


def test_rotated_views_shrink_without_aliasing():
    """A fine checkerboard becomes gray, at any angle; without antialias it would be black and white."""
    y, x = np.mgrid[:300, :300]
    board = torch.from_numpy(np.repeat((((y + x) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2))
    for angle in ANGLES:
        view = fused.geometry(replace(GEOMETRY, size_px=32), row_of(height=300, width=300, angle=angle), board)
        assert (view - 0.5).abs().max() < 0.02


# Colour


def apply_colour(spec: ViewSpec, rows_NC: np.ndarray, x_NCSS: Tensor) -> Tensor:
    return fused.colour_step(spec, stages(spec, rows_NC), fused.EAGER)(x_NCSS.clone(), slice(None))


def reference_colour(spec: ViewSpec, rows_NC: np.ndarray, x_NCSS: Tensor) -> Tensor:
    views = [reference.colour(spec, row, x[None]) for row, x in zip(rows_NC, x_NCSS, strict=True)]
    return torch.cat(views)


def random_rows(count: int, strength: float, **fixed: float) -> np.ndarray:
    spec = replace(SIMCLR, count=1, brightness=strength, contrast=strength, saturation=strength, hue=0.5)
    rows_NC = plan([spec], np.arange(count), np.full((count, 2), 50), 0, 0).of(0)[:, 0].copy()
    for name, value in ({"jitter": 1, "gray": 0} | fixed).items():
        rows_NC[:, INDEX[name]] = value
    return rows_NC


def test_colour_is_exact_where_nothing_clips():
    rows_NC = random_rows(64, 0.2, hue=0)
    x_NCSS = 0.4 + 0.2 * torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    got = apply_colour(SIMCLR, rows_NC, x_NCSS)
    assert got.min() > 0 and got.max() < 1
    assert (got - reference_colour(SIMCLR, rows_NC, x_NCSS)).abs().max() < 2e-6


def test_colour_is_exact_where_it_clips_between_the_ops_too():
    """All 24 orders, factors to 3, values at both ends: a clamp left out shows as 0.1 and more."""
    rows_NC = random_rows(256, 2.0)
    orders = {tuple(row) for row in rows_NC[:, INDEX["order_0"] : INDEX["order_3"] + 1].tolist()}
    assert len(orders) == 24
    x_NCSS = torch.rand(256, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.3
    x_NCSS = x_NCSS.clamp(0, 1)
    got, want = apply_colour(SIMCLR, rows_NC, x_NCSS), reference_colour(SIMCLR, rows_NC, x_NCSS)
    assert (got - want).abs().max() < 1e-4
    assert (got - want).abs().mean() < 1e-6


def test_chains_within_bounds_are_one_stage():
    rows_NC = random_rows(32, 0.9, hue=0, gray=1)
    for op in COLOUR_OPS[:3]:
        rows_NC[:, INDEX[op]] = rows_NC[:, INDEX[op]].clip(0, 1)
    found = stages(SIMCLR, rows_NC)
    assert found.auv_NK3.shape == (32, 1, 3)
    assert np.allclose(found.auv_NK3[:, 0, 0], 0), "gray: nothing of the colour is left"


@pytest.mark.parametrize("turns", [-0.5, -0.21, 1e-4, 1 / 6, 0.37, 0.5])
def test_hue_is_exact(turns):
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([0.0, 0.2, 0.5, 1.0])  # ties, grays, black, white
    x[1].view(3, -1)[:, :64] = torch.cartesian_prod(grid, grid, grid).T
    x[2] = x[2, :1]
    got = fused.shift_hue(x.clone(), torch.full((3,), turns))
    row = row_of(jitter=1, hue=turns)
    want = torch.cat([reference.colour(SIMCLR, row, one[None]) for one in x])
    assert (got - want).abs().max() < 3e-6


@pytest.mark.parametrize("turns", [-0.5, -0.21, 1e-4, 1 / 6, 0.37, 0.5])
def test_hue_in_yiq(turns):
    """Turned chroma by hand: luma stays, gray stays gray, saturation (the radius) stays, and the angle moves."""
    x = 0.4 + 0.2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[1] = x[1, :1]
    spec = replace(SIMCLR, hue_space="yiq")
    row = row_of(jitter=1, hue=turns)
    got = apply_colour(spec, np.stack([row, row]), x)
    assert (got - torch.cat([reference.colour(spec, row, one[None]) for one in x])).abs().max() < 1e-6
    assert (got[1] - x[1]).abs().max() < 1e-6
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    before, after = (np.einsum("dc,cij->dij", to_yiq, v[0].double().numpy()) for v in (x, got))
    assert np.abs(after[0] - before[0]).max() < 1e-6
    chroma = [v[1] + 1j * v[2] for v in (before, after)]
    assert np.abs(chroma[1] - chroma[0] * np.exp(-2j * math.pi * turns)).max() < 1e-6


def test_hue_in_yiq_turns_the_way_of_hsv():
    red = torch.tensor([0.6, 0.4, 0.4]).view(3, 1, 1).expand(3, 4, 4)
    for turns, strongest in ((0.0, 0), (1 / 3, 1), (-1 / 3, 2)):
        got = fused.mix_channels(red[None].clone(), torch.from_numpy(yiq_turn(turns))[None])
        assert got[0, :, 0, 0].argmax() == strongest


@pytest.mark.parametrize("chain", [
    (), ("jitter",), ("gray", "blur"), ("jitter", "gray", "blur", "solarize"), ("solarize", "gray", "jitter"),
    ("gray", "jitter", "blur"), ("jitter", "blur", "gray"),
])  # fmt: skip
@pytest.mark.parametrize("hue_space", ["hsv", "yiq"])
def test_any_order_of_the_ops(chain, hue_space):
    spec = replace(SIMCLR, chain=chain, hue_space=hue_space, gray_p=0.5, solarize_p=0.3, rotate_p=0.4, count=6)
    (difference,) = both([spec], [field(i, 120, 160) for i in range(4)]).values()
    # a value on the solarize threshold may fall on either side: one pixel in a million
    assert difference.flatten(2).mean(-1).max() < 2e-5
    (with_all,) = both([replace(spec, chain=CHAIN)], [field(0, 120, 160)]).values()
    assert with_all.mean() < 2e-5


def test_what_is_not_in_the_chain_is_not_done():
    spec = replace(SIMCLR, chain=(), hflip_p=0, vflip_p=0, turn_p=0)
    p = plan([spec], np.arange(2), np.full((2, 2), 90), 0, 0)
    (got,) = fused.render(p, [noise(90, 90)] * 2, (0, 0, 0), (1, 1, 1)).values()
    plain = [fused.geometry(spec, row, noise(90, 90)) for row in p.of(0).transpose(1, 0, 2).reshape(4, -1)]
    assert torch.equal(got.flatten(0, 1), torch.stack(plain))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarize(threshold):
    """Thresholds that no value of the image meets exactly: inverting is a jump there."""
    spec = replace(SIMCLR, solarize_p=1.0, solarize_threshold=threshold, jitter_p=0.0)
    assert both([spec], [field(0)])["simclr"].mean() < 1e-4


def test_batched_colour_is_that_of_single_views():
    """The other way of working, for a device that wants all views at once."""
    rows_NC = random_rows(24, 0.8)
    rows_NC[::3, INDEX["jitter"]] = 0
    rows_NC[::5, INDEX["gray"]] = 1
    x_NCSS = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    step = fused.colour_step(SIMCLR, stages(SIMCLR, rows_NC), fused.EAGER)
    whole = step(x_NCSS.clone(), slice(None))
    single = torch.cat([step(x_NCSS[n : n + 1].clone(), slice(n, n + 1)) for n in range(24)])
    assert (whole - single).abs().max() < 1e-6
    assert torch.equal(whole[3], x_NCSS[3]), "neither jittered nor gray"


# Whole views


@pytest.mark.parametrize("specs", [[SIMCLR], DINO, [GEOMETRY]], ids=["simclr", "dino", "geometry"])
@pytest.mark.parametrize("epoch", range(2))
def test_views_are_the_references(specs, epoch):
    images = [field(i, 150 + 40 * i, 320 - 30 * i) for i in range(6)] + [noise(100, 130), noise(50, 30)]
    for name, difference in both(specs, images, epoch).items():
        assert difference.flatten(2).mean(-1).max() < 1e-6, name
        assert difference.max() < 1e-4, name


def test_normalised_and_cast():
    p = plan([SIMCLR], np.arange(3), np.full((3, 2), [240, 320]), 0, 0)
    images = [field(i) for i in range(3)]
    ours, theirs = (engine.render(p, images, MEAN, STD)["simclr"] for engine in (fused, reference))
    assert (ours - theirs).abs().max() < 1e-4
    half = fused.render(p, images, MEAN, STD, device="cpu", dtype=torch.bfloat16)["simclr"]
    assert half.dtype == torch.bfloat16 and torch.equal(half, ours.to(torch.bfloat16))


@pytest.mark.parametrize("engine", [fused, reference], ids=["fused", "reference"])
def test_the_batch_does_not_matter(engine):
    specs = [SIMCLR, DINO[0], DINO[1]]
    images = [field(i, 90 + 5 * i, 200 - 3 * i) for i in range(32)]

    def of(ids: list[int]) -> dict[str, Tensor]:
        sizes = np.array([images[i].shape[:2] for i in ids])
        return engine.render(plan(specs, np.array(ids), sizes, 2, 0), [images[i] for i in ids], MEAN, STD)

    whole = of(list(range(32)))
    for ids in (list(range(8)), [31, 5, 17], [9]):
        part = of(ids)
        for name in whole:
            assert torch.equal(part[name], whole[name][:, ids])


def test_images_are_not_written_to():
    images = [field(0), field(1)]
    copies = [image.clone() for image in images]
    both([SIMCLR, *DINO], images)
    assert all(torch.equal(a, b) for a, b in zip(images, copies, strict=True))


def test_another_number_of_images_than_planned_is_refused():
    p = plan([SIMCLR], np.arange(2), np.full((2, 2), 64), 0, 0)
    with pytest.raises(ValueError, match="for 2 images"):
        fused.render(p, [noise(64, 64)] * 4, MEAN, STD)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 900), st.integers(8, 1300), st.booleans(), st.integers(0, 1000))
@example(1, 1300, False, 0)
@example(900, 1, True, 0)
@example(1, 1, False, 0)
@example(8, 8, True, 0)
@example(900, 1300, False, 0)
@example(8, 4224, False, 1)
@example(4096, 8, True, 1)
@example(4096, 4224, False, 0)
def test_any_size(height, width, grey, epoch):
    image = noise(height, width)
    if grey:
        image[..., 1:] = image[..., :1]
    specs = [replace(SIMCLR, size_px=32, rotate_p=0.4), replace(DINO[1], count=2, solarize_p=0.5)]
    for difference in both(specs, [image], epoch).values():
        assert difference.flatten(2).mean(-1).max() < 1e-4
        assert difference.isfinite().all()
    if grey:
        drawn = plan(specs, np.arange(1), np.array([[height, width]]), epoch, 0)
        for x in fused.render(drawn, [image], (0, 0, 0), (1, 1, 1)).values():
            assert (x[:, :, 1:] - x[:, :, :1]).abs().max() < 1e-5, "grey stays grey"


@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (200, 220, 180), (1, 0, 0), (0, 255, 255)]
)
@pytest.mark.parametrize("engine", [fused, reference], ids=["fused", "reference"])
def test_flat_images(engine, colour):
    """No NaN, no warning (they are errors here), and a flat image stays flat and in range."""
    image = torch.tensor(colour, dtype=torch.uint8).expand(40, 60, 3)
    specs = [replace(SIMCLR, count=16, solarize_p=0.3, size_px=24, rotate_p=0.5), replace(DINO[1], count=8)]
    p = plan(specs, np.arange(1), np.array([[40, 60]]), 0, 0)
    for x in engine.render(p, [image], (0, 0, 0), (1, 1, 1)).values():
        assert x.isfinite().all()
        assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6
        assert (x.amax((-2, -1)) - x.amin((-2, -1))).max() < 1e-5


def test_threads_change_no_bit_and_are_given_back() -> None:
    """torch adds up what is large in several parts where it has several threads."""
    images = [field(i, 400, 500) for i in range(2)]
    p = plan([replace(SIMCLR, size_px=256)], np.arange(2), np.array([image.shape[:2] for image in images]), 0, 0)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fused.render(p, images, MEAN, STD)["simclr"])
        assert torch.get_num_threads() == threads
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="for 2 images"):
        fused.render(p, images[:1], MEAN, STD)
    assert torch.get_num_threads() == 2
