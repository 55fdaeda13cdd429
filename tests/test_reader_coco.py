from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as oracle

from ssl_pretrain.data.readers import LabelledSet, coco, read
from ssl_pretrain.data.shapes import Mask, Polygon, of_pixels, pixels, text_of
from ssl_pretrain.errors import DataError

CATEGORIES = [{"id": 1, "name": "RBC"}, {"id": 7, "name": "WBC"}]


def image(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)


def dump(path: Path, images: Any, annotations: Any = (), categories: Any = CATEGORIES, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps({**more, **lists}))
    return path


def entry(i: Any, name: Any, width: Any = 64, height: Any = 48) -> dict[str, Any]:
    return {"id": i, "file_name": name, "width": width, "height": height}


def boxed(image_id: Any, bbox: Any, category: Any = 1, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category, "bbox": bbox, **more}


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.tolist()) for item in labelled.images}


def test_boxes_categories_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        image(tmp_path / "images" / name)
    dump(
        tmp_path / "annotations" / "instances.json",
        [
            entry(0, "a.png"),
            entry(1, "b.png", 48, 64),
            entry("x", "c.png"),
            entry(5, "lost.png"),
            entry(6, "a.png"),
            entry(8, "d.png"),
            entry(8, "d.png"),
            {"id": 9},
        ],
        [
            boxed(0, [1, 2, 10, 20], 0),
            boxed(0, [1.5, 2, 62.5, 46], 7, id=17),
            boxed(0, [60, 40, 10, 20], 3),
            boxed("x", [5, 5, 0, 9]),
            boxed("x", [5, 5, -2, 9]),
            boxed("x", [5, 5, 1, 9]),
            boxed("x", [70, 5, 9, 9]),
            boxed("x", [5, 5, 9]),
            boxed("x", [5, 5, 9, True]),
            boxed("x", [5, 5, 9, float("nan")]),
            boxed("x", [5, 5, 9, 10**400]),
            boxed("x", "5,5,9,9"),
            boxed("x", [5, 5, 9, 9], 99),
            boxed("x", [5, 5, 9, 9], True),
            boxed("x", [5, 5, 9, 9], 4),
            boxed("x", [5, 5, 9, 9], 7, iscrowd=1),
            boxed(5, [5, 5, 9, 9]),
            boxed(6, [5, 5, 9, 9]),
            boxed(8, [5, 5, 9, 9]),
            boxed(77, [5, 5, 9, 9]),
            boxed([0], [5, 5, 9, 9]),
            "annotation",
        ],
        [
            {"id": 0, "name": "cells"},
            {"id": 1, "name": "RBC"},
            {"id": 3, "name": "RBC"},
            {"id": 4, "name": "a"},
            {"id": 4, "name": "b"},
            {"id": 7, "name": " WBC "},
            {"id": True, "name": "bool"},
            {"id": 8, "name": 8},
        ],
    )
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("coco", "box", ("RBC", "WBC", "cells"))
    assert shown(labelled) == {
        "a.png": (("cells", "WBC", "RBC"), [[1, 2, 11, 22], [1.5, 2, 64, 48], [60, 40, 64, 48]]),
        "b.png": ((), []),
        "c.png": (("RBC",), [[5, 5, 6, 14]]),
    }
    assert labelled.annotated == {
        "cells": 1, "RBC": 15, "WBC": 2, "category 99": 1, "category True": 1, "category 4": 1, "": 1,
    }  # fmt: skip
    where = "instances.json: annotation"
    assert list(labelled.problems) == [
        "instances.json: category id 4 is both a and b: not used",
        "instances.json: category no. 7 left out, it has no id or no name",
        "instances.json: category no. 8 left out, it has no id or no name",
        "instances.json: 2 category ids have the name RBC: taken as one class",
        f"{where} no. 22 (without a name) left out, it is not an object",
        "images/b.png: instances.json says 48 x 64 px, but the image is 64 x 48",
        f"{where} no. 4 (RBC) left out, zero-size box at (5, 5)",
        f"{where} no. 5 (RBC) left out, its corners are swapped",
        f"{where} no. 7 (RBC) left out, its box is outside the image",
        f"{where} no. 8 (RBC) left out, malformed box",
        f"{where} no. 9 (RBC) left out, malformed box",
        f"{where} no. 10 (RBC) left out, malformed box",
        f"{where} no. 11 (RBC) left out, malformed box",
        f"{where} no. 12 (RBC) left out, malformed box",
        f"{where} no. 13 (category 99) left out, its category id 99 is not in the list of categories",
        f"{where} no. 14 (category True) left out, its category id True is not in the list of categories",
        f"{where} no. 15 (category 4) left out, its category id 4 is not in the list of categories",
        f"{where} no. 16 (WBC) left out, it marks a crowd (iscrowd), not an object",
        "instances.json: lost.png left out, missing image lost.png (1 objects)",
        "instances.json: image id 6 left out, images/a.png has an entry already (1 objects)",
        "instances.json: d.png left out, its image id 8 is given twice (1 objects)",
        "instances.json: d.png left out, its image id 8 is given twice (0 objects)",
        "instances.json: image no. 8 left out, it has no id or no file name (0 objects)",
        f"{where} no. 20 (RBC) left out, its image id 77 is not in the list of images",
        f"{where} no. 21 (RBC) left out, its image id [0] is not in the list of images",
        "instances.json: 1 images without an annotation, taken as images without objects",
        "1 boxes are at most 1 px wide or high; they are kept",
        "images/d.png: left out, no label file has it (unlabelled)",
        "1 boxes reached over the edge of their image and were clipped",
    ]


