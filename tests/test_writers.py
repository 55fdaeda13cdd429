from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from ssl_pretrain.data import writers
from ssl_pretrain.data.readers import LabelledImage, LabelledSet, classes_of, read
from ssl_pretrain.data.shapes import Polygon, Shape, box, of_pixels, polygon
from ssl_pretrain.data.writers import place, safe_name, write
from ssl_pretrain.errors import DataError, UsageError, WriteError
from ssl_pretrain.named import named, names


def image(path: Path, width: int = 64, height: int = 48) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)
    return path


def one(
    path: Path, boxes: Any = (), labels: tuple[str, ...] = (), split: str | None = None, group: str = "",
    shapes: tuple[Shape | None, ...] = (), size_px: tuple[int, int] = (64, 48),
) -> LabelledImage:  # fmt: skip
    boxes_N4 = np.array(boxes, np.float64).reshape(-1, 4)
    return LabelledImage(path, size_px, boxes_N4, labels, group or path.name, split, shapes)


def of(*images: LabelledImage, kind: Any = "box") -> LabelledSet:
    return LabelledSet("test", "", kind, classes_of(images), images, ())


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]], str | None]]:
    return {item.path.name: (item.labels, item.boxes_N4.round(3).tolist(), item.split) for item in labelled.images}


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def some(folder: Path) -> LabelledSet:
    return of(
        one(image(folder / "a.png"), [[1, 2, 11, 22], [0, 0, 64, 48]], ("WBC", "no"), "train", "p1"),
        one(image(folder / "b.jpg"), [[1.5, 2.25, 3.5, 4.75]], ("WBC",), "val", "p2"),
        one(image(folder / "c.png"), split="train", group="p1"),
    )


def test_every_writer_keeps_the_contract(tmp_path: Path) -> None:
    assert {"coco", "yolo"} <= set(names(writers.KIND))
    for name in names(writers.KIND):
        assert named(writers.KIND, name).__doc__
        said = write(some(tmp_path / "set"), tmp_path / name, format=name)
        assert "2 classes" in said and "\n" not in said
        labelled = read(tmp_path / name)
        assert labelled.format == name and shown(labelled) == {
            "a.png": (("WBC", "no"), [[1, 2, 11, 22], [0, 0, 64, 48]], "train"),
            "b.jpg": (("WBC",), [[1.5, 2.25, 3.5, 4.75]], "val"),
            "c.png": ((), [], "train"),
        }
        assert (tmp_path / name / "images" / "train" / "a.png").readlink() == tmp_path / "set" / "a.png"


