"""Fields of cells drawn here: what repeats one is found, what only resembles one is not."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data import duplicates
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.duplicates import detail, families, hashes, near, same, thumbnail
from ssl_pretrain.data.readers import LabelledImage, LabelledSet, read
from ssl_pretrain.probe.objects import Objects, cut, leave_one_out

HEIGHT, WIDTH = 240, 320


@lru_cache
def field(seed: int, cells: int = 25, dirt: int = 0, noise: float = 2.0) -> np.ndarray:
    """Dark discs on a bright field with the vignette that every field of this microscope has, and its dirt."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    grey = 225 - 60 * (((x - 150) / WIDTH) ** 2 + ((y - 110) / HEIGHT) ** 2)
    for at, count, depth, low, high in ((draw, cells, 60, 8, 22), (np.random.default_rng(999), dirt, 40, 3, 8)):
        for _ in range(count):
            cx, cy, radius = at.uniform(0, WIDTH), at.uniform(0, HEIGHT), at.uniform(low, high)
            grey = grey - depth * at.uniform(0.5, 1) / (1 + np.exp(np.hypot(x - cx, y - cy) - radius))
    pixels = grey[..., None] * (1.0, 0.93, 0.95) + np.random.default_rng(seed + 5000).normal(
        0, noise, (HEIGHT, WIDTH, 3)
    )
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=30)
    return np.asarray(Image.open(buffer))


def brighter(image: np.ndarray) -> np.ndarray:
    return (image.astype(float) * 0.75 + 55).clip(0, 255).astype(np.uint8)


def shifted(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.roll(image, (2, 2), (0, 1)))


def halved(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS))


def noisier(image: np.ndarray) -> np.ndarray:
    draw = np.random.default_rng(1)
    return (image + draw.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


COPIES: list[Callable[[np.ndarray], np.ndarray]] = [jpeg, brighter, shifted, halved, noisier]


def pairs(*images: np.ndarray) -> list[tuple[int, int]]:
    small = [thumbnail(image) for image in images]
    assert all(t is not None for t in small)
    return [(i, j) for i, j in near(np.stack([t for t in small if t is not None])).tolist()]


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_a_copy_is_found(copy: Callable[[np.ndarray], np.ndarray], seed: int) -> None:
    others = [field(100 + i) for i in range(3)]
    assert pairs(others[0], field(seed), others[1], copy(field(seed)), others[2]) == [(1, 3)]


def test_a_field_with_few_cells_is_found_again() -> None:
    assert pairs(field(3, cells=3), jpeg(field(3, cells=3)), field(4, cells=3)) == [(0, 1)]


def test_fields_of_one_slide_are_not_joined() -> None:
    """One stain, one illumination, one pattern of dirt: 66 pairs."""
    assert pairs(*(field(seed, dirt=25) for seed in range(12))) == []


def test_blank_fields_are_not_joined() -> None:
    """Nothing but vignette and noise: their hashes are near, and there is nothing to tell one from another."""
    assert pairs(*(field(seed, cells=0) for seed in range(10))) == []
    plain = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    assert pairs(plain, plain, brighter(plain)) == []


def test_blank_fields_with_the_same_dirt_and_other_particles_are_not_joined() -> None:
    """The trap: as wholes they correlate by .9, by what the lens has; the particle tells them apart."""
    fields = [field(seed, cells=1, dirt=120) for seed in range(5)]
    small = np.stack([t for t in map(thumbnail, fields) if t is not None])
    i, j = np.triu_indices(5, 1)
    flat = detail(small).reshape(5, -1)
    assert duplicates.correlation(flat[i], flat[j]).max() > duplicates.WHOLE
    assert near(small).tolist() == []
    assert pairs(fields[0], jpeg(fields[0])) == [(0, 1)]


def test_small_images_are_not_compared() -> None:
    assert thumbnail(field(0)[:63]) is None
    small = thumbnail(field(0)[:64, :64])
    assert small is not None and small.shape == (64, 64) and small.dtype == np.uint8


def test_the_thumbnail_is_the_mean_of_each_place() -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 1)).repeat(3, axis=2).astype(np.uint8)
    small = thumbnail(image)
    assert small is not None
    expected = image[..., 0].reshape(64, 2, 64, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small, expected, atol=1.01)


def test_the_hash_is_the_formula() -> None:
    small = thumbnail(field(7))
    assert small is not None
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    grey = small.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    sums = [
        (grey * np.cos(np.pi * (x + 0.5) * u / 32) * np.cos(np.pi * (y + 0.5) * v / 32)).sum()
        for v in range(1, 9)
        for u in range(1, 9)
    ]
    expected = np.packbits(np.array(sums) > np.median(sums))
    np.testing.assert_array_equal(hashes(small[None])[0], expected)
    assert np.unpackbits(expected).sum() == 32


