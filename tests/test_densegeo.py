"""DenseGeo: cells that show one spot are found by where they lie, and told from the cells of other images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import corners_of, small
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import backbones, load_backbone, methods, pretrain, rng
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.building import build
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views, densegeo
from ssl_pretrain.methods.densegeo import DenseGeo, counterparts, info_nce
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.feed import Feed, Share
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import corners, plan

SMALL = {"size_px": 64, "hidden_dim": 32, "output_dim": 16, "anchors": 8, "negatives": 4}
SQUARE = np.array([[0.0, 0.0], [64.0, 0.0], [64.0, 64.0], [0.0, 64.0]])


def built(backbone: str = "test_resnet", **changes: object) -> DenseGeo:
    torch.manual_seed(0)
    vit = {"img_size": 64, "patch_size": 8, "pool": "avg"} if backbones.maskable(backbone) else {}
    method = methods.create(densegeo.Config(**{**SMALL, **changes}), backbones.create(backbone, **vit))
    assert isinstance(method, DenseGeo)
    return method


def seen(count: int = 6, corners: np.ndarray | None = None) -> Views:
    crops = torch.randn(2, count, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    where = corners_of(densegeo.Config(**SMALL).views(), count) if corners is None else {"view": corners}
    return Views({"view": crops}, rng.fold_in(rng.key(0, "test"), np.arange(count)), where)


# Where cells lie


def affine(corners_42: np.ndarray) -> np.ndarray:
    """(3, 3): from places in a view, 0 to 1, to the image's pixels; solved from the four corners."""
    unit = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=np.float64)
    solved, *_ = np.linalg.lstsq(unit, np.concatenate([corners_42, np.ones((4, 1))], axis=1))
    return solved.T


