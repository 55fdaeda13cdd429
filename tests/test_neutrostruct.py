"""TEM-NeutroStruct: hand-worked cases, the defects of the published scripts, and properties of the conversion."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import re
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from rich.console import Console

from ssl_pretrain.cli import _neutrostruct
from ssl_pretrain.data import shapes
from ssl_pretrain.data.neutrostruct import (
    ALIASES,
    CHILDREN,
    CLASSES,
    PARENT_OF,
    PARENTS,
    class_id,
    coco,
    convert,
    cvat,
    masks,
    naming,
    palette,
    parents,
    relabel,
    scales,
    sevens,
    statistics,
    steps,
    tables,
    verify,
)
from ssl_pretrain.errors import DataError, UsageError, WriteError

FOUR = ("Primary granules", "Secondary granules", "Empty vesicles", "Emptying vesicles")


def document(*rows: tuple[str, int, float, float], images: int = 0, names: tuple[str, ...] = FOUR) -> dict[str, Any]:
    """(class, image, width, height) a box; they stand 100 px apart. Ids start at odd places on purpose."""
    count = images or max(image for _, image, _, _ in rows) + 1
    return {
        "info": {"year": 2025},
        "images": [{"id": 10 + i, "file_name": f"N{i}.tif", "width": 1000, "height": 800} for i in range(count)],
        "categories": [{"id": 7 - i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 100 + n, "image_id": 10 + image, "category_id": 7 - names.index(name), "score": 0.5,
             "bbox": [100 * (n % 9), 100 * (n // 9), w, h]}
            for n, (name, image, w, h) in enumerate(rows)
        ],
    }  # fmt: skip


def named_classes(made: dict[str, Any]) -> list[str]:
    names = {category["id"]: category["name"] for category in made["categories"]}
    return [names[annotation["category_id"]] for annotation in made["annotations"]]


def round_boxes(*diameters: tuple[str, float]) -> list[tuple[str, int, float, float]]:
    return [(name, 0, d, d) for name, d in diameters]


P, S, E, G = FOUR
WORKED = round_boxes((P, 10), (P, 20), (S, 20), (S, 30), (S, 50), (E, 26), (E, 26.5), (E, 25), (G, 99))
"""Median 20, pooled mean 130 / 5 = 26, mean of the class means (15 + 100 / 3) / 2 = 24.1666..."""


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_published_ids_belong_to_the_published_names() -> None:
    ids = {name: class_id(name) for name in CLASSES}
    assert ids["Specific granules"] == 1 and ids["Non-specific secondary granules"] == 4 and ids["Vacuoles"] == 7
    assert sorted(PARENT_OF) == sorted(CLASSES)
    assert CHILDREN["secondary"] == ("Non-specific tertiary granules", "Non-specific secondary granules")


@pytest.mark.parametrize("name", ["primary", "PRIMARY_granule", "Primary Granules", "pg", " primary  granules "])
def test_aliases_of_the_four_classes(name: str) -> None:
    assert parents([name]) == {name: "primary"}


def test_a_seven_class_name_is_never_taken_for_one_of_four() -> None:
    for name in CLASSES:
        if name not in ("Empty vesicles", "Emptying vesicles"):  # the two that both versions have
            with pytest.raises(DataError, match="converted already"):
                parents([name])
    with pytest.raises(DataError, match="converted already"):
        parents(["empty (undecided)"])


def test_two_names_for_one_class_are_refused() -> None:
    with pytest.raises(DataError, match=r"SG and Secondary both mean secondary"):
        parents(["SG", "Secondary"])
    with pytest.raises(DataError, match="both mean Vacuoles"):
        sevens(["vacuole", "Vacuoles"])
    with pytest.raises(DataError, match="convert this file"):
        sevens(["primary"])
    with pytest.raises(UsageError, match="the four classes are"):
        parents(["x"], {"x": "tertiary"})
    assert parents(["Azurophil"], {"azurophils": "primary"}) == {"Azurophil": "primary"}
    assert set(ALIASES.values()) == set(PARENTS)


# --- scales -----------------------------------------------------------------------------------------------------------


def scales_of(tmp_path: Path, text: str, column: str | None = None) -> scales.Scales:
    path = tmp_path / "scale.csv"
    path.write_bytes(text.encode())
    return scales.read(path, column)


@pytest.mark.parametrize(
    "text",
    [
        "image_name,Pixles per microm\nN0.tif,371.52\n",
        "\ufeffimage_name;pixels per µm\nN0.tif;371.52\n",
        "file name\tpx/μm\nN0.tif\t371.52\n",
        f"image_name,Micrometer per Pixel\nN0.tif,{1 / 371.52!r}\n",
        f"image_name,pixel size (nm)\nN0.tif,{1000 / 371.52!r}\n",
        "image_name,bar_px,bar_um\nN0.tif,743.04,2\n",
        "image_name,Scale bar (nm),scale bar px\nN0.tif,500,185.76\n",
    ],
)
def test_every_spelling_of_a_scale_means_the_same(tmp_path: Path, text: str) -> None:
    assert scales_of(tmp_path, text).pixels_per_um == pytest.approx({"N0.tif": 371.52}, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("image_name,scale\nN0,375\n", "no column says which way"),
        ("image_name,px_um\nN0,375\n", "no column says which way"),
        ("image_name,px/um,um/px\nN0,375,0.0027\n", "more than one column"),
        ("image_name,px/um,bar_px,bar_um\nN0,375,375,1\n", "more than one column"),
        (",px/um\nN0,375\n", "first column has no name"),
        ("who,px/um\nN0,375\n", "needs one column image_name"),
        ("image_name,um per pixel\nN0,375\nN1,371\n", "read as micrometres per pixel, but 375 cannot be that"),
        ("image_name,px/um\nN0,0.0027\n", "read as pixels per micrometre, but 0.0027 cannot be that"),
        ("image_name,px/um\n", "no rows below"),
        ("image_name,px/um\nN0,nan\n", "no scale that can be used"),
    ],
)
def test_a_scale_of_unknown_direction_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        scales_of(tmp_path, text)


def test_rows_without_a_usable_scale_are_listed(tmp_path: Path) -> None:
    text = "image_name,px/um\na,375\nb,-1\nc,\nd,1_000\ne,200\ne,201\nf,186\nf,186\ng,0.001\n"
    found = scales_of(tmp_path, text)
    assert found.pixels_per_um == {"a": 375, "f": 186}
    assert len(found.problems) == 5 and "images with two scales: e" in found.problems[-1]
    assert "row 10 (g) left out, 0.001 px a micrometre" in found.problems[3]
    both = "image_name,px/um,um/px\na,375,0.0027\n"
    assert scales_of(tmp_path, both, "px/um").pixels_per_um == {"a": 375}


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_reads_back_as_it_was_written_and_has_the_same_bytes(tmp_path: Path) -> None:
    rows: list[list[str | float]] = [["=1+1", 0.1, math.nan], ["ü,;", 3, 1 / 3]]
    for suffix in (".csv", ".xlsx"):
        path = tmp_path / f"t{suffix}"
        path.write_bytes(tables.write(["image_name", "a", "b"], rows, suffix))
        assert tables.write(["image_name", "a", "b"], rows, suffix) == path.read_bytes()
        found = tables.read(path)
        assert found.header == ["image_name", "a", "b"]
        assert found.rows == [["=1+1", "0.1", ""], ["ü,;", "3", repr(1 / 3)]]
    with zipfile.ZipFile(tmp_path / "t.xlsx") as archive:
        assert all(member.date_time[0] == 1980 for member in archive.infolist())
        assert b"<f>" not in archive.read("xl/worksheets/sheet1.xml")


def test_hostile_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_BYTES", 1 << 20)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", b"0" * (tables.MAX_BYTES + 1))
    for name, data, why in (
        ("a.xlsx", bomb.getvalue(), "unpacks to"),
        ("b.xlsx", b"PK\x03\x04 no", "not an xlsx"),
        ("c.csv", b"image_name\xff,a\n", "not UTF-8"),
        ("d.csv", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=why):
            tables.read(tmp_path / name)
    with pytest.raises(DataError, match="missing"):
        tables.read(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"\.csv or \.xlsx"):
        tables.read(tmp_path / "a.ods")


def test_without_openpyxl_the_pip_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xlsx").write_bytes(tables.write(["image_name"], [["a"]], ".xlsx"))
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    for work in (lambda: tables.write(["a"], [], ".xlsx"), lambda: tables.read(tmp_path / "a.xlsx")):
        with pytest.raises(UsageError, match=r"pip install 'ssl-pretrain\[data\]'"):
            work()
    assert tables.write(["a"], [[1.5]], ".csv") == b"a\n1.5\n"


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    four = coco.checked(document(*WORKED, images=2))
    found = statistics.statistics(four, parents(FOUR), coco.bbox_diameters(four), {"N0.tif": 10.0})
    assert found.count_I2.tolist() == [[2, 3], [0, 0]]
    assert found.median_px_I[0] == 20 and math.isnan(found.median_px_I[1])
    assert found.average_px_I["pooled_mean"][0] == 26
    assert found.average_px_I["class_means"][0] == pytest.approx((15 + 100 / 3) / 2)
    header, rows = statistics.table(found, "pooled_mean")
    assert header[:4] == ["image_name", "pixels_per_um", "primary", "secondary"]
    row = dict(zip(header, rows[0], strict=True))
    assert (row["mean_diameter"], row["median_diameter"], row["average_diameter_SG_PG"]) == (2.6, 2.0, 2.6)
    assert row["median_diameter_px"] == 20 and rows[1][0] == "N1.tif" and math.isnan(float(rows[1][1]))


def test_an_image_with_one_kind_of_granule_has_no_mean_of_class_means() -> None:
    four = coco.checked(document(*round_boxes((P, 10), (P, 20))))
    found = statistics.statistics(four, parents(FOUR), coco.bbox_diameters(four), {})
    assert found.average_px_I["pooled_mean"][0] == 15 and math.isnan(found.average_px_I["class_means"][0])


# --- conversion -------------------------------------------------------------------------------------------------------


def test_conversion_by_hand() -> None:
    made, done = convert.convert(coco.checked(document(*WORKED)), "pooled_mean")
    assert named_classes(made) == [
        "Specific granules",  # 10
        "Specific granules",  # 20 is the median: small
        "Non-specific tertiary granules",  # 20
        "Non-specific secondary granules",  # 30
        "Non-specific secondary granules",  # 50
        "Empty vesicles",  # 26 is the average: small
        "Vacuoles",  # 26.5
        "Empty vesicles",  # 25
        "Emptying vesicles",
    ]
    assert [category["name"] for category in made["categories"]] == list(CLASSES)
    assert [category["id"] for category in made["categories"]] == [1, 2, 3, 4, 5, 6, 7]
    assert done.to_json()["before"] == {"primary": 2, "secondary": 3, "empty": 3, "emptying": 1}
    assert done.to_json()["images"]["N0.tif"]["average_diameter_px"] == 26
    other, _ = convert.convert(coco.checked(document(*WORKED)), "class_means")
    assert named_classes(other)[5:8] == ["Vacuoles", "Vacuoles", "Vacuoles"]  # 24.17 parts them elsewhere


def test_only_the_class_of_an_annotation_changes_and_the_old_document_stays() -> None:
    old = document(*WORKED)
    before = copy.deepcopy(old)
    made, _ = convert.convert(coco.checked(old), "pooled_mean")
    assert old == before and made["info"] == old["info"] and made["images"] == old["images"]
    for a, b in zip(old["annotations"], made["annotations"], strict=True):
        assert {**a, "category_id": 0} == {**b, "category_id": 0}


def test_the_median_is_the_granules_own_diameter_in_the_same_formula() -> None:
    """(w / s + h / s) / 2 and (w + h) / (2 s) round differently, so an eighth of such images lost a granule."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = [(S, 0, float(w), float(h)) for w, h in rng.uniform(20, 120, (5, 2))]
        made, _ = convert.convert(coco.checked(document(*rows)), "pooled_mean")
        assert Counter(named_classes(made)) == {CLASSES[2]: 3, CLASSES[3]: 2}


