from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data import building, files, partial, workers
from ssl_pretrain.data import decode as decoding
from ssl_pretrain.data.building import build, pack_or_folder
from ssl_pretrain.data.decode import AS_STATED, Reading, decode, decode_bytes, header_size, resize_short_side
from ssl_pretrain.data.files import Rejected, escape, find_images, unescape
from ssl_pretrain.data.pack import DUPLICATE, is_pack, open_pack
from ssl_pretrain.errors import DataError, UsageError, WriteError


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve ragged PNG images in two folders, with one pair of equal files."""
    folder = tmp_path / "images"
    for i in range(11):
        path = folder / f"slide{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20 + 3 * i, 50 - 2 * i, i)).save(path)
    shutil.copy(folder / "slide0" / "00.png", folder / "slide2" / "copy.png")
    return folder


# --- decoding ---------------------------------------------------------------------------------------------------------

RGB = Image.fromarray(noise(24, 32))
JPEG = encoded(RGB, "JPEG")
PNG = encoded(RGB, "PNG")
HOSTILE = {
    "zero.jpg": (b"", "empty"),
    "text.png": (b"this is no image\n" * 9, "unknown_format"),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "unknown_format"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "damaged"),
    "cut by two bytes.jpg": (JPEG[:-2], "damaged"),
    "half.png": (PNG[: len(PNG) // 2], "damaged"),
    "corrupt.png": (PNG[:80] + bytes(60) + PNG[140:], "damaged"),
    "header of 4 gigapixels.png": (png_header(65000, 65000), "too_large"),
    "header of 100.02 megapixels.png": (png_header(10002, 10000), "too_large"),
    "long.png": (png_header(32769, 100), "too_large"),
    "thin.png": (encoded(Image.new("RGB", (500, 15)), "PNG"), "too_small"),
    "float.tif": (encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"), "unstated_range"),
    "int32.tif": (encoded(Image.fromarray(np.ones((20, 20), np.int32)), "TIFF"), "unstated_range"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_rejected_for_its_reason(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Rejected) as caught:
        decode(tmp_path / name)
    assert caught.value.reason == reason
    assert caught.value.detail.isprintable() and str(tmp_path) not in caught.value.detail


def test_what_is_not_a_file_is_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket is limited to 108 bytes
    listener.bind("socket.jpg")
    os.chdir(here)
    reasons = {}
    for path in [*sorted(tmp_path.iterdir()), Path("/dev/zero"), Path("bad\0name.jpg")]:
        with pytest.raises(Rejected) as caught:
            decode(path)
        reasons[path.name] = caught.value.reason
    listener.close()
    not_a_file = dict.fromkeys(["folder.jpg", "pipe.jpg", "socket.jpg", "zero"], "not_a_file")
    assert reasons == {"dangling.jpg": "missing", "loop.jpg": "missing", "bad\0name.jpg": "missing", **not_a_file}


def test_bytes_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(Rejected, match="too_many_bytes"):
        files.read_bytes(tmp_path / "a.png", max_bytes=len(PNG) - 1)
    assert files.read_bytes(tmp_path / "a.png", max_bytes=len(PNG)) == PNG


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(tmp_path: Path, kind: str) -> None:
    (tmp_path / "lying.jpg").write_bytes(encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {})))
    pixels = decode(tmp_path / "lying.jpg")
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(RGB))
    assert header_size(tmp_path / "lying.jpg") == (32, 24)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :16] = 255  # a white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(pixels), kind, exif=exif))
    upright = decode(tmp_path / "a")
    corner = [(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)][orientation - 1]
    expected = (64, 32) if orientation >= 5 else (32, 64)
    assert upright.shape[:2] == expected
    assert upright[corner].min() > 250 and (upright > 128).mean() == pytest.approx(1 / 8, abs=0.01)
    assert header_size(tmp_path / "a") == expected[::-1]
    assert decode_bytes((tmp_path / "a").read_bytes(), 16).original_hw == expected


def test_colour_spaces_become_rgb(tmp_path: Path) -> None:
    def of(image: Image.Image, kind: str, **options: object) -> list[int]:
        (tmp_path / "a").write_bytes(encoded(image, kind, **options))
        return [int(value) for value in decode(tmp_path / "a")[10, 10]]

    size = (20, 20)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert of(palette, "PNG") == [10, 20, 30]
    assert of(palette, "PNG", transparency=1) == [255, 255, 255]
    assert of(palette, "PNG", transparency=b"\xff\x80") == [132, 137, 142]
    assert of(Image.new("RGBA", size, (255, 0, 0, 0)), "PNG") == [255, 255, 255]
    assert of(Image.new("RGBA", size, (200, 0, 100, 51)), "PNG") == [244, 204, 224]
    assert of(Image.new("LA", size, (0, 0)), "PNG") == [255, 255, 255]
    assert of(Image.new("RGB", size, (9, 8, 7)), "PNG", transparency=(9, 8, 7)) == [255, 255, 255]
    assert of(Image.new("1", size, 1), "PNG") == [255, 255, 255]
    assert of(Image.new("L", size, 77), "BMP") == [77, 77, 77]
    assert of(Image.new("CMYK", size, (0, 255, 255, 0)), "TIFF") == [255, 0, 0]
    red = of(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG")
    assert red[0] > 245 and max(red[1:]) < 10
    frames = [Image.new("RGB", size, colour) for colour in ("lime", "red")]
    assert of(frames[0], "GIF", save_all=True, append_images=frames[1:]) == [0, 255, 0]
    assert of(frames[0], "TIFF", save_all=True, append_images=frames[1:]) == [0, 255, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, kind: str, order: str) -> None:
    values = np.linspace(0, 65535, 400).astype(order).reshape(20, 20)
    if kind == "PNG" and order == ">u2":
        pytest.skip("Pillow writes PNG from little endian only")
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(values), kind))
    pixels = decode(tmp_path / "a")
    np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))
    assert pixels.min() == 0 and pixels.max() == 255


def test_a_stated_range_makes_float_images_usable(tmp_path: Path) -> None:
    values = np.linspace(-1, 3, 400, dtype=np.float32).reshape(20, 20)
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    grey = decode(tmp_path / "a", Reading((0, 2)))[..., 1]
    np.testing.assert_allclose(grey, values.clip(0, 2) * 127.5, atol=0.5001)
    values[3, 3] = np.nan
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(Rejected, match="damaged"):
        decode(tmp_path / "a", Reading((0, 2)))


def test_resize_is_antialiased_and_never_enlarges() -> None:
    stripes = np.zeros((200, 333, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the small image can show: must become grey, not stripes
    small = resize_short_side(stripes, 40)
    assert small.shape == (40, 67, 3)
    assert abs(small[5:-5, 5:-5].astype(int) - 128).max() <= 4
    assert resize_short_side(stripes, 200) is stripes and resize_short_side(stripes, 999) is stripes
    assert resize_short_side(noise(16, 2000), 16).shape == (16, 2000, 3)


@pytest.mark.parametrize("size", [(170, 120), (121, 333), (90, 91)])
@pytest.mark.parametrize("turn", [1, 6])
def test_an_image_is_reduced_as_pillow_would(size: tuple[int, int], turn: int) -> None:
    """By another implementation of the same filter, so within 1."""
    width, height = size
    y, x = np.mgrid[:height, :width] / 9
    picture = (127 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.fromarray(picture), "JPEG", quality=90, exif=exif)
    whole = Image.fromarray(decode_bytes(data).pixels)
    assert whole.size == (size if turn == 1 else size[::-1])
    expected = np.asarray(whole.resize(decoding._target(*whole.size, 50), Image.Resampling.BICUBIC)).astype(int)
    small = decode_bytes(data, 50)
    assert small.pixels.shape == expected.shape and min(expected.shape[:2]) == 50
    assert np.abs(small.pixels - expected).max() <= 1 and not small.pixels.flags.writeable
    assert small.original_hw == whole.size[::-1]


def test_scaled_jpeg_decoding_stays_near_to_the_full_one() -> None:
    y, x = np.mgrid[:640, :900] / 40
    picture = (127 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)).astype(np.uint8)
    data = encoded(Image.fromarray(picture), "JPEG", quality=95)
    fast, original_hw, _ = decode_bytes(data, 64)
    assert original_hw == (640, 900)
    slow = resize_short_side(decode_bytes(data).pixels, 64)
    assert fast.shape == slow.shape == (64, 90, 3)
    assert np.abs(fast.astype(int) - slow).mean() < 1.5


@settings(deadline=None)
@given(
    st.integers(1, 32768),
    st.integers(1, 32768),
    st.integers(1, 4096),
)
def test_target_size_keeps_the_aspect(width: int, height: int, short: int) -> None:
    new_width, new_height = decoding._target(width, height, short)
    assert min(new_width, new_height) == min(short, width, height)
    assert abs(new_width * height - new_height * width) <= max(width, height)


# --- finding ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(st.characters() | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])))
def test_escape_is_one_printable_line_and_can_be_undone(name: str) -> None:
    assert escape(name).isprintable()
    escape(name).encode()
    assert unescape(escape(name)) == name


def test_find_images(tmp_path: Path) -> None:
    for name in [
        "b/2.JPG",
        "b/1.jpeg",
        "a.tif",
        "c/d/e/x.WebP",
        "._a.png",
        ".hidden/x.png",
        "notes.txt",
        "b/Thumbs.db",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "a_link").symlink_to("c")
    (tmp_path / "self").symlink_to("self")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a.tif", "b/1.jpeg", "b/2.JPG", "c/d/e/x.WebP"]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    (tmp_path / "b" / "up").unlink()
    both = [tmp_path / "c", tmp_path / "b"]
    assert find_images(both) == find_images(both[::-1]) == find_images([*both, tmp_path / "b" / "1.jpeg"])
    assert [path.parent.name for path in find_images(both)] == ["b", "b", "e"]
    with pytest.raises(DataError, match="there is no"):
        find_images([tmp_path / "nowhere"])


def test_names_of_every_kind_are_packed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    names = [b"new\nline.png", b"not \xff utf8.png", "größe µ.png".encode(), b"back\\slash.png", b"\x1b[31mred.png"]
    for i, name in enumerate(names):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(encoded(Image.new("RGB", (20, 20), (i, 0, 0)), "PNG"))
    with open(os.path.join(folder, b"bad\n\xfe.png"), "wb") as file:
        file.write(b"text")
    pack = build([tmp_path / "odd"], tmp_path / "pack", processes=1)
    assert {os.fsencode(unescape(path)) for path in pack.paths} == set(names)
    for i, path in enumerate(pack.paths):
        assert path.isprintable()
        assert (pack.image(i) == decode(tmp_path / "odd" / unescape(path))).all()
    (line,) = (pack.folder / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "bad\\u000a\\xfe.png"


# --- packing ----------------------------------------------------------------------------------------------------------


def test_a_pack_holds_the_images(images: Path, tmp_path: Path) -> None:
    for name, (content, _) in HOSTILE.items():
        (images / name).write_bytes(content)
    os.mkfifo(images / "pipe.jpg")
    (images / "loop").symlink_to(images)
    seen: list[tuple[int, int, int]] = []
    pack = build([images], tmp_path / "pack", processes=2, progress=lambda *args: seen.append(args))
    assert is_pack(pack.folder) and not is_pack(images)
    assert len(pack) == 12 and pack.short_side_px is None
    assert pack.paths == tuple(sorted(pack.paths)) and pack.paths[0] == "slide0/00.png"
    for i, path in enumerate(pack.paths):
        np.testing.assert_array_equal(pack.image(i), decode(images / path))
        assert not pack.image(i).flags.writeable
        assert pack.image(i).base is not None
    assert pack.scale_N.tolist() == [1.0] * 12
    assert pack.group_N.tolist() == list(range(12))
    assert [path for path, flag in zip(pack.paths, pack.flags_N, strict=True) if flag & DUPLICATE] == [
        "slide2/copy.png"
    ]
    rejected = [json.loads(line) for line in (pack.folder / "rejected.jsonl").read_text().splitlines()]
    expected = {name: reason for name, (_, reason) in HOSTILE.items()} | {"pipe.jpg": "not_a_file"}
    assert {record["path"]: record["reason"] for record in rejected} == expected
    total = 12 + len(expected)
    assert seen[0] == (0, total, 0) and seen[-1] == (total, total, len(expected)) and seen == sorted(seen)
    made = json.loads((pack.folder / "pack.json").read_text())
    assert (made["images"], made["duplicates"], made["sources"]) == (12, 1, ["images"])
    assert made["rejected"]["damaged"] == 4 and str(tmp_path) not in json.dumps(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "pack"]
    assert sorted(path.name for path in pack.folder.iterdir()) == [
        "index.npz",
        "looks.npz",
        "pack.json",
        "pixels.bin",
        "rejected.jsonl",
        "thumbnails.bin",
    ]


def test_the_short_side_is_reduced(images: Path, tmp_path: Path) -> None:
    pack = build([images], tmp_path / "pack", short_side_px=25, processes=0)
    for i, path in enumerate(pack.paths):
        original = decode(images / path)
        assert pack.original_N2[i].tolist() == list(original.shape[:2])
        np.testing.assert_array_equal(pack.image(i), resize_short_side(original, 25))
        assert pack.scale_N[i] == min(pack.size_N2[i]) / min(original.shape[:2]) <= 1
    assert pack.short_side_px == 25 and pack.size_N2.min(1).max() == 25


def test_the_fingerprint_is_of_the_content(images: Path, tmp_path: Path) -> None:
    one = build([images], tmp_path / "one", 30, processes=1)
    two = build([images], tmp_path / "two", 30, processes=2)
    assert one.fingerprint == two.fingerprint
    for name in ("pixels.bin", "index.npz"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    folders = sorted(images.iterdir())
    apart = build(folders[::-1], tmp_path / "apart", 30, processes=0)
    assert apart.fingerprint == one.fingerprint and apart.paths == one.paths
    renamed = images.rename(tmp_path / "renamed")
    (renamed / "slide0" / "00.png").rename(renamed / "zz.png")
    moved = build([renamed], tmp_path / "moved", 30, processes=0)
    assert moved.fingerprint == one.fingerprint and moved.paths != one.paths
    assert build([renamed], tmp_path / "other side", 29, processes=0).fingerprint != one.fingerprint
    (renamed / "zz.png").unlink()
    assert build([renamed], tmp_path / "fewer", 30, processes=0).fingerprint != one.fingerprint


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(16, 70), st.integers(16, 70)), min_size=1, max_size=5),
    st.none() | st.integers(1, 80),
)
def test_sizes_go_round(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], side: int | None
) -> None:
    folder = tmp_path_factory.mktemp("round")
    (folder / "in").mkdir()
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(noise(height, width, i)).save(folder / "in" / f"{i}.bmp")
    made = build([folder / "in"], folder / "pack", side, processes=0)
    pack = open_pack(folder / "pack")
    assert [tuple(row) for row in pack.original_N2.tolist()] == sizes
    for i, (height, width) in enumerate(sizes):
        stored = noise(height, width, i) if side is None else resize_short_side(noise(height, width, i), side)
        np.testing.assert_array_equal(pack.image(i), stored)
        assert pack.size_N2[i].tolist() == list(stored.shape[:2])
    assert pack.fingerprint == made.fingerprint


def test_groups(images: Path, tmp_path: Path) -> None:
    pack = build([images], tmp_path / "pack", group_regex=r"slide(\d)/\d", processes=0)
    slides = [int(path[5]) for path in pack.paths]
    assert pack.paths[-1] == "slide2/copy.png"
    assert pack.group_N.tolist() == [*slides[:-1], 3]  # the copy does not match: a group of its own
    for regex, message in [("(", "not a regular expression"), ("slide", "needs a"), ("(patient)", "matches no path")]:
        with pytest.raises(UsageError, match=message):
            build([images], tmp_path / "other", group_regex=regex)
    with pytest.raises(UsageError, match="pack of other"):
        build([images], tmp_path / "pack", processes=0)


def test_a_finished_pack_is_reused_and_nothing_foreign_is_touched(images: Path, tmp_path: Path) -> None:
    first = build([images], tmp_path / "pack", processes=0)
    stamp = (first.folder / "pixels.bin").stat().st_mtime_ns
    for path in images.rglob("*.png"):
        os.utime(path, (1, 1))  # other times, same bytes
    assert build([images], tmp_path / "pack", processes=0).fingerprint == first.fingerprint
    assert (first.folder / "pixels.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="pack of other images or settings"):
        build([images], tmp_path / "pack", 30, processes=0)
    (images / "slide0" / "00.png").write_bytes(PNG)
    with pytest.raises(UsageError, match="pack of other images or settings"):
        build([images], tmp_path / "pack", processes=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not a pack"):
        build([images], tmp_path / "full", processes=0)
    (tmp_path / "empty").mkdir()
    assert len(build([images], tmp_path / "empty", processes=0)) == 12


def test_nothing_usable_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError, match=r"no images in .*bad") as none:
        build([tmp_path / "bad"], tmp_path / "pack")
    for name, (content, _) in HOSTILE.items():
        (tmp_path / "bad" / name).write_bytes(content)
    with pytest.raises(DataError, match=r"all 13 images in .*bad were rejected: 4 x damaged, 3 x too_large") as bad:
        build([tmp_path / "bad"], tmp_path / "pack", processes=0)
    with pytest.raises(DataError, match=r"there is no .*missing") as missing:
        build([tmp_path / "missing"], tmp_path / "pack")
    assert all("\n" not in str(caught.value) for caught in (none, bad, missing))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("damage", ["pixels", "index", "missing", "foreign", "version", "json", "sha"])
def test_a_damaged_pack_is_refused(images: Path, tmp_path: Path, damage: str) -> None:
    folder = build([images], tmp_path / "pack", processes=0).folder
    made = json.loads((folder / "pack.json").read_text())
    if damage == "pixels":
        os.truncate(folder / "pixels.bin", made["pixel_bytes"] - 1)
    elif damage == "index":
        os.truncate(folder / "index.npz", 1000)
    elif damage == "missing":
        (folder / "index.npz").unlink()
    elif damage == "foreign":
        other = build([images / "slide1"], tmp_path / "other", processes=0)
        shutil.copy(other.folder / "index.npz", folder)
    elif damage == "version":
        (folder / "pack.json").write_text(json.dumps(made | {"version": 1}))
    elif damage == "json":
        (folder / "pack.json").write_text("{")
    elif damage == "sha":
        (folder / "pack.json").write_text(json.dumps(made | {"fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"version 2.*pack the images again" if damage == "version" else "is damaged"):
        open_pack(folder)
    with pytest.raises(DataError):
        pack_or_folder(folder, tmp_path, None)


def test_pack_or_folder(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    first = pack_or_folder(images, cache, 30)
    stamp = (first.folder / "pixels.bin").stat().st_ino
    assert first.folder.name.startswith("images-") and first.short_side_px == 30
    assert (pack_or_folder(images, cache, 30).folder / "pixels.bin").stat().st_ino == stamp
    assert pack_or_folder(first.folder, cache, 99).folder == first.folder
    Image.new("RGB", (40, 40)).save(images / "new.png")
    second = pack_or_folder(images, cache, 30)
    assert len(second) == 13 and second.folder != first.folder and len(open_pack(first.folder)) == 12
    status = (images / "new.png").stat()
    os.utime(images / "new.png", ns=(0, status.st_mtime_ns + 1))  # written again, at the same size
    assert pack_or_folder(images, cache, 30).folder not in (first.folder, second.folder)


def test_pack_or_folder_waits_for_who_is_making_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    holders = [partial.alone(tmp_path / pack_or_folder(images, tmp_path / "other", None).folder.name)]
    holders[0].__enter__()

    def release(seconds: float) -> None:
        waited.append(seconds)
        holders.pop().__exit__(None, None, None)

    monkeypatch.setattr(building.time, "sleep", release)
    assert len(pack_or_folder(images, tmp_path, None)) == 12
    assert len(waited) == 1


def test_a_pack_goes_to_another_process_by_name(images: Path, tmp_path: Path) -> None:
    import pickle

    pack = build([images], tmp_path / "pack", processes=0)
    sent = pickle.dumps(pack)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).image(3), pack.image(3))


# --- what may happen to a build ---------------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from ssl_pretrain.data import building, workers
workers._CHUNK_FILES, building._SYNC_SECONDS = 2, 0.0
def slow(done, total, rejected):
    print(done, flush=True)
    time.sleep(0.2)
building.build([Path(sys.argv[1])], Path(sys.argv[2]), processes=2, progress=slow)
"""