@pytest.mark.parametrize("reach", [0.3, 0.5, 1.2])
def test_counterparts_are_what_trying_all_pairs_finds(reach: float) -> None:
    spec = ViewSpec("view", 64, (0.1, 1.0), count=2, vflip_p=0.5, turn_p=0.5, rotate_p=0.7)
    drawn = corners(plan([spec], np.arange(20), np.full((20, 2), [300, 400]), epoch=0, seed=0), 0)
    match, found = counterparts(drawn[:, 0], drawn[:, 1], 5, reach)
    middles = np.array([[(i % 5 + 0.5) / 5, (i // 5 + 0.5) / 5, 1] for i in range(25)])
    for b in range(20):
        spots = affine(drawn[b, 0]) @ middles.T  # in the image
        there = np.linalg.solve(affine(drawn[b, 1]), spots)[:2].T  # in the other view
        for n in range(25):
            apart = 5 * np.abs(there[n] - middles[:, :2]).max(axis=1)
            assert found[b, n] == (apart.min() <= reach)
            assert not found[b, n] or apart[match[b, n]] == pytest.approx(apart.min(), abs=1e-9)
    assert 50 < found.sum() < 450


def test_flips_and_turns_are_undone() -> None:
    mirrored, turned = SQUARE[[1, 0, 3, 2]], np.roll(SQUARE, 1, axis=0)
    for other, expected in ((SQUARE, [0, 1, 2, 3]), (mirrored, [1, 0, 3, 2]), (turned, [1, 3, 0, 2])):
        match, found = counterparts(SQUARE[None], other[None], 2, 0.5)
        assert match.tolist() == [expected] and found.all()


def test_cells_said_to_be_one_spot_show_one_spot(tmp_path: Path) -> None:
    """An image whose colour is its place, through the real feed: the pixels themselves say where a cell lies."""
    y, x = np.mgrid[:240, :240]
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = np.stack([x, y, np.full_like(x, i)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    pack = build([tmp_path / "images"], tmp_path / "pack", processes=0)
    spec = ViewSpec("view", 64, (0.4, 1.0), count=2, vflip_p=0.5, turn_p=0.7)
    fed = InputSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 64)
    feed = Feed(pack, (spec,), 4, 0, None, fed, Share(), torch.device("cpu"))
    checked = 0
    for epoch in range(6):
        views = feed.draw(feed.ids(epoch), epoch)
        assert views.corners is not None
        place_VBN2 = 255 * F.avg_pool2d(views.crops["view"].flatten(0, 1)[:, :2], 8).flatten(2).mT.unflatten(0, (2, -1))
        match, found = counterparts(views.corners["view"][:, 0], views.corners["view"][:, 1], 8, 0.5)
        for b in range(4):
            sides = np.abs(views.corners["view"][b, 1, 2] - views.corners["view"][b, 1, 0]) / 8
            apart = (place_VBN2[0, b] - place_VBN2[1, b, match[b]]).abs().numpy()
            # Half a cell, and some for the crop's edge, where resizing repeats pixels, and for 8 bits.
            assert (apart <= 0.5 * sides + 1.5)[found[b]].all()
            checked += int(found[b].sum())
    assert checked > 400


def test_two_views_of_a_square_always_overlap_by_default() -> None:
    spec = densegeo.Config().views()[0]
    drawn = corners(plan([spec], np.arange(3000), np.full((3000, 2), 512), epoch=0, seed=0), 0)
    low, high = drawn.min(axis=2), drawn.max(axis=2)  # upright views
    shared = high.min(axis=1) - low.max(axis=1)
    assert shared.min() > 0.09 * 512


# The loss


def by_hand(anchor: Tensor, positive: Tensor, negative: Tensor, found: Tensor, temperature: float) -> Tensor:
    losses = []
    for b in range(len(anchor)):
        for a in range(anchor.shape[1]):
            if not found[b, a]:
                continue
            own = torch.cosine_similarity(anchor[b, a], positive[b, a], dim=0)
            others = [torch.cosine_similarity(anchor[b, a], z, dim=0) for g in range(len(negative)) if g != b
                      for z in negative[g]]  # fmt: skip
            losses.append(-(own / temperature - (torch.stack([own, *others]) / temperature).logsumexp(0)))
    return torch.stack(losses).mean()


def test_info_nce_is_the_formula() -> None:
    torch.manual_seed(0)
    anchor, positive = torch.randn(2, 4, 5, 6, dtype=torch.float64).requires_grad_()
    negative, found = torch.randn(4, 3, 6, dtype=torch.float64), torch.rand(4, 5) < 0.6
    expected = by_hand(anchor, positive, negative, found, 0.3)
    assert abs(info_nce(anchor, positive, negative, found, 0.3) - expected) < 1e-12
    spoiled = torch.where(found[:, :, None], anchor, 7.0)  # an anchor without counterpart counts for nothing
    assert abs(info_nce(spoiled, positive, negative, found, 0.3) - expected) < 1e-12


def test_the_method_contrasts_what_it_says() -> None:
    """Equation 3 from the maps, with plain loops over cells."""
    method = built().double()
    views = seen()
    views = Views({"view": views.crops["view"].double()}, views.key_B2, views.corners)
    losses = method.loss(views, 0.0)
    maps = method.backbone.maps(views.crops["view"].flatten(0, 1))
    levels = []
    for level, index in enumerate(method.levels):
        z = method.dense_heads[level](maps[index].flatten(2).mT).unflatten(0, (2, 6))  # every cell, as a convolution
        cells, found, _ = method.draw(views, level)
        anchors = found.shape[2]
        for v in (0, 1):
            assert views.corners is not None
            where = views.corners["view"]
            match, has = counterparts(where[:, v], where[:, 1 - v], method.sides[level], 0.5)
            chosen = cells[v, :, :anchors]
            assert torch.equal(found[v], torch.from_numpy(has).gather(1, chosen))
            partner = torch.from_numpy(match).gather(1, chosen)
            anchor, positive = (
                torch.stack([z[w, b, i[b]] for b in range(6)]) for w, i in ((v, chosen), (1 - v, partner))
            )
            negative = torch.stack([z[1 - v, b, cells[1 - v, b, 2 * anchors :]] for b in range(6)])
            levels.append(by_hand(anchor, positive, negative, found[v], 0.2))
    pooled = method.global_head(maps[-1].mean((2, 3))).unflatten(0, (2, 6)).unsqueeze(2)
    whole = [by_hand(pooled[v], pooled[1 - v], pooled[1 - v], torch.ones(6, 1), 0.2) for v in (0, 1)]
    dense, alone = torch.stack(levels).mean(), torch.stack(whole).mean()
    assert abs(losses["loss_dense"] - dense) < 1e-12 and abs(losses["loss_global"] - alone) < 1e-12
    assert abs(losses["loss"] - (dense + alone) / 2) < 1e-12


def test_losses_are_exact_under_autocast() -> None:
    torch.manual_seed(0)
    anchor, positive, negative = torch.randn(3, 16, 8, 32).bfloat16()
    found = torch.ones(16, 8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(anchor, positive, negative, found, 0.1)
    assert loss.dtype == torch.float32
    assert abs(loss - info_nce(anchor.double(), positive.double(), negative.double(), found, 0.1)) < 1e-5


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_collapse_costs_chance(backbone: str) -> None:
    method = built(backbone, negatives=6)
    for head in (method.global_head, *method.dense_heads):
        head[-1].weight.data.zero_()
    losses = method.loss(seen(), 0.0)
    expected = method.chance(6)
    assert len(method.levels) == (3 if backbone == "test_resnet" else 1)
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, abs=1e-5)
    if backbone == "test_resnet":  # 8 x 8, 4 x 4 and 2 x 2 cells, of which 6, 6 and 4 are drawn
        assert expected["loss_dense"] == pytest.approx((2 * math.log(31) + math.log(21)) / 3)


def test_without_a_common_spot_there_is_no_dense_loss_and_no_nan() -> None:
    apart = np.stack([SQUARE, SQUARE + 100])[None].repeat(6, axis=0)
    method = built()
    losses = method.loss(seen(corners=apart), 0.0)
    losses["loss"].backward()
    assert losses["loss_dense"] == 0 and losses["matched"] == 0 and losses["loss_global"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    alone = built()
    loss = alone.loss(seen(1), 0.0)["loss"]  # nor where there is no other image
    loss.backward()
    assert loss == 0 and all(p.grad is not None and p.grad.isfinite().all() for p in alone.parameters())


# What is drawn


def test_cells_belong_to_the_image_and_not_to_the_batch() -> None:
    method, views = built(), seen()
    assert views.corners is not None
    part = Views({"view": views.crops["view"][:, 2:4]}, views.key_B2[2:4], {"view": views.corners["view"][2:4]})
    for level in range(3):
        for whole, alone in zip(method.draw(views, level)[:2], method.draw(part, level)[:2], strict=True):
            assert torch.equal(whole[:, 2:4], alone)


def test_anchors_are_drawn_among_cells_with_a_counterpart() -> None:
    right_half = np.stack([SQUARE, SQUARE + np.array([32.0, 0.0])])[None].repeat(5, axis=0)
    cells, found, share = built().draw(seen(5, right_half), 0)
    assert share == 0.5 and found.all() and cells.shape == (2, 5, 8 + 8 + 4)
    anchor, partner = cells[:, :, :8] % 8, cells.flip(0)[:, :, 8:16] % 8  # columns
    assert (anchor[0] >= 4).all() and (anchor[1] < 4).all()
    assert torch.equal(partner[0], anchor[0] - 4) and torch.equal(partner[1], anchor[1] + 4)
    drawn = cells[..., 16:]
    assert (drawn[0] % 8 < 4).any(), "negatives come from anywhere"
    assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) == 10


def test_where_views_lie_must_be_known_and_settings_make_sense() -> None:
    with pytest.raises(ValueError, match="where its views lie"):
        built().loss(seen()._replace(corners=None), 0.0)
    for wrong in ({"temperature": 0}, {"anchors": 0}, {"dense_weight": 1.5}, {"reach": 0.0}, {"size_px": 70}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            built(**wrong)


def test_pictures_put_each_spot_where_the_other_view_has_it() -> None:
    mirrored = np.stack([SQUARE, SQUARE[[1, 0, 3, 2]]])[None].repeat(3, axis=0)
    method, views = built(), seen(3, mirrored)
    first, moved, second = method.pictures(views)["correspondence"].unflatten(0, (3, 3)).unbind(1)
    assert torch.equal(first, views.crops["view"][0]) and torch.equal(second, views.crops["view"][1])
    assert torch.equal(moved[..., :8], second[..., -8:]) and torch.equal(moved[..., -8:], second[..., :8])


def test_only_what_the_maps_need_is_trained() -> None:
    assert all(p.requires_grad for p in built().parameters())
    still = [n for n, p in built("test_convnext").named_parameters() if not p.requires_grad]
    assert still == ["backbone.network.head.norm.weight", "backbone.network.head.norm.bias"]
    for one, other in zip(built().backbone.buffers(), backbones.create("test_resnet").buffers(), strict=True):
        assert torch.equal(one, other)  # finding that out moved no statistic


# A run


def test_a_run_resumes_bit_for_bit_and_leaves_an_artefact(tmp_path: Path) -> None:
    recipe = {**small("densegeo", steps=4, save_every_steps=2), "data": "synthetic:16", "views": {"window_px": 200}}
    whole = pretrain(recipe, out=tmp_path / "whole")
    pretrain(recipe, out=tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob("step_000000004*"):
        path.unlink()
    again = pretrain(recipe, out=tmp_path / "cut")
    states = [Checkpoints(result.folder / "checkpoints").newest() for result in (whole, again)]
    assert states[0] is not None and states[1] is not None and whole.step == again.step == 4
    assert all(torch.equal(states[0]["method"][key], states[1]["method"][key]) for key in states[0]["method"])
    kept = load_backbone(whole.artefact).backbone.weights()
    assert all(torch.equal(kept[key], states[0]["method"][f"backbone.network.{key}"]) for key in kept)
