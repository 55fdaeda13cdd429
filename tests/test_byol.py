"""BYOL: its loss, who is trained and who follows, and what others get wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import METHODS, VIT
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from test_methods import build, seen

from ssl_pretrain import backbones, methods
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views
from ssl_pretrain.methods.byol import BYOL, byol_loss, spread
from ssl_pretrain.train.recipe import load


def byol(backbone: str = "test_resnet", **changes: object) -> BYOL:
    method = build("byol", backbone, **changes)
    assert isinstance(method, BYOL)
    return method


def followers(method: BYOL) -> list[torch.nn.Parameter]:
    return [*method.target.parameters(), *method.target_projector.parameters()]


def test_the_loss_is_the_papers_formula_and_lightlys() -> None:
    q, z = torch.randn(2, 6, 5, dtype=torch.float64)
    unit_q, unit_z = (v / v.square().sum(1, keepdim=True).sqrt() for v in (q, z))
    assert abs(byol_loss(q, z) - (unit_q - unit_z).square().sum(1).mean()) < 1e-12
    assert abs(byol_loss(q, z) - (2 + 2 * NegativeCosineSimilarity()(q, z))) < 1e-12


def test_each_view_predicts_the_others_target() -> None:
    method = byol().double()
    with torch.no_grad():  # so that online and target are not the same networks
        for p in followers(method):
            p += 0.1 * torch.randn_like(p)
    x0, x1 = (x[0].double() for x in seen(method).crops.values())
    views = Views({"view_0": x0[None], "view_1": x1[None]}, seen(method).key_B2)
    parts = copy.deepcopy(method)
    online0, online1 = (parts.predictor(parts.projector(parts.backbone(x))) for x in (x0, x1))
    target0, target1 = (parts.target_projector(parts.target(x)) for x in (x0, x1))

    def distance(q: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (q / q.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)).square().sum(1).mean()

    expected = distance(online0, target1) + distance(online1, target0)
    assert abs(method.loss(views, 0.5)["loss"] - expected) < 1e-12
    exchanged = Views({"view_0": x1[None], "view_1": x0[None]}, views.key_B2)
    assert abs(method.loss(exchanged, 0.5)["loss"] - expected) < 1e-12


def test_the_views_never_share_a_batch_norm() -> None:
    method = byol()
    rows: list[int] = []
    for module in method.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    method.loss(seen(method, 4), 0.5)
    assert rows == [4] * 6  # projector, predictor and target projector, for each view


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_gradients_reach_the_online_network_alone(backbone: str) -> None:
    method = byol(backbone)
    method.loss(seen(method), 0.5)["loss"].backward()
    online = [*method.backbone.parameters(), *method.projector.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None for p in online)
    assert all(p.grad is None and not p.requires_grad for p in followers(method))
    assert len(online) + len(followers(method)) == len(list(method.parameters()))


def test_the_loss_itself_detaches_the_target() -> None:
    q, z = torch.randn(2, 3, 8).unbind()
    q.requires_grad_()
    z.requires_grad_()
    byol_loss(q, z).backward()
    assert z.grad is None and q.grad is not None


def test_the_target_moves_in_after_step_alone_and_by_the_cosine() -> None:
    method = byol(momentum=0.9)
    before = [p.clone() for p in followers(method)]
    method.loss(seen(method), 0.5)["loss"].backward()
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1).step()
    method.before_step(0.5)
    assert all(torch.equal(old, new) for old, new in zip(before, followers(method), strict=True))
    method.after_step(0.5)  # tau = 1 - 0.1 / 2
    online = [*method.backbone.parameters(), *method.projector.parameters()]
    for old, new, now in zip(before, followers(method), online, strict=True):
        assert torch.allclose(new, 0.95 * old + 0.05 * now, atol=1e-6)
    method.after_step(1.0)  # tau = 1
    for old, new, now in zip(before, followers(method), online, strict=True):
        assert torch.allclose(new, 0.95 * old + 0.05 * now, atol=1e-6)


def test_what_chance_and_collapse_cost() -> None:
    method = byol()
    q, z = torch.randn(2, 4096, 64)
    assert (byol_loss(q, z) + byol_loss(z, q)).item() == pytest.approx(method.chance(8)["loss"], abs=0.02)
    assert spread(z).item() == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        for head in (method.projector, method.target_projector, method.predictor):
            for p in head.parameters():
                p.zero_()
            head.layers[1].bias += 1  # all hidden values 1, so all outputs the same
            head.layers[3].weight += 1
    collapsed = method.loss(seen(method), 0.5)
    assert collapsed["loss"].item() == pytest.approx(0, abs=1e-6)
    assert collapsed["target_spread"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_skipped_step_changes_nothing(backbone: str) -> None:
    method, calm = byol(backbone), byol(backbone)
    buffers = [buffer.clone() for buffer in method.buffers()]
    broken = seen(method)
    broken.crops["view_0"].fill_(math.nan)
    method.loss(broken, 0.1)["loss"].backward()
    for buffer, before in zip(method.buffers(), buffers, strict=True):  # as the loop does
        buffer.copy_(before)
    method.zero_grad()
    for m in (method, calm):
        m.loss(seen(m, seed=1), 0.2)["loss"].backward()
        m.after_step(0.2)
    assert all(torch.equal(value, calm.state_dict()[key]) for key, value in method.state_dict().items())
    gradients = zip(method.parameters(), calm.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients if a.grad is not None and b.grad is not None)


def test_the_loss_is_exact_under_autocast() -> None:
    q, z = torch.randn(2, 64, 32)
    exact = byol_loss(q.double(), z.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert byol_loss(q, z).item() == pytest.approx(exact, rel=1e-5)
        assert byol_loss(q.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_stochastic_depth_is_the_online_networks_alone() -> None:
    torch.manual_seed(0)
    backbone = backbones.create("test_vit", img_size=32, patch_size=8, drop_path=0.5)
    method = BYOL(methods.config_class("byol")(**METHODS["byol"]), backbone).train()
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(method.target(x), method.target(x))
    assert not torch.equal(method.backbone(x), method.backbone(x))


def test_the_heads_are_lightlys_but_for_a_bias() -> None:
    method = byol()
    pairs = (method.projector, BYOLProjectionHead(96, 32, 16)), (method.predictor, BYOLPredictionHead(16, 32, 16))
    for ours, theirs in pairs:
        missing = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert (missing.missing_keys, missing.unexpected_keys) == (["layers.3.bias"], [])
        torch.nn.init.zeros_(theirs.layers[3].bias)
        x = torch.randn(4, ours.layers[0].in_features)
        assert torch.equal(ours(x), theirs(x))


def test_published_constants_are_the_defaults() -> None:
    config = methods.config_class("byol")()
    assert (config.momentum, config.hidden_dim, config.output_dim) == (0.996, 4096, 256)
    assert [(spec.blur_p, spec.solarize_p) for spec in config.views()] == [(1.0, 0.0), (0.1, 0.2)]
    whole = load({"method": "byol", "train": {"batch_size": 4096}})
    assert whole.optim("convnet").lr == pytest.approx(3.2)  # 0.2 x 4096 / 256
    assert (whole.optim("convnet").optimizer, whole.optim("convnet").weight_decay) == ("lars", 1.5e-6)


@pytest.mark.parametrize(
    ("changes", "words"), [({"momentum": 1.5}, "between 0 and 1"), ({"output_dim": 0}, "at least 1")]
)
def test_what_cannot_be_is_refused_with_the_recipe(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load({"method": {"name": "byol", **changes}, "backbone": VIT})
