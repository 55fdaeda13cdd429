"""Does it help my detector: the same detector from several starts, judged on the same images."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from conftest import shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from ssl_pretrain import artefact, backbones
from ssl_pretrain.compare import MOST_SEEDS, Settings, data, detector, drawing, judging, running, starts
from ssl_pretrain.compare.data import Picture, batch, fraction_of, nested_order, turned
from ssl_pretrain.compare.detector import Detections, build
from ssl_pretrain.compare.judging import average_precision, judge, matched, resamples
from ssl_pretrain.data import readers, synthetic
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, NotProven, SslPretrainError, UsageError
from ssl_pretrain.probe import statistics

TINY = Settings(fractions=(0.3, 1.0), seeds=1, steps=3, short_side_px=64, channels=16, evaluations=2, rounds=20)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    return readers.read(synthetic.write(tmp_path_factory.mktemp("fields") / "s", 12, size_px=(160, 128)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    artefact.write(folder / "artefact", shaken("test_resnet"), {})
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def picture(
    labels: Sequence[int], unit: int = 0, boxes: Sequence[Sequence[float]] | None = None, size: int = 100
) -> Picture:
    truth = np.array(boxes if boxes is not None else [[10, 10, 40, 40]] * len(labels), np.float64).reshape(-1, 4)
    pixels = np.zeros((size, size, 3), np.uint8)
    return Picture(pixels, truth, np.array(labels, np.int64), (size, size), f"{unit:04d}", unit)


def saved(folder: Path, name: str, ink: int, size: tuple[int, int] = (48, 40)) -> Path:
    path = folder / f"{name}.png"
    Image.new("RGB", size, (ink, 2 * ink, 100)).save(path)
    return path


def labelled(
    folder: Path, rows: Sequence[tuple[str, int, str, str | None]], kind: Any = "box", boxes: Any = ((4, 4, 20, 24),)
) -> LabelledSet:
    """Rows are of name, colour, group and split."""
    images = tuple(
        LabelledImage(
            saved(folder, name, ink), (48, 40), np.array(boxes, np.float64), ("a",) * len(boxes), group, split
        )
        for name, ink, group, split in rows
    )
    return LabelledSet("voc", "some boxes", kind, ("a",), images, ())


# --- the labels -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=25),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.integers(0, 5),
)
def test_fractions_are_nested_and_keep_every_class_that_they_have_room_for(
    label_lists: list[list[int]], shares: tuple[float, float], seed: int
) -> None:
    pictures = [picture(labels, unit // 2) for unit, labels in enumerate(label_lists)]  # units of two images
    small, large = (fraction_of(pictures, share, seed) for share in sorted(shares))
    assert {id(p) for p in small} <= {id(p) for p in large}
    units = {p.unit for p in pictures}
    assert len({p.unit for p in small}) == max(1, round(min(shares) * len(units)))
    assert not {p.unit for p in small} & {p.unit for p in pictures if id(p) not in {id(q) for q in small}}, (
        "units split"
    )
    classes = set(np.concatenate([p.label_N for p in pictures]))
    if len({p.unit for p in small}) >= len(classes):
        assert set(np.concatenate([p.label_N for p in small])) == classes
    assert sorted(nested_order(pictures, seed)) == sorted(units)


def test_seeds_draw_other_fractions() -> None:
    pictures = [picture([1], unit) for unit in range(40)]
    assert len({tuple(p.unit for p in fraction_of(pictures, 0.2, seed)) for seed in range(4)}) == 4


def test_an_epoch_shows_every_image_once_and_all_ways_to_show_it_occur() -> None:
    shown = [s for step in range(30) for s in batch(12, step, 4, seed=1)]
    for epoch in range(10):
        assert sorted(s.index for s in shown[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert {(s.turns, s.flip) for s in shown} == {(turns, flip) for turns in range(4) for flip in (False, True)}
    assert len({s.turns % 2 for s in shown[:4]}) == 1, "a batch has one orientation"
    assert shown[:4] == batch(12, 0, 4, seed=1) and shown[:4] != batch(12, 0, 4, seed=2)
    assert [s.index for s in batch(2, 0, 4, 0)].count(0) == 2, "fewer images than a batch has"


@given(st.integers(0, 3), st.booleans(), st.integers(0, 6), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_boxes_go_where_their_pixels_go(turns: int, flip: bool, x: int, y: int, width: int, height: int) -> None:
    pixels = np.zeros((8, 11, 3), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    moved, box = turned(pixels, np.array([[x, y, x + width, y + height]], np.float64), turns, flip)
    rows, columns = np.nonzero(moved[..., 0])
    assert box.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert len(rows) == width * height and moved.shape == ((8, 11, 3) if turns % 2 == 0 else (11, 8, 3))


def test_all_eight_ways_differ() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 5, 3), np.uint8)
    ways = {turned(pixels, np.zeros((0, 4)), t, f)[0].tobytes() for t in range(4) for f in (False, True)}
    assert len(ways) == 8


def test_no_group_and_no_bytes_stand_on_both_sides_of_the_data_sets_own_split(tmp_path: Path) -> None:
    rows = [("a", 1, "p1", "train"), ("b", 2, "p2", "train"), ("c", 3, "p3", "val"), ("d", 4, "p4", "test"),
            ("e", 5, "p2", "test"), ("f", 1, "p5", "test"), ("g", 7, "p6", None)]  # fmt: skip
    found = data.load(labelled(tmp_path, rows), 64, 80, 0)
    # a has the bytes of f, and b the group of e
    assert [p.digest for p in found.train] == [data_digest(tmp_path / "c.png")]
    assert len(found.test) == 3 and found.split == "the data set's own: train, val to train, test to test"
    assert "1 labelled images are in no split and are left out" in found.problems
    assert any("2 training images are copies of a test image, or of its group" in line for line in found.problems)


def data_digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_split_units_are_parted_by_key_and_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    rows = [(f"{i:02d}", i + 1, f"patient {i // 2}", None) for i in range(20)]
    renamed = [(f"other {20 - i}", ink, group, split) for i, (_, ink, group, split) in enumerate(rows)]
    one, two = (
        data.load(labelled(tmp_path / "x", rows), 64, 80, 3),
        data.load(labelled(tmp_path / "y", renamed[::-1]), 64, 80, 3),
    )
    assert {p.digest for p in one.train} == {p.digest for p in two.train} and one.fingerprint == two.fingerprint
    assert len(one.train) == 12 and len(one.test) == 8, "65 % of ten units, rounded to even"
    assert not {p.unit for p in one.train} & {p.unit for p in one.test}
    other = data.load(labelled(tmp_path / "x", rows), 64, 80, 4)
    assert {p.digest for p in other.train} != {p.digest for p in one.train} and other.fingerprint != one.fingerprint


def test_points_become_squares_inside_the_image_and_boxes_shrink_with_it(tmp_path: Path) -> None:
    rows = [(f"{i}", i + 1, str(i), None) for i in range(4)]
    found = data.load(labelled(tmp_path, rows, "point", [(4, 20, 4, 20), (99, 99, 99, 99)]), 20, 16, 0)
    assert found.train[0].truth_N4.tolist() == [[0, 12, 12, 28]], "clipped at the left; the other one is outside"
    assert found.train[0].pixels_HWC.shape == (20, 24, 3) and found.train[0].box_N4.tolist() == [[0, 6, 6, 14]]
    assert "4 objects have no area or lie outside their image" in found.problems
    assert found.median_side_px == pytest.approx((6 * 8) ** 0.5)


def test_what_a_detector_cannot_be_trained_on_is_refused_in_words(tmp_path: Path) -> None:
    rows = [("a", 1, "", "train"), ("b", 2, "", "test")]
    with pytest.raises(UsageError, match="compare cannot use image labels"):
        data.load(labelled(tmp_path, rows, "image"), 64, 80, 0)
    with pytest.raises(DataError, match="no object to train with"):
        data.load(labelled(tmp_path, rows, boxes=[(5, 5, 5, 9)]), 64, 80, 0)
    broken = labelled(tmp_path, [("a", 1, "", "train"), ("b", 2, "", "test"), ("c", 3, "", "test")])
    (tmp_path / "c.png").write_bytes(b"no image")
    assert any("1 labelled images cannot be used" in line for line in data.load(broken, 64, 80, 0).problems)


# --- the judge --------------------------------------------------------------------------------------------------------


def guesses(seed: int, images: int = 8, classes: int = 3, ties: bool = False) -> tuple[list[Picture], list[Detections]]:
    """Random objects, and detections that are near them or anywhere."""
    draw = np.random.default_rng(seed)
    test, found = [], []
    for unit in range(images):
        count = int(draw.integers(0, 6))
        corner = draw.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + draw.uniform(5, 40, (count, 2))], axis=1)
        labels = draw.integers(1, classes + 1, count)
        test.append(picture(labels.tolist(), unit, boxes.tolist()))
        near = boxes + draw.normal(0, 2, boxes.shape)
        far = draw.uniform(0, 50, (4, 2))
        box = np.concatenate([near, near + 1, np.concatenate([far, far + 20], axis=1)])
        label = np.concatenate([labels, labels, draw.integers(1, classes + 1, 4)])
        score = draw.uniform(0, 1, len(box))
        found.append(Detections(box, score.round(1) if ties else score, label))
    return test, found


def plainly(test: Sequence[Picture], found: Sequence[Detections], classes: int, images: Sequence[int]) -> np.ndarray:
    """COCOeval as its own demo calls it, on these images, one of which may be there several times."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = COCO(), []
    annotations = []
    for new, i in enumerate(images):
        for (x0, y0, x1, y1), label in zip(test[i].truth_N4, test[i].label_N, strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({"id": len(annotations) + 1, "image_id": new, "category_id": int(label), "bbox": box,
                                "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        for (x0, y0, x1, y1), label, score in zip(found[i].box_D4, found[i].label_D, found[i].score_D, strict=True):
            results.append({"image_id": new, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0],
                            "score": float(score)})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        rows, categories = [{"id": i} for i in range(len(images))], [{"id": c} for c in range(1, classes + 1)]
        truth.dataset = {"info": {}, "images": rows, "categories": categories, "annotations": annotations}
        truth.createIndex()
        evaluated = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    stats: np.ndarray = evaluated.stats
    return stats


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_pycocotools_called_plainly(seed: int, ties: bool) -> None:
    test, found = guesses(seed, ties=ties)
    expected = plainly(test, found, 3, range(len(test)))
    figures = judge(test, found, ["a", "b", "c"])
    assert [figures.map, figures.ap50, figures.ap75] == pytest.approx(expected[:3], abs=1e-12)
    assert 0.1 < figures.map < 0.9, "a case that says something"
    whole = average_precision(matched(test, found, 3), np.ones((1, len(test))))
    assert whole == pytest.approx([figures.map], abs=1e-12), "the bootstrap's point value"
    of_class = [value for value in figures.per_class.values() if value is not None]
    assert np.mean(of_class) == pytest.approx(figures.map, abs=1e-12)


def test_a_resample_scores_as_pycocotools_scores_the_images_that_it_draws() -> None:
    test, found = guesses(5, images=6)
    drawn = [[0, 0, 3, 3, 3, 5], [1, 2, 2, 4, 5, 5], [4, 4, 4, 4, 4, 4]]
    times = np.array([np.bincount(images, minlength=6) for images in drawn], np.float64)
    expected = [plainly(test, found, 3, images)[0] for images in drawn]
    assert average_precision(matched(test, found, 3), times) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_detector_has_1_and_a_blind_one_0() -> None:
    test = guesses(7)[0]
    perfect = [Detections(p.truth_N4, np.ones(len(p.label_N)), p.label_N) for p in test]
    blind = [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)) for _ in test]
    figures = judge(test, perfect, ["a", "b", "c", "never there"])
    assert (figures.map, figures.ap50, figures.ap75) == (1, 1, 1) and figures.per_class["never there"] is None
    assert judge(test, blind, ["a", "b", "c"]).map == 0
    times = resamples([p.unit for p in test], 50, 0)
    assert average_precision(matched(test, perfect, 4), times) == pytest.approx(np.ones(50))
    assert average_precision(matched(test, blind, 3), times).tolist() == [0] * 50


