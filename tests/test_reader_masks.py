from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reader_layouts import LAYOUTS, ccagt, cellpose, cisd, cvat_masks, dsb2018, field, image, labels, sipakmed, text

from ssl_pretrain.data.files import Rejected
from ssl_pretrain.data.label_images import read_labels
from ssl_pretrain.data.readers import FALLBACK, KIND, LabelledSet, object_masks, read
from ssl_pretrain.data.shapes import Mask, pixels
from ssl_pretrain.errors import DataError
from ssl_pretrain.named import named, names


def shown(labelled: LabelledSet) -> dict[str, list[tuple[str, list[float]]]]:
    """By path and class, so that folders with images of one name are told apart."""
    return {
        "/".join(item.path.parts[-2:]): list(zip(item.labels, item.boxes_N4.tolist(), strict=True))
        for item in labelled.images
    }


# --- all layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_exactly_one_format_answers(name: str, tmp_path: Path) -> None:
    wanted, make = LAYOUTS[name]
    make(tmp_path)
    fitting = [form for form in names(KIND) if form != FALLBACK and named(KIND, form).recognise(tmp_path)]
    assert fitting == ([] if wanted == FALLBACK else [wanted])
    if wanted == FALLBACK:
        assert named(KIND, FALLBACK).recognise(tmp_path)
    if wanted == "matlab":
        with pytest.raises(DataError, match="datasets read"):
            read(tmp_path)
    else:
        labelled = read(tmp_path)
        assert labelled.format == wanted and labelled.images and sum(labelled.annotated.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_junk_changes_nothing(name: str, tmp_path: Path) -> None:
    wanted, make = LAYOUTS[name]
    make(tmp_path / "clean")
    make(tmp_path / "junk")
    for folder in [tmp_path / "junk", *(path for path in (tmp_path / "junk").rglob("*") if path.is_dir())]:
        text(folder / ".DS_Store", "x")
        text(folder / "Thumbs.db", "x")
        text(folder / "._a.png", "x")
        text(folder / "x.txt:Zone.Identifier", "[ZoneTransfer]")
    (tmp_path / "junk" / "__MACOSX").mkdir()
    (tmp_path / "junk" / ".ipynb_checkpoints").mkdir()
    os.symlink(tmp_path / "junk", tmp_path / "junk" / ".loop")
    if wanted == "matlab":
        assert named(KIND, "matlab").recognise(tmp_path / "junk")
        return
    clean, junk = read(tmp_path / "clean"), read(tmp_path / "junk")
    seen = [
        [(item.path.relative_to(tmp_path / name), item.labels, item.boxes_N4.tolist()) for item in labelled.images]
        for name, labelled in (("junk", junk), ("clean", clean))
    ]
    assert seen[0] == seen[1] and (junk.found, junk.problems) == (clean.found, clean.problems)


@pytest.mark.parametrize("form", [form for form in names(KIND)])
def test_a_recogniser_never_raises(form: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "annotations.xml")
    os.mkfifo(tmp_path / "CISD.json")
    os.mkfifo(tmp_path / "isbi_train.mat")
    os.mkfifo(tmp_path / "isbi_train_GT.mat")
    os.symlink(tmp_path, tmp_path / "images")
    os.symlink(tmp_path / "nowhere", tmp_path / "masks")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "labels.csv").write_bytes(b"\xff\x00,label\n\0")
    (tmp_path / os.fsdecode(b"im_\xff")).mkdir()
    assert named(KIND, form).recognise(tmp_path) in (True, False)


# --- classes as numbers -----------------------------------------------------------------------------------------------


def test_ccagt(tmp_path: Path) -> None:
    ccagt(tmp_path)
    image(tmp_path / "images" / "B" / "B_2.jpg")
    labels(tmp_path / "masks" / "B" / "B_2.png", np.repeat(field(v2=(5, 5, 6, 6))[..., None], 3, 2))
    image(tmp_path / "images" / "B" / "B_3.jpg")
    labels(tmp_path / "masks" / "B" / "B_3.png", field())
    labelled = read(tmp_path)
    assert labelled.classes == ("1", "2", "7") and labelled.annotated == {"1": 2, "7": 2, "2": 1}
    two = [("1", [1, 2, 9, 8]), ("7", [20, 20, 30, 25])]
    assert shown(labelled) == {"A/A_1.jpg": two, "B/B_1.jpg": two, "B/B_2.jpg": [("2", [5, 5, 6, 6])], "B/B_3.jpg": []}
    assert [item.group for item in labelled.images] == ["images/A", "images/B", "images/B", "images/B"]
    assert labelled.problems == ()
    assert labelled.found == (
        "5 connected parts of 3 classes (numbers in the masks) in 4 images, masks in masks; "
        "objects of a class that touch are one"
    )


