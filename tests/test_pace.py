"""Probes during training: when they are due, what they may cost, and a run that ends early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small
from hypothesis import given
from hypothesis import strategies as st

from ssl_pretrain import pretrain
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.train import online
from ssl_pretrain.train.pace import FREE_S, Pace
from ssl_pretrain.train.recipe import ProbeSection, load


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def probed(section: ProbeSection, steps: int, step_s: float, probe_s: float, per_epoch: int = 10) -> tuple[Pace, Any]:
    """The steps that are probed in a run whose steps and probes take so long."""
    clock, found = Clock(), []
    pace = Pace(section, per_epoch, steps, at_end=True, clock=clock)
    for step in range(1, steps + 1):
        clock.now += step_s
        if pace.due(step):
            with pace.spending():
                clock.now += probe_s
            found.append(step)
    return pace, found


def test_cheap_probes_come_at_each_epoch_that_was_asked_for() -> None:
    pace, steps = probed(ProbeSection(every_epochs=2), steps=100, step_s=1, probe_s=0.1)
    assert steps == [20, 40, 60, 80, 100]
    assert pace.figures()["seconds"] == pytest.approx(0.1)
    assert pace.figures()["share"] == pytest.approx(0.5 / 100.5)


def test_the_last_step_is_not_probed_twice() -> None:
    _, steps = probed(ProbeSection(every_epochs=2), steps=109, step_s=1, probe_s=0.1)
    assert steps == [20, 40, 60, 80, 109]
    _, steps = probed(ProbeSection(every_epochs=2), steps=110, step_s=1, probe_s=0.1)
    assert steps == [20, 40, 60, 80, 100, 110]


def test_minutes_win_over_epochs() -> None:
    _, steps = probed(ProbeSection(every_epochs=1, every_minutes=0.5), steps=100, step_s=1, probe_s=0)
    assert steps == [30, 60, 90, 100]


def test_what_is_too_dear_is_put_off_and_not_left_out() -> None:
    """Probes of 50 s each after 100 steps of 1 s: one is free; the next two may begin when 3 % are 40 s and 90 s."""
    _, steps = probed(ProbeSection(every_epochs=10), steps=5000, step_s=1, probe_s=50)
    assert steps[0] == 100
    assert steps[1] == pytest.approx((2 * 50 - FREE_S) / 0.03 - 50, abs=1)
    assert steps[2] == pytest.approx((3 * 50 - FREE_S) / 0.03 - 100, abs=1)
    assert steps[-1] == 5000


@given(
    st.floats(0.005, 1), st.integers(1, 30), st.floats(0.1, 100), st.floats(0.1, 10), st.booleans(),
    st.integers(50, 800),
)  # fmt: skip
def test_probes_never_take_more_than_their_share(
    share: float, every: int, probe_s: float, step_s: float, minutes: bool, steps: int
) -> None:
    section = ProbeSection(every_epochs=every, max_share=share, every_minutes=every / 10 if minutes else None)
    pace, _ = probed(section, steps, step_s, probe_s)
    whole = steps * step_s + pace.seconds
    # The first one costs what nobody knew, and so does the one at the end.
    assert pace.seconds <= FREE_S + share * whole + 2 * probe_s + 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--probe.max_share", "0"), "probe.max_share"),
        (("--probe.max_share", "1.5"), "probe.max_share"),
        (("--probe.every_minutes", "0"), "probe.every_minutes"),
        (("--probe.patience", "0"), "probe.patience"),
        (("--probe.patience", "3"), "probe.data"),
        (("--probe.score", "auc"), "probe.score"),
    ],
)
def test_impossible_settings_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(small("simclr"), words)


class Falling(online.OnlineProbe):
    """Scores that get worse from the second probe on, but for the macro F1."""

    asked = 0

    def __call__(self, backbone: Any) -> dict[str, float]:
        Falling.asked += 1
        scores = dict(super().__call__(backbone))
        return {**scores, "balanced_accuracy": 1 / Falling.asked, "macro_f1": Falling.asked / 100}


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    Falling.asked = 0
    monkeypatch.setattr("ssl_pretrain.train.loop.OnlineProbe", Falling)


def recipe(**probe: Any) -> dict[str, Any]:
    return {**small("simclr", steps=60), "probe": {"data": "synthetic:12:1", "every_epochs": 1, "size_px": 16, **probe}}


@pytest.mark.usefixtures("falling")
def test_a_run_without_better_scores_ends_early_and_stays_ended(pack: Pack, tmp_path: Path) -> None:
    result = pretrain(recipe(patience=2), data=pack.folder, out=tmp_path / "a")
    assert result.step == 15  # five steps an epoch; the first probe is the best, and two more are not
    assert json.loads((tmp_path / "a" / "best" / "config.json").read_text())["ssl_pretrain"]["step"] == 5
    assert json.loads((tmp_path / "a" / "artefact" / "config.json").read_text())["ssl_pretrain"]["step"] == 15
    again = pretrain(recipe(patience=2), data=pack.folder, out=tmp_path / "a")
    assert again.step == 15
    assert Falling.asked == 3
    longer = pretrain(recipe(patience=3), data=pack.folder, out=tmp_path / "a")
    assert longer.step == 20


@pytest.mark.usefixtures("falling")
def test_best_goes_by_the_chosen_score(pack: Pack, tmp_path: Path) -> None:
    given_ = recipe(score="macro_f1", patience=2)
    given_["train"]["steps"] = 20
    result = pretrain(given_, data=pack.folder, out=tmp_path / "a")
    assert result.step == 20
    assert json.loads((tmp_path / "a" / "best" / "config.json").read_text())["ssl_pretrain"]["step"] == 20


def test_what_probes_cost_stands_among_the_curves(pack: Pack, tmp_path: Path) -> None:
    given_ = recipe()
    given_["train"]["steps"] = 10
    pretrain(given_, data=pack.folder, out=tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["probe/share"] for line in lines if "probe/share" in line]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


@pytest.mark.slow
def test_two_processes_end_early_together(pack: Pack, tmp_path: Path) -> None:
    """A learning rate of zero: no probe is better than the first one."""
    settings = recipe(patience=1)
    settings["train"] |= {"lr": 0.0, "accelerator": "cpu", "optimizer": "sgd"}
    settings["backbone"] = "test_vit"
    settings |= {"method": {**small("simclr", "test_vit")["method"]}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*torchrun, "-m", "ssl_pretrain.cli", "pretrain", str(path), "--data", str(pack.folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "a")], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "a" / "artefact" / "config.json").read_text())["ssl_pretrain"]["step"] == 10
