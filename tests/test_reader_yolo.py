from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data.readers import LabelledSet, points, read, yolo
from ssl_pretrain.data.shapes import Polygon
from ssl_pretrain.errors import DataError


def image(path: Path, width: int = 100, height: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.round(6).tolist()) for item in labelled.images}


def test_lines(tmp_path: Path) -> None:
    for name in ("a", "empty", "unlabelled", "binary"):
        image(tmp_path / "images" / f"{name}.png")
    image(tmp_path / "images" / "a.jpg")
    lines = [
        "0 0.5 0.5 0.2 0.4",
        "1 .1 .1 .2 .2 0.97",
        "1.0 0.1 0.2 0.3 0.2 0.3 0.6",
        "0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6",
        "0 0.95 0.5 0.2 0.4",
        "0 0.0249995 0.5 0.05 0.4",
        "0 1.0005 0.2 0.3 0.2 0.3 0.6",
        "0 50 25 20 20",
        "0 0.5 0.5 0 0.4",
        "2 0.5 0.5 0.2 0.4",
        "-1 0.5 0.5 0.2 0.4",
        "0.5 0.5 0.5 0.2 0.4",
        "0 nan 0.5 0.2 0.4",
        "0 0.5 0.5 0.2",
        "0 0.5 0.5 0.2 0.4 0.1 0.1 0.1",
        "cell 0.5 0.5 0.2 0.4",
        "0 0.5 0.5 0.2 0.4",
        "0 0.5 0.5 -0.2 0.4",
    ]
    text(tmp_path / "labels" / "a.txt", "\ufeff" + "\r\n\n".join(lines))
    text(tmp_path / "labels" / "empty.txt", " \n")
    text(tmp_path / "labels" / "lost.txt", lines[0])
    text(tmp_path / "labels" / "a.txt:Zone.Identifier", "[ZoneTransfer]")
    text(tmp_path / "labels" / "classes.txt", "RBC\nWBC\n")
    (tmp_path / "labels" / "binary.txt").write_bytes(b"\xff\xfe")
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("yolo", "box", ("RBC", "WBC"))
    (first, second) = labelled.images
    assert (first.path.name, second.path.name) == ("a.jpg", "empty.png") and second.labels == ()
    assert first.labels == ("RBC", "WBC", "WBC", "RBC", "RBC", "RBC", "RBC", "RBC")
    assert first.boxes_N4.round(6).tolist() == [
        [40, 15, 60, 35],
        [0, 0, 20, 10],
        [10, 10, 30, 30],
        [10, 10, 30, 30],
        [85, 15, 100, 35],
        [0, 15, 4.99995, 35],
        [30, 10, 100, 30],
        [40, 15, 60, 35],
    ]
    shape = first.shapes[2]
    assert isinstance(shape, Polygon) and shape.rings[0].round(6).tolist() == [[10, 10], [30, 10], [30, 30]]
    assert first.shapes[0] is None and isinstance(first.shapes[3], Polygon)
    assert labelled.annotated == {"RBC": 9, "WBC": 2, "class 2": 1}
    assert list(labelled.problems) == [
        "labels/a.txt: line 8 (RBC) left out, a value is not within 0 and 1 (pixels instead of fractions?)",
        "labels/a.txt: line 9 (RBC) left out, zero-size box at (50, 15)",
        "labels/a.txt: line 10 (class 2) left out, there are only 2 class names",
        "labels/a.txt: malformed line 11: -1 0.5 0.5 0.2 0.4",
        "labels/a.txt: malformed line 12: 0.5 0.5 0.5 0.2 0.4",
        "labels/a.txt: malformed line 13: 0 nan 0.5 0.2 0.4",
        "labels/a.txt: malformed line 14: 0 0.5 0.5 0.2",
        "labels/a.txt: malformed line 15: 0 0.5 0.5 0.2 0.4 0.1 0.1 0.1",
        "labels/a.txt: malformed line 16: cell 0.5 0.5 0.2 0.4",
        "labels/a.txt: line 18 (RBC) left out, a value is not within 0 and 1 (pixels instead of fractions?)",
        "labels/a.txt: 1 lines have a sixth number (a score?), which is not used",
        "labels/a.txt: 1 lines repeat another one; they are kept",
        "images/a.png: left out, images/a.jpg has the same label file",
        "labels/binary.txt: left out with its image, cannot be read "
        "('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        "labels/empty.txt: empty label file (no objects)",
        "labels/lost.txt: labels without an image (missing image)",
        "images/unlabelled.png: left out, no label file has it (unlabelled)",
        "2 boxes reached over the edge of their image and were clipped",
    ]


LINE = "1 0.5 0.5 0.2 0.4\n"


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("images/train/a.png", "labels/train/a.txt"),
        ("train/images/a.png", "train/labels/a.txt"),
        ("train/a.png", "train/a.txt"),
        ("obj_train_data/a.png", "obj_train_data/a.txt"),
        ("a.PNG", "a.txt"),
        ("images/images/a.png", "images/labels/a.txt"),
        ("images/a.png", "images/a.txt"),
    ],
)
def test_layouts(tmp_path: Path, picture: str, label: str) -> None:
    image(tmp_path / picture)
    image(tmp_path / "b.png")
    text(tmp_path / label, LINE)
    text(tmp_path / "README.txt", "0 0 0 0 0")
    labelled = read(tmp_path)
    assert [item.path for item in labelled.images] == [tmp_path / picture] and labelled.classes == ("1",)
    assert labelled.images[0].split == (None if "train/" not in picture else None if "obj" in picture else "train") or (
        "obj_train" in picture
    )
    assert any("b.png" in problem or "./" in problem for problem in labelled.problems) and len(labelled.problems) == 1


