"""Version 5 against SciPy, version 7.3 as MATLAB writes it, and files that want to harm."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_layouts import cell, cx22, image, isbi2014, isbi2014_v73, mask512, string_words, text, v73

from ssl_pretrain.data.cx22 import cut_out
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.files import find_images
from ssl_pretrain.data.matlab_files import open_mat, strings_of
from ssl_pretrain.data.readers import matlab, read
from ssl_pretrain.data.shapes import pixels
from ssl_pretrain.errors import DataError, WriteError


def saved(path: Path, compressed: bool = False, **variables: Any) -> Path:
    scipy.io.savemat(path, variables, do_compression=compressed)
    return path


# --- version 5 --------------------------------------------------------------------------------------------------------

KINDS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_scipys(tmp_path: Path, kind: str, compressed: bool) -> None:
    arrays = {f"a{i}": (np.arange(np.prod(size)) % 100).reshape(size).astype(kind) for i, size in enumerate(SIZES)}
    path = saved(tmp_path / "a.mat", compressed, **arrays, nested=cell([arrays["a0"], cell([arrays["a1"]])]))
    theirs = scipy.io.loadmat(path)
    with open_mat(path) as file:
        assert file.names() == sorted([*arrays, "nested"])
        for name in arrays:
            ours = file.array(name)
            assert ours.shape == theirs[name].shape and (ours == theirs[name]).all()
        first, second = file.cells("nested")
        assert (first == arrays["a0"]).all() and isinstance(second, list) and (second[0] == arrays["a1"]).all()
        with pytest.raises(DataError, match="nested is not an array of numbers"):
            file.array("nested")
        with pytest.raises(DataError, match="a0 is not a cell array"):
            file.cells("a0")
        with pytest.raises(DataError, match=r"has no b; it has a0, a1, .*nested"):
            file.array("b")
        with pytest.raises(DataError, match=r"which need version 7\.3"):
            file.strings("a0")


SIZES = [(3, 5), (1, 1), (0, 0), (4, 1), (2, 3, 4)]


def test_logical_and_empty_cells(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.mat", c=cell([np.array([[True, False]]), np.zeros((0, 0))]))
    with open_mat(path) as file:
        values = file.cells("c")
    assert isinstance(values[0], np.ndarray) and values[0].tolist() == [[1, 0]]
    assert isinstance(values[1], np.ndarray) and values[1].size == 0


def test_big_endian(tmp_path: Path) -> None:
    tag = struct.pack
    inner = (
        tag(">IIII", 6, 8, 9, 0) + tag(">IIii", 5, 8, 1, 2) + tag(">HHcxxx", 1, 1, b"a") + tag(">HHBBxx", 2, 2, 7, 9)
    )
    data = b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + tag(">II", 14, len(inner)) + inner
    (tmp_path / "a.mat").write_bytes(data)
    with open_mat(tmp_path / "a.mat") as file:
        assert file.array("a").tolist() == [[7, 9]]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("text", "a text is not read"),
        ({"field": 1}, "a structure is not read"),
        (np.array([[1 + 2j]]), "a complex array is not read"),
        (scipy.sparse.eye(3).tocsc(), "a sparse array is not read"),
        (cell([cell([cell([np.eye(2)])])]), "cells too deep"),
    ],
)
def test_what_is_not_read(tmp_path: Path, value: Any, why: str) -> None:
    path = saved(tmp_path / "a.mat", a=value)
    with open_mat(path) as file, pytest.raises(DataError, match=why) as caught:
        file.array("a")
    assert "\n" not in str(caught.value)


def element(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body + b"\0" * (-len(body) % 8)


def matrix(kind: int, sizes: tuple[int, ...], rest: bytes, name: bytes = b"a") -> bytes:
    flags = element(6, struct.pack("<II", kind, 0))
    return element(14, flags + element(5, struct.pack(f"<{len(sizes)}i", *sizes)) + element(1, name) + rest)


def header(*elements: bytes) -> bytes:
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"".join(elements)


def deep(levels: int) -> bytes:
    """Cells in cells, from the inside."""
    parts, size = [], 0
    for level in range(levels):
        name = element(1, b"a" if level == levels - 1 else b"")
        body = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, int(level > 0))) + name
        parts.append(struct.pack("<II", 14, len(body) + size) + body)
        size += 8 + len(body)
    return header(b"".join(reversed(parts)))


HOSTILE = {
    "deep": deep(20_000),  # scipy.io.loadmat ends the process
    "many cells": header(matrix(1, (65536, 16384), matrix(9, (1, 1), element(2, b"\1"), b""))),  # and takes 8 GiB
    "many numbers": header(matrix(9, (2**31 - 1, 2**31 - 1), element(2, b"\1"))),
    "below zero": header(matrix(9, (-1, -1), element(2, b"\1"))),
    "one size": header(matrix(9, (1,), element(2, b"\1"))),
    "unknown numbers": header(matrix(9, (1, 1), element(99, b"\1"))),
    "cut in the element": header(matrix(9, (1, 1), element(2, b"\1")))[:-20],
    "cut in the header": header()[:100],
    "not compressed": header(struct.pack("<II", 15, 8) + b"not zlib"),
    "nothing compressed": header(struct.pack("<II", 15, 8) + zlib.compress(b"")),
    "no flags": header(element(14, element(5, struct.pack("<ii", 1, 1)))),
    "a cell of text": header(matrix(1, (1, 1), element(16, b"text"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_of_version_5(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(HOSTILE[name])
    with pytest.raises(DataError) as caught, open_mat(tmp_path / "a.mat") as file:
        file.cells("a")
    assert "\n" not in str(caught.value)


def test_a_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pretrain.data.matlab_files.MAX_INFLATED_BYTES", 10_000)
    bomb = zlib.compress(matrix(9, (100, 101), element(2, b"\0" * 10_100)))
    assert len(bomb) < 200
    (tmp_path / "a.mat").write_bytes(header(struct.pack("<II", 15, len(bomb)) + bomb))
    with pytest.raises(DataError, match="more than 10000 bytes when it is inflated"), open_mat(tmp_path / "a.mat"):
        pass


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_damaged_files_of_version_5(data: st.DataObject) -> None:
    """A few bytes of a real file are changed: it is read, or refused in words."""
    raw = bytearray(REAL)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(124, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = Path(data.draw(st.just(FOLDER))) / "a.mat"
    path.write_bytes(bytes(raw))
    try:
        with open_mat(path) as file:
            for name in file.names():
                list(file.cells(name))
    except DataError as error:
        assert "\n" not in str(error)


def real() -> bytes:
    made = io.BytesIO()
    scipy.io.savemat(made, {"c": cell([np.eye(3), cell([np.ones((2, 2), np.uint8)])]), "d": cell([np.zeros((1, 3))])})
    return made.getvalue()


REAL = real()
FOLDER = ""


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    globals()["FOLDER"] = str(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"MATLAB 5.0"])
def test_what_is_no_matlab_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"not a MATLAB file of version 5 or 7\.3"), open_mat(tmp_path / "a.mat"):
        pass


# --- version 7.3 ------------------------------------------------------------------------------------------------------


def test_rows_and_columns_of_version_73(tmp_path: Path) -> None:
    table = np.arange(6).reshape(2, 3)
    v73(tmp_path / "a.mat", a=table, c=[table, [table.astype(np.uint8)]])
    with open_mat(tmp_path / "a.mat") as file:
        assert file.names() == ["a", "c"]
        assert file.array("a").tolist() == table.tolist()
        cells = file.cells("c")
        assert len(cells) == 2 and isinstance(cells[1], list)
        assert np.asarray(cells[0]).tolist() == table.tolist() == cells[1][0].tolist()
        with pytest.raises(DataError, match="c cannot be read"):
            file.array("c")
        with pytest.raises(DataError, match="not a cell array"):
            file.cells("a")
        with pytest.raises(DataError, match="has no b; it has a, c"):
            file.array("b")


def test_references_to_one_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v73(tmp_path / "a.mat", c=[[np.eye(3)] * 3])
    monkeypatch.setattr("ssl_pretrain.data.matlab_files.MAX_ELEMENTS", 26)
    with open_mat(tmp_path / "a.mat") as file, pytest.raises(DataError, match="more than 26 numbers in one cell"):
        file.cells("c")[0]


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=9)))
def test_strings_come_back(texts: list[str]) -> None:
    assert strings_of(string_words(texts)) == texts


@pytest.mark.parametrize(
    "words",
    [[], [1], [2, 2, 1, 1, 0], [1, 2, 1, 1, 5], [1, 2, 1, 1, 1, 97, 0], [1, 2, 2**40, 2**20], [1, 2, 1, 1], [1, 9, 1]],
)
def test_words_that_are_no_strings(words: list[int]) -> None:
    with pytest.raises(ValueError):
        strings_of(np.array(words, np.uint64))


def test_what_points_out_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret..")
    v73(tmp_path / "other.mat", a=np.eye(2))
    v73(tmp_path / "a.mat", fine=np.eye(2))
    with h5py.File(tmp_path / "a.mat", "r+") as file:
        file.create_dataset("raw", (1, 8), "u1", external=[(str(tmp_path / "secret"), 0, 8)])
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.mat"), "a")
        file["soft"] = h5py.SoftLink("/fine")
        layout = h5py.VirtualLayout((2, 2), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.mat"), "a", (2, 2))
        file.create_virtual_dataset("virtual", layout)
        file.create_group("group")
        file.create_dataset("text", data=np.bytes_("text"))
        file.create_dataset("huge", (10**6, 10**6), "u1", chunks=(10, 10))
    with open_mat(tmp_path / "a.mat") as mat:
        assert mat.array("fine").tolist() == np.eye(2).tolist()
        for name in ("raw", "link", "soft", "virtual", "group", "text", "huge"):
            with pytest.raises(DataError) as caught:
                mat.array(name)
            assert "secret.." not in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_of_version_73(tmp_path: Path) -> None:
    """HDF5 is C: in a process of its own, so that a crash would be seen and not felt."""
    v73(tmp_path / "a.mat", c=[np.eye(3), [np.ones((2, 2), np.uint8)]], d=np.zeros((1, 3)))
    code = f"""
