from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reader_layouts import bone_marrow, csd, fnac, image, stack_folders, stack_table, stack_tiffs, text

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.readers import class_folder, read, sipakmed, tiles, z_stack
from ssl_pretrain.errors import DataError

# --- tiles ------------------------------------------------------------------------------------------------------------


def test_tiles_of_slides(tmp_path: Path) -> None:
    csd(tmp_path)
    image(tmp_path / "POS" / "top.jpg")
    labelled = read(tmp_path, format="tiles")
    assert (labelled.format, labelled.kind, labelled.classes) == ("tiles", "image", ("NILM", "POS"))
    assert labelled.annotated == {"NILM": 6, "POS": 6}
    assert {(item.group, item.labels) for item in labelled.images} == {
        (f"{name}{i}", (name,)) for name in ("NILM", "POS") for i in (1, 2)
    }
    assert labelled.found == "12 tiles of 4 slides of 2 classes, grouped by slide"
    assert len(labelled.problems) == 1 and labelled.problems[0].startswith("POS/top.jpg: left out")


def test_tiles_below_splits(tmp_path: Path) -> None:
    csd(tmp_path / "train")
    csd(tmp_path / "Test")
    labelled = read(tmp_path)
    assert labelled.format == "tiles" and {item.split for item in labelled.images} == {"train", "test"}
    assert {item.group for item in labelled.images} == {"NILM1", "NILM2", "POS1", "POS2"}


def test_what_is_not_tiles(tmp_path: Path) -> None:
    for name in ("A", "B"):
        image(tmp_path / "one" / "NILM" / name / "1_1.jpg")  # one class
        image(tmp_path / "folds" / f"fold{name}" / "cat" / "1_1.jpg")  # the same "slide" in two classes
        image(tmp_path / "folds" / f"fold{name}" / "dog" / "1_1.jpg")
        image(tmp_path / "crops" / f"im_{name}" / "CROPPED" / "001_01.bmp")  # SIPaKMeD's
        image(tmp_path / "splits" / "train" / name / "1_1.jpg")  # classes in a split
        image(tmp_path / "names" / name / "s1" / "1_1_x.jpg")
    assert not any(tiles.recognise(folder) for folder in tmp_path.iterdir())
    assert sipakmed.recognise(tmp_path / "crops")


# --- stacks -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_planes(tmp_path: Path) -> None:
    stack_folders(tmp_path)
    image(tmp_path / "high" / "single.png")
    labelled = read(tmp_path, format="z_stack")
    # z0 to z9: the middle one of ten is the sixth
    assert [(item.path.name, item.labels, item.group) for item in labelled.images] == [
        ("z5.png", ("high",), "high/high1"),
        ("z5.png", ("low",), "low/low1"),
    ]
    assert labelled.annotated == {"high": 1, "low": 1} and labelled.kind == "image"
    assert labelled.problems == ("high/single.png: left out, neither a plane of a folder nor a TIFF with pages",)
    assert labelled.found.startswith("2 stacks of 20 planes in files of their own, 2 classes")


