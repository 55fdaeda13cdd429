from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data import readers
from ssl_pretrain.data.lookup import Lookup, files_under, first_files, folder_groups, unlabelled
from ssl_pretrain.data.readers import LabelledSet, natural, number, points, read, stays_inside
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import named, names


def real_data(name: str) -> Path:
    """A real data set: under the folder that the environment names, or beside the repository."""
    given = os.environ.get("SSL_PRETRAIN_DATA")
    folder = Path(given) if given else Path(__file__).parents[1] / ".." / "shared" / "data"
    if not (folder / name).is_dir():
        pytest.skip(f"{name} is not there: set SSL_PRETRAIN_DATA to the folder that holds it")
    return folder / name


def image(path: Path, width: int = 64, height: int = 48, kind: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path, kind, **options)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def voc(*objects: tuple[str, object, object, object, object], name: str = "", size: str = "") -> str:
    things = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for label, x0, y0, x1, y1 in objects
    )
    return f"<annotation><filename>{name}</filename>{size}{things}</annotation>"


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.tolist()) for item in labelled.images}


# --- all readers ------------------------------------------------------------------------------------------------------


def test_every_reader_keeps_the_contract(tmp_path: Path) -> None:
    assert {"class_folder", "points", "voc"} <= set(names(readers.KIND))
    for name in names(readers.KIND):
        module = named(readers.KIND, name)
        assert isinstance(module.LAYOUT, str)
        assert module.recognise(tmp_path) is False


def test_nothing_recognised_names_what_was_looked_for(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    with pytest.raises(
        DataError, match=r"no labels found .* holds 2 images; looked for class_folder: .*voc: "
    ) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="did you mean 'points'"):
        read(tmp_path, format="point")


def test_two_fitting_formats_are_not_guessed_between(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", "1 2 cell")
    text(tmp_path / "Annotations" / "a.xml", voc(("cell", 1, 2, 3, 4)))
    with pytest.raises(DataError, match="looks like points and voc: name the format"):
        read(tmp_path)
    assert read(tmp_path, format="voc").kind == "box" and read(tmp_path, format="points").kind == "point"


@settings(deadline=None)
@given(st.lists(st.text(max_size=8)))
def test_natural_order_is_total(words: list[str]) -> None:
    assert sorted(words, key=natural) == sorted(sorted(words), key=natural)


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1_0", "", "x", None])
def test_what_is_no_number(word: str | None) -> None:
    with pytest.raises(ValueError):
        number(word)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "..\\a", "C:\\a", "C:a", "\\\\host\\a", "", "a\0b"]
)
def test_names_that_leave_the_folder(name: str) -> None:
    assert not stays_inside(name)
    assert stays_inside("a/b..c.png")


# --- class folders ----------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    image(tmp_path / "train" / "10" / "a.png", 30, 20)
    image(tmp_path / "train" / "2" / "b.JPG", exif=exif(6))
    image(tmp_path / "val" / "2" / "c.png")
    image(tmp_path / "top.png")
    text(tmp_path / "val" / "2" / "broken.png", "no image")
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("class_folder", "image", ("2", "10"))
    assert shown(labelled) == {
        "a.png": (("10",), [[0, 0, 30, 20]]),
        "b.JPG": (("2",), [[0, 0, 48, 64]]),
        "c.png": (("2",), [[0, 0, 64, 48]]),
    }
    assert [item.split for item in labelled.images] == ["train", "train", "val"]
    assert [item.group for item in labelled.images] == ["train/10/a.png", "train/2/b.JPG", "val/2/c.png"]
    assert [item.size_px for item in labelled.images] == [(30, 20), (48, 64), (64, 48)]
    assert labelled.found == "3 images in folders of 2 classes"
    assert labelled.problems == (
        "top.png: left out, it lies in no class folder",
        "val/2/broken.png: image left out, unknown_format (not one of JPEG, PNG, WEBP, TIFF, BMP, GIF)",
    )


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_one_class_is_none(tmp_path: Path) -> None:
    image(tmp_path / "train" / "cells" / "a.png")
    image(tmp_path / "val" / "cells" / "a.png")
    with pytest.raises(DataError, match="no labels found"):
        read(tmp_path)


