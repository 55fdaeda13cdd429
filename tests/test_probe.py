import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking.knn import knn_predict
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from ssl_pretrain.backbones import Backbone, InputSpec, create
from ssl_pretrain.data.readers import LabelledImage, LabelledSet, read
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError
from ssl_pretrain.probe import knn
from ssl_pretrain.probe.features import embed
from ssl_pretrain.probe.knn import knn_probe, neighbours, score, vote
from ssl_pretrain.probe.objects import Objects, cut, leave_one_out
from ssl_pretrain.probe.statistics import bootstrap, counts

DATA = Path(os.environ.get("SSL_PRETRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
APART = np.arange(1000, 2000)
"""Image numbers that no bank has: nothing is excluded."""


def unit(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def random_features(seed=0, bank=120, queries=40, dim=12, classes=5):
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(classes, dim))
    bank_y, query_y = draw.integers(classes, size=bank), draw.integers(classes, size=queries)
    bank_z = unit(centres[bank_y] + 2 * draw.normal(size=(bank, dim)))
    return bank_z, bank_y, unit(centres[query_y] + 2 * draw.normal(size=(queries, dim))), query_y


def votes_of(bank_z, bank_y, query_z, ks, temperature, classes=5):
    return vote(bank_z, bank_y, np.arange(len(bank_z)), query_z, APART[: len(query_z)], ks, temperature, classes)


# --- the vote ---------------------------------------------------------------------------------------------------------


def test_vote_by_hand():
    bank = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    label = np.array([0, 1, 1, 0])
    shares = votes_of(bank, label, np.array([[1, 0]], np.float32), [1, 2, 3, 4], 0.5, classes=2)
    # exp(s / 0.5): 7.389, 4.953, 3.320, 1
    np.testing.assert_allclose(shares[1], [[1, 0]])
    np.testing.assert_allclose(shares[2], [[7.389 / 12.342, 4.953 / 12.342]], atol=1e-4)
    np.testing.assert_allclose(shares[3], [[7.389 / 15.662, 8.273 / 15.662]], atol=1e-4)
    np.testing.assert_allclose(shares[4], [[8.389 / 16.662, 8.273 / 16.662]], atol=1e-4)


@pytest.mark.parametrize("k", [1, 7, 20, 120])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_vote_equals_lightly(k, temperature):
    bank_z, bank_y, query_z, _ = random_features()
    ours = votes_of(bank_z, bank_y, query_z, [1, k], temperature)[k]
    theirs = knn_predict(
        torch.from_numpy(query_z).double(),
        torch.from_numpy(bank_z.T).double(),
        torch.from_numpy(bank_y),
        5,
        k,
        temperature,
    ).numpy()
    assert (ours.argmax(axis=1) == theirs[:, 0]).all()
    # the order of all classes that got a vote
    ranked = np.take_along_axis(ours, theirs, axis=1)
    assert (np.diff(ranked, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_vote_equals_sklearn(k):
    bank_z, bank_y, query_z, _ = random_features(seed=1)
    equal = KNeighborsClassifier(k, metric="cosine").fit(bank_z, bank_y)
    assert (votes_of(bank_z, bank_y, query_z, [k], np.inf)[k].argmax(axis=1) == equal.predict(query_z)).all()
    weighted = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(bank_z, bank_y)
    np.testing.assert_allclose(
        votes_of(bank_z, bank_y, query_z, [k], 0.07)[k], weighted.predict_proba(query_z), atol=1e-5
    )


def test_several_k_from_one_search_equal_one_by_one():
    bank_z, bank_y, query_z, _ = random_features(seed=2)
    together = votes_of(bank_z, bank_y, query_z, [50, 1, 10], 0.07)
    assert sorted(together) == [1, 10, 50]
    for k, shares in together.items():
        np.testing.assert_allclose(shares, votes_of(bank_z, bank_y, query_z, [k], 0.07)[k], atol=1e-6)


def test_k_beyond_the_bank_is_the_whole_bank_and_a_tiny_temperature_is_the_nearest():
    bank_z, bank_y, query_z, _ = random_features()
    shares = votes_of(bank_z, bank_y, query_z, [1, 120, 500], 0.07)
    np.testing.assert_array_equal(shares[120], shares[500])
    np.testing.assert_allclose(votes_of(bank_z, bank_y, query_z, [20], 1e-6)[20], shares[1], atol=1e-3)


def own_image_case():
    """A query whose own image holds 30 near copies of it with class 0; the nearest elsewhere are of class 1."""
    draw = np.random.default_rng(3)
    query = np.array([[1, 0, 0, 0]], np.float32)
    own = unit(query + 0.01 * draw.normal(size=(30, 4)))
    other = unit(np.array([1, 1, 0, 0]) + 0.05 * draw.normal(size=(10, 4)))
    far = unit(np.array([0, 0, 1, 1]) + 0.05 * draw.normal(size=(10, 4)))
    labels = np.repeat([0, 1, 2], [30, 10, 10])
    return np.concatenate([own, other, far]), labels, np.repeat([7, 8, 9], [30, 10, 10]), query


@pytest.mark.parametrize("temperature", [0.07, 1e-4, np.inf])
def test_neighbours_of_the_same_image_never_vote(temperature):
    bank_z, label, image, query = own_image_case()
    shares = vote(bank_z, label, image, query, np.array([7]), [1, 5, 10, 50], temperature, 3)
    assert all(shares[k].argmax() == 1 for k in (1, 5, 10))
    assert all(shares[k][0, 0] == 0 for k in shares)
    # k are found however many of its own are nearer: 10 of class 1, then as many of class 2 as there are
    if temperature == np.inf:
        np.testing.assert_allclose(shares[50], [[0, 0.5, 0.5]])
    # without the exclusion (the query is said to be of another image) its own image answers
    leaking = vote(bank_z, label, image, query, np.array([1]), [1, 5], temperature, 3)
    assert all(leaking[k].argmax() == 0 for k in leaking)


def test_a_query_that_nobody_can_vote_for():
    bank_z, label, image, query = own_image_case()
    with pytest.raises(DataError, match="nobody"):
        vote(bank_z[:30], label[:30], image[:30], query, np.array([7]), [5], 0.07, 3)
    with pytest.raises(DataError, match="empty"):
        vote(bank_z[:0], label[:0], image[:0], query, np.array([7]), [5], 0.07, 3)


@given(st.integers(0, 2**31), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_bank_makes_no_difference(seed, k):
    bank_z, bank_y, query_z, _ = random_features(seed, bank=40, queries=8)
    image, query_image = np.arange(40) % 7, np.arange(8) % 9
    order = np.random.default_rng(seed).permutation(40)
    plain = vote(bank_z, bank_y, image, query_z, query_image, [k], 0.07, 5)[k]
    mixed = vote(bank_z[order], bank_y[order], image[order], query_z, query_image, [k], 0.07, 5)[k]
    np.testing.assert_allclose(plain, mixed, atol=1e-5)


def test_the_gpu_search_is_the_same_search():
    bank_z, _, query_z, _ = random_features(seed=4)
    ours = knn._search_torch(bank_z, query_z, 9, torch.device("cpu"))
    theirs = knn.search(bank_z, query_z, 9)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    np.testing.assert_array_equal(ours[1], theirs[1])


# --- cutting ----------------------------------------------------------------------------------------------------------


def ramp(height=20, width=30, blue=0):
    """Red counts columns, green rows, blue is free to tell images apart."""
    image = np.full((height, width, 3), blue, np.uint8)
    image[..., 0] += (8 * np.arange(width)).astype(np.uint8)
    image[..., 1] += (12 * np.arange(height)[:, None]).astype(np.uint8)
    return image


def labelled(folder, images, kind="box", classes=("a", "b")):
    """A set from (pixels or None, boxes, labels, group, split); None is a file that is not an image."""
    made = []
    for i, (pixels, boxes, labels, group, split) in enumerate(images):
        path = folder / f"{i:03}.png"
        if pixels is None:
            path.write_bytes(b"not an image, %d" % i)
        else:
            Image.fromarray(pixels).save(path)
        size = (30, 20) if pixels is None else (pixels.shape[1], pixels.shape[0])
        box_N4 = np.array(boxes, np.float64).reshape(-1, 4)
        made.append(LabelledImage(path, size, box_N4, tuple(labels), group or path.stem, split))
    return LabelledSet("hand", "made by hand", kind, classes, tuple(made), ())


def test_boxes_are_where_they_are(tmp_path):
    boxes = [[10, 6, 14, 8], [9.5, 5.5, 12, 8], [10, 5, 18, 9]]
    objects = cut(
        labelled(tmp_path, [(ramp(), boxes, "aba", "", "train"), (ramp(blue=9), [[4, 4, 8, 8]], "a", "", "test")]),
        4,
        margin=0,
    )
    image = ramp()
    np.testing.assert_array_equal(objects.square_N3[0], [10, 5, 4])
    np.testing.assert_array_equal(objects.crops_NSSC[0], image[5:9, 10:14])
    np.testing.assert_array_equal(objects.label_N, [0, 1, 0, 0])
    np.testing.assert_array_equal(objects.image_N, [0, 0, 0, 1])
    np.testing.assert_array_equal(objects.train_N, [True, True, True, False])
    # 2.5 px from column 9.5 on, centred at 10.75, which on this ramp of 8 a column is worth 8 * (10.75 - 0.5)
    assert objects.crops_NSSC[1, 1:3, 1:3, 0].mean() == pytest.approx(82, abs=1)
    # 8 px to 4: pairs of columns 10, 11 ... 16, 17
    np.testing.assert_allclose(objects.crops_NSSC[2, 1, 1:3, 0], [8 * 12.5, 8 * 14.5], atol=1)
    np.testing.assert_array_equal(objects.crops_NSSC[3], ramp(blue=9)[4:8, 4:8])


def test_margin_points_and_whole_images(tmp_path):
    two = [(ramp(), [[10, 6, 20, 8]], "a", "", "train"), (ramp(blue=9), [[10, 6, 20, 8]], "a", "", "test")]
    objects = cut(labelled(tmp_path, two), 12)
    np.testing.assert_allclose(objects.square_N3[0], [9, 1, 12])
    np.testing.assert_array_equal(objects.crops_NSSC[0], ramp()[1:13, 9:21])
    points = [(pixels, [[12, 7, 12, 7], [0, 0, 0, 0]], "ab", "", split) for pixels, _, _, _, split in two]
    objects = cut(labelled(tmp_path, points, "point"), 6, point_px=6)
    np.testing.assert_array_equal(objects.crops_NSSC[0], ramp()[4:10, 9:15])
    # beyond the image its edge goes on
    around = np.pad(ramp(), ((3, 3), (3, 3), (0, 0)), mode="edge")
    np.testing.assert_array_equal(objects.crops_NSSC[1], around[:6, :6])
    assert objects.crops_NSSC[1].min(axis=(0, 1))[2] == 0 and objects.crops_NSSC[3].min(axis=(0, 1))[2] == 9
    whole = [(pixels, [[0, 0, 30, 20]], "a", "", split) for pixels, _, _, _, split in two]
    objects = cut(labelled(tmp_path, whole, "image"), 30)
    np.testing.assert_array_equal(objects.crops_NSSC[0], np.pad(ramp(), ((5, 5), (0, 0), (0, 0)), mode="edge"))
    assert "padded" in objects.rule


def test_small_crops_are_antialiased(tmp_path):
    board = np.zeros((64, 64, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    other = 255 - board
    both = [(board, [[0, 0, 64, 64]], "a", "", "train"), (other, [[0, 0, 64, 64]], "a", "", "test")]
    crops = cut(labelled(tmp_path, both), 4, margin=0).crops_NSSC
    assert abs(crops.astype(int) - 127).max() <= 3


def test_what_cannot_be_cut_is_counted_and_said(tmp_path):
    good = [[10, 6, 14, 8]]
    broken = [[5, 5, 5, 5], [8, 8, 4, 4], [90, 90, 95, 95], [np.nan, 1, 2, 2], [0, 0, np.inf, np.inf]]
    images = [
        (ramp(blue=1), good + broken, "abbbbb", "", None),
        (None, good, "a", "", None),
        (ramp(blue=2), good, "a", "", None),
        (ramp(blue=3), [], "", "", None),
        (ramp(blue=4), good, "a", "", None),
    ]
    made = labelled(tmp_path, images)
    wrong = replace(made.images[4], size_px=(20, 30))
    gone = replace(made.images[2], path=tmp_path / "gone.png")
    images = (*made.images[:4], wrong, gone, *labelled_more(tmp_path).images)
    objects = cut(replace(made, images=images, problems=("one", "two")), 8)
    assert (objects.degenerate_objects, objects.unreadable_images) == (5, 3)
    np.testing.assert_array_equal(np.unique(objects.image_N), [0, 2, *range(6, 14)])
    assert any("001.png" in line or "gone.png" in line for line in objects.problems)
    assert any("2 problems" in line for line in objects.problems) and len(objects.problems) == 3
    assert len(objects.crops_NSSC) == len(objects.label_N) == 10
    # the crops that follow a dropped image are still their own
    for i, crop in zip(objects.image_N, objects.crops_NSSC, strict=True):
        assert (crop[..., 2] == (i // 2 + 1 if i < 6 else 44 + i)).all()
    with pytest.raises(DataError, match="two images"):
        cut(replace(made, images=made.images[:2]), 8)
    with pytest.raises(DataError, match="0 objects"):
        cut(replace(made, images=()), 8)
    with pytest.raises(UsageError):
        cut(made, 0)


def labelled_more(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir(exist_ok=True)
    return labelled(folder, [(ramp(blue=50 + i), [[10, 6, 14, 8]], "ab"[i % 2], "", None) for i in range(8)])


def test_warning_filters_survive_the_threads(tmp_path):
    before = list(warnings.filters)
    cut(labelled_more(tmp_path), 8, workers=4)
    assert warnings.filters == before


# --- the split --------------------------------------------------------------------------------------------------------


def sides(objects):
    """Image -> is it in the bank; every image is on one side only."""
    bank = {int(i): {bool(t) for t in objects.train_N[objects.image_N == i]} for i in np.unique(objects.image_N)}
    assert all(len(side) == 1 for side in bank.values())
    return {i: side.pop() for i, side in bank.items()}


def box_images(count, group=lambda i: "", split=lambda i: None, same=lambda i: i, classes="ab"):
    return [(ramp(blue=same(i)), [[10, 6, 14, 8]], classes[i % len(classes)], group(i), split(i)) for i in range(count)]


def test_split_is_by_unit_keyed_and_blind_to_names(tmp_path):
    # 0 and 1 have the same bytes, 1 and 2 the same patient
    images = box_images(40, group=lambda i: "patient" if i in (1, 2) else "", same=lambda i: max(i, 1))
    made = labelled(tmp_path, images)
    parts = [sides(cut(made, 4, seed=seed)) for seed in range(20)]
    assert all(part[0] == part[1] == part[2] for part in parts)
    assert len({part[0] for part in parts}) == 2, "over twenty seeds the three are on either side"
    objects = cut(made, 4)
    assert len(np.unique(objects.unit_N)) == 38
    assert len(np.unique(objects.unit_N[objects.train_N])) == round(0.65 * 38)
    moved = tmp_path / "moved"
    moved.mkdir()
    again = labelled(moved, images[::-1])
    again = replace(
        again, images=tuple(replace(x, group=x.group.replace(x.path.stem, f"x{x.path.stem}")) for x in again.images)
    )
    other = cut(again, 4)
    assert {39 - i: side for i, side in sides(other).items()} == sides(objects)
    assert other.fingerprint == objects.fingerprint != cut(made, 4, margin=0.2).fingerprint


def test_rare_classes_are_on_both_sides(tmp_path):
    # b is in two of thirty images: by chance both are in the bank in 42 % of all permutations, out of it in 12 %
    made = labelled(tmp_path, box_images(30, classes="b" + 14 * "a"))
    for seed in range(6):
        objects = cut(made, 4, seed=seed)
        assert set(objects.label_N[objects.train_N]) == set(objects.label_N[~objects.train_N]) == {0, 1}
    alone = labelled(tmp_path, box_images(30, classes="b" + 29 * "a"))
    cuts = [cut(alone, 4, seed=seed) for seed in range(8)]
    lacking = [any("no object in the bank" in line for line in objects.problems) for objects in cuts]
    assert lacking == [1 not in objects.label_N[objects.train_N] for objects in cuts] and any(lacking)


def test_own_split_is_kept_and_leaks_are_closed(tmp_path):
    names = ["train", "val", "test", None, "train", "test"]
    images = box_images(6, split=lambda i: names[i], same=lambda i: 2 if i == 4 else i)
    objects = cut(labelled(tmp_path, images), 4)
    assert sides(objects) == {0: True, 1: True, 2: False, 5: False}, "4 has the bytes of 2, 3 is in no split"
    assert "train, val as bank, test as queries" in objects.split
    assert len(objects.problems) == 2
    no_test = labelled(tmp_path, box_images(4, split=lambda i: ["train", "val"][i % 2]))
    assert sides(cut(no_test, 4)) == {0: True, 1: False, 2: True, 3: False}
    only_train = labelled(tmp_path, box_images(10, split=lambda i: "train"))
    assert set(sides(cut(only_train, 4)).values()) == {True, False}


# --- embedding --------------------------------------------------------------------------------------------------------


class Tiny(Backbone):
    """A convolution and a BatchNorm with running statistics, another one that is frozen."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.family, self.dim, self.strides, self.channels = "tiny", "convnet", 8, (1,), (8,)
        self.input = InputSpec((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 8)
        self.scale = scale
        self.convolution, self.norm, self.frozen = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.norm.running_mean += 0.3
        self.seen = []

    def forward(self, x_BCHW):
        self.seen.append((self.training, x_BCHW.dtype))
        return self.scale * self.frozen(self.norm(self.convolution(x_BCHW))).relu().mean(dim=(2, 3))

    def maps(self, x_BCHW):
        raise NotImplementedError

    def config(self):
        return {}

    def weights(self):
        return self.state_dict()

    def load_weights(self, weights):
        self.load_state_dict(weights)


def random_crops(count=70, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_embed_is_the_same_in_every_batch_and_leaves_no_trace():
    backbone = Tiny().train()
    backbone.frozen.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    crops = random_crops()
    by_64, by_1 = embed(backbone, crops, 64), embed(backbone, crops, 1)
    assert by_64.dtype == np.float32 and by_64.shape == (70, 8)
    np.testing.assert_allclose(np.linalg.norm(by_64, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(by_64, by_1, atol=1e-6)
    assert not any(training for training, _ in backbone.seen)
    assert backbone.training and backbone.norm.training and not backbone.frozen.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    # normalised as the backbone asks
    x = (torch.from_numpy(crops[:5]).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    with torch.no_grad():
        z = backbone.eval()(x)
    np.testing.assert_allclose(by_64[:5], nn.functional.normalize(z, dim=1).numpy(), atol=1e-5)
    assert embed(backbone, crops[:0]).shape == (0, 8)


@given(st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
def test_the_scale_of_features_makes_no_difference(scale):
    crops = random_crops(20)
    np.testing.assert_allclose(embed(Tiny(), crops), embed(Tiny(scale), crops), atol=1e-5)


def test_embed_under_autocast_and_in_half_precision():
    crops, backbone = random_crops(20), Tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = embed(backbone, crops)
    np.testing.assert_array_equal(cast, embed(backbone, crops))
    half = Tiny().to(torch.bfloat16)
    np.testing.assert_allclose(embed(half, crops), cast, atol=0.05)
    assert half.seen[-1][1] == torch.bfloat16


def test_features_that_are_not_finite():
    backbone = Tiny(float("nan")).train()
    with pytest.raises(SslPretrainError, match=r"tiny .* 20 of 20"):
        embed(backbone, random_crops(20))
    assert backbone.training


def test_a_backbone_can_be_trained_after_a_probe():
    backbone = Tiny().train()
    embed(backbone, random_crops(4))
    backbone(torch.rand(4, 3, 8, 8)).sum().backward()
    assert backbone.convolution.weight.grad is not None


# --- the pixels baseline ----------------------------------------------------------------------------------------------


def test_pixels_baseline():
    backbone = create("pixels/16")
    x = torch.rand(2, 3, 64, 64)
    [thumbnail] = backbone.maps(x)
    assert backbone(x).shape == (2, backbone.dim) == (2, 768)
    assert thumbnail.shape == (2, *backbone.channels, 16, 16) and backbone.strides == (4,)
    torch.testing.assert_close(backbone(x), thumbnail.flatten(1))
    torch.testing.assert_close(backbone(torch.full((1, 3, 50, 70), 0.25)), torch.full((1, 768), 0.25))
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1  # between the sampling points of a thumbnail that is not antialiased
    torch.testing.assert_close(backbone.maps(stripes)[0].mean(), torch.tensor(0.25), atol=0.02, rtol=0)
    assert (create("pixels/").name, create("pixels/8", img_size=32).strides) == ("pixels/16", (4,))
    assert not list(backbone.parameters()) and backbone.weights() == {}
    backbone.load_weights({})
    with pytest.raises(RuntimeError):
        backbone.load_weights({"w": torch.zeros(1)})
    for wrong in ("pixels/big", "pixels/0", "pixels/-1"):
        with pytest.raises(UsageError, match="pixels"):
            create(wrong)


# --- the probe --------------------------------------------------------------------------------------------------------


def colours(folder, images=24, each=6, contrast=160):
    """Images of objects in three colours, by so much over a noise of 40."""
    draw, made = np.random.default_rng(0), []
    for _ in range(images):
        pixels = draw.integers(0, 40, (24, 24 * each, 3))
        labels = draw.integers(3, size=each)
        for i, c in enumerate(labels):
            pixels[4:20, 24 * i + 4 : 24 * i + 20, c] += contrast
        boxes = [[24 * i + 4, 4, 24 * i + 20, 20] for i in range(each)]
        made.append((pixels.astype(np.uint8), boxes, ["rgb"[c] for c in labels], "", None))
    return labelled(folder, made, classes=("r", "g", "b", "never"))


def test_probe_on_colours(tmp_path):
    made = colours(tmp_path)
    found = knn_probe(create("pixels/4"), made, size_px=16, ks=(1, 500), rounds=50)
    assert (found.accuracy.value, found.accuracy.low, found.macro_f1.value) == (1.0, 1.0, 1.0)
    assert [row.name for row in found.classes] == ["r", "g", "b", "never"]
    assert found.classes[0].recall == found.classes[0].precision == 1.0
    assert found.classes[3] == knn.ClassScore("never", 0, 0, None, None)
    assert sum(row.queries for row in found.classes) == found.data["queries"] == found.confusion_CC.sum()
    assert sorted(found.by_k) == [1, 20, 500] and found.by_k[20]["accuracy"] == 1.0
    assert any("500" in line for line in found.problems)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["protocol"] == "objects-knn/v0" and plain["backbone"] == "pixels/4" and plain["size_px"] == 16
    assert plain["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0} and "confusion_CC" not in plain
    assert str(tmp_path) not in json.dumps(plain)


def test_probe_again_on_the_same_objects(tmp_path):
    objects = cut(colours(tmp_path, contrast=1), 16)
    first, second = (knn_probe(create("pixels/4"), objects, rounds=50).to_json() for _ in range(2))
    assert first == second and 0.4 < first["accuracy"]["value"] < 1
    z_ND = embed(create("pixels/4"), objects.crops_NSSC)
    assert score(objects, z_ND, "pixels/4", rounds=50).to_json() == first
    true_Q = objects.label_N[~objects.train_N]
    # spoiling the queries' labels must spoil the score: nothing of them reaches the vote
    spoilt = objects.label_N.copy()
    spoilt[~objects.train_N] = (true_Q + 1) % 3
    assert knn_probe(create("pixels/4"), replace(objects, label_N=spoilt), rounds=5).accuracy.value < 0.35
    for wrong in ({"k": 0}, {"ks": (0, 1)}, {"temperature": 0.0}, {"rounds": 0}, {"seed": -1}):
        with pytest.raises(UsageError):
            knn_probe(create("pixels/4"), objects, **wrong)


def test_score_in_its_parts(tmp_path):
    objects = cut(colours(tmp_path, contrast=1), 16)
    z_ND, bank = embed(create("pixels/4"), objects.crops_NSSC), objects.train_N
    found = score(objects, z_ND, "pixels/4", rounds=100, seed=5)
    near = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    predicted_Q = near.fit(z_ND[bank], objects.label_N[bank]).predict(z_ND[~bank])
    true_Q, unit_Q = objects.label_N[~bank], objects.unit_N[~bank]
    np.testing.assert_array_equal(found.confusion_CC, confusion_matrix(true_Q, predicted_Q, labels=range(4)))
    assert bootstrap(counts(true_Q, predicted_Q, unit_Q, 4), 100, 5) == (
        found.accuracy,
        found.balanced_accuracy,
        found.macro_f1,
    )
    recalls = recall_score(true_Q, predicted_Q, average=None, labels=range(3))
    precisions = precision_score(true_Q, predicted_Q, average=None, labels=range(3))
    assert [row.recall for row in found.classes[:3]] == pytest.approx(list(recalls))
    assert [row.precision for row in found.classes[:3]] == pytest.approx(list(precisions))
    assert list(recalls) != pytest.approx(list(precisions))
    assert [row.bank for row in found.classes] == np.bincount(objects.label_N[bank], minlength=4).tolist()


def test_neighbours_for_pictures(tmp_path):
    objects = cut(colours(tmp_path), 16)
    z_ND = embed(create("pixels/4"), objects.crops_NSSC)
    queries = [int(np.flatnonzero(objects.train_N)[0]), int(np.flatnonzero(~objects.train_N)[0])]
    found = neighbours(objects, z_ND, queries, 3)
    assert found.shape == (2, 3) and objects.train_N[found].all()
    assert (objects.unit_N[found] != objects.unit_N[queries][:, None]).all()
    assert (objects.label_N[found] == objects.label_N[queries][:, None]).all()
    similarity = (z_ND[found] * z_ND[queries][:, None]).sum(axis=-1)
    assert (np.diff(similarity, axis=1) <= 1e-6).all()
    bank = int(objects.train_N.sum())
    own = int((objects.train_N & (objects.unit_N == objects.unit_N[queries[0]])).sum())
    everyone = neighbours(objects, z_ND, queries, bank + 5)
    assert (everyone[0] < 0).sum() == 5 + own and (everyone[1] < 0).sum() == 5


@pytest.mark.skipif(not (DATA / "chula_rbc12").is_dir(), reason="no folder chula_rbc12 in SSL_PRETRAIN_DATA")
def test_pixels_on_real_cells():
    start = time.perf_counter()
    objects = cut(read(DATA / "chula_rbc12"), 64, point_px=80, seed=1)
    cutting = time.perf_counter() - start
    found = knn_probe("pixels", objects)
    print(f"chula_rbc12: {found.data['bank']} in the bank, {found.data['queries']} queries")
    print(f"cut {cutting:.1f} s, probe {time.perf_counter() - start - cutting:.1f} s")
    print({name: figure for name, figure in found.to_json().items() if name in knn.FIGURES})
    print(found.by_k)
    assert isinstance(objects, Objects) and len(objects.label_N) > 11_000
    # the sets' own spread over splits is about .03
    assert found.accuracy.value == pytest.approx(0.43, abs=0.06)
    assert found.balanced_accuracy.value == pytest.approx(0.24, abs=0.06)


def test_leave_one_out_asks_every_object_and_lets_no_unit_vote_for_itself() -> None:
    random = np.random.default_rng(3)
    z_ND = random.normal(size=(60, 8)).astype(np.float32)
    z_ND /= np.linalg.norm(z_ND, axis=1, keepdims=True)
    label_N, unit_N = random.integers(0, 3, 60), np.repeat(np.arange(12), 5)
    some = Objects(
        crops_NSSC=np.zeros((60, 4, 4, 3), np.uint8), label_N=label_N, image_N=unit_N, unit_N=unit_N,
        train_N=np.arange(60) < 40, square_N3=np.zeros((60, 3)), classes=("a", "b", "c"), source="", rule="", split="",
        seed=0, fingerprint="", unreadable_images=0, degenerate_objects=0, problems=(),
    )  # fmt: skip
    found = score(leave_one_out(some), z_ND, "random", k=1, ks=(1,), rounds=10)
    similarity = z_ND @ z_ND.T
    similarity[unit_N[:, None] == unit_N[None]] = -2
    expected = (label_N[similarity.argmax(1)] == label_N).mean()
    assert found.accuracy.value == pytest.approx(expected)
    assert found.data["queries"] == found.data["bank"] == 60