def test_resamples_draw_whole_units_as_many_as_there_are() -> None:
    times = resamples([5, 5, 7, 9, 9, 9], 400, 1)
    assert (times[:, 0] == times[:, 1]).all() and (times[:, 3] == times[:, 5]).all()
    assert (times[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert times[:, [0, 2, 3]].mean(axis=0) == pytest.approx([1, 1, 1], abs=0.15)
    assert (times[:30] == resamples([5, 5, 7, 9, 9, 9], 30, 1)).all() and len({tuple(row) for row in times}) > 5


def test_intervals_hold_both_uncertainties_by_hand() -> None:
    spread = np.tile(np.linspace(-0.1, 0.1, 201), (3, 1))
    images_only = judging.interval(np.full(3, 0.5), 0.5 + spread)
    assert [images_only.low, images_only.high] == pytest.approx([0.405, 0.595])
    both = judging.interval(np.array([0.4, 0.5, 0.6]), 0.5 + spread)
    # t(2) = 4.303, standard deviation 0.1: 4.303 * 0.1 / sqrt(3) = 0.2484; with 0.095: 0.2660
    assert [both.value, both.low, both.high] == pytest.approx([0.5, 0.5 - 0.2660, 0.5 + 0.2660], abs=1e-4)
    one = judging.interval(np.array([0.5]), 0.5 + spread[:1])
    assert [one.low, one.high] == pytest.approx([0.405, 0.595])


def test_students_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert len(judging.STUDENT_975) == MOST_SEEDS - 1
    assert judging.STUDENT_975 == pytest.approx([stats.t.ppf(0.975, n) for n in range(1, 10)], abs=6e-4)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.1, "not distinguishable"), (0, 0, "not distinguishable")],
)
def test_the_verdict_is_the_intervals(low: float, high: float, words: str) -> None:
    assert statistics.side(judging.Interval((low + high) / 2, low, high)) == words


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_before_the_first_step_the_body_holds_the_starts_weights_and_the_heads_are_the_same(
    kind: Any, trained: Path
) -> None:
    (mine, random), _ = starts.resolve(trained, ["random"], trained)
    one, far = build(mine, kind, 3, 30.0, 64, 16, seed=4)
    two, far_random = build(random, kind, 3, 30.0, 64, 16, seed=4)
    assert far < 1e-4 < 1e-2 < far_random
    held, expected = one.backbone.body.backbone.weights(), load_file(mine.folder / "model.safetensors")
    assert held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in expected)
    others = {name: weight for name, weight in one.state_dict().items() if not name.startswith("backbone.body.")}
    theirs = two.state_dict()
    assert others and all(torch.equal(weight, theirs[name]) for name, weight in others.items())
    moved = build(mine, kind, 3, 30.0, 64, 16, seed=5)[0].state_dict()
    assert any(not torch.equal(weight, moved[name]) for name, weight in others.items()), "another seed, other heads"
    modes = {m.training for m in one.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert one.training and modes == {True}, "BatchNorm learns, for all starts"


def test_weights_that_did_not_arrive_are_noticed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine, random), _ = starts.resolve(trained, ["random"], trained)
    real = detector.load
    monkeypatch.setattr(detector, "load", lambda folder, pretrained: real(folder, False))
    with pytest.raises(NotProven, match="does not hold the weights of"):
        build(mine, "fasterrcnn", 3, 30.0, 64, 16, seed=0)
    monkeypatch.setattr(detector, "load", lambda folder, pretrained: real(folder, True))
    with pytest.raises(NotProven, match="that should be random holds the weights"):
        build(random, "fasterrcnn", 3, 30.0, 64, 16, seed=0)


