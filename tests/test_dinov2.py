"""DINOv2: what it adds to iBOT (Sinkhorn-Knopp, KoLeo, two heads), and the whole loss written out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import METHODS, VIT, small
from lightly.loss import KoLeoLoss
from lightly.loss.swav_loss import sinkhorn
from test_ibot import double
from test_methods import build, seen
from torch.nn import functional as F

from ssl_pretrain import backbones, methods
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views
from ssl_pretrain.methods._masking import Masks, all_tokens
from ssl_pretrain.methods.dinov2 import DINOv2, koleo_loss, sinkhorn_knopp
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.loop import pretrain


def dinov2(**changes: object) -> DINOv2:
    method = build("dinov2", **changes)
    assert isinstance(method, DINOv2)
    return method


def drawn(method: DINOv2, views: Views) -> Masks:
    images = torch.cat([views.crops["global_0"], views.crops["global_1"]]).flatten(0, 1)
    c = method.config
    return Masks.draw(views.key_B2, images, 8, c.mask_probability, c.mask_ratio, c.mask_smallest)


def written_out(logits_NK: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """The paper's Sinkhorn-Knopp: every prototype weighs 1/K, then every sample 1/N."""
    count, prototypes = logits_NK.shape
    q = (logits_NK / temperature).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / prototypes
        q = q / q.sum(1, keepdim=True) / count
    return q * count


# Sinkhorn-Knopp


@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_sinkhorn_knopp_is_the_papers_and_lightlys(iterations: int) -> None:
    logits = torch.randn(12, 20, dtype=torch.float64).clamp(-1, 1)
    kept = logits.clone()
    ours = sinkhorn_knopp(logits, 0.07, iterations)
    assert torch.equal(logits, kept)
    assert (ours - written_out(logits, 0.07, iterations)).abs().max() < 1e-12
    assert (ours - sinkhorn(logits, iterations, 0.07)).abs().max() < 1e-12


def test_samples_and_prototypes_weigh_the_same() -> None:
    q = sinkhorn_knopp(torch.randn(40, 8, dtype=torch.float64), 0.5, 100)
    assert (q.sum(1) - 1).abs().max() < 1e-12 and (q.sum(0) - 5).abs().max() < 1e-6
    assert (sinkhorn_knopp(torch.zeros(3, 8), 0.04, 3) - 1 / 8).abs().max() < 1e-7


def test_sinkhorn_knopp_does_not_overflow_where_lightlys_does() -> None:
    """Prototypes that are not held at unit length make logits large: exp(4 / 0.04) is no float32."""
    logits = 4 * torch.randn(12, 20)
    found = sinkhorn_knopp(logits, 0.04, 3)
    assert (found - written_out(logits.double(), 0.04, 3)).abs().max() < 1e-4
    assert not sinkhorn(logits, 3, 0.04).isfinite().all()
    assert sinkhorn_knopp(logits.bfloat16(), 0.04, 3).dtype == torch.float32


def test_no_sample_at_all_is_no_error() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 8), 0.04, 3).shape == (0, 8)


# KoLeo


def test_koleo_is_lightlys() -> None:
    z = torch.randn(16, 8, dtype=torch.float64)
    assert abs(koleo_loss(z, 1e-4) - KoLeoLoss()(z)) < 1e-12
    unit = F.normalize(z)
    distance = torch.cdist(unit, unit).fill_diagonal_(math.inf).min(1).values
    assert abs(koleo_loss(z, 1e-4) + distance.log().mean()) < 1e-6


def test_the_same_image_twice_leaves_koleos_gradient_small() -> None:
    """With lightly's, as with the authors', two images that are all but the same drown the others' gradient."""
    z = torch.randn(8, 16)
    z[5] = z[2] + 1e-6 * torch.randn(16)

    def gradient(loss: object) -> torch.Tensor:
        here = z.clone().requires_grad_()
        loss(here).backward()  # type: ignore[operator]
        assert here.grad is not None
        return here.grad

    assert gradient(KoLeoLoss()).abs().max() > 1e4
    found = gradient(lambda here: koleo_loss(here, 1e-4))
    assert found.isfinite().all() and found.abs().max() < 1
    apart = torch.arange(8) != 5
    others = torch.stack([row for row, keep in zip(z, apart, strict=True) if keep])
    assert koleo_loss(others, 1e-4) < koleo_loss(z, 1e-4)
    assert koleo_loss(z[:1], 1e-4).isfinite()


