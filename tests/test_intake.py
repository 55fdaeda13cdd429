"""The intake report: numbers by hand, oracles, planted oddities, and the hostile files of the reliability facts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from rich.console import Console
from test_pack import HOSTILE, encoded, noise, png_header

from ssl_pretrain.cli import pack as verb
from ssl_pretrain.data import decode as decoding
from ssl_pretrain.data import duplicates, intake, looks, overlap
from ssl_pretrain.data.building import build
from ssl_pretrain.data.decode import Reading, Source, decode_bytes
from ssl_pretrain.data.files import Rejected, unescape
from ssl_pretrain.data.pack import Pack, open_pack
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.report import oddities
from ssl_pretrain.report.sections import images
from ssl_pretrain.report.sheet import pixels

Y, X = np.mgrid[:192, :256]


def field(seed: int, particles: int = 14, level: float = 190, fall: float = 40, grain: float = 2) -> np.ndarray:
    """A bright field with a vignette and dark discs: (192, 256, 3)."""
    random = np.random.default_rng(seed)
    grey = level - fall * ((Y - 96) ** 2 + (X - 128) ** 2) / (96**2 + 128**2)
    for _ in range(particles):
        y, x, radius = random.integers(10, 182), random.integers(10, 246), random.integers(5, 14)
        grey = np.where((Y - y) ** 2 + (X - x) ** 2 < radius**2, grey - random.integers(50, 90), grey)
    grey = grey[..., None] + random.normal(0, grain, (192, 256, 3))
    return grey.clip(0, 255).astype(np.uint8)


def save(path: Path, picture: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Twelve sharp fields, `00.png` to `11.png`."""
    for i in range(12):
        save(tmp_path / "fields" / f"{i:02d}.png", field(i))
    return tmp_path / "fields"


def packed(folder: Path, name: str = "pack", **options: object) -> Pack:
    return build([folder], folder.parent / name, processes=0, **options)  # type: ignore[arg-type]


def kinds(pack: Pack, against: Path | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in intake.inspect(pack, against, processes=0).findings:
        found.setdefault(finding.finding, []).append(finding.path)
    return found


# --- one image --------------------------------------------------------------------------------------------------------


def test_the_numbers_of_an_image_by_hand() -> None:
    picture = np.full((100, 100, 3), 100, np.uint8)
    picture[:10] = 255  # a tenth
    look, thumbnail_HW = looks.measure(picture)
    assert look.mean == pytest.approx(0.9 * 100 + 0.1 * 255)
    assert look.white == pytest.approx(0.1) and look.bright == 255
    assert thumbnail_HW is not None and thumbnail_HW.shape == (64, 64) and thumbnail_HW[0, 0] == 255
    small, nothing = looks.measure(picture[:60])
    assert nothing is None and np.isnan(small.sharpness) and small.white == pytest.approx(10 / 60)


def test_sharpness_is_the_ratio_of_edges_by_hand() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 160  # the edge bends by 160 at both scales
    assert looks.measure(picture).look.sharpness == 0
    ramp = np.broadcast_to((np.arange(64) * 4).astype(np.uint8)[:, None, None], (64, 64, 3))
    assert looks.measure(np.ascontiguousarray(ramp)).look.sharpness == 0  # bends nowhere: (0 + 1) / (0 + 1)
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::4] = lines[:, 1::4] = 255  # 2 px wide, as fine as the fine scale, and even at the coarse one
    assert looks.measure(lines).look.sharpness == pytest.approx(np.log2(511 / 1))


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (200, 131), (480, 640)])
def test_thumbnails_are_those_of_duplicates(size: tuple[int, int]) -> None:
    picture = np.asarray(Image.fromarray(field(3)).resize(size[::-1]))
    mine, theirs = looks.measure(picture).thumbnail_HW, duplicates.thumbnail(picture)
    assert mine is not None and theirs is not None
    assert np.abs(mine.astype(int) - theirs).mean() < 2  # boxes of 7.5 px end on even pixels here
    if min(size) < 2 * looks.SIDE_PX:
        np.testing.assert_array_equal(mine, theirs)
    both = np.stack([mine, theirs])
    assert duplicates.near(both).tolist() == [[0, 1]]