def test_images_without_granules() -> None:
    rows = [*WORKED, (E, 1, 30, 30), (G, 1, 5, 5)]
    four = coco.checked(document(*rows))
    with pytest.raises(DataError, match=r"1 images have empty structures .*N1\.tif"):
        convert.convert(four, "pooled_mean")
    made, done = convert.convert(four, "pooled_mean", keep_undecided=True)
    assert named_classes(made)[-2:] == ["Empty vesicles (undecided)", "Emptying vesicles"]
    assert [c["id"] for c in made["categories"]] == [*range(1, 9)] and done.after_I8[1].tolist() == [0] * 5 + [1, 0, 1]
    assert "1 empty structures" in done.notes[0]
    fine, _ = convert.convert(coco.checked(document(*WORKED, (G, 1, 5, 5))), "pooled_mean")  # nothing to decide there
    assert len(fine["categories"]) == 7


def test_converted_files_are_not_converted_again() -> None:
    made, _ = convert.convert(coco.checked(document(*WORKED)), "pooled_mean")
    with pytest.raises(DataError, match="converted already"):
        convert.convert(coco.checked(made), "pooled_mean")


def test_classes_that_are_not_known_are_refused_when_used() -> None:
    old = document((P, 0, 5, 5), ("cell", 0, 9, 9), names=(*FOUR, "cell"))
    with pytest.raises(UsageError, match=r"cell: not known .* alias"):
        convert.convert(coco.checked(old), "pooled_mean")
    made, done = convert.convert(coco.checked(document((P, 0, 5, 5), names=(*FOUR, "cell"))), "pooled_mean")
    assert len(made["annotations"]) == 1 and "category cell had no annotation and is gone" in done.notes


