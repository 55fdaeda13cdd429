from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data.readers import LabelledSet, cvat, read
from ssl_pretrain.data.shapes import Polygon, ellipse, of_pixels, pixels
from ssl_pretrain.errors import DataError


def image(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)


def xml(path: Path, *images: str, head: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<?xml version="1.0"?>{head}<annotations><version>1.1</version>{"".join(images)}</annotations>')


def entry(name: str, *shapes: str, more: str = 'width="64" height="48"') -> str:
    return f'<image id="0" name="{name}" {more}>{"".join(shapes)}</image>'


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.round(3).tolist()) for item in labelled.images}


def test_every_shape(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    xml(
        tmp_path / "annotations.xml",
        entry(
            "a.png",
            '<box label="cell" xtl="1" ytl="2" xbr="11" ybr="6"/>',
            '<box label="cell" xtl="10" ytl="18" xbr="30" ybr="22" rotation="90"/>',
            '<polygon label="rod" points="1,1;5,1;5.5,9"><attribute name="a">b</attribute></polygon>',
            '<ellipse label="cell" cx="20" cy="20" rx="10" ry="5"/>',
            '<ellipse label="cell" cx="20" cy="20" rx="10" ry="5" rotation="90"/>',
            '<mask label="rod" left="3" top="2" width="3" height="2" rle="1, 2, 0, 1, 2"/>',
            '<polyline label="line" points="1,1;2,2"/>',
            '<points label="dot" points="1,1"/>',
            '<tag label="good"/>',
        ),
    )
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("cvat", "box", ("cell", "rod"))
    # the mask: row 0 is 0 1 1, row 1 is 1 0 0, from (3, 2) on
    assert labelled.images[0].boxes_N4.round(6).tolist() == [
        [1, 2, 11, 6],
        [18, 10, 22, 30],
        [1, 1, 5.5, 9],
        [10, 15, 30, 25],
        [15, 10, 25, 30],
        [3, 2, 6, 4],
    ]
    shapes = labelled.images[0].shapes
    assert shapes[0] is None and isinstance(shapes[3], Polygon) and shapes[5] is not None
    inside = pixels(shapes[5], (48, 64))
    assert sorted(zip(*(axis.tolist() for axis in np.nonzero(inside)), strict=True)) == [(2, 4), (2, 5), (3, 3)]
    assert labelled.annotated == {"cell": 4, "rod": 2, "line": 1, "dot": 1, "good": 1}
    assert [problem.partition(" left out")[0] for problem in labelled.problems] == [
        "annotations.xml: a.png: polyline 7 (line)",
        "annotations.xml: a.png: points 8 (dot)",
        "annotations.xml: a.png: tag 9 (good)",
    ]


@settings(deadline=None, max_examples=100)
@given(st.floats(0.5, 40), st.floats(0.5, 40), st.floats(-720, 720))
def test_the_tightest_box_of_an_ellipse(rx: float, ry: float, degrees: float) -> None:
    """The formula against the outline, whose 4000 corners come to within their sagitta of the box."""
    outline_P2 = ellipse(100, 100, rx, ry, degrees, corners=4000).rings[0]
    edges = [*outline_P2.min(0), *outline_P2.max(0)]
    assert cvat.ellipse_box(100, 100, rx, ry, degrees) == pytest.approx(edges, abs=40 * (math.pi / 4000) ** 2)


def test_the_box_is_not_that_of_the_polygon() -> None:
    """64 corners miss the tip of an ellipse: 45 degrees are worked by hand, w = 2 sqrt((rx^2 + ry^2) / 2)."""
    x0, _, x1, _ = cvat.ellipse_box(0, 0, 7, 1, 45)
    assert x1 - x0 == pytest.approx(10.0)


def test_images_are_found(tmp_path: Path) -> None:
    image(tmp_path / "images" / "train" / "a &amp b.png")
    (tmp_path / "images" / "train" / "a &amp b.png").rename(tmp_path / "images" / "train" / "a & b.png")
    image(tmp_path / "images" / "Validation" / "same.png")
    image(tmp_path / "images" / "Test" / "same.png")
    image(tmp_path / "elsewhere" / "far.png")
    image(tmp_path / "elsewhere" / "extra.png")
    box = '<box label="x" xtl="1" ytl="2" xbr="3" ybr="4"/>'
    size = 'width="64" height="48"'
    xml(
        tmp_path / "annotations.xml",
        entry("a &amp; b.png", box, more=f'subset="train" {size}'),
        entry("same.png", box, more=f'subset="Validation" {size}'),
        entry("same.png", more=f'subset="Test" {size}'),
        entry("far.png", box, more='subset="default" width="65" height="48"'),
        entry("same.png", box, box, more=f'subset="Test" {size}'),
        entry("same.png", box, more=size),
        entry("gone.png", box, '<polygon label="y" points=""/>'),
        entry("../gone.png", box),
        entry("", box),
    )
    labelled = read(tmp_path)
    assert [(item.path.name, item.split, len(item.labels)) for item in labelled.images] == [
        ("a & b.png", "train", 1),
        ("same.png", "val", 1),
        ("same.png", "test", 0),
        ("far.png", None, 1),
    ]
    assert labelled.problems == (
        "annotations.xml: far.png: says 65 x 48 px, but the image is 64 x 48",
        "annotations.xml: same.png: left out, image 0 of annotations.xml is about the same image (2 objects)",
        "annotations.xml: same.png: left out, its image could be images/Test/same.png or images/Validation/same.png"
        " (1 objects)",
        "annotations.xml: gone.png: left out, missing image gone.png (2 objects)",
        "annotations.xml: ../gone.png: left out, its name leads out of the folder (1 objects)",
        "annotations.xml: an image without a name: left out, its name leads out of the folder (1 objects)",
        "elsewhere/extra.png: left out, not in the XML file (unlabelled)",
    )
    assert labelled.annotated == {"x": 9, "y": 1}


def test_shapes_that_are_none(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    wrong = [
        '<box label="x" xtl="nan" ytl="2" xbr="3" ybr="4"/>',
        '<box label="x" xtl="5" ytl="2" xbr="3" ybr="4"/>',
        '<box label="x" xtl="5" ytl="2" xbr="3" ybr="4" rotation="5"/>',
        '<box label="" xtl="1" ytl="2" xbr="3" ybr="4"/>',
        '<ellipse label="x" cx="1e9" cy="1" rx="1" ry="1"/>',
        '<ellipse label="x" cx="9" cy="1" rx="-1" ry="1"/>',
        '<ellipse label="x" cx="9" cy="9" rx="0" ry="1"/>',
        '<polygon label="x" points="1,1;2,2"/>',
        '<polygon label="x" points="1,1;2;3,3"/>',
        '<mask label="x" left="3" top="2" width="3" height="2" rle="1,2"/>',
        '<mask label="x" left="3" top="2" width="3" height="2" rle=""/>',
        '<mask label="x" left="62" top="2" width="3" height="2" rle="0,6"/>',
        '<mask label="x" left="0" top="0" width="100000" height="1000" rle="0,100000000"/>',
        '<mask label="x" left="0.5" top="0" width="1" height="1" rle="0,1"/>',
        '<mask label="x" left="1" top="1" width="2" height="1" rle="2"/>',
        '<cuboid label="x"/>',
        "<box/>",
    ]
    good = '<box label="x" xtl="-1" ytl="2" xbr="3" ybr="4"/>'
    xml(tmp_path / "annotations.xml", entry("a.png", *wrong, good))
    labelled = read(tmp_path)
    assert shown(labelled) == {"a.png": (("x",), [[0, 2, 3, 4]])}
    assert len(labelled.problems) == len(wrong) + 1 and sum(labelled.annotated.values()) == len(wrong) + 1
    assert labelled.problems[-1] == "1 boxes reached over the edge of their image and were clipped"


def test_points_and_tags_alone(tmp_path: Path) -> None:
    image(tmp_path / "points" / "a.png")
    dots = '<points label="dot" points="1,2;3.5,4"/><points label="dot" points="x"/><tag label="t"/>'
    xml(tmp_path / "points" / "annotations.xml", entry("a.png", dots))
    labelled = read(tmp_path / "points")
    assert labelled.kind == "point" and labelled.annotated == {"dot": 3, "t": 1}
    assert labelled.images[0].boxes_N4.tolist() == [[1, 2, 1, 2], [3.5, 4, 3.5, 4]]
    image(tmp_path / "tags" / "a.png")
    xml(tmp_path / "tags" / "annotations.xml", entry("a.png", '<tag label="good"/>'))
    labelled = read(tmp_path / "tags")
    assert labelled.kind == "image" and shown(labelled) == {"a.png": (("good",), [[0, 0, 64, 48]])}


def test_tracks_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    xml(tmp_path / "annotations.xml", '<track id="0" label="x"><box frame="0"/></track>')
    with pytest.raises(DataError, match=r"tracks of a video: export it as 'CVAT for images 1\.1'"):
        read(tmp_path)


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f"{BOMB}<annotations><image name='&b;'/></annotations>", "document type or entities"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotations></annotations>", "document type or entities"),
        ("<annotations><image", "malformed XML"),
        ("<annotations></annotations><x/>", "malformed XML"),
        ("<?xml version='1.0' encoding='nonsense'?><annotations></annotations>", "malformed XML"),
        ("<x><annotations></annotations></x>", "<x> is not the <annotations>"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, why: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "annotations.xml").write_text(content)
    with pytest.raises(DataError, match=why) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_without_images(tmp_path: Path) -> None:
    xml(tmp_path / "annotations.xml", entry("a.png"))
    with pytest.raises(DataError, match="1 files of CVAT but no image"):
        read(tmp_path)


def test_as_many_ellipses_as_neutrostruct_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    Image.new("L", (4096, 4224)).save(tmp_path / "images" / "a.bmp")
    numbers = rng.uniform(0, 1, (21_143, 5)) * [4000, 4000, 60, 60, 360] + [40, 40, 1, 1, 0]
    shapes = [
        f'<ellipse label="g" cx="{cx:.2f}" cy="{cy:.2f}" rx="{rx:.2f}" ry="{ry:.2f}" rotation="{degrees:.1f}"/>'
        for cx, cy, rx, ry, degrees in numbers.tolist()
    ]
    xml(tmp_path / "annotations.xml", entry("a.bmp", *shapes, more='width="4096" height="4224"'))
    labelled = read(tmp_path)
    assert labelled.annotated == {"g": 21_143} and len(labelled.images[0].shapes) == 21_143


def test_masks_come_out_as_they_were_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image(tmp_path / "a.png")
    drawn, shapes = [], []
    for _ in range(20):
        inside = rng.random((7, 9)) < 0.5
        inside[0, 0] = inside[-1, -1] = True
        left, top = int(rng.integers(0, 55)), int(rng.integers(0, 41))
        flat = np.concatenate([[False], inside.ravel(), [False]])
        runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [inside.size]])).tolist()
        runs = runs if runs[-1] else runs[:-1]
        size = f'left="{left}" top="{top}" width="9" height="7"'
        shapes.append(f'<mask label="x" {size} rle="{", ".join(map(str, runs))}"/>')
        drawn.append(np.pad(inside, ((top, 48 - 7 - top), (left, 64 - 9 - left))))
    xml(tmp_path / "annotations.xml", entry("a.png", *shapes))
    found = read(tmp_path).images[0].shapes
    assert [of.runs_R.tolist() for of in found if of and not isinstance(of, Polygon)] == [
        of_pixels(inside).runs_R.tolist() for inside in drawn
    ]