def test_coco_by_hand(tmp_path: Path) -> None:
    inside = np.zeros((48, 64), bool)
    inside[3:7, 5:12] = True
    shapes = (polygon([[1, 2, 11, 2, 1, 22]]), of_pixels(inside), None)
    labelled = of(
        one(
            image(tmp_path / "set" / "a.png"),
            [[1, 2, 11, 22], [5, 3, 12, 7], [2, 2, 4.5, 3]],
            ("x", "y", "x"),
            shapes=shapes,
        )
    )
    said = write(labelled, tmp_path / "out", format="coco", images="none")
    assert said == "COCO, 2 classes, instances.json: 3 objects in 1 images; no image files, as asked for"
    assert everything(tmp_path / "out") == ["annotations/instances.json"]
    content = json.loads((tmp_path / "out" / "annotations" / "instances.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}]
    assert content["categories"] == [
        {"id": 1, "name": "x", "supercategory": ""}, {"id": 2, "name": "y", "supercategory": ""},
    ]  # fmt: skip
    first, second, third = content["annotations"]
    assert first == {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "area": 100, "iscrowd": 0,
        "segmentation": [[1, 2, 11, 2, 1, 22]],
    }  # fmt: skip
    assert second["area"] == 28 and second["segmentation"]["size"] == [48, 64]
    assert third["area"] == 2.5 and third["segmentation"] == [] and third["bbox"] == [2, 2, 2.5, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools and numpy 2
def test_pycocotools_loads_what_is_written(tmp_path: Path) -> None:
    inside = np.zeros((48, 64), bool)
    inside[3:7, 5:12] = True
    inside[4, 6] = False
    shapes = (polygon([[1, 2, 11, 2, 11, 22, 1, 22]]), of_pixels(inside), None)
    labelled = of(
        one(
            image(tmp_path / "set" / "a.png"),
            [[1, 2, 11, 22], [5, 3, 12, 7], [2, 2, 4, 3]],
            ("x", "y", "x"),
            shapes=shapes,
        )
    )
    write(labelled, tmp_path / "out", format="coco", images="none")
    with redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "out" / "annotations" / "instances.json")
    first, second, _ = coco.loadAnns(coco.getAnnIds())
    assert coco.annToMask(first).sum() == first["area"] == 200
    assert (coco.annToMask(second).astype(bool) == inside).all() and second["area"] == 27
    assert [coco.cats[a["category_id"]]["name"] for a in coco.loadAnns(coco.getAnnIds())] == ["x", "y", "x"]


def test_yolo_by_hand(tmp_path: Path) -> None:
    said = write(some(tmp_path / "set"), tmp_path / "out", format="yolo", images="copy")
    assert said.startswith("YOLO, 2 classes, 3 boxes in 3 images; which images belong together (patient, slide) has no")
    assert everything(tmp_path / "out") == [
        "data.yaml", "images/train/a.png", "images/train/c.png", "images/val/b.jpg",
        "labels/train/a.txt", "labels/train/c.txt", "labels/val/b.txt",
    ]  # fmt: skip
    assert (tmp_path / "out" / "labels" / "train" / "a.txt").read_text() == (
        "0 0.09375000 0.25000000 0.15625000 0.41666667\n1 0.50000000 0.50000000 1.00000000 1.00000000\n"
    )
    assert (tmp_path / "out" / "labels" / "train" / "c.txt").read_text() == ""
    data = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert data == {"train": "images/train", "val": "images/val", "nc": 2, "names": {0: "WBC", 1: "no"}}
    copied = tmp_path / "out" / "images" / "val" / "b.jpg"
    assert not copied.is_symlink() and copied.read_bytes() == (tmp_path / "set" / "b.jpg").read_bytes()


def test_yolo_invents_no_split(tmp_path: Path) -> None:
    labelled = of(one(image(tmp_path / "set" / "a.png"), [[1, 2, 11, 22]], ("x",)))
    said = write(labelled, tmp_path / "out", format="yolo")
    assert said.endswith("1 images are in no split: data.yaml needs their folders before training")
    assert set(yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())) == {"nc", "names"}
    assert shown(read(tmp_path / "out")) == {"a.png": (("x",), [[1, 2, 11, 22]], None)}


def test_yolo_outlines_are_all_or_none(tmp_path: Path) -> None:
    triangle, path = polygon([[1, 2, 11, 2, 1, 22]]), image(tmp_path / "set" / "a.png")
    boxes, labels = [[1, 2, 11, 22], [1, 2, 11, 22]], ("x", "x")
    said = write(of(one(path, boxes, labels, shapes=(triangle, triangle))), tmp_path / "all", format="yolo")
    assert said.startswith("YOLO, 1 classes, 2 outlines in 1 images")
    (item,) = read(tmp_path / "all").images
    np.testing.assert_allclose(item.boxes_N4, boxes, atol=1e-6)
    assert isinstance(item.shapes[1], Polygon)
    np.testing.assert_allclose(item.shapes[1].rings[0], triangle.rings[0], atol=1e-6)
    others: Mapping[str, Shape | None] = {
        "none": None,
        "mask": of_pixels(np.ones((48, 64), bool)),
        "rings": polygon([[1, 2, 11, 2, 1, 22], [5, 5, 6, 5, 6, 6]]),
        "away": polygon([[1, 2, 12, 2, 1, 22]]),  # another box than the one that is given
    }
    for name, shape in others.items():
        said = write(of(one(path, boxes, labels, shapes=(triangle, shape))), tmp_path / name, format="yolo")
        assert "2 boxes in 1 images" in said
        assert f"{2 - (shape is None)} outlines are not written" in said
        assert shown(read(tmp_path / name)) == {"a.png": (labels, boxes, None)}


def test_groups_survive_coco(tmp_path: Path) -> None:
    write(some(tmp_path / "set"), tmp_path / "out", format="coco")
    assert [item.group for item in read(tmp_path / "out").images] == ["p1", "p1", "images/val/b.jpg"]


def test_points_become_squares_when_asked_for(tmp_path: Path) -> None:
    labelled = of(one(image(tmp_path / "set" / "a.png"), [[10, 20, 10, 20], [0, 48, 0, 48]], ("x", "y")), kind="point")
    for name in names(writers.KIND):
        with pytest.raises(UsageError, match="--point-px 80 makes a square"):
            write(labelled, tmp_path / name, format=name)
        with pytest.raises(UsageError, match="at least 1"):
            write(labelled, tmp_path / name, format=name, point_px=0)
        write(labelled, tmp_path / name, format=name, point_px=8)
        back = read(tmp_path / name)
        assert shown(back) == {"a.png": (("x", "y"), [[6, 16, 14, 24], [0, 44, 4, 48]], None)}
        assert back.problems == ()  # the squares were cut off when they were written


def test_what_is_refused(tmp_path: Path) -> None:
    labelled = some(tmp_path / "set")
    with pytest.raises(UsageError, match="did you mean 'coco'"):
        write(labelled, tmp_path / "out", format="cocoa")
    with pytest.raises(UsageError, match="whole images"):
        write(of(*labelled.images, kind="image"), tmp_path / "out", format="coco")
    with pytest.raises(UsageError, match="makes no sense"):
        write(labelled, tmp_path / "out", format="coco", point_px=8)
    with pytest.raises(DataError, match="no images"):
        write(of(), tmp_path / "out", format="coco")
    with pytest.raises(UsageError, match="lies among the images"):
        write(labelled, tmp_path / "set" / "out", format="coco")
    os.symlink(tmp_path / "set", tmp_path / "link")
    with pytest.raises(UsageError, match="lies among the images"):
        write(labelled, tmp_path / "link" / "out", format="coco")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    for taken in ("set", "dangling"):
        with pytest.raises(WriteError, match="exists: give a folder that does not"):
            write(labelled, tmp_path / taken, format="coco")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        write(labelled, tmp_path / "file" / "out", format="coco")
    (tmp_path / "set" / "c.png").unlink()
    os.mkfifo(tmp_path / "set" / "c.png")
    with pytest.raises(DataError, match=r"c.png cannot be copied: a pipe"):
        write(labelled, tmp_path / "out", format="coco", images="copy")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "link", "set"]  # nothing half done