@pytest.mark.parametrize("names", ["[no, '7', cell body]", "{0: no, 1: '7', 2: cell body}", "\n- no\n- 7\n- cell body"])
def test_names_are_the_text_that_they_are(tmp_path: Path, names: str) -> None:
    """YAML 1.1 calls `no` False."""
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", "".join(f"{i} 0.5 0.5 0.2 0.4\n" for i in range(3)))
    text(tmp_path / "data.yaml", f"nc: 3\nnames: {names}\n")
    labelled = read(tmp_path)
    assert labelled.images[0].labels == ("no", "7", "cell body") and labelled.problems == ()


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        ("names: [a, b", "data.yaml: not used, cannot be read"),
        ("- a\n- b", "data.yaml: not used, it holds no keys"),
        ("names: [[a], b]", "data.yaml: a class name is not used, it is no text or its number is none"),
        ("names: {one: a, 1: b}", "data.yaml: a class name is not used"),
        ("names: [a, b]\nnc: 3", "data.yaml: nc is 3, but there are 2 class names"),
        ("names: [b, b]", "class name b is given to two numbers: taken as one class"),
        ("x: &a [*a]\nnames: *a", "cannot be read"),
        ("names: !!python/object/apply:os.system [ls, b]\nval: x", "nothing is found for x"),
        ("names: " + "[" * 5000, "cannot be read"),
        ("? [1]\n: 2", "cannot be read"),
        ("names: [a, b]\ntrain: ../../../etc", "split train: nothing is found for ../../../etc"),
        ("names: [a, b]\nval: [images, 7]\ntrain: ../images", "1 images are in two splits"),
    ],
)
def test_data_yaml_that_is_wrong(tmp_path: Path, yaml: str, problem: str) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", LINE)
    text(tmp_path / "data.yaml", yaml)
    labelled = read(tmp_path)
    assert problem in "\n".join(labelled.problems) and all(line.isprintable() for line in labelled.problems)
    assert labelled.images[0].labels in (("b",), ("1",))


def test_splits_that_data_yaml_or_lists_give(tmp_path: Path) -> None:
    for name in ("one/a.png", "two/b.png", "two/c.png", "three/valid/d.png"):
        image(tmp_path / "images" / name)
        text(tmp_path / "labels" / name.replace(".png", ".txt"), LINE)
    data = "path: /home/someone/set\ntrain: ../set/images/one\nval: /home/someone/set/images/two/\nnames: [a, b]\n"
    text(tmp_path / "data.yaml", data)
    labelled = read(tmp_path)
    assert [(item.path.name, item.split) for item in labelled.images] == [
        ("a.png", "train"), ("d.png", "val"), ("b.png", "val"), ("c.png", "val"),
    ]  # fmt: skip
    text(tmp_path / "data.yaml", "train: train.txt\ntest: lists/test.txt\nnames: [a, b]\n")
    text(tmp_path / "train.txt", "./images/one/a.png\n/elsewhere/images/two/b.png\nlost.png\n")
    text(tmp_path / "lists" / "test.txt", "c.png\n")
    assert [item.split for item in read(tmp_path).images] == ["train", "val", "train", "test"]
    (tmp_path / "data.yaml").unlink()
    text(tmp_path / "valid.txt", "images/two/c.png\n")
    assert [item.split for item in read(tmp_path).images] == ["train", "val", "train", "val"]


def test_keypoints_are_not_taken_for_polygons(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 2\n")
    text(tmp_path / "data.yaml", "kpt_shape: [2, 3]\nnames: [cell]\n")
    assert shown(read(tmp_path)) == {"a.png": (("cell",), [[40, 15, 60, 35]])}


def test_empty_label_files_are_yolo_only_with_class_names(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", "")
    assert not yolo.recognise(tmp_path) and points.recognise(tmp_path)
    text(tmp_path / "data.yaml", "names: [cell]")
    assert yolo.recognise(tmp_path) and not points.recognise(tmp_path)
    with pytest.raises(DataError, match=r"0 boxes of 0 classes in 1 images, but no labelled object"):
        read(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        read(tmp_path / "data.yaml", format="yolo")


def test_no_label_file_for_any_image(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "b.txt", LINE)
    with pytest.raises(DataError, match="has 1 images and 1 text files, none for an image"):
        read(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one image, for label files that come and go."""
    folder = tmp_path_factory.mktemp("any")
    image(folder / "images" / "a.png", 16, 16)
    (folder / "labels").mkdir()
    return folder


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from(["0", "3", "0.5", "1e-3", ".2", "-1", "nan", "x", ",", "0,1", "1_0", "٣", "7;"]), max_size=9
    )
)
def test_points_and_yolo_never_both_fit(folder: Path, words: list[str]) -> None:
    text(folder / "labels" / "a.txt", " ".join(words))
    assert not (points.recognise(folder) and yolo.recognise(folder))


@settings(deadline=None, max_examples=100)
@given(
    st.text(max_size=60)
    | st.lists(st.floats(-0.1, 1.1).map(str), min_size=4, max_size=12).map(lambda w: "0 " + " ".join(w))
)
def test_any_text_is_read_or_refused_in_words(folder: Path, content: str) -> None:
    (folder / "labels" / "a.txt").write_bytes(content.encode(errors="surrogatepass"))
    labelled = yolo.read(folder)
    for item in labelled.images:
        assert (item.boxes_N4 >= 0).all() and (item.boxes_N4 <= 16).all()
        assert (item.boxes_N4[:, 2:] > item.boxes_N4[:, :2]).all()
    assert all(problem.isprintable() for problem in labelled.problems)
