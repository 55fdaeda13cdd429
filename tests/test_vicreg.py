"""VICReg: its three terms against the paper's sums and lightly's loss, and what collapse costs."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VIT
from lightly.loss import VICRegLoss
from lightly.loss.vicreg_loss import covariance_loss as lightlys_covariance
from test_methods import build, seen

from ssl_pretrain import methods
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods.vicreg import VICReg, covariance_loss, vicreg_terms
from ssl_pretrain.train.recipe import load


def vicreg(backbone: str = "test_resnet", **changes: object) -> VICReg:
    method = build("vicreg", backbone, **changes)
    assert isinstance(method, VICReg)
    return method


def total(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    invariance, variance, covariance = vicreg_terms(z0, z1)
    return 25 * invariance + 25 * variance + covariance


SHAPES = [(6, 4), (6, 6), (5, 16)]
"""More images than variables, and fewer."""


@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_the_terms_are_the_papers_sums(count: int, width: int) -> None:
    z = torch.randn(2, count, width, dtype=torch.float64)
    views = z.tolist()
    hinges = covariances = 0.0
    for view in views:
        columns = list(zip(*view, strict=True))
        means = [sum(column) / count for column in columns]
        c = [
            [
                sum((a - means[i]) * (b - means[j]) for a, b in zip(columns[i], columns[j], strict=True)) / (count - 1)
                for j in range(width)
            ]
            for i in range(width)
        ]
        hinges += sum(max(0.0, 1 - math.sqrt(c[j][j] + 1e-4)) for j in range(width)) / width
        covariances += sum(c[i][j] ** 2 for i in range(width) for j in range(width) if i != j) / width
    distance = sum((views[0][b][d] - views[1][b][d]) ** 2 for b in range(count) for d in range(width))
    expected = (distance / count / width, hinges / 2, covariances)
    for found, wanted in zip(vicreg_terms(z[0], z[1]), expected, strict=True):
        assert abs(found.item() - wanted) < 1e-12


@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_loss_and_gradient_are_lightlys(count: int, width: int) -> None:
    ours, theirs = (torch.randn(2, count, width, dtype=torch.float64).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    total(ours[0], ours[1]).backward()
    found = VICRegLoss()(theirs[0], theirs[1])
    found.backward()
    assert abs(total(ours[0], ours[1]) - found) < 1e-12
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() < 1e-12


def test_no_matrix_of_all_variables_is_made_for_a_small_batch() -> None:
    """Why it is not lightly's: that would be 80 GB here, and its list of places off the diagonal 160 GB."""
    z = torch.randn(4, 100_000, dtype=torch.float64)
    assert covariance_loss(z).item() > 0
    assert abs(covariance_loss(z[:, :50]) - lightlys_covariance(z[:, :50])) < 1e-12


def test_in_float32_nothing_is_lost_in_the_difference() -> None:
    z = torch.randn(64, 2048, dtype=torch.float64)
    assert covariance_loss(z.float()).item() == pytest.approx(covariance_loss(z).item(), rel=1e-5)
    white = torch.linalg.qr(z.T - z.T.mean(0)).Q * 8  # 2048 images of 64 nearly decorrelated variables
    assert covariance_loss(white.float()).item() == pytest.approx(covariance_loss(white).item(), abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_curves() -> None:
    method = vicreg(invariance=3.0, variance=5.0, covariance=7.0).double()
    views = seen(method)
    views.crops["view"] = views.crops["view"].double()
    found = method.loss(views, 0.5)
    expected = 3 * found["invariance"] + 5 * found["variance"] + 7 * found["covariance"]
    assert abs(found["loss"] - expected) < 1e-12
    assert not found["variance"].requires_grad


def test_a_collapsed_model_costs_chance() -> None:
    method = vicreg()
    torch.nn.init.zeros_(method.head.layers[-1].weight)
    found, chance = method.loss(seen(method), 0.5), method.chance(8)
    assert chance["loss"] == pytest.approx(24.75)
    assert {name: found[name].item() for name in chance} == pytest.approx(chance, abs=1e-5)


def test_each_view_goes_through_the_network_by_itself() -> None:
    method = vicreg()
    rows: list[int] = []
    method.head.layers[1].register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    method.loss(seen(method, 4), 0.5)
    assert rows == [4, 4]


def test_a_skipped_step_changes_nothing() -> None:
    method, calm = vicreg(), vicreg()
    buffers = [buffer.clone() for buffer in method.buffers()]
    broken = seen(method)
    broken.crops["view"].fill_(math.nan)
    method.loss(broken, 0.1)["loss"].backward()
    for buffer, before in zip(method.buffers(), buffers, strict=True):  # as the loop does
        buffer.copy_(before)
    assert method.loss(seen(method, seed=1), 0.2)["loss"] == calm.loss(seen(calm, seed=1), 0.2)["loss"]
    assert all(torch.equal(value, calm.state_dict()[key]) for key, value in method.state_dict().items())


def test_the_terms_are_exact_under_autocast() -> None:
    z0, z1 = torch.randn(2, 64, 32)
    exact = [term.item() for term in vicreg_terms(z0.double(), z1.double())]
    with torch.autocast("cpu", torch.bfloat16):
        assert [term.item() for term in vicreg_terms(z0, z1)] == pytest.approx(exact, rel=1e-5)
        assert all(term.dtype == torch.float32 for term in vicreg_terms(z0.bfloat16(), z1.bfloat16()))


def test_published_constants_are_the_defaults() -> None:
    config = methods.config_class("vicreg")()
    assert (config.invariance, config.variance, config.covariance) == (25, 25, 1)
    assert (config.hidden_dim, config.output_dim, config.head_layers) == (8192, 8192, 3)
    whole = load({"method": "vicreg", "train": {"batch_size": 2048}})
    assert whole.optim("convnet").lr == pytest.approx(1.6)  # 0.2 x 2048 / 256
    kinds = [type(layer).__name__ for layer in vicreg(head_layers=4).head.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 3 + ["Linear"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"covariance": -1.0}, "0 or more"), ({"head_layers": 1}, "at least 2"), ({"output_dim": 1}, "at least 2")],
)
def test_what_cannot_be_is_refused_with_the_recipe(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load({"method": {"name": "vicreg", **changes}, "backbone": VIT})