def test_a_killed_build_goes_on_where_it_was(images: Path, tmp_path: Path) -> None:
    (images / "a bad one.png").write_bytes(b"text")
    whole = build([images], tmp_path / "whole", processes=0)
    command = [sys.executable, "-c", KILLED, str(images), str(tmp_path / "pack")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 5:
                break
        with pytest.raises(WriteError, match="another process is making"):
            build([images], tmp_path / "pack", processes=0)
        pids = children(process.pid)
        process.kill()
    assert not is_pack(tmp_path / "pack") and len(pids) >= 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    unfinished = tmp_path / ".pack.partial"
    with open(unfinished / "journal.jsonl", "ab") as journal, open(unfinished / "pixels.bin", "ab") as pixels:
        journal.write(b'[20, 50, 20, 50, "12')  # a torn tail
        pixels.write(b"\x01" * 77)
    seen: list[int] = []
    resumed = build([images], tmp_path / "pack", processes=0, progress=lambda done, *_: seen.append(done))
    assert seen[0] >= 5
    for name in ("pixels.bin", "index.npz", "rejected.jsonl", "pack.json", "looks.npz", "thumbnails.bin"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not unfinished.exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true: object, seconds: float = 10) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def stop_after(count: int) -> building.Progress:
    def stop(done: int, total: int, rejected: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("loss", ["pixels lost", "line lost", "garbage", "other images"])
def test_what_was_not_safely_written_is_done_again(
    images: Path, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHUNK_FILES", 2)
    monkeypatch.setattr(building, "_SYNC_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        build([images], tmp_path / "pack", processes=0, progress=stop_after(8))
    journal, pixels = (tmp_path / ".pack.partial" / name for name in ("journal.jsonl", "pixels.bin"))
    expected = 8
    if loss == "pixels lost":
        os.truncate(pixels, pixels.stat().st_size - 1)
        expected = 7
    elif loss == "line lost":
        os.truncate(journal, journal.stat().st_size - 1)
        expected = 7
    elif loss == "garbage":
        journal.write_bytes(journal.read_bytes() + bytes(500))
    elif loss == "other images":
        (images / "slide0" / "00.png").unlink()
        expected = 0
    seen: list[int] = []
    pack = build([images], tmp_path / "pack", processes=0, progress=lambda done, *_: seen.append(done))
    assert seen[0] == expected
    whole = build([images], tmp_path / "whole", processes=0)
    assert (pack.folder / "pixels.bin").read_bytes() == (whole.folder / "pixels.bin").read_bytes()
    assert pack.fingerprint == whole.fingerprint


def test_a_build_that_ended_just_before_the_renaming_is_not_done_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(WriteError, match="No space left on device; what is done is kept"):
            build([images], tmp_path / "pack", processes=0)
    stamp = (tmp_path / ".pack.partial" / "pixels.bin").stat().st_mtime_ns
    pack = build([images], tmp_path / "pack", processes=0)
    assert (pack.folder / "pixels.bin").stat().st_mtime_ns == stamp


CRASHING = """
import os, signal
from PIL import Image
opened = Image.open
def open(file, *args, **kwargs):
    if b"KILL ME" in file.getvalue():
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(file, *args, **kwargs)
Image.open = open
"""


def test_a_file_that_kills_its_process_is_rejected(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHUNK_FILES", 3)
    without = build([images], tmp_path / "without", processes=0)
    for name in ("slide0/crash.jpg", "slide2/crash.jpg"):
        (images / name).write_bytes(encoded(RGB, "JPEG", comment=b"KILL ME"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    pack = build([images], tmp_path / "pack", processes=2)
    rejected = [json.loads(line) for line in (pack.folder / "rejected.jsonl").read_text().splitlines()]
    assert [(record["path"], record["reason"]) for record in rejected] == [
        ("slide0/crash.jpg", "crashed"),
        ("slide2/crash.jpg", "crashed"),
    ]
    assert pack.fingerprint == without.fingerprint


def test_a_killed_process_costs_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CHUNK_FILES", 1)
    killed: list[int] = []

    def kill_once(done: int, total: int, rejected: int) -> None:
        if done == 3 and not killed:
            killed.append(children(os.getpid())[-1])
            os.kill(killed[0], signal.SIGKILL)

    pack = build([images], tmp_path / "pack", processes=2, progress=kill_once)
    assert killed and len(pack) == 12
    assert (pack.folder / "rejected.jsonl").read_bytes() == b""


def test_a_script_without_a_main_guard_is_told(images: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom ssl_pretrain.data.building import build\n"
        f"build([Path({str(images)!r})], Path({str(tmp_path / 'pack')!r}))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "UsageError: decoding processes cannot start: a script must call this under" in ended.stderr


def test_a_worker_hands_back_before_it_holds_too_much(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CHUNK_PIXEL_BYTES", 5000)
    listing = files.scan([images])
    some = workers._decode_some(listing.root, listing.names, None)
    assert len(some) == 2  # 20 x 50 x 3, then 29 x 44 x 3
    monkeypatch.setattr(workers, "_Workers", InThisProcess)
    parts = list(workers.decode_all(listing, 0, None, 1))
    assert len(parts) > 3 and sum(len(part) for part in parts) == 12


class InThisProcess(workers._Workers):
    def __init__(self, root: Path, short_side_px: int | None, processes: int, reading: Reading = AS_STATED) -> None:
        self.root, self.short_side_px, self.reading = root, short_side_px, reading

    def submit(self, names: Sequence[str]) -> Future[list[workers.Outcome]]:
        future: Future[list[workers.Outcome]] = Future()
        future.set_result(workers._decode_some(self.root, names, self.short_side_px, self.reading))
        return future

    def close(self) -> None:
        pass


def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys, ssl_pretrain.data.building, ssl_pretrain.data.readers.voc\n"
        "print([name for name in ('torch', 'kornia', 'lightning', 'torchvision') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