def test_outlines(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 20, 16)
    inside = np.zeros((16, 20), bool)
    inside[3:7, 5:12] = True
    inside[4, 6] = False
    runs = of_pixels(inside)
    square = [1, 2, 9, 2, 9, 8, 1, 8]
    dump(
        tmp_path / "_annotations.coco.json",
        [entry(1, "a.png", 20, 16)],
        [
            boxed(1, [1, 2, 8, 6], segmentation=[square, [10, 10, 12, 10, 12, 13]]),
            boxed(1, None, segmentation=[square]),
            {"image_id": 1, "category_id": 1, "segmentation": {"size": [16, 20], "counts": runs.runs_R.tolist()}},
            boxed(1, [], segmentation={"size": [16, 20], "counts": text_of(runs)}),
            boxed(1, [1, 1, 4, 4], segmentation=[[1, 1, 4, 4]]),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [20, 16], "counts": [320]}),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [16, 20], "counts": [3, 4]}),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [16, 20], "counts": [1.5, True]}),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [16, 20], "counts": "\x7f"}),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [16, 20], "counts": "ö"}),
            boxed(1, [1, 1, 4, 4], segmentation={"size": [16, 20], "counts": [2**70, 1]}),
            boxed(1, [1, 1, 4, 4], segmentation="polygon"),
            boxed(1, None, segmentation=[]),
            boxed(1, None, segmentation={"size": [16, 20], "counts": [320]}),
        ],
    )
    labelled = read(tmp_path)
    (item,) = labelled.images
    assert item.boxes_N4.tolist() == [[1, 2, 9, 8], [1, 2, 9, 8]] + [[5, 3, 12, 7]] * 2 + [[1, 1, 5, 5]] * 8
    two, one, plain, packed, *none = item.shapes
    assert isinstance(two, Polygon) and len(two.rings) == 2 and two.rings[1].tolist() == [[10, 10], [12, 10], [12, 13]]
    assert isinstance(one, Polygon) and one.rings[0].tolist() == [[1, 2], [9, 2], [9, 8], [1, 8]]
    assert isinstance(plain, Mask) and isinstance(packed, Mask) and none == [None] * 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pycocotools and numpy 2
        known = oracle.decode({"size": [16, 20], "counts": text_of(runs).encode()}).astype(bool)
    assert (pixels(plain, (16, 20)) == known).all() and (pixels(packed, (16, 20)) == known).all() and known.sum() == 27
    text = "\n".join(labelled.problems)
    assert text.count("outline left out") == 8
    assert "its runs are for an image of 16 x 20 px" in text and "a ring of 4 numbers" in text
    assert "no. 13 (RBC) left out, it has neither box nor outline" in text
    assert "no. 14 (RBC) left out, zero-size box" in text