import random
from pathlib import Path
from ssl_pretrain.data.matlab_files import open_mat
from ssl_pretrain.errors import DataError
raw, path, draw = Path({str(tmp_path / "a.mat")!r}).read_bytes(), Path({str(tmp_path / "b.mat")!r}), random.Random(0)
refused = 0
for _ in range(150):
    data = bytearray(raw)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(512, len(data))] = draw.randrange(256)
    path.write_bytes(bytes(data if draw.random() < 0.8 else data[: draw.randrange(600, len(data))]))
    try:
        with open_mat(path) as file:
            for name in file.names():
                for i in range(min(len(file.cells(name)), 5)):
                    file.cells(name)[i]
    except DataError:
        refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 50


# --- the two data sets ------------------------------------------------------------------------------------------------


def test_isbi2014(tmp_path: Path) -> None:
    isbi2014(tmp_path / "in")
    with pytest.raises(DataError, match=r"'ssl-pretrain datasets read isbi2014 ROOT --as coco --out DIR'"):
        read(tmp_path / "in")
    made = matlab.extract(tmp_path / "in", tmp_path / "out")
    assert made.annotated == {"Cytoplasm": 10, "Nuclei": 10} and made.problems == ()
    assert [(item.path.name, item.split) for item in made.images] == [
        *((f"isbi_test90_{i:03d}.png", "test") for i in range(2)),
        *((f"isbi_train_{i:03d}.png", "train") for i in range(3)),
    ]
    back = read(tmp_path / "out")
    assert back.format == "coco" and back.annotated == made.annotated
    for item in back.images:
        assert item.boxes_N4.tolist() == [[10, 20, 110, 80], [60, 20, 200, 90], [20, 30, 30, 40], [100, 30, 120, 40]]
        assert item.labels == ("Cytoplasm", "Cytoplasm", "Nuclei", "Nuclei") and item.size_px == (512, 512)
        assert item.shapes[1] is not None
        assert (pixels(item.shapes[1], (512, 512)) == mask512(60, 20, 200, 90)).all()
    assert [int(decode(item.path)[0, 0, 0]) for item in made.images] == [100, 101, 100, 101, 102]