def test_names_that_collide_or_are_not_safe(tmp_path: Path) -> None:
    here = [
        "x/a.png",
        "y/a.png",
        "y/A.jpg",
        "x/b.png",
        "b.png",
        "x_b.png",
        "c\n\udcff:.png",
        ".d.png",
        "é.png",
        "e\u0301.png",
    ]
    paths = [tmp_path / name for name in here]
    placed, renamed = place([one(path) for path in paths])
    assert [item.name for item in placed] == [
        "x_a.png", "y_a.png", "y_A-2.jpg", "x_b-2.png", "b.png", "x_b.png", "c___.png", "_.d.png".replace("_.", "_"),
        "é.png", "e\u0301-2.png",
    ]  # fmt: skip
    assert renamed == 7
    assert safe_name("x" * 300 + ".png") == "x" * 196 + ".png" and safe_name("...") == "_" and safe_name("a.b") == "a.b"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "A", "b", "a_b", "a-2", "é"]), min_size=1, max_size=3),
        min_size=1,
        max_size=8,
        unique_by=tuple,
    )
)
def test_every_image_has_its_own_name(parts: list[list[str]]) -> None:
    placed, _ = place(
        [one(Path("/set", *some) / "x.png") for some in parts]
        + [one(Path("/set", *some[:-1], f"{some[-1]}.jpg")) for some in parts]
    )
    assert len({item.name.rpartition(".")[0].casefold() for item in placed}) == len(placed) == 2 * len(parts)