def test_splits_of_files_and_folders(tmp_path: Path) -> None:
    image(tmp_path / "c" / "train2017" / "1.png")
    image(tmp_path / "c" / "val2017" / "1.png")
    for split in ("train", "val"):
        dump(
            tmp_path / "c" / "annotations" / f"instances_{split}2017.json",
            [entry(1, "1.png")],
            [boxed(1, [1, 1, 4, 4])],
        )
    (tmp_path / "c" / "annotations" / "captions_val2017.json").write_text(
        '{"images": [], "annotations": [{"image_id": 1, "id": 2, "caption": ""}], "file_name": "", "categories": []}'
    )
    labelled = read(tmp_path / "c")
    assert [(str(item.path.relative_to(tmp_path / "c")), item.split) for item in labelled.images] == [
        ("train2017/1.png", "train"),
        ("val2017/1.png", "val"),
    ]
    for split in ("train", "valid", "test"):
        image(tmp_path / "r" / split / "cell_jpg.rf.0a.png" if split == "train" else tmp_path / "r" / split / "b.png")
        name = "cell_jpg.rf.0a.png" if split == "train" else "b.png"
        dump(tmp_path / "r" / split / "_annotations.coco.json", [entry(0, name)], [boxed(0, [1, 1, 4, 4])])
    image(tmp_path / "r" / "train" / "cell_jpg.rf.0b.png")
    dump(
        tmp_path / "r" / "train" / "_annotations.coco.json",
        [entry(0, "cell_jpg.rf.0a.png"), entry(1, "cell_jpg.rf.0b.png")],
        [boxed(0, [1, 1, 4, 4]), boxed(1, [1, 1, 4, 4])],
    )
    labelled = read(tmp_path / "r")
    assert {(item.group, item.split) for item in labelled.images} == {
        ("cell_jpg", "train"), ("valid/b.png", "val"), ("test/b.png", "test"),
    }  # fmt: skip
    assert "2 images are copies of 1 (`.rf.` in the name): one group each" in labelled.problems


def test_ccagt_slides_are_groups(tmp_path: Path) -> None:
    images = []
    for i, slide in enumerate("AABC"):
        image(tmp_path / "images" / slide / f"{slide}_{i}.jpg")
        image(tmp_path / "masks" / slide / f"{slide}_{i}.png")
        images.append(entry(i, f"{slide}_{i}.jpg"))
    dump(tmp_path / "CCAgT_COCO_OD.json", images, [boxed(i, [1, 1, 4, 4]) for i in range(4)])
    labelled = read(tmp_path, format="coco")  # its masks are labels as well
    assert [item.group for item in labelled.images] == ["A", "A", "B", "C"]
    assert "the images lie in 3 folders: each folder is taken as one group (slide, patient)" in labelled.problems
    assert "masks/A/: 2 images left out, no label file has any of them (unlabelled)" in labelled.problems