def test_global_randomness_is_left_alone_and_does_not_matter(trained: Path, fields: LabelledSet) -> None:
    labels = data.load(fields, 64, 80, 0)
    (mine, random), _ = starts.resolve(trained, ["random"], trained)
    losses = []
    for start in (mine, random, random):
        torch.manual_seed(len(losses))
        before = torch.random.get_rng_state()
        losses.append(three_steps(start, labels).loss)
        assert torch.equal(before, torch.random.get_rng_state())
    assert losses[1] == losses[2] != losses[0]


def three_steps(start: starts.Start, labels: data.Labels) -> detector.Trained:
    built, _ = build(start, "fasterrcnn", len(labels.classes), 10.0, 64, 16, seed=0)
    return detector.train(
        built, labels.train, labels.test, steps=3, batch_size=4, lr=1e-3, seed=0, device=CPU, evaluate_at=[],
        judge=lambda found: float(len(found)), progress=lambda step, loss: None,
    )  # fmt: skip


def test_detections_are_in_the_files_own_pixels(trained: Path) -> None:
    shrunk = Picture(np.zeros((64, 80, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64), (160, 256), "d", 0)

    class Seer(torch.nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            assert [tuple(image.shape) for image in images] == [(3, 64, 80)]
            one = torch.ones(1)
            return [{"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]), "scores": one, "labels": one.long()}]

    found = detector.detect(Seer(), [shrunk], 4, CPU)[0]
    assert found.box_D4.tolist() == [[20, 80, 60, 160]], "twice in x, four times in y"


def test_a_loss_that_is_not_finite_stops_in_words(
    trained: Path, fields: LabelledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = data.load(fields, 64, 80, 0)
    (mine, _), _ = starts.resolve(trained, ["random"], trained)
    monkeypatch.setattr(detector.FasterRCNN, "forward", lambda *_: {"loss": torch.tensor(float("nan"))})
    with pytest.raises(SslPretrainError, match="nan at step 0: give a smaller --lr"):
        three_steps(mine, labels)


# --- the starts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "net" / "artefact", backbones.create("resnet18", normalize=False), {})


def test_imagenet_weights_that_are_not_at_hand_are_said_in_one_line(offline: Path, resnet: Path) -> None:
    found, lines = starts.resolve(resnet, ["random", "imagenet"], offline)
    assert [start.name for start in found] == ["net", "random"]
    assert len(lines) == 1 and "ImageNet weights of resnet18 are not on this machine" in lines[0]
    with pytest.raises(UsageError, match="nothing to compare with: ImageNet weights"):
        starts.resolve(resnet, ["imagenet"], offline)


@pytest.mark.parametrize("where", ["hub", "torch"])
def test_imagenet_weights_are_taken_from_the_caches_with_their_own_normalisation(
    where: str, offline: Path, resnet: Path
) -> None:
    torch.manual_seed(3)
    network = timm.create_model("resnet18", num_classes=1000)
    card = timm.get_pretrained_cfg("resnet18")
    if where == "hub":
        folder = offline / "hub" / f"models--{card.hf_hub_id.replace('/', '--')}"
        (folder / "snapshots" / "1").mkdir(parents=True), (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1")
        save_file(network.state_dict(), folder / "snapshots" / "1" / "model.safetensors")
    else:
        (offline / "torch" / "checkpoints").mkdir(parents=True)
        torch.save(network.state_dict(), offline / "torch" / "checkpoints" / card.url.rpartition("/")[2])
    found, lines = starts.resolve(resnet, ["imagenet"], offline / "starts")
    assert [start.name for start in found] == ["net", "imagenet"] and not lines
    built, far = build(found[1], "retinanet", 3, 30.0, 64, 16, seed=0)
    held = built.backbone.body.backbone.weights()
    assert far < 1e-4 and torch.equal(held["layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])
    assert built.transform.image_mean == tuple(card.mean) != (0.0, 0.0, 0.0)


def test_starts_are_told_apart(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "mine"
    shutil.copytree(trained, again)
    other = artefact.write(tmp_path / "vit", shaken("test_vit", img_size=32, patch_size=8), {})
    found, lines = starts.resolve(trained, [str(again), "random", str(other), "random"], tmp_path)
    assert [start.name for start in found] == ["mine", "mine (2)", "random", "vit"]
    assert found[0].identity == found[1].identity != found[2].identity
    assert lines == ["other networks than test_resnet are compared too: test_vit"]
    (again / "artefact" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError):
        starts.resolve(trained, [str(again)], tmp_path)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_a_comparison_is_whole_and_continues_after_a_kill(
    trained: Path, fields: LabelledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = running.compare(trained, fields, tmp_path / "whole", TINY, quiet(), against=["random"])
    real, done = running.train, []

    def killed(*args: Any, **named: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(named["seed"])
        return real(*args, **named)

    monkeypatch.setattr(running, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        running.compare(trained, fields, tmp_path / "cut", TINY, quiet(), against=["random"])
    assert len(list((tmp_path / "cut" / "runs").glob("*.json"))) == 2
    torn = next((tmp_path / "cut" / "runs").glob("*.npz"))
    torn.write_bytes(torn.read_bytes()[:-30])  # is made again
    done.clear()
    calls: list[int] = []
    monkeypatch.setattr(running, "train", lambda *args, **named: calls.append(1) or real(*args, **named))
    console = quiet()
    resumed = running.compare(trained, fields, tmp_path / "cut", TINY, console, against=["random"])
    assert len(calls) == 4 - 2 + 1 and said(console).count("done before") == 1
    assert resumed == whole and resumed.to_json() == whole.to_json()
    written = json.loads((tmp_path / "cut" / "comparison.json").read_text())
    assert written["protocol"] == "compare/v1" and len(written["verdicts"]) == 2
    results = [json.loads(path.read_text()) for path in (tmp_path / "cut" / "runs").glob("*.json")]
    orders = {(r["key"]["fraction"], r["key"]["seed"]): set() for r in results}
    for r in results:
        orders[r["key"]["fraction"], r["key"]["seed"]].add(r["order_sha256"])
        assert len(r["loss"]) == 3 and [step for step, _ in r["curve"]] == [2, 3] and r["curve"][-1][1] == r["map"]
        assert (r["apart"] < 1e-4) == r["key"]["pretrained"]
    assert all(len(seen) == 1 for seen in orders.values()), "the same images for all starts"
    assert len(orders) == len(set.union(*orders.values())) == 2


def test_other_settings_are_other_runs_but_more_seeds_keep_what_is_done(
    trained: Path, fields: LabelledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fake(built: Any, pictures: Any, test: Sequence[Picture], **named: Any) -> detector.Trained:
        calls.append(named["seed"])
        found = tuple(Detections(p.truth_N4, np.ones(len(p.label_N)), p.label_N) for p in test)
        return detector.Trained(found, ((named["steps"], 1.0),), (1.0,), "")

    monkeypatch.setattr(running, "build", lambda *_: (None, 0.0))
    monkeypatch.setattr(running, "train", fake)
    small = replace(TINY, fractions=(1.0,), evaluations=1)
    for changed, new in ((small, 2), (small, 0), (replace(small, rounds=7), 0), (replace(small, seeds=2), 2),
                         (replace(small, lr=1e-4), 2), (replace(small, steps=2), 2), (replace(small, channels=8), 2),
                         (replace(small, detector="retinanet"), 2), (replace(small, short_side_px=72), 2),
                         (replace(small, batch_size=5), 2), (replace(small, fractions=(0.5, 1.0)), 2)):  # fmt: skip
        calls.clear()
        running.compare(trained, fields, tmp_path, changed, quiet(), against=["random"])
        assert len(calls) == new, changed
    calls.clear()
    artefact.write(tmp_path / "other" / "artefact", backbones.create("test_resnet").eval(), {})
    running.compare(tmp_path / "other", fields, tmp_path, small, quiet(), against=["random"])
    assert len(calls) == 1, "other weights; random ones of the same network are there"
    calls.clear()
    fewer = replace(fields, images=fields.images[1:])
    running.compare(trained, fewer, tmp_path, small, quiet(), against=["random"])
    assert len(calls) == 2, "other data"


def runs_of(labels: data.Labels, better: float) -> running.Run:
    """A run whose detections are right for that share of the objects."""
    draw = np.random.default_rng(0)
    found = []
    for p in labels.test:
        right = draw.uniform(size=len(p.label_N)) < better
        found.append(Detections(np.where(right[:, None], p.truth_N4, p.truth_N4 + 500), np.ones(len(right)), p.label_N))
    figures = judge(labels.test, found, labels.classes)
    return running.Run(figures, ((2, figures.map / 2), (3, figures.map)), (1.0,), "", 0.0, 5, 9, 1.0, tuple(found))


@pytest.mark.parametrize(
    ("mine", "other", "words"),
    [(0.9, 0.2, "is better than random: +"), (0.2, 0.9, "is worse than random: -"),
     (0.5, 0.5, "is not distinguishable from random with this much data: +0.000"),
     (0.0, 0.0, "no verdict, as neither mine nor random has learned to detect yet: give more --steps")],
)  # fmt: skip
def test_table_picture_and_verdict_say_what_the_runs_say(
    mine: float, other: float, words: str, trained: Path, fields: LabelledSet, tmp_path: Path
) -> None:
    labels = data.load(fields, 64, 80, 0)
    compared, _ = starts.resolve(trained, ["random"], tmp_path)
    share = {"mine": mine, "random": other}
    runs = {(s.name, f, seed): runs_of(labels, share[s.name]) for s in compared for f in (0.3, 1.0) for seed in (0, 1)}
    found = running.summarise(runs, compared, labels, fields, replace(TINY, seeds=2), ["a note"])
    assert len(found.verdicts) == 2 and all(words in verdict for verdict in found.verdicts)
    assert found.verdicts[0].startswith("30 % of the labels (5 images, 9 objects): ")
    assert words.startswith("no verdict") or found.verdicts[0].endswith(f"; {len(labels.test)} test images, 2 seeds")
    score = found.fractions[0].scores[0]
    assert score.difference is None and score.map.value == pytest.approx(runs["mine", 0.3, 0].figures.map)
    assert 0 <= score.map.low <= score.map.value <= score.map.high <= 1
    paired = found.fractions[0].scores[1].difference
    if mine == other:
        assert paired == judging.Interval(0, 0, 0), "paired: the same detections differ on no resample"
    json.dumps(found.to_json(), allow_nan=False)
    console = quiet()
    console.print(drawing.table(found))
    assert all(part in said(console) for part in ("mAP", "mine", "random", "a note", *found.verdicts))
    assert drawing.draw(found, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    single = running.summarise({k: r for k, r in runs.items() if k[2] == 0}, compared, labels, fields,
                               replace(TINY, seeds=1), [])  # fmt: skip
    assert words.startswith("no") or all(
        verdict.endswith("one seed, whose chance is not in the interval") for verdict in single.verdicts
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"fractions": (0.0, 1.0)}, "fractions are above 0"), ({"fractions": ()}, "fractions"),
     ({"fractions": (1.0, 1.0)}, "each once"), ({"seeds": 0}, "seeds are 1 to 10"), ({"seeds": 11}, "1 to 10"),
     ({"steps": 0}, "steps"), ({"batch_size": 2}, "4 images or more, for BatchNorm"), ({"lr": float("nan")}, "rate"),
     ({"short_side_px": 20}, "64 px or more"), ({"detector": "yolo"}, "fasterrcnn and retinanet"),
     ({"evaluations": 301}, "evaluations"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Settings(**wrong)


def test_without_pycocotools_nothing_is_begun(
    trained: Path, fields: LabelledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(UsageError, match=r'needs pycocotools: pip install "ssl-pretrain\[compare\]"'):
        running.compare(trained, fields, tmp_path / "out", TINY, quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_detector_on_real_cells_learns_and_is_judged(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "bccd" / "Annotations").is_dir():
        pytest.skip("BCCD is not among the real images")
    found = readers.read(real_data / "bccd")
    few = [image for split, count in (("train", 12), ("test", 6))
           for image in [image for image in found.images if image.split == split][:count]]  # fmt: skip
    net = artefact.write(tmp_path / "net" / "artefact", shaken("resnet18"), {})
    given = Settings(fractions=(1.0,), seeds=1, steps=12, short_side_px=160, channels=32, evaluations=1, lr=1e-3)
    running.compare(net, replace(found, images=tuple(few)), tmp_path, given, quiet(), against=["random"])
    for path in (tmp_path / "runs").glob("*.json"):
        loss = json.loads(path.read_text())["loss"]
        assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3]), loss