# --- points -----------------------------------------------------------------------------------------------------------


def test_points(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg", kind="PNG")
    text(tmp_path / "labels" / "a.txt", "1 2 7\n\n64,48,10\r\n 3.5 ,\t4   burr cell \n")
    image(tmp_path / "images" / "empty.png")
    text(tmp_path / "labels" / "empty.txt", "")
    image(tmp_path / "images" / "blank.png")
    text(tmp_path / "labels" / "blank.txt", "\n \n")
    image(tmp_path / "images" / "unlabelled.png")
    image(tmp_path / "images" / "val" / "b.png")
    text(tmp_path / "labels" / "val" / "b.txt", "5 5 7\n65 5 7\n5 -1 7\n5 5\nnan 5 7\n5 5 0.1 0.1\nx y class")
    text(tmp_path / "labels" / "lost.txt", "1 2 7")
    text(tmp_path / "images" / "bad.png", "no image")
    text(tmp_path / "labels" / "bad.txt", "1 2 7")
    image(tmp_path / "images" / "a.png")
    image(tmp_path / "images" / "binary.png")
    (tmp_path / "labels" / "binary.txt").write_bytes(b"\xff\xfe1 2 3")
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind) == ("points", "point")
    assert labelled.classes == ("7", "10", "burr cell")
    assert shown(labelled) == {
        "a.jpg": (("7", "10", "burr cell"), [[1, 2, 1, 2], [64, 48, 64, 48], [3.5, 4, 3.5, 4]]),
        "blank.png": ((), []),
        "empty.png": ((), []),
        "b.png": (("7",), [[5, 5, 5, 5]]),
    }
    assert all(item.boxes_N4.shape == (len(item.labels), 4) for item in labelled.images)
    assert {item.path.name: item.split for item in labelled.images if item.split} == {"b.png": "val"}
    assert labelled.found == "6 points of 3 classes in 4 images (val 1), 2 of them left out"
    assert list(labelled.problems) == [
        "a.png: left out, a.jpg has the same label file",
        "bad.png: image left out, unknown_format (not one of JPEG, PNG, WEBP, TIFF, BMP, GIF)",
        "binary.txt: left out with its image, cannot be read ('utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte)",
        "blank.txt: empty label file (no objects)",
        "empty.txt: empty label file (no objects)",
        "unlabelled.png: left out, missing label file (unlabelled)",
        "val/b.txt: point 2 (7) left out, it is at (65, 5), outside the image",
        "val/b.txt: point 3 (7) left out, it is at (5, -1), outside the image",
        "val/b.txt: malformed line 4: 5 5",
        "val/b.txt: malformed line 5: nan 5 7",
        "val/b.txt: malformed line 6: 5 5 0.1 0.1",
        "val/b.txt: malformed line 7: x y class",
        "lost.txt: labels without an image (missing image)",
    ]


def test_points_without_images_or_images_without_points(tmp_path: Path) -> None:
    text(tmp_path / "labels" / "a.txt", "1 2 7")
    with pytest.raises(DataError, match="has 1 label files in labels/ but no image in images/"):
        read(tmp_path)
    (tmp_path / "labels" / "a.txt").unlink()
    image(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match="has 1 images in images/ but no label file in labels/"):
        read(tmp_path)
    text(tmp_path / "labels" / "b.txt", "1 2 7")
    with pytest.raises(DataError, match=r"no labelled object .*2 problems: a.png: left out, missing label file"):
        read(tmp_path)
    (tmp_path / "labels" / "b.txt").unlink()
    (tmp_path / "labels").rmdir()
    with pytest.raises(DataError, match=r"no labels found .* which holds 1 images"):
        read(tmp_path)