def test_two_files_about_one_image_must_be_chosen_between(tmp_path: Path) -> None:
    """TEM-NeutroStruct's layout."""
    image(tmp_path / "train" / "images" / "a.png")
    folder = tmp_path / "train" / "annotations"
    four = dump(folder / "annotations_4classes.json", [entry(1, "a.png")], [boxed(1, [1, 1, 4, 4])])
    seven = dump(folder / "annotations_7classes.json", [entry(1, "a.png")], [boxed(1, [1, 1, 4, 4], 7)])
    with pytest.raises(
        DataError, match=r"annotations_4classes.json and .*annotations_7classes.json both have .*a.png: give"
    ):
        read(tmp_path)
    assert read(four).classes == ("RBC",) and read(seven).classes == ("WBC",)
    assert [item.split for item in read(four).images] == [None]  # its folder says so, but the folder was not given
    assert read(four).images[0].path == tmp_path / "train" / "images" / "a.png"


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "C:\\a.png", "x/../../a.png", "a\0.png", "\ud800.png", ""])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    image(tmp_path / "d" / "b.png")
    image(tmp_path / "a.png")
    dump(
        tmp_path / "d" / "x.json", [entry(1, name), entry(2, "b.png")], [boxed(1, [1, 1, 4, 4]), boxed(2, [1, 1, 4, 4])]
    )
    labelled = read(tmp_path / "d")
    assert [item.path.name for item in labelled.images] == ["b.png"] and len(labelled.problems) == 1
    assert labelled.annotated == {"RBC": 2} and labelled.problems[0].isprintable()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"images": [], "annotations": [], "categories": [], "file_name": 0, "image_id": ', "not JSON"),
        ('{"images": [{"file_name": ' + "[" * 100_000, "nested too deep"),
        ('{"images": [{"file_name": ' + "9" * 5000 + "}]}", "not JSON"),
        ('{"images": {}, "annotations": [{"image_id": 1, "category_id": 2}], "categories": []}', "no list of images"),
    ],
)
def test_what_is_no_coco(tmp_path: Path, text: str, why: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(text + (" " if "category" in text else '  "category_id"'))
    with pytest.raises(DataError, match=why) as caught:
        read(tmp_path, format="coco")
    assert "\n" not in str(caught.value)


def test_files_of_other_tools_are_not_coco(tmp_path: Path) -> None:
    others = {
        "cisd.json": '{"assets": [{"file_name": "a", "annotations": [{"category_id": 1}]}]}',
        "labelme.json": '{"shapes": [], "imagePath": "a.png"}',
        "results.json": '[{"image_id": 1, "category_id": 1, "bbox": [], "score": 1}]',
        "package.json": '{"name": "images", "categories": ["x"]}',
        "empty.json": "",
    }
    for name, text in others.items():
        (tmp_path / name).write_text(text)
        assert not coco.recognise(tmp_path / name)
    assert not coco.recognise(tmp_path) and not coco.recognise(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no COCO JSON"):
        coco.read(tmp_path)


def test_a_file_larger_than_what_is_looked_at_is_recognised(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    annotations = [boxed(1, [i % 50, 1, 4, 4]) for i in range(4000)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"annotations": annotations, "categories": CATEGORIES, "images": [entry(1, "a.png")]}))
    assert path.stat().st_size > 3 << 16 and len(read(tmp_path).images[0].labels) == 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one image, for label files that come and go."""
    folder = tmp_path_factory.mktemp("any")
    image(folder / "a.png")
    return folder


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.sampled_from(["a.png", "", "\ud800", "x"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


def records(*keys: str) -> st.SearchStrategy[Any]:
    return st.lists(st.fixed_dictionaries({}, optional={key: JSON for key in keys}) | JSON, max_size=4)


@settings(deadline=None, max_examples=100)
@given(
    records("id", "file_name", "width", "height", "group"),
    records("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd"),
    records("id", "name"),
)
def test_any_json_is_read_or_refused_in_words(folder: Path, images: Any, annotations: Any, categories: Any) -> None:
    sure = {"category_id": 1, "image_id": "sure"}
    dump(folder / "x.json", [*images, entry("sure", "a.png")], [*annotations, sure], [*categories, *CATEGORIES])
    try:
        labelled = coco.read(folder)
    except DataError as error:
        assert str(error).isprintable()
        return
    assert sum(labelled.annotated.values()) == len(annotations) + 1
    for item in labelled.images:
        assert np.isfinite(item.boxes_N4).all() and (item.boxes_N4 >= 0).all()
        assert (item.boxes_N4[:, 2:] <= item.size_px).all() and (item.boxes_N4[:, 2:] > item.boxes_N4[:, :2]).all()
    assert all(problem.isprintable() for problem in labelled.problems)
