"""Distillation: the three terms, a teacher that stands still, and a checkpoint that knows it without holding it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHODS, VIT, small
from test_methods import build, seen
from torch.nn import functional as F

from ssl_pretrain import artefact, backbones, pretrain
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import distill as module
from ssl_pretrain.methods.distill import Distill, Teacher, regression_loss, relation_loss, resized
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.recipe import load


def distill(backbone: str = "test_resnet", **changes: object) -> Distill:
    method = build("distill", backbone, **changes)
    assert isinstance(method, Distill)
    return method


def network(method: Distill) -> Backbone:
    (held,) = method.teacher._held
    return held


def lifted(method: Distill, count: int = 4) -> Any:
    views = seen(method, count)
    views.crops["view"] = views.crops["view"].double()
    return views


# The loss


def test_the_loss_is_its_formula() -> None:
    """Once more, by hand, with a teacher that has another normalisation, another width and a finer map."""
    method = distill(teacher="random:test_vit", features=2.0, maps=3.0, relations=5.0).double()
    views = lifted(method, 6)
    x = views.crops["view"][0]
    teacher, student = network(method), method.backbone
    with torch.no_grad():
        t, t_map = teacher(x), teacher.maps(x)[-1]
    t = (t - t.mean(0)) / (t.var(0, unbiased=False) + 1e-8).sqrt()
    t_map = t_map - t_map.mean((0, 2, 3), keepdim=True)
    t_map = t_map / (t_map.square().mean((0, 2, 3), keepdim=True) + 1e-8).sqrt()
    drawn = F.interpolate(method.map_head(student.maps(x)[-1]), t_map.shape[-2:], mode="bilinear")
    features = (method.head(student(x)) - t).square().sum() / t.square().sum()
    maps = (drawn - t_map).square().sum() / t_map.square().sum()
    s, kept, own = (student(x) - student(x).mean(0)).detach(), 0.0, 0.0
    for i in range(6):
        for j in range(i):
            of_teacher, of_student = (float(v[i] @ v[j] / v[i].norm() / v[j].norm()) for v in (t, s))
            kept, own = kept + (of_student - of_teacher) ** 2, own + of_teacher**2
    found = method.loss(views, 0.5)
    assert abs(found["features"] - features) < 1e-12
    assert abs(found["maps"] - maps) < 1e-12
    assert abs(found["relations"] - kept / own) < 1e-10
    assert abs(found["loss"] - (2 * features + 3 * maps + 5 * kept / own)) < 1e-9


def test_a_perfect_student_costs_nothing() -> None:
    t = torch.randn(6, 5, dtype=torch.float64)
    assert regression_loss(t, t) == 0
    assert relation_loss(3 * t + 7, t) < 1e-12  # similarities know neither place nor scale
    turn = torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64)).Q
    assert relation_loss(t @ turn.T, t) < 1e-12  # nor the axes, nor their number


@pytest.mark.parametrize("teacher", ["random:test_vit", "random:test_resnet"])
def test_a_collapsed_student_costs_chance(teacher: str) -> None:
    method = distill(teacher=teacher)
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    found, chance = method.loss(seen(method, 8), 0.5), method.chance(8)
    assert chance["loss"] == 3
    assert {name: found[name].item() for name in chance} == pytest.approx(chance, abs=1e-5)


def test_a_term_of_weight_0_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    method = distill(maps=0.0, relations=0.0)
    with monkeypatch.context() as patched:
        patched.setattr(type(method.backbone), "maps", None)  # one pass of each network is enough
        assert set(method.loss(seen(method), 0.5)) == {"loss", "features"}
    assert method.chance(8) == {"loss": 1.0, "features": 1.0}
    method = distill(features=0.0)
    assert set(method.loss(seen(method), 0.5)) == {"loss", "maps", "relations"}
    assert not any(name.startswith("head.") for name, _ in method.named_parameters())


@pytest.mark.parametrize(("given", "size"), [((7, 7), (14, 14)), ((8, 6), (4, 3)), ((4, 4), (4, 4)), ((1, 1), (3, 5))])
def test_maps_are_resized_as_interpolate_does(given: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *given, dtype=torch.float64)
    theirs = F.interpolate(x, size, mode="bilinear", antialias=True)
    assert (resized(x, size) - theirs).abs().max() < 1e-12


def test_the_losses_are_exact_under_autocast() -> None:
    s, t = torch.randn(2, 32, 16)
    exact = regression_loss(s.double(), t.double()).item(), relation_loss(s.double(), t.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert regression_loss(s, t).item() == pytest.approx(exact[0], rel=1e-5)
        assert relation_loss(s, t).item() == pytest.approx(exact[1], rel=1e-5)
        assert relation_loss(s.bfloat16(), t.bfloat16()).dtype == torch.float32
        method = distill()
        assert method.loss(seen(method), 0.5)["loss"].dtype == torch.float32


# The teacher


def test_the_teacher_stands_still_whatever_is_asked_of_the_method() -> None:
    method = distill().train()
    teacher = network(method)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        method.loss(seen(method, seed=step), 0.5)["loss"].backward()
        optimizer.step()
        method.after_step(0.5)
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_no_gradient_reaches_what_the_teacher_says() -> None:
    s, t = torch.randn(2, 4, 3).unbind()
    s.requires_grad_()
    t.requires_grad_()
    (regression_loss(s, t) + relation_loss(s, t)).backward()
    assert t.grad is None and s.grad is not None


def test_the_teacher_is_fed_as_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    method = distill("test_resnet", teacher="random:resnet10t")  # ImageNet's mean and deviation; the student has 0.5
    teacher, student = network(method), method.backbone
    assert teacher.input.mean != student.input.mean
    raw = torch.rand(2, 3, 32, 32)

    def normalised(spec: backbones.InputSpec) -> torch.Tensor:
        return (raw - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)

    given: list[torch.Tensor] = []
    monkeypatch.setattr(teacher, "forward", lambda x: given.append(x) or torch.randn(2, 512))
    method.teacher.features(normalised(student.input))
    assert torch.allclose(given[0], normalised(teacher.input), atol=1e-5)


def test_the_teacher_goes_where_the_method_goes() -> None:
    method = distill().double()
    assert {p.dtype for p in network(method).parameters()} == {torch.float64}
    assert method.to("meta").teacher.scale_311.is_meta and all(p.is_meta for p in network(method).parameters())


def test_the_teacher_is_what_its_folder_holds(tmp_path: Path) -> None:
    torch.manual_seed(3)
    backbone = backbones.create("test_convnext").eval()
    folder = artefact.write(tmp_path / "run" / "artefact", backbone, {})
    for spec in (folder, folder.parent):  # an artefact, a run
        method = distill(teacher=str(spec))
        x = torch.randn(4, 3, 32, 32)
        assert torch.equal(network(method)(x), backbone(x))
        assert method.teacher.features(x).mean(0).abs().max() < 1e-5


def test_what_torch_draws_does_not_depend_on_the_teacher() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    for teacher in ("random:test_vit", "random:test_resnet"):
        torch.manual_seed(5)
        module._resolved(module.Config(teacher=teacher, size_px=32))
        assert torch.equal(torch.rand(3), expected)


# The checkpoint


def test_the_state_holds_no_teacher_and_knows_its_own() -> None:
    method = distill("test_resnet", teacher="random:test_vit")
    state = method.state_dict()
    assert [name for name in state if name.startswith("teacher")] == ["teacher._extra_state"]
    torch.manual_seed(9)
    again = Distill(method.config, backbones.create("test_resnet"))
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert again.loss(seen(again), 0.5)["loss"] == method.loss(seen(method), 0.5)["loss"]
    other = distill("test_resnet", teacher="random:test_vit")
    with torch.no_grad():
        next(network(other).parameters()).flatten()[0] += 1e-6
    other.teacher = Teacher(network(other), other.backbone.input)
    with pytest.raises(UsageError, match="does not hold the weights that the run began with"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="_extra_state"):
        again.load_state_dict({name: value for name, value in state.items() if "extra" not in name})


def recipe(teacher: Path, backbone: Any, **train: Any) -> dict[str, Any]:
    made = small("distill", backbone, **train)
    return {**made, "method": {**made["method"], "teacher": str(teacher)}}


@pytest.mark.parametrize("backbone", ["test_resnet", VIT])
def test_a_run_from_a_run_stops_and_continues_to_the_same_bits(backbone: Any, pack: Pack, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    artefact.write(teacher / "artefact", backbones.create("test_convnext"), {})
    wanted = recipe(teacher, backbone, save_every_steps=3)
    pretrain(wanted, data=pack.folder, out=tmp_path / "a")
    kept = Checkpoints(tmp_path / "a" / "checkpoints")
    whole = kept.newest()
    for path in kept.folder.glob("step_000000006*"):
        path.unlink()
    assert pretrain(wanted, data=pack.folder, out=tmp_path / "a").step == 6
    again = kept.newest()
    assert whole is not None and again is not None and whole["step"] == again["step"] == 6
    assert all(torch.equal(value, again["method"][name]) for name, value in whole["method"].items())
    artefact.write(teacher / "artefact", backbones.create("test_convnext"), {})  # other weights
    with pytest.raises(UsageError, match="does not hold the weights"):
        pretrain(wanted, data=pack.folder, out=tmp_path / "a")


def test_a_skipped_step_changes_nothing() -> None:
    method, calm = distill(), distill()
    buffers = [buffer.clone() for buffer in method.buffers()]
    broken = seen(method)
    broken.crops["view"].fill_(math.nan)
    method.loss(broken, 0.1)["loss"].backward()
    for buffer, before in zip(method.buffers(), buffers, strict=True):  # as the loop does
        buffer.copy_(before)
    assert method.loss(seen(method, seed=1), 0.2)["loss"] == calm.loss(seen(calm, seed=1), 0.2)["loss"]
    assert all(torch.equal(value, calm.state_dict()[key]) for key, value in method.state_dict().items())


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": ""}, "method.teacher is missing"),
        ({"maps": -1.0}, "at least 0"),
        ({"hidden_dim": 0}, "at least 1"),
        ({"features": 0.0, "relations": 0.0}, "are both 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load({"method": {"name": "distill", **METHODS["distill"], **changes}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "runs/no/such"}, "method.teacher: .*does not exist"),
        ({"teacher": "random:test_vitt"}, "method.teacher: .*did you mean"),
        ({"teacher": "random:test_vit", "size_px": 40}, "no multiple of the teacher's patches"),
    ],
)
def test_a_teacher_that_cannot_teach_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        distill("test_resnet", **changes)
