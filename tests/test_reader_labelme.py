from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data.readers import LabelledSet, labelme, read
from ssl_pretrain.data.shapes import Polygon
from ssl_pretrain.errors import DataError


def image(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)


def dump(path: Path, shapes: Any, width: Any = 64, height: Any = 48, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shapes": shapes, "imageWidth": width, "imageHeight": height, **more}))


def shape(label: Any, points: Any, kind: Any = "polygon") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind}


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.round(6).tolist()) for item in labelled.images}


def test_every_kind_of_shape(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    triangle = [[1, 2], [11, 2], [1, 22]]
    dump(
        tmp_path / "a.json",
        [
            shape("cell", triangle),
            {"label": "cell", "points": triangle},
            shape("cell", [[30, 20], [10, 40]], "rectangle"),
            shape("cell", [[10, 10], [30, 10], [30, 20], [10, 20]], "rectangle"),
            shape("nucleus", [[20, 20], [23, 24]], "circle"),
            shape("cell", [[60, 40], [70, 40], [70, 60]], "polygon"),
            shape("cell", [[1, 1], [9, 9]], "mask"),
            shape("cell", [[5, 5]], "point"),
            shape("cell", [[5, 5], [6, 6]], "line"),
            shape("cell", [[5, 5], [6, 6]], "spline\n"),
            shape("cell", [[5, 5], [6, 6]]),
            shape("cell", [[5, 5], [6, 6], [True, 1]]),
            shape("cell", [[5, 5], [6, 6], [7]]),
            shape("cell", None),
            shape("cell", [[5, 5]], "rectangle"),
            shape("cell", [[5, 5]], "circle"),
            shape("", triangle),
            shape(7, triangle),
            "shape",
            shape("cell", [[70, 5], [80, 5], [80, 9]]),
            shape("cell", [[5, 5], [8, 5], [9, 5]]),
        ],
        imagePath="a.png",
        version="5.0",
    )
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("labelme", "box", ("cell", "nucleus"))
    (item,) = labelled.images
    assert item.labels == ("cell",) * 4 + ("nucleus", "cell", "cell")
    assert item.boxes_N4.round(6).tolist() == [
        [1, 2, 11, 22], [1, 2, 11, 22], [10, 20, 30, 40], [10, 10, 30, 20], [15, 15, 25, 25], [60, 40, 64, 48],
        [1, 1, 9, 9],
    ]  # fmt: skip
    assert isinstance(item.shapes[0], Polygon) and item.shapes[0].rings[0].tolist() == triangle
    assert item.shapes[2] is None and isinstance(item.shapes[4], Polygon)
    assert labelled.annotated == {"cell": 17, "nucleus": 1, "": 3}
    assert labelled.found == "21 boxes of 2 classes in 1 images, 14 of them left out"
    assert list(labelled.problems) == [
        "a.json: shape 8 (cell) left out, a point has no size, and the other objects have boxes",
        "a.json: shape 9 (cell) left out, a line has no area",
        r"a.json: shape 10 (cell) left out, shape_type spline\u000a is not known",
        "a.json: shape 11 (cell) left out, a ring of 4 numbers; at least 3 corners, two numbers each, are needed",
        "a.json: shape 12 (cell) left out, malformed points",
        "a.json: shape 13 (cell) left out, malformed points",
        "a.json: shape 14 (cell) left out, it has no points",
        "a.json: shape 15 (cell) left out, a rectangle of 1 points",
        "a.json: shape 16 (cell) left out, a circle of 1 points",
        "a.json: shape 17 (without a name) left out, it has no class",
        "a.json: shape 18 (without a name) left out, it has no class",
        "a.json: shape 19 (without a name) left out, it has no points",
        "a.json: shape 20 (cell) left out, its box is outside the image",
        "a.json: shape 21 (cell) left out, zero-size box at (5, 5)",
        "1 boxes reached over the edge of their image and were clipped",
    ]


def test_ccedd_has_no_labels(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        image(tmp_path / "png" / f"{name}.png")
        image(tmp_path / "edge" / f"{name}_edge.png")
    for name in ("1", "2"):
        dump(
            tmp_path / "json" / f"{name}.json", [{"points": [[1, 2], [11, 2], [1, 22]]}], 64, 40 if name == "2" else 48
        )
    dump(tmp_path / "json" / "9.json", [{"points": [[1, 2], [11, 2], [1, 22]]}])
    labelled = read(tmp_path)
    assert shown(labelled) == {f"{i}.png": (("unnamed",), [[1, 2, 11, 22]]) for i in (1, 2)}
    assert labelled.found == (
        "3 boxes of 1 classes in 2 images, 1 of them left out; 3 have no label and are called 'unnamed'"
    )
    assert list(labelled.problems) == [
        "json/2.json: says 64 x 40 px, but the image is 64 x 48",
        "json/9.json: left out with 1 objects, missing image 9",
        "png/3.png: left out, no label file has it (unlabelled)",
        "edge/: 3 images left out, no label file has any of them (unlabelled)",
    ]


def test_paths_as_labelme_writes_them(tmp_path: Path) -> None:
    triangle = [[1, 2], [11, 2], [1, 22]]
    image(tmp_path / "train" / "images" / "a.png")
    image(tmp_path / "val" / "images" / "a.png")
    for split in ("train", "val"):
        dump(tmp_path / split / "json" / "x.json", [shape("cell", triangle)], imagePath="..\\images\\a.png")
    dump(tmp_path / "val" / "json" / "y.json", [shape("cell", triangle)], imagePath="../../../a.png")
    dump(tmp_path / "val" / "json" / "z.json", [shape("cell", triangle)], imagePath="/etc/passwd")
    dump(tmp_path / "val" / "json" / "w.json", [shape("cell", triangle)], imagePath="../images/a.png")
    (tmp_path / "val" / "json" / "broken.json").write_text('{"shapes":')
    (tmp_path / "val" / "json" / "other.json").write_text("{}")
    labelled = read(tmp_path)
    assert [(item.path.parts[-3], item.split) for item in labelled.images] == [("train", "train"), ("val", "val")]
    assert sorted(labelled.problems) == [
        "val/json/broken.json: left out, not JSON (Expecting value: line 1 column 11 (char 10))",
        "val/json/other.json: left out, it has no `shapes` of LabelMe",
        "val/json/x.json: left out, val/json/w.json is about the same image",
        "val/json/y.json: left out with 1 objects, its file name ../a.png leads out of the folder",
        "val/json/z.json: left out with 1 objects, its file name /etc/passwd leads out of the folder",
    ]
    assert labelled.annotated == {"cell": 5}


def test_two_versions_of_all_labels(tmp_path: Path) -> None:
    image(tmp_path / "png" / "1.png")
    for folder in ("label_correct", "label_no_correct"):
        dump(tmp_path / folder / "1.json", [{"points": [[1, 2], [11, 2], [1, 22]]}])
    with pytest.raises(
        DataError, match=r"label_correct/1.json and label_no_correct/1.json are both about png/1.png: keep"
    ):
        read(tmp_path)


def test_nothing_but_points(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    dump(
        tmp_path / "a.json",
        [shape("cell", [[5, 6]], "point"), shape("cell", [[65, 6]], "point"), shape("cell", [], "point")],
    )
    labelled = read(tmp_path)
    assert labelled.kind == "point" and shown(labelled) == {"a.png": (("cell",), [[5, 6, 5, 6]])}
    assert len(labelled.problems) == 2 and labelled.annotated == {"cell": 3}


def test_what_is_no_labelme(tmp_path: Path) -> None:
    for name, text in {"a": "[]", "b": '{"shapes": {}}', "c": "[" * 100_000, "d": '{"shapes": []}', "e": ""}.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert not labelme.recognise(tmp_path) and not labelme.recognise(tmp_path / "a.json")
    with pytest.raises(DataError, match="has 0 images and 0 JSON files of LabelMe"):
        labelme.read(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        labelme.read(tmp_path / "a.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one image, for label files that come and go."""
    folder = tmp_path_factory.mktemp("any")
    image(folder / "a.png", 16, 16)
    return folder


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["a.png", "\ud800", "circle", "x\n"])
SHAPES = st.fixed_dictionaries(
    {},
    optional={
        "label": VALUES,
        "shape_type": VALUES | st.sampled_from(["rectangle", "circle", "point", "polygon", "mask"]),
        "points": VALUES | st.lists(st.lists(st.floats(-5, 25) | VALUES, max_size=3), max_size=5),
    },
)


@settings(deadline=None, max_examples=150)
@given(st.lists(SHAPES | VALUES, max_size=4), VALUES, VALUES)
def test_any_shapes_are_read_or_said(folder: Path, shapes: Any, path: Any, width: Any) -> None:
    dump(folder / "a.json", shapes, width, imagePath=path)
    try:
        labelled = labelme.read(folder)
    except DataError as error:
        assert str(error).isprintable()
        return
    assert sum(labelled.annotated.values()) == len(shapes)
    assert all((item.boxes_N4 >= 0).all() and (item.boxes_N4 <= 16).all() for item in labelled.images)
    assert all(problem.isprintable() for problem in labelled.problems)