def test_parts_of_a_class(tmp_path: Path) -> None:
    """Two squares that meet at a corner are one object, those of another class are not; the masks are the pixels."""
    values = field(v1=(0, 0, 4, 4), v1_=(4, 4, 8, 8), v1__=(20, 0, 24, 4), v2=(8, 8, 12, 12))
    image(tmp_path / "img" / "a.png")
    labels(tmp_path / "mask" / "a.png", values)
    item = read(tmp_path).images[0]
    assert item.labels == ("1", "2", "1")
    assert item.boxes_N4.tolist() == [[0, 0, 8, 8], [8, 8, 12, 12], [20, 0, 24, 4]]
    covered = np.zeros(values.shape, np.int64)
    for label, shape in zip(item.labels, item.shapes, strict=True):
        assert isinstance(shape, Mask)
        covered += int(label) * pixels(shape, (48, 64))
    assert (covered == values).all()


def test_names_of_colours(tmp_path: Path) -> None:
    cvat_masks(tmp_path)
    image(tmp_path / "JPEGImages" / "b.jpg")
    palette = [0, 0, 0, 9, 9, 9, 250, 50, 83]
    labels(tmp_path / "SegmentationClass" / "b.png", field(v2=(1, 2, 3, 4), v1=(10, 10, 12, 12)), palette)
    labelled = read(tmp_path)
    assert shown(labelled) == {
        "JPEGImages/a.jpg": [("my cell: b", [1, 2, 9, 8])],
        "JPEGImages/b.jpg": [("my cell: b", [1, 2, 3, 4])],
    }
    assert labelled.problems == ("SegmentationClass/b.png: 4 pixels left out, labelmap.txt has no colour 9,9,9",)
    assert "named by labelmap.txt" in labelled.found


