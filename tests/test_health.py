"""Guards: each injected fault is named within 50 steps, healthy runs raise nothing, and looking changes no bit."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import METHODS, VIT, small
from rich.console import Console
from test_run import same, state
from torch import Tensor, nn

from ssl_pretrain import pretrain
from ssl_pretrain.backbones.timm import TimmPyramid
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.methods import _distillation, byol, dino, simclr
from ssl_pretrain.named import names
from ssl_pretrain.train import health, loop, setup, spectrum
from ssl_pretrain.train.checkup import Checkup
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.health import GUARDS, Diagnosis, Health, advice, not_finite
from ssl_pretrain.train.journal import Journal
from ssl_pretrain.train.pace import Pace
from ssl_pretrain.train.recipe import load

STEPS = 36
"""Of a faulty run; all are to be named within 50."""
Patch = pytest.MonkeyPatch


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def diagnoses(folder: Path) -> dict[str, int]:
    """Of a run: the names, and the step at which each was first written down."""
    known = {guard.name for guard in GUARDS} | {"not_finite"}
    found: dict[str, int] = {}
    for line in lines(folder):
        for key in line:
            if key.removeprefix("health/") in known:
                found.setdefault(key.removeprefix("health/"), int(line["step"]))
    return found


def said(method: str, pack: Pack, out: Path, words: tuple[str, ...] = (), **train: Any) -> str:
    """Trains, and gives what was printed."""
    text = io.StringIO()
    recipe = small(method, **{"steps": STEPS, "log_every_steps": 1, **train})
    pretrain(recipe, data=pack.folder, out=out, words=words, console=Console(file=text, width=1000))
    return text.getvalue()


# Healthy runs


@pytest.mark.parametrize("method", names("methods"))
def test_a_healthy_run_raises_nothing(method: str, pack: Pack, tmp_path: Path) -> None:
    said(method, pack, tmp_path / "a", steps=36)
    assert diagnoses(tmp_path / "a") == {}
    looks = [line for line in lines(tmp_path / "a") if "health/feature_rank" in line]
    assert [line["step"] for line in looks] == [0, 5, 10, 15, 20, 25, 30, 35]
    assert all(line["health/feature_std"] > 0.05 for line in looks)
    assert ("health/teacher_gap" in looks[-1]) == (method in ("dino", "ibot", "dinov2", "byol"))


@pytest.mark.parametrize("method", ["dino", "simclr"])
def test_looking_changes_no_bit(method: str, pack: Pack, tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = small(method, VIT if method == "dino" else None, log_every_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "LOOK_EVERY", 1)
        always = loop.look

        def look(run: loop.Run, journal: Journal, pace: Pace) -> None:
            pace.owed = True
            always(run, journal, pace)

        patched.setattr(loop, "look", look)
        pretrain(recipe, data=pack.folder, out=tmp_path / "on")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_examine", lambda run, journal, means: None)
        patched.setattr(loop, "look", lambda run, journal, pace: None)
        patched.setattr(Checkup, "often", lambda checkup: {})
        pretrain(recipe, data=pack.folder, out=tmp_path / "off")
    assert sum("health/feature_std" in line for line in lines(tmp_path / "on")) == 7
    assert sum("health/lidar" in line for line in lines(tmp_path / "on")) == 6
    assert not any(key.startswith("health/") for line in lines(tmp_path / "off") for key in line)
    assert same(state(tmp_path / "on"), state(tmp_path / "off"))


@pytest.mark.parametrize("backbone", [VIT, "test_resnet"])
def test_a_look_leaves_generator_statistics_and_modes_alone(backbone: Any, pack: Pack) -> None:
    recipe = load(small("dino", backbone))
    method = setup.method(recipe).train()
    feed = setup.feed(recipe, pack, method, 1, 0, torch.device("cpu"))
    still = next(m for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    random, specs = torch.get_rng_state(), feed.specs
    checkup = Checkup(feed, method)
    first, figures = checkup.often(), checkup.seldom()
    assert torch.equal(torch.get_rng_state(), random) and feed.specs is specs
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert [m for m in method.backbone.modules() if not m.training] == [still]
    assert first == checkup.often() and figures == checkup.seldom()  # always the same views
    assert set(figures) == {"rankme", "alpha_req", "lidar"} and all(math.isfinite(v) for v in figures.values())
    assert first["teacher_gap"] == 0  # nothing has moved yet


# Faults


def no_negatives(patch: Patch) -> None:
    """The softmax has the positive alone: the loss is 0 from the first step on."""
    patch.setattr(simclr, "nt_xent", lambda z0, z1, t: 0 * (z0 + z1).sum())


def only_attraction(patch: Patch) -> None:
    """Views are pulled together, nothing is pushed apart, and no BatchNorm prevents the worst."""
    patch.setattr(simclr, "nt_xent", lambda z0, z1, t: 2 - 2 * nn.functional.cosine_similarity(z0, z1).mean())
    patch.setattr(simclr, "SimCLRProjectionHead", lambda *sizes: nn.Identity())


def constant_encoder(patch: Patch) -> None:
    forward = TimmPyramid.forward
    patch.setattr(TimmPyramid, "forward", lambda self, x_BCHW: 1e-6 * forward(self, x_BCHW) + 1)


def no_centre(patch: Patch) -> None:
    patch.setattr(_distillation.BatchMean, "move", lambda self, *of_the_centre: self._seen.clear())


def no_average(patch: Patch) -> None:
    """The teacher takes the student's weights at each step."""
    patch.setattr(dino, "follow", lambda teacher, student, *_: _distillation.follow(teacher, student, 0.0, 0.0))