def test_isbi2014_of_version_73(tmp_path: Path) -> None:
    isbi2014_v73(tmp_path / "in")
    made = matlab.extract(tmp_path / "in", tmp_path / "out")
    assert made.annotated == {"Cytoplasm": 3, "Nuclei": 2}
    assert made.images[1].boxes_N4.tolist() == [[1, 2, 4, 3], [20, 30, 30, 40]]
    field = decode(made.images[0].path)
    assert field[0, 299, 0] == 0 and field[0, 300, 0] == 200  # upright: bright on the right, not below
    isbi2014(tmp_path / "in")
    both = matlab.extract(tmp_path / "in", tmp_path / "both")
    assert len(both.images) == 5
    assert both.problems == ("isbi_test90.mat: left out, its fields are in testset.mat too",)


def test_isbi2014_that_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    images = [np.full((64, 48), 7.0), np.full((64, 48), 0.5), np.zeros((64, 48), np.uint8), np.zeros((0, 0))]
    good = np.pad(np.ones((2, 3)), ((1, 61), (2, 43)))
    cyto = [cell([good, good[:-1], good * 0]), cell([]), np.zeros((0, 0)), cell([])]
    saved(folder / "isbi_train.mat", ISBI_Train=cell(images))
    saved(folder / "isbi_train_GT.mat", train_Cytoplasm=cell(cyto), train_Nuclei=cell([good, good, good[:-1], good]))
    made = matlab.extract(folder, tmp_path / "out")
    assert [item.boxes_N4.tolist() for item in made.images] == [[[2, 1, 5, 3], [2, 1, 5, 3]], []]
    assert made.annotated == {"Cytoplasm": 3, "Nuclei": 2} and len(made.problems) == 5
    saved(folder / "isbi_train_GT.mat", train_Cytoplasm=cell(cyto[:3]), train_Nuclei=cell([good] * 4))
    with pytest.raises(DataError, match=r"does not belong to isbi_train\.mat: 4 fields, but masks of 3 and 4"):
        matlab.extract(folder, tmp_path / "again")
    assert not list(tmp_path.glob(".again*")) and not (tmp_path / "again").exists()
    with pytest.raises(WriteError, match="exists"):
        matlab.extract(folder, tmp_path / "out")