def test_a_palette_without_names_gives_its_numbers(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    labels(tmp_path / "masks" / "a.png", field(v3=(1, 2, 3, 4)), [0, 0, 0] * 3 + [255, 0, 0])
    assert shown(read(tmp_path)) == {"images/a.png": [("3", [1, 2, 3, 4])]}


@pytest.mark.parametrize("line", ["cell", "cell:1,2::", "cell:1,2,300::", "a:1,2,3::\nb:1,2,3::"])
def test_labelmaps_that_are_none(tmp_path: Path, line: str) -> None:
    cvat_masks(tmp_path)
    text(tmp_path / "labelmap.txt", line)
    with pytest.raises(DataError, match=r"labelmap\.txt: "):
        read(tmp_path)


def test_masks_that_are_none(tmp_path: Path) -> None:
    for name in ("a", "colour", "lossy", "size", "broken", "many", "none", "float"):
        image(tmp_path / "images" / f"{name}.png")
    image(tmp_path / "images" / "a.bmp")
    labels(tmp_path / "masks" / "a.png", field(v1=(1, 2, 3, 4)))
    labels(tmp_path / "masks" / "alone.png", field())
    colours = np.zeros((48, 64, 3), np.uint8)
    colours[0, 0] = (1, 2, 3)
    labels(tmp_path / "masks" / "colour.png", colours)
    image(tmp_path / "masks" / "lossy.jpg")
    labels(tmp_path / "masks" / "size.png", field()[:-1])
    text(tmp_path / "masks" / "broken.png", "no image")
    labels(tmp_path / "masks" / "many.png", np.arange(48 * 64).reshape(48, 64).astype(np.uint16))
    labels(tmp_path / "masks" / "float.tif", np.zeros((48, 64), np.float32))
    labelled = read(tmp_path)
    assert shown(labelled) == {"images/a.bmp": [("1", [1, 2, 3, 4])]}
    assert labelled.problems == (
        "images/a.png: left out, images/a.bmp has the same mask",
        "masks/broken.png: left out with its image, unknown_format (not one of JPEG, PNG, WEBP, TIFF, BMP, GIF)",
        "masks/colour.png: left out with its image, colours without a labelmap.txt that names them",
        "masks/float.tif: left out with its image, not_labels (pixels of mode F are not the numbers of a label image)",
        "masks/lossy.jpg: left out with its image, lossy (a JPEG does not keep the numbers of a label image)",
        "masks/many.png: left out with its image, more than 256 values are not classes",
        "images/none.png: left out, missing mask (unlabelled)",
        "masks/size.png: left out with its image, the mask is 64 x 47 px, the image 64 x 48",
        "masks/alone.png: a mask without an image of its own (missing image)",
    )


def test_many_folders_are_all_read(tmp_path: Path) -> None:
    """Only the first look is short."""
    for i in range(60):
        image(tmp_path / f"s{i:02d}" / "images" / "a.png", 16, 16)
        labels(tmp_path / f"s{i:02d}" / "masks" / "a.png", field(v1=(0, 0, 4, 4))[:16, :16])
    assert len(read(tmp_path).images) == 60


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I", "LA", "RGB", "RGBA"])
def test_numbers_in_every_mode(tmp_path: Path, mode: str) -> None:
    values = field(v1=(1, 2, 3, 4)) * (255 if mode == "1" else 1)
    made = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    if mode == "P":
        made = Image.fromarray(values)
        made.putpalette([9, 9, 9, 7, 7, 7])
    path = tmp_path / ("a.tif" if mode == "I" else "a.png")
    made.save(path)
    assert (read_labels(path) == values).all()


def test_cmyk_is_no_label_image(tmp_path: Path) -> None:
    image(tmp_path / "a.tif", mode="CMYK")
    with pytest.raises(Rejected, match="not_labels"):
        read_labels(tmp_path / "a.tif")


# --- a number an object -----------------------------------------------------------------------------------------------


def test_cellpose(tmp_path: Path) -> None:
    cellpose(tmp_path)
    image(tmp_path / "train" / "001.png")
    labels(tmp_path / "train" / "001_cp_masks.tif", field())
    text(tmp_path / "train" / "001_seg.npy", "a pickle")
    image(tmp_path / "train" / "002_img.png")
    labels(tmp_path / "train" / "003_masks.png", field(v1=(1, 1, 2, 2)))
    image(tmp_path / "train" / "000.png")
    labelled = read(tmp_path)
    two = [("object", [1, 2, 9, 8]), ("object", [9, 2, 12, 8])]
    assert shown(labelled) == {"test/000_img.png": two, "train/000_img.png": two, "train/001.png": []}
    assert [item.split for item in labelled.images] == ["test", "train", "train"]
    assert sorted(labelled.problems) == [
        "train/000.png: left out, train/000_img.png has the same label image",
        "train/002_img.png: left out, missing label image (unlabelled)",
        "train/003_masks.png: a label image without an image (missing image)",
    ]
    assert labelled.found.endswith("the format has no classes, so all are 'object'")


def test_an_object_in_two_pieces_is_one(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    values = field(v1=(0, 0, 2, 2), v1_=(30, 30, 40, 40)).astype(np.uint16) * 40_000
    labels(tmp_path / "a_masks.png", values)
    assert shown(read(tmp_path))[f"{tmp_path.name}/a.png"] == [("object", [0, 0, 40, 40])]


# --- a file an object -------------------------------------------------------------------------------------------------


def test_dsb2018(tmp_path: Path) -> None:
    dsb2018(tmp_path)
    train = tmp_path / "stage1_train"
    for name in ("empty", "table", "nothing"):
        image(train / name / "images" / f"{name}.png")
    (train / "empty" / "masks").mkdir()
    labels(train / "ab12" / "masks" / "2.png", field())
    labels(train / "ab12" / "masks" / "3.png", field()[:-1])
    text(train / "ab12" / "masks" / "4.png", "no image")
    labels(train / "lost" / "masks" / "1.png", field())
    image(train / "cd34" / "images" / "other.png")
    rows = "table,3 6 51 6\ntable,3069 5\ntable,1 5 4 2\ntable,1 2 3\ngone,1 2\nempty,1 2\n"
    text(tmp_path / "stage1_train_labels.csv", "ImageId,EncodedPixels\n" + rows)
    labelled = read(tmp_path)
    two = [("object", [1, 2, 9, 8]), ("object", [9, 2, 12, 8])]
    # 48 rows: pixel 3 is row 2 of column 0, pixel 51 row 2 of column 1
    assert shown(labelled) == {
        "images/ab12.png": two,
        "images/cd34.png": two,
        "images/empty.png": [("object", [0, 0, 1, 2])],
        "images/table.png": [("object", [0, 2, 2, 8])],
    }
    assert labelled.annotated == {"object": 13}
    assert labelled.problems == (
        "stage1_train/cd34/images/other.png: left out, it is not <id>/images/<id>.png",
        "stage1_train/ab12/masks/2.png (object) left out, the mask is empty",
        "stage1_train/ab12/masks/3.png (object) left out, the mask is 64 x 47 px, the image 64 x 48",
        "stage1_train/ab12/masks/4.png (object) left out, unknown_format (not one of JPEG, PNG, WEBP, TIFF, BMP, GIF)",
        "stage1_train/nothing/images/nothing.png: left out, missing masks (unlabelled)",
        "table: line 2 of the table (object) left out, runs outside the image",
        "table: line 3 of the table (object) left out, runs that overlap",
        "table: line 4 of the table (object) left out, not pairs of whole numbers",
        "stage1_train/lost: 1 masks without an image",
        "gone: in the table, but a missing image",
    )


@pytest.mark.parametrize("text", ["0 1", "1 0", "1 -1", "x 1", "1 1000000000000", "٣ 1", "1.0 2", "5", "16 2"])
def test_runs_from_one_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        object_masks.runs_from_one((4, 4), text)


# --- CISD -------------------------------------------------------------------------------------------------------------


def test_cisd(tmp_path: Path) -> None:
    cisd(tmp_path)
    labelled = read(tmp_path)
    # 8 px of row 2 from column 1 on, and 8 of row 3: column by column it would be a thin stripe
    assert shown(labelled) == {
        "center_slice/0240_BB_01470.jpg": [("object", [1, 2, 9, 4])],
        "center_slice/0241_BB_01471.jpg": [("object", [1, 2, 9, 4])],
    }
    assert [(item.group, item.split) for item in labelled.images] == [("0240", "train"), ("0241", "test")]
    assert labelled.problems == ("edf/: left out, the same fields as in center_slice/",)
    assert "'object'" in labelled.found


def test_cisd_that_is_wrong(tmp_path: Path) -> None:
    good = {"size": [48, 64], "counts": [0, 64, 47 * 64]}
    objects: list[Any] = [
        {"mask": good, "category": "NEUTROPHIL"},
        {"mask": good, "category_id": 3},
        {"mask": good, "category_id": 4},
        {"mask": good | {"size": [64, 48]}},
        {"mask": good | {"counts": [1, True]}},
        {"mask": good | {"counts": [3072]}},
        {"mask": good | {"counts": [0.5] * 6144}},
        {"mask": {"size": 5}},
        {},
        7,
    ]
    assets: list[Any] = [
        {"file_name": "1_a.jpg", "annotations": [{"data": objects}, {"data": objects}]},
        {"file_name": "1_a.jpg", "annotations": [{"data": objects[:1]}]},
        {"file_name": "2_b.jpg", "annotations": []},
        {"file_name": "3_c.jpg", "annotations": 5},
        {"file_name": "../1_a.jpg", "annotations": [{"data": []}]},
        {"file_name": "gone.jpg", "annotations": [{"data": objects[:1]}]},
        {"file_name": None},
        [],
    ]
    for name in ("1_a", "2_b", "3_c", "extra"):
        image(tmp_path / "edf" / f"{name}.jpg")
    document = {"categories": [{"id": 3, "name": "SUPERFICIAL"}, 5, {"id": "x"}], "assets": assets}
    text(tmp_path / "CISD.json", json.dumps(document))
    labelled = read(tmp_path)
    assert shown(labelled) == {
        "edf/1_a.jpg": [(label, [0, 0, 64, 1]) for label in ("NEUTROPHIL", "SUPERFICIAL", "4")],
        "edf/2_b.jpg": [],
        "edf/3_c.jpg": [],
    }
    assert labelled.annotated == {"NEUTROPHIL": 3, "SUPERFICIAL": 1, "4": 1, "object": 7}
    assert labelled.problems == (
        "1_a.jpg: 2 annotations, of which the first is taken",
        "1_a.jpg: object 4 (object) left out, its mask is not of the image's 64 x 48 px",
        "1_a.jpg: object 5 (object) left out, malformed mask (a truth value among numbers)",
        "1_a.jpg: object 6 (object) left out, the mask is empty",
        "1_a.jpg: object 7 (object) left out, malformed mask (not a list of numbers)",
        "1_a.jpg: object 8 (object) left out, malformed mask",
        "1_a.jpg: object 9 (object) left out, malformed mask",
        "1_a.jpg: object 10 (object) left out, malformed mask",
        "1_a.jpg: left out, an asset before is about the same image (1 objects)",
        "3_c.jpg: malformed annotations",
        "../1_a.jpg: left out, its name leads out of the folder (0 objects)",
        "gone.jpg: left out, missing image (1 objects)",
        "CISD.json: asset 7 left out, it has no file_name",
        "CISD.json: asset 8 left out, it has no file_name",
        "extra.jpg: left out, not in CISD.json (unlabelled)",
    )


@pytest.mark.parametrize(
    "content", ['{"assets": [' + "[" * 100_000, '{"assets": [1' + "0" * 5000 + "]}", '{"assets": [], "assets": 5}']
)
def test_json_that_is_refused(tmp_path: Path, content: str) -> None:
    image(tmp_path / "edf" / "a.jpg")
    text(tmp_path / "CISD.json", content)
    with pytest.raises(DataError, match=r"CISD\.json (is malformed JSON|has no list)"):
        read(tmp_path, format="rle_json")


# --- SIPaKMeD ---------------------------------------------------------------------------------------------------------


def test_sipakmed_fields(tmp_path: Path) -> None:
    sipakmed(tmp_path)
    folder = tmp_path / "im_Parabasal" / "im_Parabasal"
    text(folder / "001_nuc02.dat", "1,1\n2,1\n2,2\n")
    text(folder / "001_cyt03.dat", "1,1\n2,nan\n2,2\n")
    text(folder / "001_cyt04.dat", "1,1\n2,2\n")
    text(folder / "001_cyt05.dat", "")
    image(folder / "002.bmp")
    text(folder / "003_cyt01.dat", "1,1\n2,1\n2,2\n")
    image(tmp_path / "top.bmp")
    labelled = read(tmp_path)
    assert labelled.kind == "box" and labelled.annotated == {"Dyskeratotic": 1, "Parabasal": 6}
    assert shown(labelled) == {
        "im_Dyskeratotic/001.bmp": [("Dyskeratotic", [1, 2, 11.5, 9])],
        "im_Parabasal/001.bmp": [("Parabasal", [1, 2, 11.5, 9])],
    }
    where = "im_Parabasal/im_Parabasal/001.bmp: cell"
    assert labelled.problems == (
        "top.bmp: left out, it lies in no folder im_<Class>",
        f"{where} 03 (Parabasal) left out, malformed outline (not a finite number)",
        f"{where} 04 (Parabasal) left out, malformed outline "
        "(a ring of 4 numbers; at least 3 corners, two numbers each, are needed)",
        f"{where} 05 (Parabasal) left out, empty (the file has no bytes)",
        f"{where} 02 (Parabasal) left out, it has a nucleus, but no cytoplasm",
        "im_Parabasal/im_Parabasal/002.bmp: left out, missing outlines (unlabelled)",
        "im_Parabasal/im_Parabasal/003: outlines of 1 cells without an image (missing image)",
    )
    assert labelled.found.endswith("in 2 fields; 2 cut-outs of the same cells are not read")


def test_sipakmed_cut_outs(tmp_path: Path) -> None:
    LAYOUTS["sipakmed_crops"][1](tmp_path)
    image(tmp_path / "im_Parabasal" / "im_Parabasal" / "001.bmp")
    labelled = read(tmp_path)
    assert labelled.kind == "image" and labelled.annotated == {"Dyskeratotic": 2, "Parabasal": 2}
    assert {item.group for item in labelled.images} == {
        "im_Dyskeratotic/im_Dyskeratotic/001",
        "im_Parabasal/im_Parabasal/001",
    }
    assert labelled.problems == ("im_Parabasal/im_Parabasal/001.bmp: left out, a field without outlines",)
