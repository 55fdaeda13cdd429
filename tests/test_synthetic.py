"""The drawn fields: the same bytes everywhere, boxes that fit, classes that differ by shape and not by colour."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from defusedxml import ElementTree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data import sediment, synthetic
from ssl_pretrain.data.pen import Pen
from ssl_pretrain.errors import WriteError


def digest(drawn: synthetic.Field) -> str:
    whole = drawn.pixels_HWC.tobytes() + drawn.boxes_N4.tobytes() + "|".join(drawn.labels).encode()
    return hashlib.sha256(whole).hexdigest()


@pytest.fixture(scope="module")
def sixty():
    return [synthetic.field(0, index) for index in range(60)]


def overlap_free(drawn: synthetic.Field) -> list[int]:
    """The objects whose box, with a rim of 6 px, touches no other box and not the border of the field."""
    boxes, (height, width) = drawn.boxes_N4, drawn.pixels_HWC.shape[:2]
    low, high = boxes[:, :2] - 6, boxes[:, 2:] + 6
    meet = (low[:, None] < boxes[None, :, 2:]).all(-1) & (boxes[None, :, :2] < high[:, None]).all(-1)
    inner = (low >= 0).all(1) & (high <= (width, height)).all(1)
    return np.flatnonzero((meet.sum(1) == 1) & inner).tolist()


# ---- the same bytes ---------------------------------------------------------------------------------------------


def test_a_field_alone_is_the_field_of_the_series(sixty):
    code = (
        "import sys; from ssl_pretrain.data import synthetic as s; f = s.field(0, 17); "
        "sys.stdout.buffer.write(f.pixels_HWC.tobytes() + f.boxes_N4.tobytes() + '|'.join(f.labels).encode()); "
        "assert 'torch' not in sys.modules and 'kornia' not in sys.modules and 'scipy' not in sys.modules"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert hashlib.sha256(alone).hexdigest() == digest(sixty[17])


def test_the_bytes_do_not_depend_on_the_vector_unit(sixty):
    features = pytest.importorskip("numpy._core._multiarray_umath")
    have = [name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]]
    if not have:
        pytest.skip("numpy dispatches to nothing beyond its baseline here")
    code = "import hashlib; from ssl_pretrain.data import synthetic as s; "
    code += "print(*(hashlib.sha256(s.field(0, i).pixels_HWC.tobytes()).hexdigest() for i in range(8)))"
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(have)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=plain).stdout
    assert out.split() == [hashlib.sha256(drawn.pixels_HWC.tobytes()).hexdigest() for drawn in sixty[:8]]


def test_the_bytes_are_those_of_this_version(sixty):
    # A change here is a new data set: raise synthetic.VERSION with it.
    assert (synthetic.VERSION, digest(sixty[0])[:16], digest(sixty[1])[:16]) == (
        1,
        "e61172316231363e",
        "44a901fdbb7103a6",
    )


def test_other_seeds_and_indices_are_other_fields(sixty):
    others = [synthetic.field(seed, index) for seed in (1, 2**40) for index in (0, 1)]
    assert len({digest(drawn) for drawn in [*sixty, *others]}) == 64


@pytest.mark.parametrize("name", synthetic.CLASSES)
def test_a_drawing_is_float32_and_ends_inside_its_patch(name):
    for index in range(25):
        body = sediment.KINDS[name].draw(Pen((4, index)))
        for plane in (body.thickness_HW, body.absorption_HW, body.cover_HW):
            assert plane.dtype == np.float32
            rim = plane.copy()
            rim[2:-2, 2:-2] = 0
            assert np.abs(rim).max() < 0.02
        assert np.count_nonzero(body.cover_HW > 0.5) >= 8


# ---- boxes and classes ------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(width=st.integers(64, 900), height=st.integers(64, 700), seed=st.integers(0, 2**63), index=st.integers(0, 10**6))
def test_every_size_gives_boxes_inside_the_field(width, height, seed, index):
    drawn = synthetic.field(seed, index, (width, height))
    assert drawn.pixels_HWC.shape == (height, width, 3) and drawn.pixels_HWC.dtype == np.uint8
    x0, y0, x1, y1 = drawn.boxes_N4.T
    assert len(drawn.labels) == len(drawn.boxes_N4) >= 1 and set(drawn.labels) <= set(synthetic.CLASSES)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
    assert (x1 > x0).all() and (y1 > y0).all()


@pytest.mark.parametrize("wrong", [(-1, 0, (64, 64)), (0, -1, (64, 64)), (0, 0, (64, 31))])
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="32 px or more"):
        synthetic.field(*wrong)


def test_boxes_hold_the_object_and_are_tight(sixty):
    inside, outside, filled = [], [], []
    for drawn in sixty:
        grey = drawn.pixels_HWC.astype(float).mean(2)
        for number in overlap_free(drawn):
            x0, y0, x1, y1 = drawn.boxes_N4[number].astype(int)
            patch = grey[y0 - 6 : y1 + 6, x0 - 6 : x1 + 6]
            ring = np.ones(patch.shape, dtype=bool)
            ring[3:-3, 3:-3] = False
            noise = patch[ring].std() + 1
            far = np.abs(patch - np.median(patch[ring])) / noise
            inside.append(np.percentile(far[6:-6, 6:-6], 90))
            outside.append(np.percentile(far[ring], 90))
            seen = far[6:-6, 6:-6] > 2
            filled.append(min(np.mean(seen.any(0)), np.mean(seen.any(1))))
    assert len(inside) > 400
    assert np.median(inside) > 3 * np.median(outside)
    # Nearly every row and every column of a box shows something of its object.
    assert np.median(filled) > 0.9 and np.percentile(filled, 5) > 0.4


def test_every_class_is_common_enough_and_frequencies_are_uneven(sixty):
    assert len(synthetic.CLASSES) >= 10
    # Measured over twelve other seeds: the rarest class of any has 35 in 60 fields.
    counts = Counter(label for drawn in sixty for label in drawn.labels)
    assert min(counts[name] for name in synthetic.CLASSES) >= 15
    assert counts.most_common(1)[0][0] == "red_cell" and max(counts.values()) > 8 * min(counts.values())


def balanced_accuracy(fields, features) -> float:
    """Nearest class mean, of standardised features, learnt on the train split and asked on the test split."""
    x = np.array([row for drawn in fields for row in features(drawn)])
    y = np.array([label for drawn in fields for label in drawn.labels])
    test = np.array([synthetic.is_test(i) for i, drawn in enumerate(fields) for _ in drawn.labels])
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    centres = np.array([x[(y == name) & ~test].mean(0) for name in synthetic.CLASSES])
    said = np.array(synthetic.CLASSES)[((x[test][:, None] - centres) ** 2).sum(-1).argmin(1)]
    return float(np.mean([np.mean(said[y[test] == name] == name) for name in synthetic.CLASSES]))


def colour(drawn: synthetic.Field, from_background: bool) -> list[np.ndarray]:
    background = np.median(drawn.pixels_HWC.reshape(-1, 3), axis=0) * from_background
    boxes = drawn.boxes_N4.astype(int)
    return [drawn.pixels_HWC[y0:y1, x0:x1].reshape(-1, 3).mean(0) - background for x0, y0, x1, y1 in boxes]


def shape(drawn: synthetic.Field) -> list[np.ndarray]:
    """Grey, colour-free: the size and form of the box, how rough it is, and how its light spreads over it."""
    grey = drawn.pixels_HWC.astype(np.float32).mean(2)
    rows = []
    for x0, y0, x1, y1 in drawn.boxes_N4.astype(int):
        patch = grey[y0:y1, x0:x1] - np.median(grey[y0:y1, x0:x1])
        small = np.asarray(Image.fromarray(patch).resize((12, 12), Image.Resampling.BOX)) / (patch.std() + 1)
        around = [np.abs(small[k : 12 - k, k : 12 - k]).mean() for k in range(5)]
        wide, high = x1 - x0, y1 - y0
        rough = np.abs(np.diff(patch, axis=0)).mean() / (patch.std() + 1) if high > 1 else 0.0
        rows.append(np.array([np.log(wide * high), abs(np.log(wide / high)), rough, *around, small[5:7, 5:7].mean()]))
    return rows


def test_colour_alone_does_not_tell_the_classes_but_shape_does(sixty):
    # Chance is 1 / 14 = 0.07. Measured: colour 0.11, colour minus background 0.16, shape 0.57.
    assert balanced_accuracy(sixty, lambda drawn: colour(drawn, from_background=False)) < 0.2
    assert balanced_accuracy(sixty, lambda drawn: colour(drawn, from_background=True)) < 0.25
    assert balanced_accuracy(sixty, shape) > 0.4


# ---- the folder -------------------------------------------------------------------------------------------------


def test_the_folder_reads_as_pascal_voc(tmp_path):
    out = synthetic.write(tmp_path / "voc", 5, seed=3, size_px=(160, 120), first=10)
    names = [f"field_{index:05d}" for index in range(10, 15)]
    lists = {split: (out / f"ImageSets/Main/{split}.txt").read_text().split() for split in ("train", "test")}
    assert sorted(lists["train"] + lists["test"]) == names and lists["train"] and lists["test"]
    assert lists["test"] == [names[index - 10] for index in range(10, 15) if synthetic.is_test(index)]
    for index, name in zip(range(10, 15), names, strict=True):
        drawn = synthetic.field(3, index, (160, 120))
        root = ElementTree.parse(out / "Annotations" / f"{name}.xml").getroot()
        with Image.open(out / "JPEGImages" / root.findtext("filename")) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (int(root.findtext("size/height")), int(root.findtext("size/width")), 3) == (120, 160, 3)
        assert np.abs(pixels.astype(int) - drawn.pixels_HWC).mean() < 3
        assert tuple(item.findtext("name") for item in root.iter("object")) == drawn.labels
        boxes = [[int(box.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax")] for box in root.iter("bndbox")]
        assert np.array_equal(boxes, drawn.boxes_N4)


def test_seven_in_twenty_are_for_testing():
    assert sum(synthetic.is_test(index) for index in range(1000)) == 350


def test_writing_again_does_nothing_and_never_overwrites(tmp_path):
    out = synthetic.write(tmp_path / "voc", 2, size_px=(96, 64))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert synthetic.write(out, 2, size_px=(96, 64)) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(WriteError, match="not made with these arguments"):
        synthetic.write(out, 3, size_px=(96, 64))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert json.loads((out / "synthetic.json").read_text())["count"] == 2


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    class PulledPlug(Exception):
        pass

    def fail(drawn, file_name):
        raise PulledPlug

    with monkeypatch.context() as patch, pytest.raises(PulledPlug):
        patch.setattr(synthetic, "_annotation", fail)
        synthetic.write(tmp_path / "voc", 2, size_px=(96, 64))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "voc").mkdir()  # an empty folder is no obstacle
    twice = [synthetic.write(tmp_path / name, 2, size_px=(96, 64)) for name in ("voc", "again")]
    first, second = ([path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()] for out in twice)
    assert first == second and len(first) == 7


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="was not made"):
        synthetic.write(tmp_path / "file", 1, size_px=(64, 64))
    with pytest.raises(WriteError, match="cannot write"):
        synthetic.write(tmp_path / "file" / "below", 1, size_px=(64, 64))