@given(st.integers(0, 200), st.floats(0, 6), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_bare_field_is_blank_whatever_its_vignette(fall: int, grain: float, seed: int) -> None:
    y, x = np.mgrid[:480, :640]
    grey = 230 - fall * ((y - 240) ** 2 + (x - 320) ** 2) / (240**2 + 320**2)
    grey = grey + np.random.default_rng(seed).normal(0, grain, (480, 640))  # the same in all channels: the worst
    bare = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    assert looks.measure(bare).look.detail <= intake.BLANK


@pytest.mark.parametrize("fall", [0, 60, 120])
@pytest.mark.parametrize("place", [(96, 128), (8, 8), (186, 128)])
def test_one_faint_particle_is_not_blank(fall: int, place: tuple[int, int]) -> None:
    picture = field(0, 0, 230, fall, 2).astype(int)
    picture[(Y - place[0]) ** 2 + (X - place[1]) ** 2 < 5**2] -= 20
    assert looks.measure(picture.clip(0, 255).astype(np.uint8)).look.detail > intake.BLANK


# --- a set ------------------------------------------------------------------------------------------------------------


def test_planted_oddities_are_found_and_nothing_else(fields: Path) -> None:
    for i, sigma in ((0, 2.0), (1, 3.0)):
        Image.fromarray(field(50 + i)).filter(ImageFilter.GaussianBlur(sigma)).save(fields / f"blurred{i}.png")
    save(fields / "bare.png", field(60, 0))
    save(fields / "burnt.png", (field(61).astype(int) * 2).clip(0, 255).astype(np.uint8))
    save(fields / "dark.png", (field(62) / 7).astype(np.uint8))
    shutil.copy(fields / "03.png", fields / "copy.png")
    save(fields / "saved again.jpg", field(4), quality=50)
    save(fields / "tiny.png", field(63)[:40, :40])
    (fields / "text.png").write_bytes(b"text")
    pack = packed(fields)
    assert kinds(pack) == {
        "blank": ["bare.png"],
        "blurred": ["blurred0.png", "blurred1.png"],
        "over_exposed": ["burnt.png"],
        "under_exposed": ["dark.png"],
        "duplicate": ["copy.png"],
        "near_duplicate": ["saved again.jpg"],
    }
    found = intake.inspect(pack, processes=0)
    others = {finding.path: finding.other for finding in found.findings}
    assert (others["copy.png"], others["saved again.jpg"], others["bare.png"]) == ("03.png", "04.png", "")
    assert found.summary["not_judged"] == 1 and found.summary["families"] == 1
    assert found.summary["groups"] == {"count": 20, "largest": 1, "median": 1, "ungrouped": 0}
    assert found.summary["sizes"]["commonest"] == [[256, 192, 19], [40, 40, 1]]
    assert found.summary["files"]["format"] == {"PNG": 19, "JPEG": 1}
    lines = "\n".join(intake.words(found, Reading()))
    assert "findings: blank 1, blurred 2, over_exposed 1, under_exposed 1, duplicate 1, near_duplicate 1" in lines
    assert "2 sizes from 40 x 40 to 256 x 192 px, most often 256 x 192 px (19)" in lines


def test_more_than_half_must_be_clipped(tmp_path: Path) -> None:
    for percent in (48, 52):
        picture = field(percent)
        picture[:, : 256 * percent // 100] = 255
        save(tmp_path / "white" / f"{percent}.png", picture)
    assert kinds(packed(tmp_path / "white")) == {"over_exposed": ["52.png"]}


def test_a_set_with_nothing_odd(fields: Path) -> None:
    found = intake.inspect(packed(fields), processes=0)
    assert found.findings == () and "findings: none" in intake.words(found, Reading())


def test_blur_is_not_judged_by_too_few_images(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "few" / f"{i}.png", field(i))
    Image.fromarray(field(9)).filter(ImageFilter.GaussianBlur(5)).save(tmp_path / "few" / "blurred.png")
    assert "blurred" not in kinds(packed(tmp_path / "few"))


def test_bare_fields_do_not_move_the_median(fields: Path) -> None:
    """Their sharpness is that of noise; with them in it, the median would hide the blurred one."""
    for i in range(30):
        save(fields / f"bare{i:02d}.png", field(100 + i, 0))
    Image.fromarray(field(50)).filter(ImageFilter.GaussianBlur(3)).save(fields / "blurred.png")
    found = kinds(packed(fields))
    assert len(found["blank"]) == 30 and found["blurred"] == ["blurred.png"]


def test_real_fields_blurred(real_data: Path, tmp_path: Path) -> None:
    """Of 60 real fields none is blank or blurred; of copies with a Gaussian blur of 3 px all are blurred."""
    paths = sorted((real_data / "bccd" / "JPEGImages").glob("*.jpg"))[:60]
    numbers = np.array([looks.measure(np.asarray(Image.open(path).convert("RGB"))).look for path in paths])
    column = looks.Look._fields.index("sharpness")
    limit = intake.sharpness_limit(numbers[:, column])
    assert (numbers[:, column] > limit).all() and (numbers[:, 0] > 4 * intake.BLANK).all()
    for path in paths[:12]:
        blurred = Image.open(path).convert("RGB").filter(ImageFilter.GaussianBlur(3))
        assert looks.measure(np.asarray(blurred)).look.sharpness < limit


# --- repeats and overlap ----------------------------------------------------------------------------------------------


def thumbnails(count: int) -> np.ndarray:
    """Some are near-duplicates of others."""
    made = [looks.measure(field(i % (2 * count // 3), grain=2 + i % 2)).thumbnail_HW for i in range(count)]
    return np.stack([thumbnail for thumbnail in made if thumbnail is not None])


@pytest.mark.parametrize("block", [3, 7, 4096])
def test_near_pairs_are_those_of_duplicates_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnail_NHW = thumbnails(30)
    expected = duplicates.near(thumbnail_NHW)
    assert len(expected) >= 10
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "HELD", 5)
    np.testing.assert_array_equal(duplicates.near_pairs(thumbnail_NHW, np.arange(30)), expected)
    place_M = np.arange(0, 30, 2)
    inside = expected[np.isin(expected, place_M).all(axis=1)]
    np.testing.assert_array_equal(duplicates.near_pairs(thumbnail_NHW, place_M), inside)
    across = duplicates.near_across(thumbnail_NHW[20:], thumbnail_NHW, np.arange(20))
    mixed = [[j - 20, i] for i, j in expected.tolist() if i < 20 <= j]
    assert across.tolist() == sorted(mixed) and len(mixed) >= 5
    assert duplicates.near_pairs(thumbnail_NHW, np.arange(1)).shape == (0, 2)
    assert duplicates.near_across(thumbnail_NHW[:0], thumbnail_NHW, place_M).shape == (0, 2)


def voc(root: Path, images: dict[str, tuple[np.ndarray, str]]) -> Path:
    """A Pascal VOC set of named images with a split each."""
    for name, (picture, split) in images.items():
        save(root / "JPEGImages" / f"{name}.png", picture)
        box = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        text = f"<annotation><filename>{name}.png</filename><object><name>cell</name>{box}</object></annotation>"
        for path, content in (
            (root / "Annotations" / f"{name}.xml", text),
            (root / "ImageSets" / "Main" / f"{split}.txt", f"{name}\n"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(content)
    return root


def test_only_the_test_split_counts_and_every_pair_is_listed(fields: Path, tmp_path: Path) -> None:
    shutil.copy(fields / "02.png", fields / "two.png")  # of which the labelled set holds another rendering
    labelled = voc(
        tmp_path / "labelled",
        {
            "same": (field(0), "test"),
            "near": (np.asarray(Image.fromarray(field(2)).filter(ImageFilter.GaussianBlur(0.7))), "test"),
            "trained on": (field(5), "train"),
            "other": (field(40), "test"),
        },
    )
    pack = packed(fields)
    found = intake.inspect(pack, labelled, processes=0)
    pairs = [tuple(finding) for finding in found.findings if finding.finding.startswith("overlap")]
    assert [(path, kind, other) for path, kind, _, other in pairs] == [
        ("00.png", "overlap_bytes", "same.png"),
        ("02.png", "overlap_near", "near.png"),
        ("two.png", "overlap_near", "near.png"),
    ]
    assert found.summary["against"]["images"] == 3 and str(tmp_path) not in json.dumps(found.summary)
    lines = "\n".join(intake.words(found, Reading(), most=2))
    assert "3 images, the test split of" in lines and "00.png = same.png (the same bytes)" in lines
    assert "overlap: 3 images of the pack" in lines and "and 1 more pairs, in findings.jsonl" in lines
    for name in ("train", "test"):
        (labelled / "ImageSets" / "Main" / f"{name}.txt").unlink()
    assert kinds(pack, labelled)["overlap_bytes"] == ["00.png", "05.png"]


def test_against_any_folder_and_against_none(fields: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    save(plain / "a.png", field(7))
    (plain / "b.png").write_bytes((fields / "08.png").read_bytes()[:-40])
    pack = packed(fields)
    found = intake.inspect(pack, plain, processes=0)
    assert [finding.path for finding in found.findings] == ["07.png"]
    against = found.summary["against"]
    assert against["not_compared"] == 1 and against["how"].startswith("all images, as the folder was not read")
    assert "1 images of plain cannot be decoded" in intake.words(found, Reading())[-1]
    with pytest.raises(DataError, match="there is no folder"):
        intake.inspect(pack, tmp_path / "nowhere", processes=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in"):
        intake.inspect(pack, tmp_path / "empty", processes=0)


def test_labelled_images_are_compared_at_the_packs_size(tmp_path: Path) -> None:
    for i in range(3):
        large = np.repeat(np.repeat(field(i), 4, 0), 4, 1)
        save(tmp_path / "large" / f"{i}.jpg", large, quality=95)
    save(tmp_path / "labelled" / "x.png", np.asarray(Image.open(tmp_path / "large" / "1.jpg")))
    pack = packed(tmp_path / "large", short_side_px=150)
    assert kinds(pack, tmp_path / "labelled") == {"overlap_near": ["1.jpg"]}
    (mine,) = overlap.read(tmp_path / "labelled", pack, processes=0).thumbnails
    reduced = decode_bytes((tmp_path / "labelled" / "x.png").read_bytes(), 150).pixels
    np.testing.assert_array_equal(mine, looks.measure(reduced).thumbnail_HW)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_workers_measured_is_what_the_pack_shows(fields: Path) -> None:
    save(fields / "tiny.png", field(63)[:40, :40])
    pack = build([fields], fields.parent / "pack", 100, processes=2)
    kept = looks.of_pack(pack)
    for name in looks.FILES:
        (pack.folder / name).unlink()
    again = looks.of_pack(pack)
    np.testing.assert_array_equal(kept.numbers_NM, again.numbers_NM)
    np.testing.assert_array_equal(kept.thumbnail_NHW, again.thumbnail_NHW)
    np.testing.assert_array_equal(kept.shown_N, again.shown_N)
    assert kept.sources == (Source("PNG", "RGB", 8, 0, 0.0),) and again.sources is None
    assert kept.pages_N.tolist() == [1] * 13


def test_the_report_is_kept_and_the_fingerprint_stays(fields: Path) -> None:
    save(fields / "bare \x1b[31m.png", field(60, 0))
    pack = packed(fields)
    assert intake.read(pack) is None
    before = {path.name: path.read_bytes() for path in pack.folder.iterdir()}
    found = intake.inspect(pack, processes=0)
    intake.write(pack, found)
    assert intake.read(open_pack(pack.folder)) == found and len(found.findings) == 1
    made = json.loads((pack.folder / "pack.json").read_text())
    assert made.pop("intake") == json.loads(json.dumps(found.summary)) and made == json.loads(before["pack.json"])
    text = (pack.folder / "findings.jsonl").read_text()
    assert "\x1b" not in text and unescape(json.loads(text)["path"]) == "bare \x1b[31m.png"
    by_hand = hashlib.sha256(b"ssl_pretrain pack 2 short side None\n")
    for digest in sorted(hashlib.sha256(path.read_bytes()).digest() for path in fields.iterdir()):
        by_hand.update(digest)
    assert pack.fingerprint == open_pack(pack.folder).fingerprint == by_hand.hexdigest()
    (pack.folder / "findings.jsonl").write_text('{"path": 1')
    with pytest.raises(DataError, match="run ssl-pretrain pack again"):
        intake.read(pack)


def test_a_pack_of_before_the_report_opens_and_can_be_looked_at(fields: Path) -> None:
    save(fields / "bare.png", field(60, 0))
    pack = packed(fields)
    made = json.loads((pack.folder / "pack.json").read_text())
    del made["reading"]
    (pack.folder / "pack.json").write_text(json.dumps(made))
    for name in looks.FILES:
        (pack.folder / name).unlink()
    assert packed(fields).fingerprint == pack.fingerprint  # used as it is
    assert sorted(path.name for path in pack.folder.iterdir())[0] == "index.npz"
    old = open_pack(pack.folder)
    assert kinds(old) == {"blank": ["bare.png"]}
    assert any("older release" in line for line in intake.words(intake.inspect(old, processes=0), Reading()))


@pytest.mark.parametrize("damage", ["short thumbnails", "short numbers", "of another pack"])
def test_damaged_looks_are_refused(fields: Path, damage: str) -> None:
    pack = packed(fields)
    if damage == "short thumbnails":
        os.truncate(pack.folder / "thumbnails.bin", 4096 * 11)
    elif damage == "short numbers":
        os.truncate(pack.folder / "looks.npz", 500)
    else:
        (fields / "00.png").unlink()
        shutil.copy(packed(fields, "other").folder / "looks.npz", pack.folder)
    with pytest.raises(DataError, match=r"is damaged .*pack the images again"):
        looks.of_pack(pack)


def test_a_build_that_an_older_release_began_is_begun_again(fields: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, rejected: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([fields], tmp_path / "pack", processes=0, progress=stop)
    journal = tmp_path / ".pack.partial" / "journal.jsonl"
    head, *lines = journal.read_text().splitlines()
    assert len(lines) == 12
    journal.write_text("\n".join([head, *(json.dumps(json.loads(line)[:5]) for line in lines)]) + "\n")
    seen: list[int] = []
    build([fields], tmp_path / "pack", processes=0, progress=lambda done, *_: seen.append(done))
    assert seen[0] == 0


def test_thumbnails_that_were_not_safely_written_are_made_again(fields: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, rejected: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    whole = packed(fields, "whole")
    with pytest.raises(KeyboardInterrupt):
        build([fields], tmp_path / "pack", processes=0, progress=stop)
    os.truncate(tmp_path / ".pack.partial" / "thumbnails.bin", 4096 * 7 + 100)
    seen: list[int] = []
    pack = build([fields], tmp_path / "pack", processes=0, progress=lambda done, *_: seen.append(done))
    assert seen[0] == 7
    for name in (*looks.FILES, "pixels.bin", "index.npz"):
        assert (pack.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


# --- leaving out ------------------------------------------------------------------------------------------------------


def test_images_are_left_out_by_a_list(fields: Path, tmp_path: Path) -> None:
    whole = packed(fields)
    listed = tmp_path / "list.txt"
    listed.write_text("03.png\r\n\n05.png\n03.png\n")
    names = intake.names_in(listed)
    assert names == ["03.png", "05.png"]
    pack = packed(fields, "less", left_out=names)
    assert set(whole.paths) - set(pack.paths) == {"03.png", "05.png"} and pack.fingerprint != whole.fingerprint
    rejected = [json.loads(line) for line in (pack.folder / "rejected.jsonl").read_text().splitlines()]
    assert [(line["path"], line["reason"]) for line in rejected] == [("03.png", "left_out"), ("05.png", "left_out")]
    assert json.loads((pack.folder / "pack.json").read_text())["rejected"] == {"left_out": 2}
    stamp = (pack.folder / "pixels.bin").stat().st_ino
    for path in fields.iterdir():
        os.utime(path, (1, 1))  # other times, same bytes
    assert packed(fields, "less", left_out=names[::-1]).folder.joinpath("pixels.bin").stat().st_ino == stamp
    for other in ([], ["03.png"], ["03.png", "06.png"]):
        with pytest.raises(UsageError, match="is a pack of other images or settings"):
            packed(fields, "less", left_out=other)
    with pytest.raises(UsageError, match=r"1 of the 2 images to leave out .* the first is 'nowhere.png'"):
        packed(fields, "more", left_out=["03.png", "nowhere.png"])
    with pytest.raises(DataError, match="all 12 images are to be left out"):
        packed(fields, "none", left_out=list(whole.paths))


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"{\n", b'{"path": 3}\n', b"\xff\n", b"[" * 100_000, b""])
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "findings.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=r"is not a list of images|cannot read the list"):
        intake.names_in(tmp_path / "findings.jsonl")
    with pytest.raises(UsageError, match=r"cannot read the list .*missing"):
        intake.names_in(tmp_path / "nowhere")


# --- ranges and planes ------------------------------------------------------------------------------------------------


def deep(high: int, seed: int = 0) -> np.ndarray:
    """16-bit grey up to `high`."""
    return (field(seed)[..., 0].astype(np.float64) / 255 * high).astype(np.uint16)


def test_twelve_bits_in_sixteen_are_said_and_a_range_helps(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / "deep" / f"{i}.tif", deep(4095, i))
    pack = packed(tmp_path / "deep")
    found = intake.inspect(pack, processes=0)
    peak = max(int(deep(4095, i).max()) for i in range(8))
    assert found.summary["files"]["peak"] == peak < 4096 and found.summary["files"]["bits"] == {"16": 8}
    line = f"16-bit grey: 8 files, largest value {peak}, so 12 bits are in use; divided by 257 they are nearly black: "
    assert line + "pack again with --range 0 4095" in intake.words(found, Reading())
    assert pack.image(0).max() == round(int(deep(4095).max()) / 257)
    stated = Reading((0, 4095))
    bright = packed(tmp_path / "deep", "stated", reading=stated)
    np.testing.assert_array_equal(bright.image(0)[..., 0], np.rint(deep(4095) / 4095 * 255))
    assert bright.fingerprint != pack.fingerprint and overlap.reading_of(open_pack(bright.folder)) == stated
    assert packed(tmp_path / "deep", "stated", reading=stated).fingerprint == bright.fingerprint
    with pytest.raises(UsageError, match="other images or settings"):
        packed(tmp_path / "deep", reading=stated)
    lines = intake.words(intake.inspect(bright, tmp_path / "deep", processes=0), stated)
    assert any("0 is black and 4095 white" in line and "what is above" not in line for line in lines)
    assert "overlap: 8 images of the pack are or show one of these (8 pairs)" in lines


@pytest.mark.parametrize("mode", [np.uint16, np.float32, np.int32])
def test_a_range_is_linear_and_clips(mode: type) -> None:
    values = np.linspace(0, 1200, 400).astype(mode).reshape(20, 20)
    made = decode_bytes(encoded(Image.fromarray(values), "TIFF"), reading=Reading((200, 1000)))
    by_hand = np.rint((values.astype(np.float64) - 200) / 800 * 255).clip(0, 255)
    np.testing.assert_array_equal(made.pixels[..., 2], by_hand)
    assert made.source.peak == 1200 and made.source.bits == (16 if mode is np.uint16 else 32)


@pytest.mark.parametrize("low, high", [(3, 3), (4, 1), (float("nan"), 1), (0, float("inf"))])
def test_a_range_that_makes_no_sense_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="the range is"):
        Reading((low, high))
    with pytest.raises(UsageError, match="give one of first, middle, sharpest"):
        Reading(plane="best")


def test_16_bit_colour_keeps_its_upper_byte_and_has_no_range() -> None:
    values = np.arange(0, 65536, 64).astype(">u2")[:1020].reshape(17, 20, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 17, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    made = decode_bytes(data)
    np.testing.assert_array_equal(made.pixels, values >> 8)
    assert made.source[:3] == ("PNG", "RGB", 16)
    with pytest.raises(Rejected, match="16-bit colour has no range"):
        decode_bytes(data, reading=Reading((0, 4095)))
    assert decode_bytes(encoded(Image.new("RGB", (20, 20)), "PNG"), reading=Reading((0, 4095))).source.bits == 8


def stack(*pages: np.ndarray) -> bytes:
    first, *others = [Image.fromarray(page) for page in pages]
    return encoded(first, "TIFF", save_all=True, append_images=others)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_plane_of_a_stack(depth: int) -> None:
    sharp = field(0)[..., 0]
    pages = [np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(s))) for s in (6, 4, 2, 0, 3)]
    pages = [page if depth == 8 else page.astype(np.uint16) * 257 for page in pages]
    data = stack(*pages)
    for plane, place in (("first", 0), ("middle", 2), ("sharpest", 3)):
        made = decode_bytes(data, reading=Reading(plane=plane))
        expected = pages[place] if depth == 8 else pages[place] // 257
        np.testing.assert_array_equal(made.pixels[..., 0], expected)
        assert made.source.pages == 5 and made.original_hw == (192, 256)
    np.testing.assert_array_equal(
        decode_bytes(stack(*pages[:4]), reading=Reading(plane="middle")).pixels[..., 0],
        pages[2] if depth == 8 else pages[2] // 257,
    )
    assert decode_bytes(encoded(Image.fromarray(sharp), "PNG"), reading=Reading(plane="sharpest")).source.pages == 1


def test_moving_pictures_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("lime", "red", "blue")]
    for kind, pages in (("GIF", 2), ("WEBP", 3)):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        made = decode_bytes(data, reading=Reading(plane="sharpest"))
        assert made.pixels[5, 5].tolist() == [0, 255, 0] and made.source.pages == pages


def test_hostile_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = field(0)[..., 0]
    long = stack(small, np.zeros((17, 32769), np.uint8), small)
    assert decode_bytes(long).source.pages == 3
    with pytest.raises(Rejected, match="too_large"):
        decode_bytes(long, reading=Reading(plane="middle"))
    np.testing.assert_array_equal(decode_bytes(long, reading=Reading(plane="sharpest")).pixels[..., 0], small)
    three = stack(small, small // 2, small // 3)
    cut = three[: len(stack(small, small // 2)) + 90]
    assert decode_bytes(cut).pixels.shape == (192, 256, 3)  # the first page is whole
    with pytest.raises(Rejected, match="damaged"):
        decode_bytes(three[:-30000], reading=Reading(plane="sharpest"))
    monkeypatch.setattr(decoding, "MAX_PAGES", 3)
    assert decode_bytes(stack(*[small] * 6)).source.pages == 3
    with pytest.raises(Rejected, match="only the first page"):
        decode_bytes(three, reading=Reading(plane="middle"))
    monkeypatch.setattr(decoding, "MAX_PAGES", 9)
    monkeypatch.setattr(decoding, "MAX_STACK_PIXELS", 3 * small.size - 1)
    with pytest.raises(Rejected, match="too many to look for the sharpest"):
        decode_bytes(three, reading=Reading(plane="sharpest"))


def test_a_stack_that_leads_back_to_itself_ends() -> None:
    data = bytearray(stack(*[field(0)[..., 0]] * 2))
    first = struct.unpack_from("<I", data, 4)[0]
    second_at = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    second = struct.unpack_from("<I", data, second_at)[0]
    next_at = second + 2 + 12 * struct.unpack_from("<H", data, second)[0]
    struct.pack_into("<I", data, next_at, first)
    assert decode_bytes(bytes(data)).source.pages == 2


def tiff(channels: int, bits: int, photometric: int, planar: int = 1) -> bytes:
    """A plain TIFF, little endian, 20 x 20, one strip of zeros, of any number of channels."""
    extra = 256  # behind the directory
    tags = [
        (256, 3, 1, 20), (257, 3, 1, 20), (258, 3, channels, extra if channels > 2 else bits | bits << 16),
        (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 512), (277, 3, 1, channels), (278, 3, 1, 20),
        (279, 4, 1, 400 * channels * bits // 8), (284, 3, 1, planar),
    ]  # fmt: skip
    if photometric == 2 and channels > 3:
        tags.append((338, 3, channels - 3, 0 if channels < 6 else extra + 64))
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8) + body
    data = data.ljust(extra, b"\0") + struct.pack(f"<{channels}H", *[bits] * channels)
    return data.ljust(512, b"\0") + bytes(400 * channels * bits // 8)


@pytest.mark.parametrize(
    "channels, bits, photometric, reason",
    [(5, 8, 1, "5 channels"), (5, 8, 2, "5 channels"), (5, 16, 1, "5 channels"), (3, 32, 2, "32, 32, 32 bits"),
     (7, 8, 1, "7 channels")],
)  # fmt: skip
def test_a_tiff_of_many_channels_is_rejected_with_its_reason(
    channels: int, bits: int, photometric: int, reason: str
) -> None:
    with pytest.raises(Rejected) as caught:
        decode_bytes(tiff(channels, bits, photometric))
    assert caught.value.reason == "unsupported" and reason in caught.value.detail
    assert decode_bytes(tiff(3, 8, 2)).pixels.shape == (20, 20, 3)


# --- the verb ---------------------------------------------------------------------------------------------------------


def said(words: list[str]) -> str:
    file = io.StringIO()
    verb.run(words, Console(file=file, width=60))
    return file.getvalue()


def test_the_verb_reports_and_leaves_out_what_it_found(fields: Path, tmp_path: Path) -> None:
    save(fields / "bare [bold].png", field(60, 0))
    (fields / "text.png").write_bytes(b"text")
    shutil.copy(fields / "03.png", fields / "copy.png")
    test = voc(tmp_path / "labelled", {"x": (field(6), "test"), "y": (field(44), "train")})
    common = [str(fields), "--processes", "0"]
    text = said([*common, "--out", str(tmp_path / "p"), "--against", str(test)])
    assert "findings: blank 1, duplicate 1, overlap_bytes 1; each is listed in findings.jsonl" in text
    assert "1 files rejected (unknown_format 1)" in text and "06.png = x.png (the same bytes)" in text
    with Image.open(tmp_path / "p" / "oddest.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
    findings = tmp_path / "p" / "findings.jsonl"
    text = said([*common, "--out", str(tmp_path / "less"), "--leave-out", str(findings)])
    assert "findings: none" in text and "left_out 3" in text
    left = open_pack(tmp_path / "less").paths
    assert set(open_pack(tmp_path / "p").paths) - set(left) == {"bare [bold].png", "copy.png", "06.png"}
    again = said([*common, "--out", str(tmp_path / "p")])  # without the labelled set
    assert "overlap" not in again and "findings: blank 1, duplicate 1;" in again
    for words, message in (
        (["--plane", "best"], "give one of first"),
        (["--range", "5", "1"], "lower first"),
        (["--against", str(tmp_path / "nowhere")], "there is no folder"),
        (["--leave-out", str(tmp_path / "nowhere")], "cannot read the list"),
    ):
        with pytest.raises((UsageError, DataError), match=message):
            said([*common, "--out", str(tmp_path / "q"), *words])
    assert not (tmp_path / "q").exists()


def test_the_sheet_shows_the_ends_of_the_set(fields: Path) -> None:
    save(fields / "bare.png", field(60, 0))
    save(fields / "twice.jpg", field(4), quality=60)
    save(fields / "$a$ very long name with $ in it \x1b[31m.png", field(61))
    pack = packed(fields)
    found = intake.inspect(pack, processes=0)
    figure = oddities.figure(pack, found)
    texts = [text.get_text() for text in figure.texts]
    assert "Most blurred of those that show something" in texts and "Pairs that show the same, side by side" in texts
    assert texts.count("bare.png") == 2  # it shows least and is the brightest, but is not the most blurred
    assert len(figure.axes) == 4 * oddities.COLUMNS + 2 and pixels(figure).std() > 10
    seen = looks.of_pack(pack)
    places = oddities.extreme(seen, "detail", False, [True] * len(pack))
    assert pack.paths[places[0]] == "bare.png"
    assert (np.diff(seen.number("detail")[places]) >= 0).all()


def test_the_page_of_a_run_shows_the_report(fields: Path) -> None:
    save(fields / "bare <b>.png", field(60, 0))
    pack = packed(fields)
    run: Any = SimpleNamespace(pack=pack)
    before = images.section(run)
    assert "were not looked for" in before.html and before.figure is None
    intake.write(pack, intake.inspect(pack, processes=0))
    after = images.section(run)
    assert "findings: blank 1" in after.html and "not looked for" not in after.html
    assert after.figure is not None and after.alt and "<b>" not in after.html


# --- hostile files ----------------------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(Image.fromarray(noise(24, 32)), "JPEG", exif=tags)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel that is really there: small as a file."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes((width // 8 + 1) * 1000)) for _ in range(height // 1000)) + packer.flush()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def used() -> dict[str, bytes]:
    """Files that are odd and good."""
    picture = Image.fromarray(noise(24, 32))
    frames = [picture, picture.rotate(180)]
    palette = picture.convert("P")
    return {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "deep.png": encoded(Image.fromarray(noise(24, 32)[..., 0].astype(np.uint16) * 257), "PNG"),
        "deep.tif": encoded(Image.fromarray(noise(24, 32)[..., 0].astype(np.uint16) * 257), "TIFF"),
        "palette.png": encoded(palette, "PNG"),
        "palette with transparency.png": encoded(palette, "PNG", transparency=3),
        "rgba.png": encoded(picture.convert("RGBA"), "PNG"),
        "la.png": encoded(picture.convert("LA"), "PNG"),
        "one bit.png": encoded(picture.convert("1"), "PNG"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "lzw.tiff": encoded(picture, "TIFF", compression="tiff_lzw"),
        "plain.bmp": encoded(picture, "BMP"),
        "png in truth.jpg": encoded(picture, "PNG"),
        "UPPER.JPG": encoded(picture, "JPEG"),
        "trailing bytes.jpg": encoded(picture, "JPEG") + b"\0" * 99,
        "flat 16 px.png": encoded(picture.resize((5000, 16)), "PNG"),
        **{f"exif {i}.jpg": exif(i) for i in range(1, 9)},
    }


REJECTED = {
    "one pixel.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "too_small"),
    "5000 x 1.png": (encoded(Image.new("RGB", (5000, 1)), "PNG"), "too_small"),
    "header of 65000 squared.png": (png_header(65000, 65000), "too_large"),
    "five channels.tif": (tiff(5, 8, 1), "unsupported"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown_format"),
    "html.jpg": (b"<!DOCTYPE html><title>404</title>", "unknown_format"),
    "pdf.tif": (b"%PDF-1.4\n", "unknown_format"),
    "pickle.png": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94", "unknown_format"),
    "zip.jpg": (b"PK\x03\x04" + bytes(60), "unknown_format"),
    **HOSTILE,
}
JUNK = [
    ".DS_Store", "._cell.jpg", "Thumbs.db", "desktop.ini", "cell.jpg:Zone.Identifier", "__MACOSX/._cell.jpg",
    ".ipynb_checkpoints/cell.jpg", "notes.txt", "labels.csv",
]  # fmt: skip


def test_every_hostile_file_is_used_or_rejected_for_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "hostile"
    good, bad = used(), {name: reason for name, (_, reason) in REJECTED.items()}
    for name, content in {**good, **{name: content for name, (content, _) in REJECTED.items()}}.items():
        root.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    for name in JUNK:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(good["png in truth.jpg"])
    for raw in (b"new\nline.png", b"not \xff utf8.png", b"\x1b[2Jescape.png"):
        with open(os.path.join(os.fsencode(root), raw), "wb") as file:
            file.write(good["palette.png"] + raw)
    (root / "bomb of 600 Mpx.png").write_bytes(bomb(30000, 20000))
    os.mkfifo(root / "pipe.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "loop of folders").symlink_to(".")
    (root / "a folder.jpg").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root)
    listener.bind("socket.jpg")
    os.chdir(here)
    bad |= {"bomb of 600 Mpx.png": "too_large", "dangling.jpg": "missing", "loop.jpg": "missing"}
    bad |= dict.fromkeys(["pipe.jpg", "device.jpg", "socket.jpg"], "not_a_file")
    pack = build([root], tmp_path / "pack", processes=1)
    listener.close()
    lines = (pack.folder / "rejected.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["path"]: record["reason"] for record in records} == bad
    assert all(record["detail"].isprintable() and str(tmp_path) not in record["detail"] for record in records)
    odd_names = {"new\\u000aline.png", "not \\xff utf8.png", "\\u001b[2Jescape.png"}
    assert set(pack.paths) == {*good, *odd_names}
    assert len(bad) + len(pack) >= 37 + 18
    found = intake.inspect(pack, processes=0)
    intake.write(pack, found)
    assert found.summary["files"]["pages"] == {"files": 3, "most": 2}
    assert all(line.isprintable() for line in intake.words(found, Reading()))
    assert all(line.isprintable() for line in (pack.folder / "findings.jsonl").read_text().splitlines())


NOBODY = """
import json, os, sys
from pathlib import Path
import ssl_pretrain.data.building as building
building.build([Path(sys.argv[1]) / "good.png"], Path(sys.argv[2] + " warm"), processes=0)  # imports all it needs
os.setuid(65534)
pack = building.build([Path(sys.argv[1])], Path(sys.argv[2]), processes=0)
print((pack.folder / "rejected.jsonl").read_text())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another test process of another user is needed")
def test_no_permission_is_its_own_reason() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o777)
        save(root / "in" / "good.png", field(0))
        save(root / "in" / "secret.png", field(1)).chmod(0)
        save(root / "in" / "closed" / "x.png", field(2))
        (root / "in" / "closed").chmod(0)
        command = [sys.executable, "-c", NOBODY, str(root / "in"), str(root / "pack")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (root / "in" / "closed").chmod(0o700)
    reasons = {record["path"]: record["reason"] for record in map(json.loads, done.stdout.split("\n")[:2])}
    assert reasons == {"secret.png": "no_permission", "closed": "unreadable_folder"}


MILLION = """
import sys
from pathlib import Path
from ssl_pretrain.data.files import scan
def peak():  # of this program: getrusage would count what the parent had when it was forked
    return Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
before = peak()
listing = scan([Path(sys.argv[1])])
print(len(listing.names), before, peak())
"""


@pytest.mark.slow
def test_a_folder_of_a_million_entries_is_listed_in_bounded_memory() -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk takes minutes
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for i in range(1_000_000):
            os.mknod(f"{folder}/field_{i:07d}.jpg")
        command = [sys.executable, "-c", MILLION, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, before, peak = (int(word) for word in done.stdout.split())
    print(f"{count} files, {before / 1024:.0f} MiB before, {peak / 1024:.0f} MiB at most")
    assert count == 1_000_000
    assert peak < 1 << 20  # kilobytes: 1 GiB