def test_averages_from_a_table(tmp_path: Path) -> None:
    four, path = coco.checked(document(*WORKED)), tmp_path / "a.csv"
    path.write_text("image_name,average_diameter_SG_PG\nN0,2.5\n")
    px = convert.averages_px(path, {"N0.tif": 10.0})
    assert px == {"N0": pytest.approx(25)}
    made, _ = convert.convert(four, px)
    assert named_classes(made)[5:8] == ["Vacuoles", "Vacuoles", "Empty vesicles"]  # 25 is the average: small
    with pytest.raises(DataError, match="has no scale"):
        convert.averages_px(path, {})
    path.write_text("image_name,average_diameter_px,average_diameter_um\nN0,25,2.5\n")
    with pytest.raises(DataError, match="once, to say which"):
        convert.averages_px(path, {})
    assert convert.averages_px(path, {}, "average_diameter_px") == {"N0": 25}


def test_micrometres_there_and_back_keep_ties_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        d, s = (float(value) for value in rng.uniform(10, 400, 2))
        (tmp_path / "a.csv").write_text(f"image_name,average_diameter_um\nN0.tif,{d / s!r}\n")
        px = convert.averages_px(tmp_path / "a.csv", {"N0.tif": s})
        made, _ = convert.convert(coco.checked(document((E, 0, d, d))), px)
        assert named_classes(made) == ["Empty vesicles"]


ROWS = st.lists(
    st.tuples(st.sampled_from(FOUR), st.integers(0, 2), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(statistics.READINGS))
def test_the_order_of_annotations_images_and_categories_makes_no_difference(
    rows: list[tuple[str, int, float, float]], random: Any, reading: statistics.Reading
) -> None:
    old = document(*((name, image, w / 7, h / 3) for name, image, w, h in rows), images=3)
    made, done = convert.convert(coco.checked(old), reading, keep_undecided=True)
    mixed = copy.deepcopy(old)
    for key in ("annotations", "images", "categories"):
        random.shuffle(mixed[key])
    again, _ = convert.convert(coco.checked(mixed), reading, keep_undecided=True)
    ids = [{annotation["id"]: annotation["category_id"] for annotation in one["annotations"]} for one in (made, again)]
    assert ids[0] == ids[1]
    # conserved, counted from the documents themselves
    for image in range(3):
        was = Counter(name for name, at, _, _ in rows if at == image)
        now = [n for n, (_, at, _, _) in zip(named_classes(made), rows, strict=True) if at == image]
        assert was[P] == sum(n in CLASSES[:2] for n in now) and was[S] == sum(n in CLASSES[2:4] for n in now)
        assert was[G] == now.count("Emptying vesicles")
        assert was[E] == sum(n in ("Empty vesicles", "Vacuoles", "Empty vesicles (undecided)") for n in now)
    assert done.before_I4.sum() == done.after_I8.sum() == len(rows)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(-3, 3))
def test_the_scale_cancels(rows: list[tuple[str, int, float, float]], power: int) -> None:
    made, _ = convert.convert(coco.checked(document(*rows, images=3)), "pooled_mean", keep_undecided=True)
    scaled = [(name, image, w * 2.0**power, h * 2.0**power) for name, image, w, h in rows]
    again, _ = convert.convert(coco.checked(document(*scaled, images=3)), "pooled_mean", keep_undecided=True)
    assert named_classes(made) == named_classes(again)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=31))
def test_at_least_half_of_the_granules_are_small_and_the_median_is(sides: list[int]) -> None:
    made, _ = convert.convert(coco.checked(document(*round_boxes(*((P, side / 3) for side in sides)))), "pooled_mean")
    small = [side for side, name in zip(sides, named_classes(made), strict=True) if name == "Specific granules"]
    assert 2 * len(small) >= len(sides) and max(small) <= np.median(sides) < min(set(sides) - set(small), default=401)


# --- the COCO file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bbox": [1, 1, 0, 5]}, "no size"),
        ({"bbox": [1, 1, -3, 5]}, "no size"),
        ({"bbox": [1, 1, True, 5]}, "four numbers"),
        ({"bbox": [1, 1, 1e300, 5]}, "four numbers"),
        ({"bbox": [1, 1, 10**400, 5]}, "four numbers"),
        ({"bbox": "1234"}, "four numbers"),
        ({"bbox": [1000, 1, 5, 5]}, "outside"),
        ({"image_id": 99}, "image is not listed"),
        ({"image_id": True}, "image is not listed"),
        ({"category_id": 9}, "category is not listed"),  # what the published scripts leave
        ({"category_id": [1]}, "category is not listed"),
        ({"id": 101}, "taken"),
        ({"id": None}, "whole number"),
        ({"iscrowd": 1}, "crowd"),
    ],
)
def test_broken_annotations_stop_the_reading_or_are_listed(change: dict[str, Any], why: str) -> None:
    old = document(*WORKED)
    old["annotations"][4] = {**old["annotations"][4], **change}
    with pytest.raises(DataError, match=rf"1 annotations cannot be used \(annotation 5: .*{why}"):
        coco.checked(old)
    left = coco.checked(old, reject=True)
    assert len(left.annotations) == 8 and why in left.rejected[0]
    assert why in convert.convert(left, "pooled_mean")[1].notes[0]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"images": []}', b'{"a": NaN}', b"9" * 5000, b"null",
     b'{"images": [{"id": 1, "file_name": "../a"}], "categories": [], "annotations": []}',
     b'{"images": [{"id": 1, "file_name": "a\\nb"}], "categories": [], "annotations": []}',
     b'{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "categories": [], "annotations": []}',
     b'{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": 3}], "annotations": []}'],
)  # fmt: skip
def test_hostile_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError) as caught:
        coco.read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