# --- round trips ------------------------------------------------------------------------------------------------------


@st.composite
def objects(draw: st.DrawFn) -> tuple[tuple[int, int], list[list[float]], tuple[str, ...], tuple[Shape | None, ...]]:
    width, height = draw(st.tuples(st.integers(16, 4000), st.integers(16, 4000)))
    side = st.floats(0, 1, allow_subnormal=False)
    boxes, labels, shapes = [], [], list[Shape | None]()
    outlines = draw(st.booleans())
    for _ in range(draw(st.integers(0, 5))):
        corners = (
            sorted([draw(side) * (width - 1), draw(side) * (width - 1)]),
            sorted([draw(side) * (height - 1), draw(side) * (height - 1)]),
        )
        (x0, x1), (y0, y1) = ((low, max(high, low + 0.5)) for low, high in corners)
        shape = polygon([[x0, y0, x1, draw(side) * (y1 - y0) + y0, x0, y1]]) if outlines else None
        boxes.append([x0, y0, x1, y1] if shape is None else list(box(shape)))
        labels.append(draw(st.sampled_from(["RBC", "no", "7", "cell body", "ö: x", "#", "{"])))
        shapes.append(shape)
    return (width, height), boxes, tuple(labels), tuple(shapes)


@settings(deadline=None, max_examples=40)
@given(
    objects(),
    st.lists(st.sampled_from(["coco", "yolo"]), min_size=1, max_size=3),
    st.sampled_from([None, "train", "test"]),
)
def test_round_trips_keep_every_box(
    tmp_path_factory: pytest.TempPathFactory, thing: Any, route: list[str], split: str | None
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    size_px, boxes, labels, shapes = thing
    path = folder / "set" / "a.png"
    path.parent.mkdir()
    Image.new("1", size_px).save(path)
    image(folder / "set" / "b.png")
    sure = one(folder / "set" / "b.png", [[1, 2, 3, 4]], ("sure",), split)
    labelled = of(one(path, boxes, labels, split, shapes=shapes, size_px=size_px), sure)
    for i, name in enumerate(route):
        write(labelled, folder / str(i), format=name)
        labelled = read(folder / str(i))
        assert labelled.format == name
    first = next(item for item in labelled.images if item.path.name == "a.png")
    assert first.labels == labels and first.size_px == size_px and first.split == split
    np.testing.assert_allclose(first.boxes_N4, np.array(boxes).reshape(-1, 4), atol=0.01)  # half a pixel is allowed
    assert not [problem for problem in labelled.problems if "left out" in problem or "clipped" in problem]


def test_the_real_bccd_from_voc_to_coco_to_yolo(tmp_path: Path, real_data: Path) -> None:
    first = read(real_data / "bccd")
    write(first, tmp_path / "coco", format="coco")
    second = read(tmp_path / "coco")
    said = write(second, tmp_path / "yolo", format="yolo")
    third = read(tmp_path / "yolo")
    assert said == "YOLO, 3 classes, 4886 boxes in 364 images"
    assert second.annotated == third.annotated == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    for labelled in (second, third):
        assert Counter(item.split for item in labelled.images) == {"train": 205, "val": 87, "test": 72}
        assert not [problem for problem in labelled.problems if "left out" in problem]
        by_name = {item.path.name: item for item in labelled.images}
        for item in first.images:
            other = by_name[item.path.name]
            assert other.labels == item.labels and other.split == item.split
            np.testing.assert_allclose(other.boxes_N4, item.boxes_N4, atol=1e-4)
    with redirect_stdout(io.StringIO()):
        assert len(COCO(tmp_path / "coco" / "annotations" / "instances_test.json").imgs) == 72


def test_the_real_chula_as_squares(tmp_path: Path, real_data: Path) -> None:
    points = read(real_data / "chula_rbc12")
    write(points, tmp_path / "yolo", format="yolo", point_px=80)
    labelled = read(tmp_path / "yolo")
    assert (
        len(labelled.images) == 350
        and labelled.annotated == points.annotated
        and sum(labelled.annotated.values()) == 11905
    )
    assert sum(not item.labels for item in labelled.images) == 2