def test_a_list_of_classes_among_points(tmp_path: Path) -> None:
    image(tmp_path / "images" / "b.png")
    text(tmp_path / "labels" / "b.txt", "1 2 cell")
    text(tmp_path / "labels" / "classes.txt", "cell")
    assert shown(read(tmp_path)) == {"b.png": (("cell",), [[1, 2, 1, 2]])}


def test_labels_that_are_pictures_are_not_points(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    image(tmp_path / "labels" / "a.png")
    assert not points.recognise(tmp_path)


def test_yolo_labels_are_not_points(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "0.txt", "")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1")
    assert not points.recognise(tmp_path)


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def test_voc(tmp_path: Path) -> None:
    size = "<size><width>64</width><height>48</height></size>"
    image(tmp_path / "JPEGImages" / "a.jpg", kind="PNG")
    a = voc(
        ("RBC", 1, 2, 30, 40),
        (" WBC ", 10.5, 2, 64, 48),
        ("RBC", 5, 5, 5, 5),
        ("RBC", 5, 5, 9, 5),
        ("RBC", 9, 5, 5, 9),
        ("RBC", -3, -3, 10, 90),
        ("RBC", 70, 5, 80, 9),
        ("RBC", 1, "one", 5, 9),
        ("", 1, 2, 3, 4),
        name="a.jpg",
        size=size,
    )
    text(tmp_path / "Annotations" / "a.xml", a)
    image(tmp_path / "JPEGImages" / "b.png")
    text(tmp_path / "Annotations" / "b.xml", voc(name="b"))
    image(tmp_path / "JPEGImages" / "c.png", 64, 48, exif=exif(6))
    text(tmp_path / "Annotations" / "c.xml", voc(("WBC", 0, 0, 48, 64), name="else.png", size=size))
    image(tmp_path / "JPEGImages" / "d.png")
    text(tmp_path / "Annotations" / "d.xml", "<annotation>")
    text(tmp_path / "Annotations" / "e.xml", voc(("WBC", 1, 2, 3, 4)))
    text(tmp_path / "Annotations" / "f.xml", voc(("WBC", 1, 2, 3, 4), name="../../secret.png"))
    text(tmp_path / "Annotations" / "g.xml", '<!DOCTYPE x [<!ENTITY a "b">]><annotation>&a;</annotation>')
    text(tmp_path / "Annotations" / "h.xml", "")
    text(tmp_path / "Annotations" / "i.xml", "<annotations/>")
    text(tmp_path / "Annotations" / "j.xml", voc(("WBC", 1, 2, 3, 4), name="a.jpg"))
    main = tmp_path / "ImageSets" / "Main"
    text(main / "train.txt", "a\nz\n")
    text(main / "val.txt", "b\na\n")
    text(main / "trainval.txt", "a\nb\nc\n")
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("voc", "box", ("RBC", "WBC"))
    assert shown(labelled) == {
        "a.jpg": (("RBC", "WBC", "RBC"), [[1, 2, 30, 40], [10.5, 2, 64, 48], [0, 0, 10, 48]]),
        "b.png": ((), []),
        "c.png": (("WBC",), [[0, 0, 48, 64]]),
    }
    assert {item.path.name: item.split for item in labelled.images} == {"a.jpg": "train", "b.png": "val", "c.png": None}
    assert labelled.found == "10 boxes of 2 classes in 3 images (train 1, val 1), 6 of them left out"
    assert labelled.images[1].boxes_N4.shape == (0, 4)
    assert list(labelled.problems) == [
        "train.txt: lists z, which has no XML file",
        "val.txt: lists a, which train.txt lists already",
        "a.xml: object 3 (RBC) left out, zero-size box at (5, 5)",
        "a.xml: object 4 (RBC) left out, zero-size box at (5, 5)",
        "a.xml: object 5 (RBC) left out, its corners are swapped",
        "a.xml: object 7 (RBC) left out, its box is outside the image",
        "a.xml: object 8 (RBC) left out, malformed box",
        "a.xml: object 9 (without a name) left out, it has no class",
        "c.xml: names the missing image else.png; taken for c.png",
        "c.xml: says 64 x 48 px, but the image is 48 x 64",
        "d.xml: left out, malformed XML (no element found: line 1, column 12)",
        "e.xml: left out, missing image e",
        "f.xml: left out, its file name ../../secret.png leads out of the folder",
        "g.xml: left out, a document type or entities are not allowed",
        "h.xml: left out, empty label file",
        "i.xml: left out, <annotations> is not the <annotation> of Pascal VOC",
        "j.xml: left out, a.xml is about the same image",
        "d.png: left out, missing label file (unlabelled)",
        "1 boxes reached over the edge of their image and were clipped",
    ]


def test_voc_with_another_folder_of_images(tmp_path: Path) -> None:
    text(tmp_path / "Annotations" / "a.xml", voc(("cell", 1, 2, 3, 4), name="a.png"))
    with pytest.raises(DataError, match="has 1 XML files in Annotations/ but no folder of images"):
        read(tmp_path)
    image(tmp_path / "pictures" / "a.png")
    image(tmp_path / "pictures" / "b.png")
    image(tmp_path / "masks" / "a.png")
    (labelled,) = read(tmp_path).images
    assert labelled.path == tmp_path / "pictures" / "a.png" and labelled.group == "a.png"
    (tmp_path / "Annotations" / "a.xml").unlink()
    image(tmp_path / "JPEGImages" / "a.png")
    with pytest.raises(DataError, match="has 1 images in JPEGImages/ but no XML file"):
        read(tmp_path)


def test_xml_of_cvat_in_annotations_is_not_voc(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "Annotations" / "x.xml", '<?xml version="1.0"?>\n<annotations><version>1.1</version></annotations>')
    assert not named(readers.KIND, "voc").recognise(tmp_path)
    text(tmp_path / "Annotations" / "a.xml", voc(("cell", 1, 2, 3, 4), name="a.png"))
    assert named(readers.KIND, "voc").recognise(tmp_path)


# --- names in label files ---------------------------------------------------------------------------------------------


def test_which_image_is_meant() -> None:
    lookup = Lookup(["a.png", "x/b.png", "y/b.png", "masks/x/b.png", "train/c.png", "val/c.png", "d/e.jpg", "d/e.png"])
    assert lookup.find("a.png") == lookup.find("./a.png") == lookup.find("a") == lookup.find("z/a.png") == "a.png"
    assert lookup.find("y\\b.png") == lookup.find("b.png", near=["y"]) == "y/b.png"
    assert lookup.find("c.png", split="val") == "val/c.png" and lookup.find("e.jpg") == "d/e.jpg"
    for name, why in [("b.png", "could be x/b.png or y/b.png"), ("c.png", "could be"), ("f", "missing image f"),
                      ("e", "could be d/e.jpg or d/e.png"), ("../a.png", "leads out of the folder")]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            lookup.find(name)
    assert lookup.find_tail("/elsewhere/x/b.png") == "x/b.png"
    only = Lookup(["train/1.png"])  # the image of val is not there, and train's is another one
    assert only.find("1.png") == only.find("1.png", split="train") == "train/1.png"
    for name, split in [("val/1.png", None), ("1.png", "val"), ("images/val2017/1", None)]:
        with pytest.raises(ValueError, match=r"missing image 1"):
            only.find(name, split=split)


def test_folder_groups_names() -> None:
    assert folder_groups(["a.png", "x/b.png", "y/c.png"]) == ({}, [])  # two folders may be anything
    assert folder_groups(["train/a.rf.0.jpg", "val/a.rf.1.jpg", "val/b.rf.2.jpg"])[0] == {
        "train/a.rf.0.jpg": "a", "val/a.rf.1.jpg": "a",
    }  # fmt: skip
    slides = ["images/A/1.png", "images/A/2.png", "train/B/3.png", "C/4.png", "5.png", "masks/D/1.png"]
    assert folder_groups(slides)[0] == {
        "images/A/1.png": "A", "images/A/2.png": "A", "train/B/3.png": "B", "C/4.png": "C",
    }  # fmt: skip


def test_a_folder_of_many_files_is_looked_at_in_part(tmp_path: Path) -> None:
    for i in range(1100):
        (tmp_path / f"{i:04}.txt").touch()
    text(tmp_path / "b" / "c" / "d.TXT", "")
    text(tmp_path / ".hidden.txt", "")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert list(first_files(tmp_path, frozenset({".txt"}), each=2)) == ["0000.txt", "0001.txt", "b/c/d.TXT"]
    assert list(first_files(tmp_path, frozenset({".txt"}), each=2, depth=1)) == ["0000.txt", "0001.txt"]
    assert len(files_under(tmp_path, frozenset({".txt"}))) == 1101
    assert files_under(tmp_path / "nowhere", frozenset({".txt"})) == []


def test_unlabelled_images_are_said_one_by_one_or_by_folder() -> None:
    names_of_all = ["a/1.png", "a/2.png", "masks/1.png", "masks/2.png", "top.png"]
    assert unlabelled(names_of_all, ["a/1.png"]) == [
        "a/2.png: left out, no label file has it (unlabelled)",
        "./: 1 images left out, no label file has any of them (unlabelled)",
        "masks/: 2 images left out, no label file has any of them (unlabelled)",
    ]


# --- real data --------------------------------------------------------------------------------------------------------


def test_bccd() -> None:
    labelled = read(real_data("bccd"))
    assert labelled.format == "voc" and len(labelled.images) == 364
    counts = Counter(label for item in labelled.images for label in item.labels)
    assert labelled.annotated == {"RBC": 4155, "WBC": 372, "Platelets": 361}
    assert labelled.found == "4888 boxes of 3 classes in 364 images (train 205, val 87, test 72), 2 of them left out"
    assert counts == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    assert list(labelled.problems) == [
        "BloodImage_00338.xml: object 13 (RBC) left out, zero-size box at (504, 337)",
        "BloodImage_00343.xml: object 4 (RBC) left out, zero-size box at (181, 329)",
    ]
    assert Counter(item.split for item in labelled.images) == {"train": 205, "val": 87, "test": 72}
    assert all(item.size_px == (640, 480) for item in labelled.images)


def test_chula() -> None:
    labelled = read(real_data("chula_rbc12"))
    assert labelled.kind == "point" and labelled.classes == tuple(str(i) for i in range(13))
    counts = Counter(label for item in labelled.images for label in item.labels)
    assert [counts[str(i)] for i in range(13)] == [3352, 455, 281, 2069, 1849, 1323, 712, 171, 369, 481, 132, 640, 71]
    assert len(labelled.images) == 350 and sum(counts.values()) == 11905
    assert Counter(problem.partition(": ")[2] for problem in labelled.problems) == {
        "left out, missing label file (unlabelled)": 20,
        "empty label file (no objects)": 2,
    }
    lying = {"707.jpg", "708.jpg", "709.jpg"}  # PNG files
    assert lying <= {item.path.name for item in labelled.images}


def test_real_data_may_be_unreadable_in_part(tmp_path: Path) -> None:
    source = real_data("bccd")
    for folder, suffix in [("Annotations", ".xml"), ("JPEGImages", ".jpg")]:
        (tmp_path / folder).mkdir()
        for name in ("BloodImage_00000", "BloodImage_00001"):
            shutil.copy(source / folder / (name + suffix), tmp_path / folder)
    broken = tmp_path / "JPEGImages" / "BloodImage_00001.jpg"
    broken.write_bytes(broken.read_bytes()[:20])
    labelled = read(tmp_path)
    assert [item.path.name for item in labelled.images] == ["BloodImage_00000.jpg"]
    assert len(labelled.problems) == 1 and labelled.problems[0].startswith("BloodImage_00001.jpg: image left out")
    assert labelled.images[0].boxes_N4.dtype == np.float64 and len(labelled.images[0].labels) == 20