def equal_targets(patch: Patch) -> None:
    """What BYOL without a predictor comes to."""
    target = byol.spread
    patch.setattr(byol, "spread", lambda z_ND: 0.01 * target(z_ND))


def nothing(patch: Patch) -> None:
    """The recipe is the fault."""


HOT = ("--method.teacher_temperature", "10", "--method.teacher_temperature_start", "10")
ON_VIT = ("--backbone.name", "test_vit", "--backbone.patch_size", "8")
FAULTS: dict[str, tuple[str, Callable[[Patch], None], tuple[str, ...], dict[str, Any], set[str], str]] = {
    "no negatives": ("simclr", no_negatives, (), {}, {"loss_impossible"}, "lower method.temperature (0.5)"),
    "only attraction": ("simclr", only_attraction, ON_VIT, {}, {"features_collapsed"}, "lower train.lr (0.001)"),
    "constant encoder": ("simclr", constant_encoder, (), {}, {"features_collapsed"}, "train.lr (0.001)"),
    "no centre": ("dino", no_centre, (), {}, {"one_prototype"}, "lower method.center_momentum (0.9)"),
    "no sharpening": ("dino", nothing, HOT, {}, {"uniform_teacher"}, "lower method.teacher_temperature (10)"),
    "no moving average": ("dino", no_average, (), {}, {"teacher_is_student"}, "raise method.momentum (0.9)"),
    "equal targets": ("byol", equal_targets, (), {}, {"targets_collapsed"}, "raise method.momentum (0.9)"),
    "rate x 300": ("simclr", nothing, (), {"lr": 0.3}, {"features_collapsed"}, "lower train.lr (0.3)"),
    "rate x 300, teacher": ("dino", nothing, (), {"lr": 0.3}, {"features_collapsed"}, "lower train.lr (0.3)"),
    "too hot": ("simclr", nothing, ("--method.temperature", "100"), {}, {"loss_at_chance"}, "temperature (100)"),
    "too cold": (
        "simclr",
        nothing,
        ("--method.temperature", "0.001"),
        {},
        {"loss_above_chance"},
        "temperature (0.001)",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_named_with_its_knob(fault: str, pack: Pack, tmp_path: Path, monkeypatch: Patch) -> None:
    method, inject, words, train, expected, knob = FAULTS[fault]
    inject(monkeypatch)
    text = said(method, pack, tmp_path / "a", words, **train)
    found = diagnoses(tmp_path / "a")
    assert expected <= set(found) and all(found[name] <= STEPS for name in expected)
    (told,) = [line for line in text.splitlines() if f": {min(expected)}: " in line]  # once
    assert knob in told and any(digit.isdigit() for digit in told.partition(": ")[2])


def test_a_broken_batch_is_named_before_the_optimizer_moves(pack: Pack, tmp_path: Path, monkeypatch: Patch) -> None:
    drawn = Feed.views

    def poisoned(self: Feed, step: int) -> Any:
        for views in drawn(self, step):
            if step == 3:
                views.crops["view"][0, 0].fill_(math.nan)
            yield views

    monkeypatch.setattr(Feed, "views", poisoned)
    text = said("simclr", pack, tmp_path / "a", steps=6)
    assert diagnoses(tmp_path / "a") == {"not_finite": 4}
    (told,) = [line for line in text.splitlines() if "not_finite" in line]
    assert "step 3: not_finite: loss nan" in told and "see the images of this step" in told
    assert all(torch.isfinite(t).all() for t in state(tmp_path / "a")["method"].values())


def test_stop_saves_and_ends_with_code_70(pack: Pack, tmp_path: Path, monkeypatch: Patch) -> None:
    constant_encoder(monkeypatch)
    with pytest.raises(SslPretrainError, match=r"features_collapsed: feature std 0\.00.*lower train\.lr") as error:
        said("simclr", pack, tmp_path / "a", on_collapse="stop")
    assert error.value.exit_code == 70
    (at,) = {step for name, step in diagnoses(tmp_path / "a").items() if name == "features_collapsed"}
    assert state(tmp_path / "a")["step"] == at < STEPS
    monkeypatch.undo()
    said("simclr", pack, tmp_path / "a", on_collapse="warn")  # the key may change; the run goes on
    assert state(tmp_path / "a")["step"] == STEPS


# The state machine


def fed(values: list[dict[str, float]], chance: dict[str, float] | None = None, **more: Any) -> list[set[str]]:
    """What is wrong after each of these log steps, after the warm-up."""
    judge = Health(100, chance or {"loss": 1.0}, {"train.lr": 0.1}, more.get("crops", 16))
    return [{d.name for d in judge.look(21 + i, v)} for i, v in enumerate(values)]


def test_a_diagnosis_needs_failures_in_a_row_and_is_told_again_after_it_cleared() -> None:
    judge = Health(100, {"loss": 1.0}, {"train.lr": 0.1}, 16)
    news = []
    bad, good = {"target_spread": 0.0}, {"target_spread": 0.5}
    for step, values in enumerate([bad, bad, good, bad, bad, bad, {}, bad, bad, bad, good, bad, bad, bad], 21):
        news.append([d.name for d in judge.news(judge.look(step, values))])
    told = [i for i, names_ in enumerate(news) if names_]
    assert told == [5, 13] and news[5] == ["targets_collapsed"]  # a line without the number clears nothing


def test_losses_are_not_judged_while_a_run_warms_up() -> None:
    judge = Health(1000, {"loss": 1.0}, {}, 16)
    values = {"loss": 1.0, "feature_std": 0.0, "feature_rank": 0.0}
    assert judge.look(0, values) == []
    early = [{d.name for d in judge.look(step, values)} for step in range(1, 101)]
    assert early[0] == set() and all(names_ == {"features_collapsed"} for names_ in early[1:])
    late = [{d.name for d in judge.look(step, values)} for step in range(101, 111)]
    assert "loss_at_chance" not in late[8] and "loss_at_chance" in late[9]


def test_a_loss_of_several_parts_is_at_chance_when_all_are() -> None:
    chance = {"loss": 9.0, "loss_cls": 4.0, "loss_patch": 3.0}
    one = [{"loss": 9.0, "loss_cls": 4.01, "loss_patch": 2.5}] * 12
    assert not any(fed(one, chance))
    assert fed([{**one[0], "loss_patch": 3.01}] * 12, chance)[-1] == {"loss_at_chance"}


def test_a_rank_that_falls_and_a_loss_that_jumps() -> None:
    ranks = [{"feature_rank": r, "feature_std": 0.5} for r in (20.0, 25.0, 15.0, 4.9, 4.9, 10.0)]
    assert fed(ranks) == [set(), set(), set(), set(), {"low_rank"}, set()]
    losses = [{"loss": 0.5 + 0.01 * (i % 3)} for i in range(12)]
    jump = [{"loss": 0.9}] * 3
    assert fed(losses + jump + losses[:1])[-2:] == [{"loss_spike"}, set()]
    assert not any(fed(losses + jump[:2] + losses))
    assert not any(fed([{"loss": math.nan}] * 40))


def test_swings_of_a_fast_teacher_are_named() -> None:
    """The losses of DINO on 370 fields with a momentum of 0.9, at every tenth step; and healthy ones."""
    swinging = [2.153, 0.135, 5.197, 6.837, 6.501, 1.294, 0.132, 4.9]
    found = fed([{"loss": loss} for loss in swinging])
    assert [("loss_swings" in names) for names in found] == [False] * 5 + [True] * 3
    falling = [4.0 / 4**i for i in range(10)]  # to nothing, but never up
    assert not any("loss_swings" in names for names in fed([{"loss": loss} for loss in falling]))
    calm = [6.93 - 0.3 * math.sin(i) for i in range(20)]
    assert not any("loss_swings" in names for names in fed([{"loss": loss} for loss in calm]))


def test_few_crops_cannot_fill_many_prototypes() -> None:
    """16 sharp crops among 65,536 prototypes spread over ln 16 / ln 65536 = 1/4 of them: that is no collapse."""
    chance = {"loss": math.log(65536)}
    sharp = [{"teacher_entropy": 0.0, "teacher_spread": 0.1}] * 6
    assert not any(fed(sharp, chance, crops=16))
    assert fed([{"teacher_entropy": 0.0, "teacher_spread": 0.1}] * 6, {"loss": math.log(64)}, crops=64)[-1] == {
        "one_prototype"
    }
    hidden = [{"patch_entropy": 1.0, "patch_spread": 1.0, "loss_patch": 0.0}] * 12  # no crop had a mask
    assert not any(fed(hidden, {"loss": 5.0, "loss_patch": 4.0}))


def test_every_guard_has_a_knob_that_every_method_has() -> None:
    for method in METHODS:
        recipe = load(small(method))
        for guard in GUARDS:
            used = recipe.flat() | {"train.lr": 0.1, "train.warmup": 0.1}
            if guard.name in ("targets_collapsed", "uniform_teacher", "teacher_is_student", "one_prototype"):
                continue  # of methods with a teacher, which have the keys
            assert advice(guard.knobs, used), (method, guard.name)
    assert str(Diagnosis("a", "b 1", "c")) == "a: b 1; c"
    assert "lower train.lr" in not_finite(1.0, math.inf, 1, 0.3).knob
    assert health.LOOK_EVERY * 10 == 50  # steps, as the cost is stated


# Label-free figures


def test_figures_of_the_spectrum_are_those_of_written_out_numpy() -> None:
    z_IQD = np.random.default_rng(0).normal(size=(30, 4, 6)) * np.arange(1, 7) + np.arange(30)[:, None, None] / 5
    z_ND = z_IQD.reshape(120, 6)
    tensor = torch.from_numpy(z_IQD)

    def effective(values: np.ndarray) -> float:
        p = values / values.sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    assert spectrum.rankme(tensor.flatten(0, 1)) == pytest.approx(effective(np.linalg.svd(z_ND)[1]), rel=1e-9)
    eigen = np.linalg.eigvalsh(np.cov(z_ND.T))[::-1]
    slope = np.polyfit(np.log(np.arange(1, 7)), np.log(eigen), 1, w=np.arange(1, 7) ** -0.5)[0]
    assert spectrum.alpha_req(tensor.flatten(0, 1), first=1) == pytest.approx(-slope, rel=1e-9)
    mean_ID = z_IQD.mean(1)
    between = np.cov(mean_ID.T, bias=True)
    within = np.cov((z_IQD - mean_ID[:, None]).reshape(120, 6).T, bias=True) + 1e-4 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    assert spectrum.lidar(tensor) == pytest.approx(effective(np.linalg.eigvalsh(root @ between @ root)), rel=1e-9)
    unit = z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)
    assert spectrum.spread(tensor.flatten(0, 1)) == pytest.approx(unit.std(0).mean() * 6**0.5, rel=1e-9)
    about = np.linalg.svd(unit - unit.mean(0))[1]
    assert spectrum.centred_rank(tensor.flatten(0, 1)) == pytest.approx(effective(about), rel=1e-9)


def test_features_that_are_all_equal_have_no_rank() -> None:
    z_ND: Tensor = torch.ones(8, 5)
    assert spectrum.centred_rank(z_ND) == 0 and spectrum.spread(z_ND) == 0
    assert spectrum.rankme(z_ND) == pytest.approx(1, abs=1e-6)
    assert math.isfinite(spectrum.alpha_req(z_ND)) and math.isfinite(spectrum.lidar(z_ND.view(4, 2, 5)))


def test_the_figures_stand_beside_the_probe(pack: Pack, tmp_path: Path) -> None:
    recipe = {**small("simclr", steps=5), "probe": {"data": "synthetic:12:1", "every_epochs": 1, "size_px": 32}}
    pretrain(recipe, data=pack.folder, out=tmp_path / "a")
    (figures,) = [line for line in lines(tmp_path / "a") if "health/rankme" in line]
    (knn,) = [line for line in lines(tmp_path / "a") if "knn/accuracy" in line]
    assert figures["step"] == knn["step"] == 5 and {"health/alpha_req", "health/lidar"} <= set(figures)