def test_koleo_is_exact_under_autocast() -> None:
    z = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(z, 1e-4).item() == pytest.approx(koleo_loss(z.double(), 1e-4).item(), rel=1e-5)
        assert koleo_loss(z.bfloat16(), 1e-4).dtype == torch.float32


# The whole


def test_the_loss_is_the_papers_written_out() -> None:
    method = dinov2(cls_weight=0.7, patch_weight=1.3, koleo_weight=0.2, sinkhorn_iterations=2).double()
    with torch.no_grad():
        method.mask_token.normal_()
        for p in method.student.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # the teacher is another network
    views = double(seen(method))
    found = method.loss(views, 0.15)
    masks = drawn(method, views).mask_CN
    temperature = method.teacher_temperature(0.15)
    assert temperature == pytest.approx(0.055)
    both = torch.cat([views.crops["global_0"][0], views.crops["global_1"][0]])
    seen_by_teacher = all_tokens(method.backbone, both)
    targets = written_out(method.teacher_head(seen_by_teacher[:, 0]), temperature, 2).chunk(2)
    patch_targets = written_out(method.teacher_patch_head(seen_by_teacher[:, 1:][masks]), temperature, 2)
    tokens = method.student.masked(both, masks, method.mask_token[0])
    classes = [*tokens[:, 0].chunk(2), *(method.student(crop) for crop in views.crops["local"])]
    pairs = [(q, v) for q in range(2) for v in range(4) if q != v]
    said = [F.log_softmax(method.student_head(z) / 0.1, -1) for z in classes]
    cls = torch.stack([-(targets[q] * said[v]).sum(-1).mean() for q, v in pairs]).mean()
    each_M = -(patch_targets * F.log_softmax(method.student_patch_head(tokens[:, 1:][masks]) / 0.1, -1)).sum(-1)
    crop_M = masks.nonzero()[:, 0]
    patch = sum(each_M[crop_M == c].mean() for c in crop_M.unique()) / len(masks)
    koleo = sum(KoLeoLoss()(z) for z in classes[:2])
    assert abs(found["loss"] - (0.7 * cls + 1.3 * patch + 0.2 * koleo)) < 1e-10
    assert abs(found["loss_cls"] - cls) < 1e-10 and abs(found["koleo"] - koleo / 2) < 1e-10
    assert abs(found["loss_patch"] - patch / masks.any(1).double().mean()) < 1e-10


def test_an_even_student_costs_chance() -> None:
    method = dinov2()
    for head in (method.student_head, method.student_patch_head):
        head.last_layer.weight_g.data.zero_()
    found = method.loss(seen(method), 0.5)
    assert method.chance(8) == {"loss_cls": math.log(64), "loss_patch": math.log(48)}
    for name, value in method.chance(8).items():
        assert found[name].item() == pytest.approx(value, abs=1e-5)


def test_without_masks_and_koleo_it_is_dino_with_sinkhorn() -> None:
    method = dinov2(mask_probability=0.0, koleo_weight=0.0)
    found = method.loss(seen(method), 0.5)
    assert found["loss"] == found["loss_cls"] and found["loss_patch"] == 0
    assert all(torch.isfinite(value) for value in found.values())


def test_the_mask_token_learns_and_the_teacher_sees_no_mask() -> None:
    method = dinov2()
    views = seen(method)
    first = method.loss(views, 0.5)
    first["loss"].backward()
    assert method.mask_token.grad is not None and method.mask_token.grad.abs().max() > 0
    teacher = method.backbone, method.teacher_head, method.teacher_patch_head
    assert all(p.grad is None for module in teacher for p in module.parameters())
    with torch.no_grad():
        method.mask_token.normal_()
    second = method.loss(views, 0.5)
    assert second["loss"] != first["loss"]
    for name in ("teacher_entropy", "teacher_spread", "patch_entropy", "patch_spread"):
        assert second[name] == first[name]