def test_cx22(tmp_path: Path) -> None:
    cx22(tmp_path / "in")
    made = matlab.extract(tmp_path / "in", tmp_path / "out")
    assert made.annotated == {"cyto": 6, "nuc": 6} and made.problems == ()
    assert [(item.group, item.split, item.size_px) for item in made.images] == [
        (name, "test", (512, 512)) for name in ("00477", "00012", "00477")
    ]
    assert made.images[0].boxes_N4.tolist() == [[10, 20, 110, 80], [5, 6, 7, 9]] * 2
    first = decode(made.images[0].path)
    assert first[0, 0].tolist() == [10, 20, 477 % 256]  # the region's corner, x before y
    assert first[199, 299].tolist() == [(10 + 299) % 256, 20 + 199, 477 % 256]
    assert (first[200:] == 255).all() and (first[:, 300:] == 255).all()
    second = decode(made.images[1].path)
    assert (second[round(400 * 512 / 600) :] == 255).all() and not (second[:300, :500] == 255).all(axis=2).any()
    back = read(tmp_path / "out")
    assert back.format == "coco" and back.annotated == made.annotated
    assert {item.group for item in back.images if item.path.name.endswith("00477.png")} == {"00477"}


def test_cx22_without_images(tmp_path: Path) -> None:
    cx22(tmp_path)
    for path in find_images([tmp_path / "CCEDD"]):
        if path.stem == "00012":
            path.unlink()
    made = matlab.extract(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert len(made.images) == 2
    assert made.problems == ("Cx22-Multi-Test_0001_00012: left out, no image 00012 of CCEDD",)
    (tmp_path / "CCEDD" / "png" / "00477.png").unlink()
    with pytest.raises(
        DataError, match="none of the 2 images that Cx22-Multi-Test is cut from: put CCEDD's folder png"
    ):
        matlab.extract(tmp_path, tmp_path.parent / f"{tmp_path.name}-none")


def test_cx22_that_is_wrong(tmp_path: Path) -> None:
    cx22(tmp_path / "in")
    folder = tmp_path / "in" / "Cx22-Multi-Test"
    turned = [[mask512(20, 10, 80, 110)], [mask512(0, 0, 0, 0), np.ones((3, 3), np.uint8)], [mask512(5, 6, 7, 9)]]
    (folder / "nuc" / "nuc_ins.mat").unlink()
    v73(folder / "nuc" / "nuc_ins.mat", nuc_ins=turned)
    v73(folder / "generator" / "ROIs_x_y.mat", ROIs_x_y=np.array([[10, 20], [700, 0], [30, 40]]))
    made = matlab.extract(tmp_path / "in", tmp_path / "out")
    assert made.annotated == {"cyto": 4, "nuc": 2}
    assert made.problems == (
        "Cx22-Multi-Test_0000_00477: the boxes of nuc in the file are not those of its masks",
        "Cx22-Multi-Test_0001_00012: left out, a region outside the image",
        "Cx22-Multi-Test_0002_00477: the boxes of nuc in the file are not those of its masks",
    )
    v73(folder / "generator" / "ROIs_W_H.mat", ROIs_W_H=np.zeros((2, 2)))
    with pytest.raises(DataError, match="not two numbers for each of 3 fields"):
        matlab.extract(tmp_path / "in", tmp_path / "again")


def test_a_region_of_512_px_is_not_scaled() -> None:
    source = np.arange(600 * 600 * 3, dtype=np.uint32).reshape(600, 600, 3).astype(np.uint8)
    assert (cut_out(source, 8, 9, 512, 512) == source[9:521, 8:520]).all()
    assert (cut_out(source, 0, 0, 600, 300)[256:] == 255).all()


def test_a_folder_without_matlab_files(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    text(tmp_path / "isbi_train.mat", "x")
    assert not matlab.recognise(tmp_path)
    with pytest.raises(DataError, match=r"has no isbi_train\.mat"):
        matlab.extract(tmp_path, tmp_path / "out")