# --- CVAT -------------------------------------------------------------------------------------------------------------

XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <labels>
        <label>
          <name>Primary granules</name>
          <color>#ff0000</color>
          <attributes/>
        </label>
        <label>
          <name>Empty vesicles</name>
          <color>#00ff00</color>
        </label>
        <label><name>Emptying vesicles</name></label>
        <label><name>nucleus</name></label>
      </labels>
    </task>
  </meta>
  <!-- <ellipse label="Primary granules"/> -->
  <image id="0" name="N0.tif" width="1000" height="800">
    <ellipse label="Primary granules" source="a > b label='x'" cx="50.0" cy="50.00" rx="10" ry="10" z_order="0">
      <attribute name="note">Primary granules &amp; more</attribute>
    </ellipse>
    <ellipse source='manual' cx="150" cy="150" rx="30" ry="10" rotation="90.0"   label = 'Primary granules'/>
    <box label="Empty vesicles" xtl="200" ytl="200" xbr="220" ybr="240" rotation="90"></box>
    <polygon label="Empty vesicles" points="300,300;340,300;340,340;300,340" group_id="&#x31;"/>
    <mask label="Emptying vesicles" rle="0, 4" left="400" top="400" width="2" height="2"/>
    <ellipse label="nucleus" cx="500" cy="500" rx="100" ry="100"/>
    <points label="Primary granules" points="1,1"/>
  </image>
  <image id="1" name="empty&amp;.tif" width="1000" height="800"/>