def test_planes_are_counted_by_value(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for z in ("2", "10", "9"):
            image(tmp_path / name / "s" / f"plane_{z}.png")
    assert [item.path.name for item in read(tmp_path).images] == ["plane_9.png", "plane_9.png"]


def test_a_tiff_with_pages(tmp_path: Path) -> None:
    stack_tiffs(tmp_path)
    image(tmp_path / "low" / "one.tif")
    text(tmp_path / "low" / "broken.tif", "II*\0")
    labelled = read(tmp_path, format="z_stack")
    assert [(item.path.name, item.labels, item.group) for item in labelled.images] == [
        ("high1.tif", ("high",), "high/high1.tif"),
        ("low1.tif", ("low",), "low/low1.tif"),
    ]
    assert np.unique(decode(labelled.images[0].path)).tolist() == [10]  # the first page
    assert len(labelled.problems) == 2


def test_stacks_with_a_table(tmp_path: Path) -> None:
    stack_table(tmp_path)
    text(tmp_path / "labels.csv", "\ufeffstack,label,set\nframe000,H,train\nframe001,N,test\ngone,N,\n")
    image(tmp_path / "frame002" / "0.png")
    image(tmp_path / "frame002" / "1.png")
    labelled = read(tmp_path)
    assert labelled.format == "z_stack"
    assert [(item.path.name, item.labels, item.group, item.split) for item in labelled.images] == [
        ("2.png", ("H",), "frame000", "train"),
        ("2.png", ("N",), "frame001", "test"),
    ]
    assert labelled.annotated == {"H": 1, "N": 2}
    assert labelled.problems == (
        "labels.csv: gone has no folder of planes (missing image)",
        "frame002/0.png: left out, not in a stack of labels.csv",
        "frame002/1.png: left out, not in a stack of labels.csv",
    )


@pytest.mark.parametrize("row", ["frame000", "frame000,", ",H", "frame000,H\nframe000,N"])
def test_tables_that_are_refused(tmp_path: Path, row: str) -> None:
    stack_table(tmp_path)
    text(tmp_path / "labels.csv", f"stack,label\n{row}\n")
    with pytest.raises(DataError, match=r"labels\.csv: row \d"):
        read(tmp_path, format="z_stack")


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    stack_table(tmp_path)
    text(tmp_path / "labels.csv", "stack,label\nx," + "a" * (csv.field_size_limit() + 1))
    with pytest.raises(DataError, match=r"labels\.csv cannot be read"):
        read(tmp_path, format="z_stack")
    assert not z_stack.recognise(tmp_path)


def test_class_folders_with_numbers_are_no_stacks(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(3):
            image(tmp_path / "train" / name / f"{i:03d}.png")
            image(tmp_path / "val" / name / f"{i:03d}.png")
    assert not z_stack.recognise(tmp_path)
    labelled = read(tmp_path)
    assert labelled.format == "class_folder" and labelled.classes == ("cat", "dog")


def test_tiffs_with_one_page_are_no_stacks(tmp_path: Path) -> None:
    stack_tiffs(tmp_path)
    image(tmp_path / "high" / "one.tif")
    assert not z_stack.recognise(tmp_path)


# --- class folders ----------------------------------------------------------------------------------------------------


def test_blocks_of_numbers_are_no_classes(tmp_path: Path) -> None:
    bone_marrow(tmp_path)
    labelled = read(tmp_path)
    assert labelled.format == "class_folder" and labelled.annotated == {"ART": 2, "BAS": 2}


def test_the_class_in_the_name(tmp_path: Path) -> None:
    fnac(tmp_path)
    labelled = read(tmp_path)
    assert labelled.annotated == {"B": 2, "M": 2} and labelled.kind == "image"
    assert labelled.found == "4 images of 2 classes, taken from the start of their names: B, M"


def test_the_class_in_the_name_below_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("nilm1", "lsil (2)", "hsil-3"):
            image(tmp_path / split / f"{name}.JPG")
    labelled = read(tmp_path)
    assert labelled.annotated == {"nilm": 2, "lsil": 2, "hsil": 2}
    assert [item.split for item in labelled.images] == ["test"] * 3 + ["train"] * 3


@pytest.mark.parametrize(
    "names",
    [
        ["IMG_1", "IMG_2", "B_1", "B_2"],  # a camera
        ["B_1", "B_2", "M_1"],  # one image of a class
        ["B_1", "B_2", "B_3"],  # one class
        ["B_1", "B_2", "M_1", "M_2", "12"],  # one without a class
        ["B_1", "B_2", "M1x", "Mx"],  # one without a number
        ["cell_1", "cell_2", "field_1", "field_2"],  # words for anything
        ["B1", "B2", "b c_1", "b c_2"],  # not letters alone
    ],
)
def test_names_without_a_class(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        image(tmp_path / f"{name}.png")
    assert not class_folder.recognise(tmp_path)
    with pytest.raises(DataError, match="no labels found"):
        read(tmp_path)


def test_a_prefix_counts_only_where_all_lie_together(tmp_path: Path) -> None:
    fnac(tmp_path / "one")
    assert class_folder.recognise(tmp_path / "one") and not class_folder.recognise(tmp_path)


def test_planes_of_another_size_do_not_matter(tmp_path: Path) -> None:
    """The plane that is shown gives the size."""
    stack_folders(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "low" / "low1" / "z0.png")
    assert {item.size_px for item in read(tmp_path).images} == {(64, 48)}