@given(st.floats(0.5, 1.5), st.floats(-20, 20), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_gain_and_offset_make_no_difference(gain: float, offset: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    small = draw.integers(60, 120, (1, 64, 64)).astype(np.float32)
    assert same(detail(small), detail(small * gain + offset)).all()
    np.testing.assert_array_equal(hashes(small), hashes(small * gain + offset))


def test_the_order_of_the_images_makes_no_difference() -> None:
    images = [field(0), jpeg(field(0)), field(1), brighter(field(0)), field(2), shifted(field(2))]
    assert pairs(*images) == [(0, 1), (0, 3), (1, 3), (4, 5)]
    assert pairs(*images[::-1]) == [(0, 1), (2, 4), (2, 5), (4, 5)]


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [field(0), jpeg(field(0)), field(1), brighter(field(0))]
    whole = pairs(*images)
    monkeypatch.setattr(duplicates, "BLOCK", 2)
    assert pairs(*images) == whole and len(whole) == 3


def test_none_and_one() -> None:
    assert near(np.zeros((0, 64, 64), np.uint8)).shape == near(np.zeros((1, 64, 64), np.uint8)).shape == (0, 2)
    assert families(np.zeros((0, 2), np.int64)) == ([], 0)


def test_look_alikes_in_a_chain_are_not_one_family() -> None:
    chain = np.array([(i, i + 1) for i in range(40)])
    assert families(chain) == ([], 41)
    clique = np.array([(i, j) for i in range(5) for j in range(i + 1, 5)]) + 100
    assert families(np.concatenate([chain, clique])) == ([[100, 101, 102, 103, 104]], 41)


# --- in the units -----------------------------------------------------------------------------------------------------


def labelled(folder: Path, images: list[np.ndarray], groups: list[str], splits: list[str | None]) -> LabelledSet:
    made = []
    for i, (pixels, group, split) in enumerate(zip(images, groups, splits, strict=True)):
        path = folder / f"{i:03}.png"
        Image.fromarray(pixels).save(path)
        size = (pixels.shape[1], pixels.shape[0])
        made.append(LabelledImage(path, size, np.array([[50.0, 50, 80, 80]]), ("a",), group or path.name, split))
    return LabelledSet("hand", "made by hand", "box", ("a",), tuple(made), ())


def parted(folder: Path, images: list[np.ndarray], groups: str = "", splits: list[str | None] | None = None) -> Objects:
    names = list(groups) if groups else [""] * len(images)
    return cut(labelled(folder, images, names, splits or [None] * len(images)), 16)


def test_copies_share_a_unit_and_are_counted(tmp_path: Path) -> None:
    images = [field(0), field(1), jpeg(field(0)), field(1), field(2), field(3)]
    found = parted(tmp_path, images)
    assert found.unit_N.tolist() == [0, 1, 0, 1, 4, 5]
    assert found.repeated_images == 2
    assert found.problems == (
        "2 images repeat another one (1 byte-identical to it, 1 near-duplicates) and share its unit",
    )
    assert found.split.startswith("by image: ") and "of 4 units" in found.split and found.groups == 0
    assert leave_one_out(found).split.startswith("leave one image out")


def test_a_copy_of_a_byte_identical_pair_joins_all_three_and_their_groups(tmp_path: Path) -> None:
    images = [field(0), field(0), jpeg(field(0)), field(1), field(2), field(3)]
    found = parted(tmp_path, images, groups="abcdcd")  # 2 and 4 are of patient c, 3 and 5 of patient d
    assert found.unit_N.tolist() == [0, 0, 0, 3, 0, 3]
    assert found.groups == 4 and found.split.startswith("by group (4 groups given): 1 of 2 units")
    assert leave_one_out(found).split == "leave one group out (4 groups given): each against all others"


def test_copies_across_a_given_split_leave_the_bank(tmp_path: Path) -> None:
    images = [field(0), field(1), jpeg(field(0)), field(1), field(2), field(3)]
    splits: list[str | None] = ["train", "train", "test", "test", "train", "test"]
    found = parted(tmp_path, images, splits=splits)
    assert found.image_N.tolist() == [2, 3, 4, 5] and found.train_N.tolist() == [False, False, True, False]
    assert found.problems == (
        "2 images of the bank repeat a query image (1 byte-identical to it, 1 near-duplicates) and are left out",
    )
    assert found.repeated_images == 0
    crops = parted(tmp_path, images).crops_NSSC
    np.testing.assert_array_equal(found.crops_NSSC, crops[[2, 3, 4, 5]])


def test_a_group_on_both_sides_of_a_given_split_is_said(tmp_path: Path) -> None:
    found = parted(tmp_path, [field(i) for i in range(4)], "aabb", ["train", "test", "train", "train"])
    assert found.problems == ("1 groups have images on both sides of the data set's own split",)


def test_look_alikes_stay_independent_and_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "near", lambda thumbnails: np.array([(i, i + 1) for i in range(4)]))
    found = parted(tmp_path, [field(i) for i in range(5)])
    assert found.unit_N.tolist() == [0, 1, 2, 3, 4] and found.repeated_images == 0
    assert found.problems[0].startswith("5 images look much alike")


def real(real_data: Path, name: str) -> Path:
    if not (real_data / name).is_dir():
        pytest.skip(f"no folder {name} among the real images")
    return real_data / name


def found_among(folder: Path) -> list[tuple[str, str]]:
    images = read(folder).images
    small = [t for image in images if (t := thumbnail(decode(image.path))) is not None]
    assert len(small) == len(images)
    return [(images[i].path.name, images[j].path.name) for i, j in near(np.stack(small)).tolist()]


def test_real_cells(real_data: Path) -> None:
    """Seen by eye: the same field twice, at another focus, once in val and once in train."""
    assert found_among(real(real_data, "bccd")) == [("BloodImage_00037.jpg", "BloodImage_00038.jpg")]


def test_real_copies(real_data: Path) -> None:
    folder = real(real_data, "chula_rbc12")
    where = {image.path.name: image.path.read_bytes() for image in read(folder).images}
    found = found_among(folder)
    assert len(found) == 11 and all(where[a] == where[b] for a, b in found)