</annotations>
"""


@functools.cache
def seven_of_xml() -> coco.Coco:
    """An annotation a shape: 10 and 20 px of radius give median diameter 30, average 30."""
    old = document((P, 0, 1, 1), (P, 0, 1, 1), (E, 0, 1, 1), (E, 0, 1, 1), (G, 0, 1, 1), (P, 0, 1, 1))
    boxes = [[40, 40, 20, 20], [140, 120, 20, 60], [190, 210, 40, 20], [300, 300, 40, 40], [400, 400, 2, 2],
             [700, 700, 30, 30]]  # fmt: skip
    for annotation, box in zip(old["annotations"], boxes, strict=True):
        annotation["bbox"] = box
    made, _ = convert.convert(coco.checked(old), "pooled_mean")
    return coco.checked(made)


def test_shapes_and_their_boxes_by_hand() -> None:
    found = cvat.parsed(XML.encode())
    assert found.images == ("N0.tif", "empty&.tif") and len(found.shapes) == 6
    boxes = {shape.kind: shape.box_4 for shape in found.shapes[:5]}
    assert found.shapes[0].box_4 == pytest.approx((40, 40, 20, 20))
    assert boxes["ellipse"] == pytest.approx((140, 120, 20, 60))  # turned by a right angle
    assert boxes["box"] == pytest.approx((190, 210, 40, 20))
    assert boxes["polygon"] == (300, 300, 40, 40) and boxes["mask"] == (400, 400, 2, 2)
    assert len(found.problems) == 1 and "shape 7 (points) left alone" in found.problems[0]


def test_labels_follow_the_annotations_and_nothing_else_changes() -> None:
    old = XML.encode()
    data, done = relabel.relabel(cvat.parsed(old), seven_of_xml(), palette.DEFAULT)
    new = cvat.parsed(data)
    assert [shape.label for shape in new.shapes] == [
        "Specific granules", "Non-specific primary granules", "Empty vesicles", "Vacuoles", "Emptying vesicles",
        "nucleus",
    ]  # fmt: skip
    assert done.matched == 5 and not done.shapes_without and len(done.annotations_without) == 1
    assert "1 shapes of nucleus were left alone" in done.notes
    # byte for byte, by another way: what is left when the changed labels are cut out
    cut = re.compile(rb"<labels>.*</labels>|(?<=\slabel=\")[^\"]*|(?<=\slabel = ')[^']*", re.DOTALL)
    assert [part for part in cut.split(old)] == [part for part in cut.split(data)]
    meta = data[data.index(b"<labels>") : data.index(b"</labels>")].decode()
    names = re.findall("<name>(.*?)</name>", meta)
    assert names == [*CLASSES[:2], "Empty vesicles", "Vacuoles", "Emptying vesicles", "nucleus"]
    assert "#0072b2" in meta and meta.count("<attributes/>") == 2 and "#ff0000" not in meta


def test_a_shape_without_a_partner_is_marked_and_never_reads_as_a_class_of_seven() -> None:
    seven = seven_of_xml()
    rest = {**seven.document, "annotations": seven.document["annotations"][:2]}
    data, done = relabel.relabel(cvat.parsed(XML.encode()), coco.checked(rest), palette.DEFAULT)
    assert done.after == {
        "Emptying vesicles": 1, "Empty vesicles (undecided)": 2, "Non-specific primary granules": 1,
        "Specific granules": 1,
    }  # fmt: skip
    assert len(done.shapes_without) == 3 and "polygon Empty vesicles at (300.0, 300.0)" in done.shapes_without[1]
    assert b"<name>Empty vesicles (undecided)</name>" in data


def test_a_shape_is_not_matched_across_images_or_parents() -> None:
    seven = seven_of_xml()
    moved = copy.deepcopy(seven.document)
    moved["images"] = [{**moved["images"][0], "file_name": "empty&.tif"}]
    _, done = relabel.relabel(cvat.parsed(XML.encode()), coco.checked(moved), palette.DEFAULT)
    assert done.matched == 0 and len(done.annotations_without) == 6 and len(done.shapes_without) == 5
    swapped = copy.deepcopy(seven.document)
    for annotation in swapped["annotations"]:
        annotation["category_id"] = class_id("Vacuoles")
    _, done = relabel.relabel(cvat.parsed(XML.encode()), coco.checked(swapped), palette.DEFAULT)
    assert done.matched == 2  # the two empty structures


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 12))
def test_matching_is_greedy_one_to_one_and_knows_no_order(seed: int, a: int, b: int) -> None:
    rng = np.random.default_rng(seed)
    a_A4, b_B4 = (np.c_[rng.integers(0, 12, (n, 2)), rng.integers(4, 12, (n, 2))].astype(float) for n in (a, b))
    kind_A, kind_B = rng.integers(0, 2, a), rng.integers(0, 2, b)
    pairs = relabel.match(a_A4, b_B4, kind_A, kind_B, 0.3)
    assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == len(pairs)
    overlap = coco_mask.iou(a_A4, b_B4, [0] * b) if b else np.zeros((a, 0))
    assert np.allclose(relabel.iou(a_A4, b_B4), overlap)
    taken = {int(i): overlap[i, j] for i, j in pairs}, {int(j): overlap[i, j] for i, j in pairs}
    for i in range(a):
        for j in range(b):
            if kind_A[i] == kind_B[j] and overlap[i, j] >= 0.3:  # a pair is left only for one as good
                assert max(taken[0].get(i, 0), taken[1].get(j, 0)) >= overlap[i, j] - 1e-12
    mix_A, mix_B = rng.permutation(a), rng.permutation(b)
    again = relabel.match(a_A4[mix_A], b_B4[mix_B], kind_A[mix_A], kind_B[mix_B], 0.3)
    boxes = [sorted((a_[i].tolist(), b_[j].tolist()) for i, j in p)
             for a_, b_, p in ((a_A4, b_B4, pairs), (a_A4[mix_A], b_B4[mix_B], again))]  # fmt: skip
    assert boxes[0] == boxes[1]


@settings(max_examples=100, deadline=None)
@given(st.floats(0.5, 80), st.floats(0.5, 80), st.floats(-400, 400))
def test_the_box_of_a_turned_ellipse(rx: float, ry: float, degrees: float) -> None:
    w, h = shapes.ellipse_extent(rx, ry, degrees)
    t = math.radians(degrees)
    assert w == pytest.approx(2 * math.sqrt(rx**2 * math.cos(t) ** 2 + ry**2 * math.sin(t) ** 2))
    a = np.linspace(0, 2 * np.pi, 20_001)
    x = rx * np.cos(a) * math.cos(t) - ry * np.sin(a) * math.sin(t)
    y = rx * np.cos(a) * math.sin(t) + ry * np.sin(a) * math.cos(t)
    assert (np.ptp(x), np.ptp(y)) == pytest.approx((w, h), rel=1e-5)
    assert (w + h) / 2 >= (rx + ry) * (1 - 1e-12)


def test_diameters_of_ellipses() -> None:
    old = document((P, 0, 1, 1), (P, 0, 1, 1))
    for annotation, box in zip(old["annotations"], ([40, 40, 20, 20], [140, 120, 20, 60]), strict=True):
        annotation["bbox"] = box
    assert relabel.ellipse_diameters(cvat.parsed(XML.encode()), coco.checked(old)).tolist() == [20, 40]
    old["annotations"].append({**old["annotations"][0], "id": 1, "bbox": [600, 600, 20, 20]})
    with pytest.raises(DataError, match=r"1 annotations have no ellipse .*at \(600"):
        relabel.ellipse_diameters(cvat.parsed(XML.encode()), coco.checked(old))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotations><image name="&b;"/></annotations>', "document type or entities"),
        (b"<annotations><image name='a'>", "malformed"),
        (b"<annotation/>", "not the <annotations>"),
        (b"<annotations><track/></annotations>", "CVAT for video"),
        (b"<annotations/>", "lists no image"),
        (b"<annotations><image name='../a'/></annotations>", "leads out"),
        (b"<annotations><image name='a'/><image name='a'/></annotations>", "same image twice"),
        (b"<?xml version='1.0' encoding='latin-1'?><annotations/>", "says that it is latin-1"),
        ("<annotations/>".encode("utf-16"), "not UTF-8"),
        (b"\x00", "malformed"),
    ],
)
def test_hostile_cvat(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        cvat.parsed(data)


@pytest.mark.parametrize(
    "shape",
    ['<ellipse label="a" cx="1" cy="1" rx="0" ry="2"/>', '<ellipse label="a" cx="nan" cy="1" rx="1" ry="2"/>',
     '<box label="a" xtl="5" ytl="1" xbr="1" ybr="2"/>', '<polygon label="a" points="1,1;2,2"/>', "<box/>",
     '<mask label="a" rle="1,x" left="0" top="0" width="1" height="1"/>',
     '<ellipse label="a" cx="1e9" cy="1" rx="1" ry="2"/>',
     '<mask label="a" rle="0,1000000000000" left="0" top="0" width="1000000" height="1000000"/>',
     '<mask label="a" rle="0,1" left="0.5" top="0" width="1" height="1"/>',
     '<mask label="a" rle="5" left="0" top="0" width="1e999" height="1"/>'],
)  # fmt: skip
def test_shapes_without_extent_are_listed(shape: str) -> None:
    found = cvat.parsed(f"<annotations><image name='a'>{shape}</image></annotations>".encode())
    assert not found.shapes and len(found.problems) == 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_in_words_or_keeps_all_but_labels(data: st.DataObject) -> None:
    broken = bytearray(XML.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        byte = data.draw(st.sampled_from(b"\x00<>\"'&/= 0a-.,;\xff"))
        if data.draw(st.booleans()):
            broken[at] = byte
        else:
            del broken[at : at + data.draw(st.integers(1, 40))]
    try:
        found = cvat.parsed(bytes(broken))
        made, _ = relabel.relabel(found, seven_of_xml(), palette.DEFAULT)
        cvat.parsed(made)
    except (DataError, UsageError) as error:
        assert "\n" not in str(error)


# --- masks ------------------------------------------------------------------------------------------------------------


def drawn(*outlines: masks.Outline, size: tuple[int, int] = (64, 48)) -> masks.Drawable:
    return masks.Drawable("a.tif", size, outlines)


def decoded(runs: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pycocotools, about numpy 2
        return coco_mask.decode(runs)


def ellipse(id: int, cx: float, cy: float, rx: float, ry: float, degrees: float = 0) -> masks.Outline:
    w, h = shapes.ellipse_extent(rx, ry, degrees)
    return masks.Outline(id, (cx - w / 2, cy - h / 2, w, h), math.pi * rx * ry, ellipse=(cx, cy, rx, ry, degrees))


def test_small_objects_lie_on_large_ones_whatever_the_order() -> None:
    small, large = ellipse(1, 20, 20, 4, 4), ellipse(7, 22, 20, 12, 12)
    for order in ((small, large), (large, small)):
        mask_HW, hidden = masks.paint(drawn(*order))
        assert mask_HW[20, 20] == 1 and mask_HW[20, 28] == 7 and mask_HW[0, 0] == 0 and not hidden
    assert 1 <= masks.paint(drawn(small))[0].sum() == pytest.approx(math.pi * 16, rel=0.1)


def test_a_turned_ellipse_covers_the_pixels_that_its_angle_says() -> None:
    mask_HW = masks.paint(drawn(ellipse(3, 32, 24, 20, 3, 45)))[0]  # clockwise: to the lower right, as CVAT draws it
    assert mask_HW[34, 42] == 3 and mask_HW[14, 22] == 3 and mask_HW[14, 42] == 0
    assert mask_HW.astype(bool).sum() == pytest.approx(math.pi * 60, rel=0.05)


def test_objects_without_a_pixel_are_listed() -> None:
    outlines = (ellipse(5, 20, 20, 9, 9), ellipse(6, 30.0, 30.0, 0.2, 0.2), ellipse(4, 500, 500, 9, 9))
    item = drawn(*outlines)
    _, hidden = masks.paint(item)
    line = masks.without_pixels(item, hidden)
    assert line is not None and "1 Emptying vesicles, 1 Non-specific secondary granules" in line


def filled(corner_K2: np.ndarray, x0: int, y0: int, width: int, height: int) -> np.ndarray:
    return masks._patch(masks._polygon(1, (corner_K2,)), x0, y0, width, height)


def test_polygons_against_two_other_rasterisers() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
        corner_K2 = np.c_[30 + 20 * rng.uniform(0.3, 1) * np.cos(angle), 24 + 18 * np.sin(angle)]
        ours = filled(corner_K2, 0, 0, 64, 48)
        runs = coco_mask.frPyObjects([corner_K2.reshape(-1).tolist()], 48, 64)
        theirs = decoded(runs)[..., 0].astype(bool)
        image = Image.new("1", (64, 48))
        ImageDraw.Draw(image).polygon([tuple(p) for p in (corner_K2 - 0.5).tolist()], fill=1)
        border = np.hypot(*(corner_K2 - np.roll(corner_K2, 1, 0)).T).sum()
        for other in (theirs, np.asarray(image)):
            assert (ours != other).sum() <= border  # on the edge rules differ by up to a pixel
    square = np.array([[2.0, 3], [7, 3], [7, 9], [2, 9]])
    assert filled(square, 0, 0, 64, 48).sum() == 30
    assert np.array_equal(filled(square, 3, 4, 20, 20), filled(square, 0, 0, 64, 48)[4:24, 3:23])


def test_masks_of_coco_by_box_polygon_and_run_lengths() -> None:
    seven = seven_of_xml()
    pixels = np.zeros((800, 1000), np.uint8, order="F")
    pixels[405:410, 420:450] = 1
    packed = coco_mask.encode(pixels)
    annotations = copy.deepcopy(seven.document["annotations"][:4])
    annotations[1]["segmentation"] = [
        [100, 100, 110, 100, 110, 120, 100, 120],
        [200, 100, 204, 100, 204, 104, 200, 104],
    ]
    annotations[2]["segmentation"] = {"size": [800, 1000], "counts": packed["counts"].decode()}
    flat = pixels.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(np.r_[0, flat])).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    annotations[3]["segmentation"] = {"size": [800, 1000], "counts": counts}
    item = masks.from_coco(coco.checked({**seven.document, "annotations": annotations}))[0]
    mask_HW, hidden = masks.paint(item)
    assert np.bincount(mask_HW.reshape(-1)).tolist() == [800 * 1000 - 400 - 216 - 150, 400, 216, 0, 0, 0, 0, 150]
    assert len(hidden) == 1  # two objects of the same pixels
    plain = masks.from_coco(coco.checked({**seven.document, "annotations": annotations}), boxes_only=True)[0]
    assert plain.ids == item.ids and [outline.area_px for outline in plain.outlines] == [400, 1200, 800, 1600]
    for broken in ({"size": [9, 9], "counts": [3]}, {"size": [9], "counts": "a"},
                   {"size": [1 << 20] * 2, "counts": [1]}, {"size": [9, 9], "counts": None},
                   [[1, 2, 3]], [["a"]], [[1, 2]], 5):  # fmt: skip
        annotations[3]["segmentation"] = broken
        with pytest.raises(DataError):
            masks.from_coco(coco.checked({**seven.document, "annotations": annotations}))


def test_masks_of_cvat_and_coco_agree_on_what_both_can_say() -> None:
    data, _ = relabel.relabel(cvat.parsed(XML.encode()), seven_of_xml(), palette.DEFAULT)
    with pytest.raises(DataError, match="nucleus: not one of the seven"):
        masks.from_cvat(cvat.parsed(data))
    data = data.replace(b'<ellipse label="nucleus" cx="500" cy="500" rx="100" ry="100"/>', b"")
    items = masks.from_cvat(cvat.parsed(data))
    mask_HW = masks.paint(items[0])[0]
    assert mask_HW[150, 150] == 2 and mask_HW[220, 195] == 5 and mask_HW[320, 320] == 7 and mask_HW[401, 401] == 6
    assert (mask_HW == 6).sum() == 0 + (mask_HW[400:402, 400:402] == 6).sum()
    assert masks.paint(items[1])[0].max() == 0


def test_a_mask_is_a_palette_png_of_the_palettes_colours() -> None:
    mask_HW = masks.paint(drawn(ellipse(5, 20, 20, 9, 9), ellipse(8, 40, 20, 5, 5)))[0]
    data = masks.encoded(mask_HW, palette.DEFAULT)
    assert data == masks.encoded(mask_HW, palette.DEFAULT)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), mask_HW)
        colours = {rgb for _, rgb in image.convert("RGB").getcolors()}
    assert colours == {(0, 0, 0), palette.DEFAULT.colours[4], palette.DEFAULT.undecided}
    assert np.array_equal(verify.read_ids(data, palette.DEFAULT), mask_HW)
    plain = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(plain, "PNG")
    assert np.array_equal(verify.read_ids(plain.getvalue(), palette.DEFAULT), mask_HW)


def test_a_labelmap_reads_back_and_broken_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labelmap.txt"
    path.write_bytes(palette.DEFAULT.labelmap())
    assert palette.read(path) == palette.DEFAULT
    text = path.read_text()
    for old, new, why in (
        ("0,114,178", "0,0,0", "have the colour"),
        ("0,114,178", "213,94,0", "have the colour"),
        ("0,114,178", "0,114,999", "0 to 255"),
        ("0,114,178", "0,114", "not name:r,g,b"),
        ("background:0,0,0", "background:1,0,0", "masks have 0,0,0"),
        ("Vacuoles", "Lysosomes", "no colour for Vacuoles"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=why):
            palette.read(path)


def test_images_that_would_share_a_mask_are_refused() -> None:
    assert masks.mask_names(["a/b.tif", "b.tif"]) == ["a/b.png", "b.png"]
    with pytest.raises(DataError, match=r"share one mask: a\.tif, a\.png"):
        masks.mask_names(["a.tif", "a.png", "b.png"])


# --- verification -----------------------------------------------------------------------------------------------------


def test_differences_between_masks_and_labels() -> None:
    item = drawn(ellipse(5, 20, 20, 9, 9), ellipse(1, 40, 20, 5, 5))
    mask_HW, _ = masks.paint(item)
    assert verify.differences(item, mask_HW) == []
    wrong_HW = mask_HW.copy()
    wrong_HW[mask_HW == 1] = 7
    wrong_HW[0, :3] = verify.UNKNOWN
    assert verify.differences(item, wrong_HW) == [
        "a.tif: 3 pixels have no colour of the palette",
        "a.tif: Vacuoles is in the mask, but not in the labels",
        "a.tif: Specific granules is in the labels, but not in the mask",
    ]


def test_an_overlay_leaves_the_background_alone_and_draws_edges() -> None:
    mask_HW = masks.paint(drawn(ellipse(5, 20, 20, 9, 9)))[0]
    picture_HWC = np.full((48, 64, 3), 100, np.uint8)
    shown = np.asarray(verify.overlay(picture_HWC, mask_HW, palette.DEFAULT, {5: 1}))
    assert shown.shape[0] > 48 and (shown[:48][mask_HW == 0] == 100).all() and (picture_HWC == 100).all()
    assert tuple(shown[20, 11]) == palette.DEFAULT.colours[4]
    assert shown[20, 20].tolist() == np.rint(0.78 * 100 + 0.22 * np.array(palette.DEFAULT.colours[4])).tolist()


# --- files and the command line ---------------------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x"
    naming.write_new(path, b"1")
    naming.write_new(path, b"1")
    with pytest.raises(WriteError, match="other content"):
        naming.write_new(path, b"2")
    with pytest.raises(UsageError, match="read here"):
        naming.write_new(tmp_path / "a" / ".." / "a" / "x", b"1", [path])
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="read here"):
        naming.write_new(tmp_path / "link", b"3", [path])
    assert path.read_bytes() == b"1"


def made_folder(tmp_path: Path) -> Path:
    """Inputs of all six steps: two images, the shapes of `XML` without the nucleus, a scale for one image."""
    root = tmp_path / "in"
    (root / "images").mkdir(parents=True)
    old = document((P, 0, 1, 1), (P, 0, 1, 1), (E, 0, 1, 1), (E, 0, 1, 1), (G, 0, 1, 1), images=2)
    boxes = [[40, 40, 20, 20], [140, 120, 20, 60], [190, 210, 40, 20], [300, 300, 40, 40], [400, 400, 2, 2]]
    for annotation, box in zip(old["annotations"], boxes, strict=True):
        annotation["bbox"] = box
    old["images"][1]["file_name"] = "empty&.tif"
    (root / "four.json").write_text(json.dumps(old))
    (root / "four.xml").write_text(re.sub(r'<ellipse label="nucleus".*?/>|<points.*?/>', "", XML))
    (root / "scale.csv").write_text("image_name,Pixles per microm\nN0.tif,20\n")
    for name in ("N0.tif", "empty&.tif"):
        Image.new("L", (1000, 800), 120).save(root / "images" / name)
    return root


def spoken(words: list[str]) -> str:
    out = io.StringIO()
    _neutrostruct.run(words, Console(file=out, width=200, soft_wrap=True))
    return out.getvalue()


def test_all_six_steps(tmp_path: Path) -> None:
    root, out = made_folder(tmp_path), tmp_path / "out"
    words = ["all", str(root / "four.json"), "--scales", str(root / "scale.csv"), "--cvat", str(root / "four.xml"),
             "--images", str(root / "images"), "--average", "pooled_mean", "--out", str(out)]  # fmt: skip
    said = spoken(words)
    assert "5 shapes matched; 0 shapes and 0 annotations found no partner" in said
    assert "1 images have no scale, so no micrometres: empty&.tif" in said and "0 differences" in said
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == [
        "annotations_7classes.json", "annotations_7classes.xml", "masks/N0.png", "masks/empty&.png",
        "masks/labelmap.txt",
        "overlays/N0.jpg", "overlays/empty&.jpg", "report.json", "scales.xlsx", "statistics.xlsx",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["convert"]["after"]["Vacuoles"] == 1 and report["verify"]["differences"] == []
    table = tables.read(out / "statistics.xlsx")
    assert dict(zip(table.header, table.rows[0], strict=True))["average_diameter_SG_PG"] == "1.5"  # 30 px of 20 px/um
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert spoken(words) == said  # again: the same bytes, so nothing to write
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(WriteError, match=r"statistics\.xlsx is there already"):
        spoken([word if word != "pooled_mean" else "average.csv" for word in words] + _average(tmp_path))


def _average(tmp_path: Path) -> list[str]:
    path = tmp_path / "average.csv"
    path.write_text("image_name,average_diameter_px\nN0.tif,500\n")
    return ["--average", str(path)]


def test_the_steps_one_by_one_give_the_same(tmp_path: Path) -> None:
    root, out, one = made_folder(tmp_path), tmp_path / "out", tmp_path / "one"
    four, xml = str(root / "four.json"), str(root / "four.xml")
    spoken(["all", four, "--cvat", xml, "--images", str(root / "images"), "--average", "pooled_mean", "--out", str(out),
            "--tables", "csv"])  # fmt: skip
    assert json.loads((out / "report.json").read_text())["scale"]["left_out"].startswith("no table")
    assert "as pixels per micrometre" in spoken(["scale", str(root / "scale.csv"), "--out", str(one / "scale.csv")])
    spoken(["statistics", four, "--average", "pooled_mean", "--out", str(one / "statistics.csv")])
    spoken(["convert", four, "--average", "pooled_mean", "--out", str(one / "7.json")])
    spoken(["cvat", xml, "--coco", str(one / "7.json"), "--out", str(one / "7.xml")])
    spoken(["masks", str(one / "7.xml"), "--out", str(one / "masks")])
    spoken(["verify", str(one / "masks"), "--labels", str(one / "7.json"), "--images", str(root / "images"),
            "--out", str(one / "overlays")])  # fmt: skip
    for mine, theirs in (("7.json", "annotations_7classes.json"), ("7.xml", "annotations_7classes.xml"),
                         ("statistics.csv",) * 2, ("masks/N0.png",) * 2, ("overlays/N0.jpg",) * 2):  # fmt: skip
        assert (one / mine).read_bytes() == (out / theirs).read_bytes()
    # the statistics file is a table of averages too
    column = "average_diameter_pooled_mean_px"
    spoken(["convert", four, "--average", str(one / "statistics.csv"), "--average-column", column, "--out",
            str(one / "7.json")])  # fmt: skip


def test_verify_refuses_and_finds(tmp_path: Path) -> None:
    root, out = made_folder(tmp_path), tmp_path / "out"
    spoken(["convert", str(root / "four.json"), "--average", "pooled_mean", "--out", str(out / "7.json")])
    spoken(["masks", str(out / "7.json"), "--out", str(out / "masks")])
    words = ["verify", str(out / "masks"), "--labels", str(out / "7.json"), "--images", str(root / "images"), "--out"]
    with Image.open(out / "masks" / "N0.png") as mask:
        pixels = np.array(mask)
    pixels[pixels == 7] = 5
    (out / "masks" / "N0.png").write_bytes(masks.encoded(pixels, palette.DEFAULT))
    with pytest.raises(
        DataError, match=r"differ in 1 ways, first: N0\.tif: Vacuoles is in the labels, but not in the mask"
    ):
        spoken([*words, str(out / "overlays")])
    Image.new("P", (999, 800)).save(out / "masks" / "N0.png")
    with pytest.raises(DataError, match=r"999 x 800 px, the labels say 1000 x 800"):
        spoken([*words, str(out / "b")])
    (out / "masks" / "N0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images have no mask .*N0\.tif"):
        spoken([*words, str(out / "b")])
    (root / "images" / "N0.tif").unlink()
    (out / "masks" / "N0.png").write_bytes(masks.encoded(pixels, palette.DEFAULT))
    with pytest.raises(DataError, match=r"1 of 2 images are not in .*N0\.tif"):
        spoken([*words, str(out / "b")])
    assert not (out / "b").exists()


def test_the_choices_that_nobody_may_guess(tmp_path: Path) -> None:
    root = made_folder(tmp_path)
    four = str(root / "four.json")
    with pytest.raises(UsageError, match="average"):
        spoken(["convert", four, "--out", str(tmp_path / "a.json")])
    with pytest.raises(UsageError, match="there is no file mean"):
        spoken(["convert", four, "--average", "mean", "--out", str(tmp_path / "a.json")])
    with pytest.raises(UsageError, match="read here"):
        spoken(["convert", four, "--average", "pooled_mean", "--out", four])
    with pytest.raises(UsageError, match="name it too"):
        spoken(
            ["convert", four, "--average", "pooled_mean", "--diameter", "ellipse", "--out", str(tmp_path / "a.json")]
        )
    with pytest.raises(UsageError, match=r"no step 'convrt' .*'convert'"):
        spoken(["convrt"])
    with pytest.raises(UsageError, match=r"--avrage.*--average"):
        spoken(["convert", four, "--avrage", "x"])
    with pytest.raises(UsageError, match="write NAME=primary"):
        spoken(["convert", four, "--average", "pooled_mean", "--alias", "x", "--out", str(tmp_path / "a.json")])
    assert "scale" in spoken(["--help"])
    assert (tmp_path / "a.json").exists() is False


def test_ellipses_may_give_other_classes_than_boxes(tmp_path: Path) -> None:
    """Half axes 30 and 10: 40 px by the ellipse, and (42.4 + 42.4) / 2 by the box when it is turned by 45 degrees."""
    root = made_folder(tmp_path)
    side = 2 * math.sqrt(500)
    text = XML.replace('rotation="90.0"', 'rotation="45"').replace('rx="10" ry="10"', 'rx="21" ry="21"')
    (root / "four.xml").write_text(re.sub(r'<ellipse label="nucleus".*?/>|<points.*?/>', "", text))
    old = json.loads((root / "four.json").read_text())
    old["annotations"] = old["annotations"][:2]
    old["annotations"][0]["bbox"] = [29, 29, 42, 42]
    old["annotations"][1]["bbox"] = [150 - side / 2, 150 - side / 2, side, side]
    (root / "four.json").write_text(json.dumps(old))
    found = {}
    for how in ("bbox", "ellipse"):
        words = ["convert", str(root / "four.json"), "--average", "pooled_mean", "--cvat", str(root / "four.xml")]
        spoken([*words, "--diameter", how, "--out", str(tmp_path / f"{how}.json")])
        found[how] = named_classes(json.loads((tmp_path / f"{how}.json").read_text()))[:2]
    assert found["bbox"] == ["Specific granules", "Non-specific primary granules"]
    assert found["ellipse"] == ["Non-specific primary granules", "Specific granules"]


def test_broken_annotations_are_counted_on_the_command_line(tmp_path: Path) -> None:
    root = made_folder(tmp_path)
    old = json.loads((root / "four.json").read_text())
    old["annotations"].append({**old["annotations"][0], "id": 5, "bbox": [0, 0, 0, 0]})
    (root / "four.json").write_text(json.dumps(old))
    words = ["convert", str(root / "four.json"), "--average", "class_means", "--out", str(tmp_path / "7.json")]
    with pytest.raises(DataError, match="1 annotations cannot be used"):
        spoken(words)
    with pytest.raises(DataError, match="no average diameter"):  # there is no secondary granule
        spoken([*words, "--reject"])
    said = spoken([*words, "--reject", "--undecided", "keep"])
    assert (
        "5 annotations in 2 images" in said and "annotation 6: its bbox has no size" in said and "2 undecided" in said
    )


def test_steps_refuse_labels_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"COCO \(\.json\) or CVAT"):
        steps.drawables(tmp_path / "a.txt")