def test_the_teacher_follows_the_student_in_all_its_parts() -> None:
    method = dinov2()
    student = method.student, method.student_head, method.student_patch_head
    teacher = method.backbone, method.teacher_head, method.teacher_patch_head
    before = [p.clone() for module in teacher for p in module.parameters()]
    with torch.no_grad():
        for module in student:
            for p in module.parameters():
                p += 1
    method.after_step(0.0)
    after = [p for module in teacher for p in module.parameters()]
    assert all(torch.allclose(new, old + 0.1, atol=1e-6) for old, new in zip(before, after, strict=True))


def test_backbone_and_heads_are_clipped_by_their_whole_gradient_and_prototypes_stand_still_at_first() -> None:
    method = dinov2(clip=1e-3, freeze_last_layer=0.1)
    method.loss(seen(method), 0.2)["loss"].backward()
    vit = [*method.student.parameters(), method.mask_token]
    parts = vit, [*method.student_head.parameters()], [*method.student_patch_head.parameters()]
    before = [[p.grad.clone() for p in part if p.grad is not None] for part in parts]
    method.before_step(0.2)
    for part, old in zip(parts, before, strict=True):
        new = [p.grad for p in part if p.grad is not None]
        assert torch.nn.utils.get_total_norm(new).item() == pytest.approx(1e-3, rel=1e-2)
        ratio = new[0].norm() / old[0].norm()
        assert all(torch.allclose(g, ratio * o, rtol=1e-3, atol=1e-9) for g, o in zip(new, old, strict=True))
    assert method.student_head.last_layer.weight_v.grad is not None
    method.before_step(0.05)
    for head in (method.student_head, method.student_patch_head):
        assert all(p.grad is None for p in head.last_layer.parameters())


def test_published_constants_are_the_defaults_and_wrong_values_are_refused() -> None:
    config = methods.config_class("dinov2")
    c = config()
    assert (c.prototypes, c.patch_prototypes, c.koleo_weight, c.sinkhorn_iterations) == (65536, 65536, 0.1, 3)
    assert (c.global_scale, c.local_scale, c.local_count, c.momentum) == ((0.32, 1.0), (0.05, 0.32), 8, 0.992)
    optim = c.optim("vit")
    assert (optim.layer_decay, optim.patch_rate) == (0.9, 0.2)
    assert optim.lr_scaling == "sqrt" and optim.lr * math.sqrt(1024 / 256) == pytest.approx(4e-3)
    for wrong in ({"mask_ratio": (0.5, 0.1)}, {"sinkhorn_iterations": 0}, {"koleo_floor": 0.0}, {"mask_smallest": 0},
                  {"momentum": 30}):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(wrong))):
            config(**wrong)


def test_stochastic_depth_is_the_students_alone() -> None:
    torch.manual_seed(0)
    vit = backbones.create("test_vit", img_size=48, patch_size=8, drop_path=0.5)
    method = DINOv2(methods.config_class("dinov2")(**METHODS["dinov2"]), vit).train()
    x = torch.randn(8, 3, 48, 48)
    assert torch.equal(all_tokens(method.backbone, x), all_tokens(method.backbone, x))
    assert not torch.equal(all_tokens(method.student, x), all_tokens(method.student, x))


@pytest.mark.slow  # half a minute and more; two ranks are compared in test_two_ranks too
def test_one_and_two_processes_train_the_same_network(tmp_path: Path) -> None:
    """Under DDP, with so few masks that a process has none in some steps; SGD, as Adam would hide a wrong factor."""
    settings = {"steps": 4, "precision": "64-true", "accelerator": "cpu", "optimizer": "sgd", "lr": 1e-2}
    recipe = small("dinov2", {**VIT, "drop_path": 0.0}, log_every_steps=1, **settings)
    recipe["method"] |= {"mask_probability": 0.1, "local_size_px": 48}
    recipe["data"] = "synthetic:16"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pretrain(recipe, out=tmp_path / "one")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
             "ssl_pretrain.cli", "pretrain", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [Checkpoints(tmp_path / name / "checkpoints").newest() for name in ("one", "two")]
    assert states[0] is not None and states[1] is not None
    one, two = states[0]["method"], states[1]["method"]
    assert set(one) == set(two)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-10
    logs = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    lines = [[found for line in log if "train/loss" in (found := json.loads(line))] for log in logs]
    for a, b in zip(*lines, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)
