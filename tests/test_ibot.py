"""iBOT, and what it shares with DINOv2: masks, the masked encoder, the loss on masked patches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, VIT, small
from lightly.loss import IBOTPatchLoss
from lightly.models.utils import random_block_mask_image
from test_methods import build, seen
from test_run import state
from torch.nn import functional as F

from ssl_pretrain import backbones, methods, rng
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views
from ssl_pretrain.methods._distillation import cross_view_loss
from ssl_pretrain.methods._masking import Masks, all_tokens, block_masks, masked_patch_loss
from ssl_pretrain.methods.ibot import IBOT
from ssl_pretrain.train.loop import pretrain


def ibot(**changes: object) -> IBOT:
    method = build("ibot", **changes)
    assert isinstance(method, IBOT)
    return method


def keys(count: int) -> rng.Key:
    return rng.fold_in(rng.key(0, "test"), np.arange(count))


def double(views: Views) -> Views:
    return Views({name: crops.double() for name, crops in views.crops.items()}, views.key_B2)


def drawn(method: IBOT, views: Views) -> Masks:
    images = torch.cat([views.crops["global_0"], views.crops["global_1"]]).flatten(0, 1)
    return Masks.draw(views.key_B2, images, 8, method.config.mask_probability, method.config.mask_ratio)


# Masks


def test_half_of_the_crops_are_masked_with_every_share_of_patches() -> None:
    masks = block_masks(keys(4000), (14, 14), 0.5, (0.1, 0.5), 16)
    share = masks.mean((1, 2))
    assert (share == 0).mean() == pytest.approx(0.5, abs=0.03)
    masked = share[share > 0]
    assert masked.max() <= 0.5 and masked.min() > 0.05
    assert masked.mean() == pytest.approx(0.3, abs=0.015)  # a little less than asked, as no block may overshoot
    assert np.histogram(masked, 4, (0.1, 0.5))[0].min() > 0.2 * len(masked)


def test_blocks_are_distributed_as_lightlys() -> None:
    """lightly carries DINOv2's generator over, image by image, with Python's random numbers."""
    ours = block_masks(keys(2000), (14, 14), 1.0, (0.3, 0.3), 4)
    theirs = np.stack([random_block_mask_image((14, 14), 58, 4).numpy() for _ in range(400)])
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.003)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.12  # per patch: five standard errors
    apart = [(m[:, 1:] != m[:, :-1]).mean() + (m[:, :, 1:] != m[:, :, :-1]).mean() for m in (ours, theirs)]
    assert apart[0] == pytest.approx(apart[1], rel=0.05)  # as coarse


def test_masks_belong_to_the_image_and_not_to_the_batch() -> None:
    method = ibot()
    views = seen(method, 8)
    whole = drawn(method, views).mask_CN.unflatten(0, (2, 8))
    part = Views({name: crops[:, 3:5] for name, crops in views.crops.items()}, views.key_B2[3:5])
    assert torch.equal(drawn(method, part).mask_CN.unflatten(0, (2, 2)), whole[:, 3:5])
    assert not torch.equal(whole[0], whole[1])  # each crop of an image has its own


def test_masks_count_the_same_for_every_masked_crop() -> None:
    method = ibot()
    views = seen(method, 8)
    masks = drawn(method, views)
    assert torch.equal(masks.index_M, masks.mask_CN.flatten().nonzero().flatten())
    crop_M = masks.index_M // 36
    per_crop = torch.zeros(16).index_add(0, crop_M, masks.weight_M)
    masked = masks.mask_CN.any(1)
    assert 0 < masked.sum() < 16
    assert torch.allclose(per_crop, masked / 16)


# The masked encoder


def test_a_masked_patch_cannot_be_seen_and_keeps_its_place() -> None:
    vit = backbones.create("test_vit", img_size=48, patch_size=8)
    assert isinstance(vit, backbones.MaskableBackbone)
    x, token = torch.randn(2, 3, 48, 48), torch.randn(64)
    nothing = torch.zeros(2, 36, dtype=torch.bool)
    assert torch.equal(vit.masked(x, nothing, token), all_tokens(vit, x))
    assert torch.equal(all_tokens(vit, x)[:, 0], vit(x))
    mask = nothing.clone()
    mask[1, 7] = True
    found = vit.masked(x, mask, token)
    assert torch.equal(found[0], all_tokens(vit, x)[0]) and not torch.equal(found[1], all_tokens(vit, x)[1])
    changed = x.clone()
    changed[1, :, 8:16, 8:16] = 9  # patch 7 of a grid of 6: row 1, column 1
    assert torch.equal(vit.masked(changed, mask, token), found)
    assert not torch.equal(vit.masked(changed, nothing, token), all_tokens(vit, x))
    alike = vit.masked(x, ~nothing, token)[0, 1:]
    assert (alike[0] - alike[1]).abs().max() > 1e-3, "positions are added behind the mask token"


def test_a_backbone_without_class_token_is_refused() -> None:
    config = methods.config_class("ibot")(**METHODS["ibot"])
    with pytest.raises(UsageError, match="plain ViT"):
        methods.create(config, backbones.create("test_resnet"))
    without = backbones.create("test_vit", img_size=48, patch_size=8)
    assert isinstance(without, backbones.MaskableBackbone)
    without.prefix_tokens = 0
    with pytest.raises(UsageError, match="class token"):
        methods.create(config, without)


# The loss


def test_masked_patch_loss_is_lightlys_and_the_papers() -> None:
    torch.manual_seed(0)
    mask = torch.from_numpy(block_masks(keys(6), (6, 6), 0.5, (0.1, 0.5), 4))
    assert mask.any((1, 2)).sum() not in (0, 6)
    count = int(mask.sum())
    teacher, student = torch.randn(2, count, 16, dtype=torch.float64)
    weight = (1 / (6 * mask.sum((1, 2), keepdim=True).clamp(min=1).double())).expand_as(mask)[mask]
    theirs = IBOTPatchLoss(16, teacher_temp=0.0625).double()  # lightly holds the temperature in float32
    theirs.center.center.copy_(torch.randn(1, 16) / 10)
    p = ((teacher - theirs.center.value) / 0.0625).softmax(-1)
    ours = masked_patch_loss(p, student, weight, 0.1)
    assert abs(ours - theirs(teacher, student, mask)) < 1e-6  # lightly weighs the patches in float32
    crops, first = [], 0
    for crop in mask.flatten(1):
        part = slice(first, first := first + int(crop.sum()))
        cross_entropy = -(p[part] * (student[part] / 0.1).log_softmax(-1)).sum(-1)
        crops.append(cross_entropy.mean() if len(cross_entropy) else torch.tensor(0.0))
    assert abs(ours - torch.stack(crops).mean()) < 1e-12


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_the_authors_written_out(shared: bool) -> None:
    """Every pair of views by itself, with centres and two temperatures, in float64."""
    method = ibot(shared_head=shared, cls_weight=0.7, patch_weight=1.3, patch_temperature_start=0.06).double()
    with torch.no_grad():
        for tensor in (method.mask_token, method.centre_K, method.patch_centre_K):
            tensor.normal_(0, 0.1)
        for p in method.student.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # the teacher is another network
    views = double(seen(method))
    found = method.loss(views, 0.15)
    mask = drawn(method, views).mask_CN.unflatten(0, (2, 4))
    head, patch_head = method.student_heads[0], method.student_heads[-1]
    assert (head is patch_head) is shared
    t_cls, t_patch = method.teacher_temperatures(0.15)
    assert t_cls == pytest.approx(0.055) and t_patch == pytest.approx(0.065)
    crops = [views.crops["global_0"][0], views.crops["global_1"][0], *views.crops["local"]]
    cls, patch = [], []
    for q in range(2):
        seen_BTD = all_tokens(method.backbone, crops[q])
        p_cls = F.softmax((method.teacher_heads[0](seen_BTD[:, 0]) - method.centre_K) / t_cls, -1)
        p_patch = F.softmax((method.teacher_heads[-1](seen_BTD[:, 1:]) - method.patch_centre_K) / t_patch, -1)
        for v, crop in enumerate(crops):
            tokens = method.student.masked(crop, mask[v], method.mask_token[0]) if v < 2 else None
            student = head(tokens[:, 0] if tokens is not None else method.student(crop))
            if v != q:
                cls.append(-(p_cls * F.log_softmax(student / 0.1, -1)).sum(-1).mean())
                continue
            assert tokens is not None
            each_BN = -(p_patch * F.log_softmax(patch_head(tokens[:, 1:]) / 0.1, -1)).sum(-1)
            patch.append(((each_BN * mask[v]).sum(-1) / mask[v].sum(-1).clamp(min=1)).mean())
    expected_cls, expected_patch = torch.stack(cls).mean(), torch.stack(patch).mean()
    assert len(cls) == 2 * 4 - 2
    assert abs(found["loss"] - (0.7 * expected_cls + 1.3 * expected_patch)) < 1e-10
    assert abs(found["loss_cls"] - expected_cls) < 1e-10
    assert abs(found["loss_patch"] - expected_patch / mask.any(-1).double().mean()) < 1e-10


def test_an_even_student_costs_chance() -> None:
    method = ibot(mask_probability=1.0)
    for head in method.student_heads:
        head.last_layer.weight_g.data.zero_()
    found = method.loss(seen(method), 0.5)
    for name, value in method.chance(8).items():
        assert found[name].item() == pytest.approx(value, abs=1e-5)
    assert method.chance(8)["loss_patch"] == math.log(64)
    assert ibot().chance(8)["loss"] == pytest.approx(1.5 * math.log(64))  # half of the crops are masked


def test_losses_are_exact_under_autocast() -> None:
    torch.manual_seed(0)
    p_GBK, p_MK = torch.randn(2, 64, 256).softmax(-1), torch.randn(50, 256).softmax(-1)
    views, patches, weight = (
        torch.randn(4, 64, 256).bfloat16(),
        torch.randn(50, 256).bfloat16(),
        torch.full((50,), 0.02),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_view_loss(p_GBK, views, 0.1), masked_patch_loss(p_MK, patches, weight, 0.1)
    expected = (
        cross_view_loss(p_GBK.double(), views.double(), 0.1),
        masked_patch_loss(p_MK.double(), patches.double(), weight.double(), 0.1),
    )
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.item() == pytest.approx(exact.item(), rel=1e-5)


def test_without_a_mask_it_is_dino() -> None:
    method = ibot(mask_probability=0.0)
    found = method.loss(seen(method), 0.5)
    assert found["loss"] == found["loss_cls"] and found["loss_patch"] == 0
    assert all(torch.isfinite(value) for value in found.values())
    found["loss"].backward()
    assert method.mask_token.grad is not None and method.mask_token.grad.abs().max() == 0


# Student and teacher


def test_the_mask_token_learns_and_the_teacher_sees_no_mask() -> None:
    method = ibot()
    views = seen(method)
    first = method.loss(views, 0.5)
    first["loss"].backward()
    assert method.mask_token.grad is not None and method.mask_token.grad.abs().max() > 0
    assert all(p.grad is None for p in [*method.backbone.parameters(), *method.teacher_heads.parameters()])
    assert not any("mask" in key for key in method.backbone.weights())
    with torch.no_grad():
        method.mask_token.normal_()
    second = method.loss(views, 0.5)
    assert second["loss"] != first["loss"]
    for name in ("teacher_entropy", "teacher_spread", "patch_entropy", "patch_spread"):
        assert second[name] == first[name]


def test_the_targets_are_detached() -> None:
    p, student = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    masked_patch_loss(p.softmax(-1), student, torch.full((5,), 0.2), 0.1).backward()
    assert p.grad is None and student.grad is not None


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_follows_and_both_centres_move_after_the_loss(shared: bool) -> None:
    method = ibot(shared_head=shared, teacher_temperature_warmup=0.0)
    views = seen(method)
    first = method.loss(views, 0.1)["loss"]
    assert method.centre_K.abs().max() == method.patch_centre_K.abs().max() == 0
    assert method.loss(views, 0.2)["loss"] == first  # a step that was skipped in between left nothing behind
    tokens = all_tokens(method.backbone, torch.cat([views.crops["global_0"][0], views.crops["global_1"][0]]))
    logits, patches = method.teacher_heads[0](tokens[:, 0]), method.teacher_heads[-1](tokens[:, 1:])
    before = [p.clone() for p in [*method.backbone.parameters(), *method.teacher_heads.parameters()]]
    with torch.no_grad():
        for p in [*method.student.parameters(), *method.student_heads.parameters()]:
            p += 1
    method.after_step(0.0)
    assert torch.allclose(method.centre_K, 0.1 * logits.mean(0), atol=1e-6)
    assert torch.allclose(method.patch_centre_K, 0.1 * patches.mean((0, 1)), atol=1e-6)  # of all, masked or not
    assert not torch.allclose(method.centre_K, method.patch_centre_K, atol=1e-3)
    after = [*method.backbone.parameters(), *method.teacher_heads.parameters()]
    assert all(torch.allclose(new, old + 0.1, atol=1e-6) for old, new in zip(before, after, strict=True))


def test_a_skipped_step_does_not_enter_the_centres() -> None:
    method, calm = ibot(), ibot()
    broken = seen(method)
    broken.crops["global_0"].fill_(math.nan)
    method.loss(broken, 0.1)
    for m in (method, calm):
        m.loss(seen(m, seed=1), 0.2)
        m.after_step(0.2)
    assert torch.equal(method.centre_K, calm.centre_K) and torch.equal(method.patch_centre_K, calm.patch_centre_K)


@pytest.mark.parametrize("shared", [True, False])
def test_clipping_is_per_tensor_and_the_prototypes_stand_still_at_first(shared: bool) -> None:
    method = ibot(clip=1e-3, freeze_last_layer=0.1, shared_head=shared)
    method.loss(seen(method), 0.05)["loss"].backward()
    method.before_step(0.05)
    norms = [p.grad.norm().item() for p in method.parameters() if p.grad is not None]
    assert max(norms) <= 1e-3 + 1e-8 and sum(n > 0.9e-3 for n in norms) > 5
    prototypes = [p for head in method.student_heads for p in head.last_layer.parameters()]
    assert all(p.grad is None for p in prototypes)
    method.loss(seen(method), 0.2)["loss"].backward()
    method.before_step(0.2)
    assert all(p.grad is not None for p in prototypes)


def test_stochastic_depth_is_the_students_alone() -> None:
    torch.manual_seed(0)
    vit = backbones.create("test_vit", img_size=48, patch_size=8, drop_path=0.5)
    method = IBOT(methods.config_class("ibot")(**METHODS["ibot"]), vit).train()
    x = torch.randn(8, 3, 48, 48)
    assert torch.equal(all_tokens(method.backbone, x), all_tokens(method.backbone, x))
    assert not torch.equal(all_tokens(method.student, x), all_tokens(method.student, x))


def test_published_constants_are_the_defaults_and_wrong_values_are_refused() -> None:
    config = methods.config_class("ibot")
    c = config()
    assert (c.prototypes, c.shared_head, c.norm_last_layer, c.momentum, c.clip) == (8192, True, False, 0.996, 3.0)
    assert (c.local_count, c.global_scale, c.local_scale) == (10, (0.25, 1.0), (0.05, 0.25))
    assert (c.mask_probability, c.mask_ratio, c.cls_weight, c.patch_weight) == (0.5, (0.1, 0.5), 1.0, 1.0)
    assert (c.teacher_temperature_start, c.teacher_temperature) == (0.04, 0.07)
    assert (c.patch_temperature_start, c.patch_temperature) == (0.04, 0.07)
    for wrong in ({"mask_ratio": (0.5, 0.1)}, {"mask_ratio": (0.0, 1.1)}, {"mask_probability": 2}, {"momentum": 30},
                  {"patch_temperature": 0.0}):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(wrong))):
            config(**wrong)


@pytest.mark.parametrize("method", ["ibot", "dinov2"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    """With drop path, masks, and a batch in two parts."""
    recipe = {**small(method, {**VIT, "drop_path": 0.2}, save_every_steps=2, accumulate=2, steps=4), "seed": 3}
    pretrain(recipe, data="synthetic:16", out=tmp_path / "a" / "calm")
    for path in (tmp_path / "a" / "calm" / "checkpoints").glob("step_000000004*"):
        path.unlink()
    pretrain(recipe, data="synthetic:16", out=tmp_path / "a" / "calm")
    pretrain(recipe, data="synthetic:16", out=tmp_path / "a" / "other")
    calm, other = (state(tmp_path / "a" / name)["method"] for name in ("calm", "other"))
    assert all(torch.equal(calm[key], other[key]) for key in other) and set(calm) == set(other)
