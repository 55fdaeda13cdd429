"""Every method: its contract, its loss against an independent formula, and the details that others get wrong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import METHODS, VIT, corners_of
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import MaskedVisionTransformerTIMM
from torch.nn import functional as F

from ssl_pretrain import backbones, methods, rng
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, Views
from ssl_pretrain.methods._distillation import BatchMean
from ssl_pretrain.methods.dino import DINO, dino_loss
from ssl_pretrain.methods.mae import MAE, mae_loss
from ssl_pretrain.methods.simclr import nt_xent
from ssl_pretrain.named import names


def build(name: str, backbone: str = "", **changes: object) -> Method:
    torch.manual_seed(0)
    config = methods.config_class(name)(**{**METHODS.get(name, {}), **changes})
    vit = {"img_size": config.views()[0].size_px, "patch_size": VIT["patch_size"], "pool": config.vit().pool}
    backbone = backbone or ("test_resnet" if config.masks_maps else "test_vit")
    made = backbones.create(backbone, **(vit if backbones.maskable(backbone) else {}))
    return methods.create(config, made)


def seen(method: Method, count: int = 4, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    specs = method.config.views()
    crops = {s.name: torch.randn(s.count, count, 3, s.size_px, s.size_px, generator=generator) for s in specs}
    return Views(crops, rng.fold_in(rng.key(seed, "test"), np.arange(count)), corners_of(specs, count))


@pytest.mark.parametrize("name", names("methods"))
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet", "test_convnext"])
def test_every_method_trains_every_backbone_it_takes(name: str, backbone: str) -> None:
    config = methods.config_class(name)
    if config.masks_maps if backbones.maskable(backbone) else config.masks_patches:
        with pytest.raises(UsageError, match="plain ViT"):
            build(name, backbone)
        return
    method = build(name, backbone)
    losses = method.loss(seen(method), 0.5)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    silent = [n for n, p in trained.items() if p.grad is None]
    assert not silent, f"no gradient reaches {silent}"
    method.before_step(0.5)
    method.after_step(0.5)
    assert set(method.chance(8)) <= set(losses)
    method.eval()
    with torch.no_grad():
        assert all(image.shape[1] == 3 for image in method.pictures(seen(method)).values())


@pytest.mark.parametrize("name", names("methods"))
def test_a_run_of_steps_lowers_the_loss(name: str) -> None:
    # With teacher and centre held still, the loss of DINO and iBOT is a plain cross entropy, which has to fall.
    method = build(name, **({"momentum": 1.0, "center_momentum": 1.0} if name in ("dino", "ibot") else {}))
    views = seen(method, 8)
    if type(method.config).masks_maps:  # its patches are too large for noise to be learned by heart
        coarse = views.crops["view"][:, :, :1, ::8, ::8]
        views.crops["view"].copy_(coarse.repeat_interleave(8, 3).repeat_interleave(8, 4))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    found = []
    for step in range(40):
        loss = method.loss(views, step / 40)["loss"]
        found.append(loss.item())
        loss.backward()
        method.before_step(step / 40)
        optimizer.step()
        method.after_step(step / 40)
        optimizer.zero_grad()
    assert found[-1] < 0.9 * found[0]


# SimCLR


def test_nt_xent_is_the_papers_formula() -> None:
    z0, z1 = torch.randn(2, 6, 5, dtype=torch.float64)
    z = F.normalize(torch.cat([z0, z1]))
    similarity = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    positive = torch.arange(12).roll(6)
    expected = (similarity.logsumexp(1) - similarity[torch.arange(12), positive]).mean()
    assert abs(nt_xent(z0, z1, 0.3) - expected) < 1e-12
    assert abs(nt_xent(z0, z1, 0.3) - NTXentLoss(0.3)(z0, z1)) < 1e-12


def test_collapsed_projections_cost_chance() -> None:
    z = torch.ones(8, 4)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(build("simclr").chance(8)["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_losses_are_exact_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 64, 32)
    teacher, student, centre = torch.randn(2, 64, 256), torch.randn(4, 64, 256), torch.zeros(256)

    def loss(autocast: bool, kind: torch.dtype) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "simclr":
                return nt_xent(z0.to(kind), z1.to(kind), 0.1)
            return dino_loss(teacher.to(kind), student.to(kind), centre.to(kind), 0.04, 0.1)

    assert loss(True, torch.float32).item() == pytest.approx(loss(False, torch.float64).item(), rel=1e-5)
    assert loss(True, torch.bfloat16).dtype == torch.float32


# DINO


def test_dino_loss_and_centre_are_lightlys() -> None:
    teacher, student = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(6, 5, 16, dtype=torch.float64)
    theirs = DINOLoss(16, center_momentum=0.9).double()
    theirs.center.copy_(torch.randn(16, dtype=torch.float64) / 10)
    centre = theirs.center.view(-1).clone()
    ours = dino_loss(teacher, student, centre, 0.0625, 0.1)  # lightly holds the temperature in float32
    assert abs(ours - theirs(list(teacher), list(student), teacher_temp=0.0625)) < 1e-12
    assert (centre.lerp(teacher.mean((0, 1)), 0.1) - theirs.center.view(-1)).abs().max() < 1e-12


def test_an_even_teacher_costs_chance() -> None:
    loss = dino_loss(torch.zeros(2, 3, 64), torch.zeros(4, 3, 64), torch.zeros(64), 0.04, 0.1)
    assert loss.item() == pytest.approx(build("dino").chance(8)["loss"], abs=1e-5)


def dino(**changes: object) -> DINO:
    method = build("dino", **changes)
    assert isinstance(method, DINO)
    return method


def test_no_gradient_reaches_the_teacher_and_the_teacher_follows_the_student() -> None:
    method = dino(momentum=0.9)
    before = [p.clone() for p in method.backbone.parameters()]
    method.loss(seen(method), 0.0)["loss"].backward()
    assert all(p.grad is None for p in [*method.backbone.parameters(), *method.teacher_head.parameters()])
    with torch.no_grad():
        for p in method.student.parameters():
            p += 1
    method.after_step(0.0)
    for old, new in zip(before, method.backbone.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * (old + 1), atol=1e-6)


def test_the_loss_itself_detaches_the_teacher() -> None:
    teacher, student = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 3, 8, requires_grad=True)
    dino_loss(teacher, student, torch.zeros(8), 0.04, 0.1).backward()
    assert teacher.grad is None and student.grad is not None


def test_the_centre_moves_after_the_loss_has_used_it() -> None:
    method = dino()
    views = seen(method)
    first = method.loss(views, 0.1)["loss"]
    assert method.centre_K.abs().max() == 0
    assert method.loss(views, 0.2)["loss"] == first  # a step that was skipped in between left nothing behind
    method.after_step(0.2)
    logits = method.teacher_head(method.backbone(torch.cat([views.crops["global_0"][0], views.crops["global_1"][0]])))
    # The teacher followed by one step of EMA, yet the student had not moved: it is the same teacher.
    assert torch.allclose(method.centre_K, 0.1 * logits.mean(0), atol=1e-6)


def test_a_skipped_step_does_not_enter_the_centre() -> None:
    method, calm = dino(), dino()
    broken = seen(method)
    broken.crops["global_0"].fill_(math.nan)
    method.loss(broken, 0.1)
    for m in (method, calm):
        m.loss(seen(m, seed=1), 0.2)
        m.after_step(0.2)
    assert torch.equal(method.centre_K, calm.centre_K)


def test_clipping_is_per_tensor_and_the_prototypes_stand_still_at_first() -> None:
    method = dino(clip=1e-3, freeze_last_layer=0.1)
    method.loss(seen(method), 0.05)["loss"].backward()
    method.before_step(0.05)
    norms = [p.grad.norm().item() for p in method.student.parameters() if p.grad is not None]
    assert max(norms) <= 1e-3 + 1e-8
    assert sum(n > 0.9e-3 for n in norms) > 5, "each tensor is clipped by itself, not all together"
    assert all(p.grad is None for p in method.student_head.last_layer.parameters())
    method.loss(seen(method), 0.2)["loss"].backward()
    method.before_step(0.2)
    assert any(p.grad is not None for p in method.student_head.last_layer.parameters())


def test_the_prototypes_have_unit_length() -> None:
    method = dino()
    method.student_head.last_layer.weight_v.data *= 7
    method.student_head(torch.zeros(1, 64))
    assert torch.allclose(method.student_head.last_layer.weight.norm(dim=1), torch.ones(64), atol=1e-5)
    assert not method.student_head.last_layer.weight_g.requires_grad


def test_stochastic_depth_is_the_students_alone() -> None:
    torch.manual_seed(0)
    backbone = backbones.create("test_vit", img_size=32, patch_size=8, drop_path=0.5)
    method = DINO(methods.config_class("dino")(**METHODS["dino"]), backbone).train()
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(method.backbone(x), method.backbone(x))
    assert not torch.equal(method.student(x), method.student(x))


def test_teacher_temperature_rises_linearly() -> None:
    method = dino(teacher_temperature_start=0.04, teacher_temperature=0.07, teacher_temperature_warmup=0.3)
    found = [method.teacher_temperature(p) for p in (0.0, 0.15, 0.3, 1.0)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


# MAE


def mae(**changes: object) -> MAE:
    method = build("mae", **changes)
    assert isinstance(method, MAE)
    return method


def test_the_encoder_sees_only_kept_patches_and_equals_lightlys() -> None:
    method = mae()
    views = seen(method)
    keep, masked = method.mask(views)
    assert keep.shape == (4, 4) and masked.shape == (4, 12)  # 16 patches, a quarter kept
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(16).expand(4, -1))
    encoder = method.encoder
    theirs = MaskedVisionTransformerTIMM(
        vit=backbones.create("test_vit", img_size=32, patch_size=8, pool="avg").network
    )
    theirs.vit.load_state_dict(encoder.weights())
    x = views.crops["view"][0]
    with_class_token = torch.cat([torch.zeros(4, 1, dtype=torch.long), keep + 1], 1)
    found = encoder.tokens(x, keep)
    assert (found - theirs.encode(images=x, idx_keep=with_class_token)).abs().max() < 1e-5
    changed = x.clone()
    for b in range(4):  # what is masked cannot be seen
        for patch in masked[b].tolist():
            row, column = divmod(patch, 4)
            changed[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 9
    assert torch.equal(encoder.tokens(changed, keep), found)


def test_masks_belong_to_the_image_and_not_to_the_batch() -> None:
    method = mae()
    views = seen(method, 8)
    keep, _ = method.mask(views)
    part, _ = method.mask(Views({"view": views.crops["view"][:, 3:5]}, views.key_B2[3:5]))
    assert torch.equal(keep[3:5], part)


def test_mae_loss_is_the_authors() -> None:
    prediction, target = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    expected = ((prediction - (target - mean) / (var + 1e-6) ** 0.5) ** 2).mean(-1).mean()
    assert abs(mae_loss(prediction, target, norm_pix=True) - expected) < 1e-12


def test_predicting_nothing_costs_chance() -> None:
    loss = mae_loss(torch.zeros(4, 12, 192), torch.randn(4, 12, 192), norm_pix=True)
    assert loss.item() == pytest.approx(mae().chance(8)["loss"], abs=0.01)


def test_the_loss_is_over_masked_patches_alone() -> None:
    method = mae()
    views = seen(method)
    before = method.loss(views, 0.0)["loss"]
    keep, masked = method.mask(views)

    def spoil(index_BK: torch.Tensor) -> torch.Tensor:
        def add(module: object, given: object, drawn_BNP: torch.Tensor) -> torch.Tensor:
            places = 1 + index_BK.unsqueeze(-1).expand(-1, -1, drawn_BNP.shape[-1])  # behind the class token
            return drawn_BNP.scatter_add(1, places, torch.ones_like(drawn_BNP))

        hook = method.decoder_pred.register_forward_hook(add)
        loss = method.loss(views, 0.0)["loss"]
        hook.remove()
        return loss

    assert spoil(keep) == before
    assert spoil(masked) != before


def test_positions_are_fixed_and_weights_begin_as_the_authors() -> None:
    method = mae()
    assert not method.encoder.position_embedding.requires_grad
    assert not method.decoder.pos_embed.requires_grad
    patch_embed = method.encoder.network.patch_embed.proj.weight.flatten(1)
    assert patch_embed.abs().max().item() == pytest.approx(
        (6 / sum(patch_embed.shape)) ** 0.5, rel=0.01
    )  # Xavier's bound


def test_reconstructions_stand_beside_their_image() -> None:
    method = mae()
    views = seen(method)
    drawn = method.pictures(views)["reconstruction"]
    assert drawn.shape == (4 * 3, 3, 32, 32)
    _, image = drawn[1], drawn[2]
    assert torch.allclose(image, views.crops["view"][0, 0], atol=1e-6)


def test_configs_are_frozen_and_published_constants_are_the_defaults() -> None:
    config = methods.config_class("dino")()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prototypes = 3
    assert (config.prototypes, config.local_count, config.momentum, config.clip) == (65536, 8, 0.996, 3.0)
    assert methods.config_class("mae")().mask_ratio == 0.75
    assert methods.config_class("simclr")().scale == (0.08, 1.0)


def test_a_centre_may_start_from_the_first_batch() -> None:
    mean = BatchMean()
    zero, batch = torch.zeros(2), torch.zeros(2)
    for logits in (torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])):
        for centre, start in ((zero, "zero"), (batch, "batch")):
            mean.remember(logits, 0.0)
            mean.move(centre, 0.9, start)
    torch.testing.assert_close(zero, torch.tensor([0.09 + 0.2, 0.27 + 0.3]))
    torch.testing.assert_close(batch, torch.tensor([1.1, 3.0]))
