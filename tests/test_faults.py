"""Runs that are killed, interrupted, starved of disk and memory: each ends as the calm run, or says why it cannot.

The runs are processes that `faults.py` forks. What is slow repeats the same for every site and many moments.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import METHODS, VIT, small
from faults import Child, Forks, Site, forks
from safetensors.torch import load_file
from test_run import same, state

from ssl_pretrain import load_backbone, pretrain, rng
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named, names
from ssl_pretrain.train import slurm
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.feed import Feed, Share
from ssl_pretrain.train.recipe import load

STEPS, EVERY = 6, 2
SAVED = (1, 2, 4, 6)
"""Steps of the short run that are saved."""
START = ("mkdir .", "open .lock", "open recipe.yaml~", "write recipe.yaml~", "fsync recipe.yaml~", "rename recipe.yaml",
         "fsync .")  # fmt: skip
"""What is written before the first step: a run that cannot even begin says so."""


@pytest.fixture(scope="session")
def pool() -> Forks:
    return forks()


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is such a file system: `TMPDIR` is on another one then."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="ssl_pretrain_", dir=shm))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


Calm = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def calm(pool: Forks, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The last state of an undisturbed run, for each recipe once."""
    known: dict[str, dict[str, Any]] = {}

    def found(recipe: dict[str, Any], **faults: Any) -> dict[str, Any]:
        key = json.dumps([recipe, faults])
        if key not in known:
            out = tmp_path_factory.mktemp("calm") / "run"
            assert pool.run(recipe, pack.folder, out, **faults) == 0
            known[key] = state(out)
        return known[key]

    return found


def short(**train: Any) -> dict[str, Any]:
    return small("simclr", steps=STEPS, save_every_steps=EVERY, log_every_steps=1, **train)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that can be trusted; 0 for none."""
    found = Checkpoints(folder / "checkpoints").newest()
    return found["step"] if found else 0


def wait_for(condition: Callable[[], Any], child: Child, seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < give_up, child.text()[-2000:]
        time.sleep(0.003)


def marked(folder: Path) -> int:
    return max(Checkpoints(folder / "checkpoints").steps(), default=0)


def whole(folder: Path) -> None:
    """Every file under its final name is whole, and nothing else is there."""
    left = [p for p in folder.rglob("*") if ".tmp-" in p.name]
    assert not left
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
            if path.with_suffix(".json").exists():
                assert Checkpoints(path.parent).read(path) is not None, path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".jsonl":
            lines = path.read_bytes().splitlines(keepends=True)
            assert all(json.loads(line) and line.endswith(b"\n") for line in lines), path
        elif path.name == "recipe.yaml":
            assert "method" in yaml.safe_load(path.read_text())


def calmly(text: str) -> bool:
    """Whether nothing ended in a traceback, in no thread."""
    return "Traceback" not in text


def logged(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


# SIGKILL


def killed_at_random(pool: Forks, method: str, number: int, pack: Pack, folder: Path, kills: int = 3) -> Path:
    """A run killed at moments that its number gives: while it starts, in a step, in a save."""
    recipe = small(method, steps=20, save_every_steps=EVERY)
    out, moments = folder / f"{method}_{number}", rng.fold_in(rng.key(number, "kills"), 0)
    u_K3 = rng.uniform(moments, 3 * kills).reshape(kills, 3)
    for starts, ahead, later in u_K3:
        child = pool.start(recipe, pack.folder, out, step_s=0.01)
        if starts < 0.25:
            time.sleep(0.6 * ahead)
        else:
            least = marked(out) + 1 + int(3 * ahead)
            wait_for(lambda least=least: marked(out) >= least, child)  # type: ignore[misc]
            time.sleep(0.08 * later)
        assert child.kill() == -signal.SIGKILL, child.text()[-2000:]
    assert pool.run(recipe, pack.folder, out) == 0
    return out


def test_a_run_killed_three_times_at_random_ends_with_the_same_bits(
    pool: Forks, calm: Calm, pack: Pack, fast: Path
) -> None:
    out = killed_at_random(pool, "mae", 0, pack, fast)
    assert same(state(out), calm(small("mae", steps=20, save_every_steps=EVERY)))
    whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "dino", "mae"])
def test_twenty_runs_of_each_killed_three_times(method: str, pool: Forks, calm: Calm, pack: Pack, fast: Path) -> None:
    expected = calm(small(method, steps=20, save_every_steps=EVERY))
    for number in range(1, 21):
        out = killed_at_random(pool, method, number, pack, fast)
        assert same(state(out), expected), number
        whole(out)
        shutil.rmtree(out)


@pytest.fixture(scope="session")
def sites(pool: Forks, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    """Every call by which the short run writes into its folder."""
    folder = tmp_path_factory.mktemp("sites")
    log = folder / "sites"
    assert pool.run(short(), pack.folder, folder / "run", sites=[str(folder / "run"), "once", None],
                    site_log=str(log)) == 0  # fmt: skip
    return [(row[0], row[1], row[2]) for row in map(json.loads, log.read_text().splitlines())]


def test_every_file_of_a_run_is_written_through_a_site(sites: list[Site]) -> None:
    """What the injector does not see it cannot break: each file is opened, written and, if it counts, forced."""
    done = {f"{operation} {name}" for operation, name, _ in sites}
    for step in SAVED:
        for end in ("pt", "json"):
            name = f"checkpoints/step_{step:09d}.{end}"
            assert done >= {f"open {name}~", f"write {name}~", f"fsync {name}~", f"rename {name}"}
    for name in ("artefact/model.safetensors", "artefact/config.json", "recipe.yaml"):
        assert done >= {f"open {name}~", f"write {name}~", f"fsync {name}~", f"rename {name}"}
    assert done >= {"write metrics.jsonl", "write tensorboard/events", "write .lock", *START}
    assert len(sites) > 300


def killed_in_a_save(pool: Forks, calm: Calm, pack: Pack, folder: Path, site: Site, mode: str) -> None:
    """What was acknowledged is there after the kill, and the next start goes on from it and leaves nothing behind."""
    out, note, temporary = folder / "run", folder / "acknowledged", folder / "tmp"
    shutil.rmtree(out, ignore_errors=True)
    note.unlink(missing_ok=True)
    temporary.mkdir(exist_ok=True)
    how = {"sites": [str(out), mode, site], "acknowledged": str(note), "pad_bytes": 1 << 22}
    env = {"TMPDIR": str(temporary)}
    assert pool.run(short(), pack.folder, out, env=env, **how) == -signal.SIGKILL, site
    done = [int(line) for line in note.read_text().split()] if note.exists() else []
    assert newest(out) >= max(done, default=0), site
    assert pool.run(short(), pack.folder, out, env=env, pad_bytes=1 << 22) == 0, site
    assert same(state(out), calm(short())), site
    whole(out)
    assert not list(temporary.iterdir()), site


@pytest.mark.parametrize(
    ("operation", "name", "mode"),
    [
        ("write", "step_000000004.pt~", "kill"), ("fsync", "step_000000004.pt~", "kill"),
        ("rename", "step_000000002.pt", "after"), ("write", "step_000000004.json~", "kill"),
        ("rename", "step_000000004.json", "after"),
    ],
)  # fmt: skip
def test_a_kill_in_a_save_loses_nothing_that_was_acknowledged(
    operation: str, name: str, mode: str, pool: Forks, calm: Calm, pack: Pack, fast: Path, tmp_path: Path
) -> None:
    killed_in_a_save(pool, calm, pack, fast, (operation, f"checkpoints/{name}", 0), mode)


@pytest.mark.slow
def test_two_hundred_kills_in_saves(pool: Forks, calm: Calm, sites: list[Site], pack: Pack, fast: Path) -> None:
    """Before, in the middle of and after every kind of call, spread over all saves and everything beside them."""
    those = [site for site in sites if site[1].startswith(("checkpoints/", "artefact/"))]
    drawn = rng.permutation(rng.key(0, "sites"), len(those))[:200]
    for number, place in enumerate(drawn):
        killed_in_a_save(pool, calm, pack, fast, those[place], ("kill", "after")[number % 2])


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_ends_the_step_saves_and_leaves_with_75(
    number: signal.Signals, pool: Forks, calm: Calm, pack: Pack, fast: Path
) -> None:
    out = fast / "run"
    child = pool.start(short(), pack.folder, out, asked_on=[2, number])
    assert child.wait() == 75
    assert newest(out) == 3  # the step it came in is the last
    assert f"stopped by {number.name} at step 3 of 6; the same command continues" in child.text()
    assert load_backbone(out / "artefact").card["step"] == 3
    assert ("no SLURM job" in child.text()) == (number == signal.SIGUSR1)
    assert pool.run(short(), pack.folder, out) == 0
    assert same(state(out), calm(short()))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_leaves_at_once(
    first: signal.Signals, pool: Forks, calm: Calm, pack: Pack, fast: Path
) -> None:
    out = fast / "run"
    assert pool.run(short(), pack.folder, out, asked_on=[3, first, signal.SIGINT]) == 130
    assert newest(out) <= 2
    assert pool.run(short(), pack.folder, out) == 0
    assert same(state(out), calm(short()))
    whole(out)


def test_slurm_is_asked_for_the_job_again(pool: Forks, pack: Pack, fast: Path) -> None:
    said = scontrol(fast)
    env = {"PATH": f"{fast / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    child = pool.start(short(), pack.folder, fast / "run", asked_on=[2, signal.SIGUSR1], env=env)
    assert child.wait() == 75 and said.read_text().splitlines() == ["2", "requeue", "4711"]
    assert "SLURM will start job 4711 again" in child.text()
    said.unlink()
    for words, number in ((("--train.requeue", "false"), signal.SIGUSR1), ((), signal.SIGTERM)):
        asked = {"asked_on": [3 if words else 4, number], "env": env}
        assert pool.run(short(), pack.folder, fast / "run", *words, **asked) == 75
        assert not said.exists()  # it was not wanted, or the machine is to be left


def scontrol(folder: Path, code: int = 0) -> Path:
    """Stands for SLURM's: writes down how many words it was called with, and which."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / "scontrol"
    path.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$#\" \"$@\" > '{folder}/said'\necho 'Invalid\njob' >&2\nexit {code}\n"
    )
    path.chmod(0o700)
    return folder / "said"


SLURM = "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (("12", None, None), "12"), (("14", "12", "3"), "12_3"), (("14", "12", None), "14"),
        *(((bad, None, None), None) for bad in ("", "12; touch x", "12\n", "-f", "$(id)", "12_", "1.2", "١٢", "12 13")),
        (("12", "12", "3;id"), None), (("12", "--all", "3"), None),
    ],
)  # fmt: skip
def test_the_job_that_is_asked_for(
    given: tuple[str | None, ...], asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = scontrol(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in zip(SLURM, given, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    answer = slurm.requeue()
    assert (said.read_text().splitlines() if said.exists() else None) == (["2", "requeue", asked] if asked else None)
    assert (asked or "no SLURM job") in answer


def test_a_scontrol_that_fails_or_is_not_there_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol(tmp_path, code=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert slurm.requeue() == "not requeued: scontrol requeue 12: Invalid job"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.requeue().startswith("not requeued: scontrol requeue 12: ") and "\n" not in slurm.requeue()


# A full disk


def fails_once(pool: Forks, calm: Calm, pack: Pack, folder: Path, site: Site) -> None:
    """One call fails: the run goes on and nobody can tell from its weights; or it could not begin."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    child = pool.start(short(), pack.folder, out, sites=[str(out), "once", site])
    code = child.wait()
    assert calmly(child.text()), (site, child.text()[-3000:])
    if f"{site[0]} {site[1]}" in START:
        assert code in (0, 74), site
        assert code == 0 or pool.run(short(), pack.folder, out) == 0
    else:
        assert code == 0, (site, child.text()[-2000:])
    assert same(state(out), calm(short())), site
    assert logged(out) == list(range(1, STEPS + 1)), site
    assert load_backbone(out / "artefact").card["step"] == STEPS
    whole(out)


def fails_for_ever(pool: Forks, calm: Calm, pack: Pack, folder: Path, site: Site) -> None:
    """All calls from one on fail: 74 and one line, what was good is good, and with room again it goes on."""
    out, note = folder / "run", folder / "acknowledged"
    shutil.rmtree(out, ignore_errors=True)
    note.unlink(missing_ok=True)
    how = {"sites": [str(out), "always", site], "acknowledged": str(note)}
    child = pool.start(short(), pack.folder, out, **how)
    code = child.wait()
    done = max([int(line) for line in note.read_text().split()] if note.exists() else [0])
    assert calmly(child.text()), (site, child.text()[-3000:])
    assert code == 74 or (code == 0 and done == STEPS), (site, code)
    if code == 74:
        line = child.text().splitlines()[-1]
        assert line.startswith("ssl-pretrain: ") and "No space left on device" in line, line
    assert newest(out) >= done, site
    whole(out)
    assert pool.run(short(), pack.folder, out) == 0, site
    assert same(state(out), calm(short())), site


@pytest.mark.parametrize(
    "site",
    [
        ("write", "checkpoints/step_000000002.pt~", 40), ("fsync", "checkpoints/step_000000004.json~", 0),
        ("rename", "artefact/config.json", 1), ("write", "metrics.jsonl", 3), ("write", "tensorboard/events", 3),
    ],
)  # fmt: skip
def test_one_write_that_fails_changes_nothing(site: Site, pool: Forks, calm: Calm, pack: Pack, fast: Path) -> None:
    fails_once(pool, calm, pack, fast, site)


@pytest.mark.parametrize(
    "site",
    [("open", ".lock", 0), ("write", "checkpoints/step_000000001.pt~", 0), ("rename", "artefact/config.json", 1)],
)
def test_a_disk_that_stays_full_ends_in_74(site: Site, pool: Forks, calm: Calm, pack: Pack, fast: Path) -> None:
    fails_for_ever(pool, calm, pack, fast, site)


def ends_and_middle(sites: list[Site]) -> list[Site]:
    """All sites but the many equal writes of one file, of which every eighth is taken."""
    return [site for site in sites if site[0] != "write" or ".pt" not in site[1] or site[2] % 8 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("how", [fails_once, fails_for_ever])
def test_a_full_disk_at_every_site(
    how: Callable[..., None], pool: Forks, calm: Calm, sites: list[Site], pack: Pack, fast: Path
) -> None:
    for site in ends_and_middle(sites):
        how(pool, calm, pack, fast, site)


def test_a_file_system_that_is_really_full(pool: Forks, calm: Calm, pack: Pack, tmp_path: Path) -> None:
    """The kernel's own answer, without an injector: a small file system in memory, and a file that fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        recipe = small("simclr", steps=20, save_every_steps=1)
        child = pool.start(recipe, pack.folder, disk / "run", step_s=0.1)
        wait_for(lambda: marked(disk / "run") >= 2, child)
        with open(disk / "ballast", "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass
        assert child.wait() == 74, child.text()
        assert "No space left on device" in child.text().splitlines()[-1] and newest(disk / "run") >= 2
        (disk / "ballast").unlink()
        assert pool.run(recipe, pack.folder, disk / "run") == 0
        assert same(state(disk / "run"), calm(recipe))
        whole(disk / "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_is_removed_is_made_again(pool: Forks, calm: Calm, pack: Pack, fast: Path) -> None:
    out, recipe = fast / "run", small("simclr", steps=16, save_every_steps=EVERY)
    child = pool.start(recipe, pack.folder, out, step_s=0.05)
    wait_for(lambda: marked(out) >= 4, child)
    out.rename(fast / "gone")  # at once, and then all that was in it
    shutil.rmtree(fast / "gone", ignore_errors=True)
    assert child.wait() == 0, child.text()
    assert same(state(out), calm(recipe))
    for name in ("recipe.yaml", "metrics.jsonl", "artefact/config.json", "checkpoints", ".lock", "tensorboard"):
        assert (out / name).exists(), name
    whole(out)
    assert calmly(child.text()), child.text()
    assert pool.run(recipe, pack.folder, out) == 0  # and it is a run that is finished


# Changes on purpose


def test_a_change_is_shown_refused_and_recorded_where_it_is_wanted(pack: Pack, images: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "run", {"steps": 2, "save_every_steps": 1}
    pretrain(small("simclr", **few), data=pack.folder, out=out)
    wanted = small("simclr", **{**few, "steps": 4}, lr=0.01)
    with pytest.raises(UsageError, match=r"lr was 0.001 and is 0.01.*--train.on_change continue") as error:
        pretrain(wanted, data=pack.folder, out=out)
    assert "train.steps was 2 and is 4" in str(error.value) and newest(out) == 2
    pretrain(wanted, data=pack.folder, out=out, words=("--train.on_change", "continue"))
    first = (out / "recipe.yaml").read_text().splitlines()[0]
    assert first.startswith("# changed at step 2: ") and "train.lr was 0.001 and is 0.01" in first
    card = json.loads((out / "artefact" / "config.json").read_text())["ssl_pretrain"]
    assert card["step"] == 4 and [each["step"] for each in card["changes"]] == [2]
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(images.iterdir())[:20]:
        shutil.copy(path, fewer)
    longer = small("simclr", **{**few, "steps": 5}, lr=0.01)
    with pytest.raises(UsageError, match=rf"other images \(40 of them, pack {pack.fingerprint[:12]}; .* has 20, pack"):
        pretrain(longer, data=fewer, out=out)
    pretrain(longer, data=fewer, out=out, words=("--train.on_change", "continue"))
    card = json.loads((out / "artefact" / "config.json").read_text())["ssl_pretrain"]
    assert [each["step"] for each in card["changes"]] == [2, 4] and card["images"] == 20
    assert any("other images" in what for what in card["changes"][1]["what"])
    assert [line for line in (out / "recipe.yaml").read_text().splitlines() if line.startswith("# changed at step")]


def test_another_network_is_refused_in_one_line_even_on_purpose(pack: Pack, tmp_path: Path) -> None:
    pretrain(small("simclr", steps=1), data=pack.folder, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"does not fit this network: [^\n]*$"):
        pretrain(small("simclr", VIT, steps=2), data=pack.folder, out=tmp_path / "run",
                 words=("--train.on_change", "continue"))  # fmt: skip


# Back once


NANS = {"nan_steps": [5, 6, 7, 8]}


def rolling(**train: Any) -> dict[str, Any]:
    return small("simclr", steps=12, save_every_steps=EVERY, log_every_steps=1, **train)


def test_a_run_goes_back_once_and_on_through_other_images(
    pool: Forks, calm: Calm, pack: Pack, fast: Path, tmp_path: Path
) -> None:
    out = fast / "run"
    child = pool.start(rolling(), pack.folder, out, **NANS)
    assert child.wait() == 0
    assert child.text().count("back to the checkpoint of step 8") == 1
    found = state(out)
    assert found["detour"] == 1 and found["step"] == 12
    assert not same(found, calm(rolling()))
    assert logged(out) == list(range(1, 13))  # no step twice, none missing


def test_a_kill_after_going_back_changes_nothing(pool: Forks, calm: Calm, pack: Pack, fast: Path) -> None:
    out, site = fast / "run", ("rename", "checkpoints/step_000000010.json", 0)
    assert pool.run(rolling(), pack.folder, out, **NANS, sites=[str(out), "after", site]) == -signal.SIGKILL
    assert newest(out) == 10
    assert pool.run(rolling(), pack.folder, out, **NANS) == 0
    assert same(state(out), calm(rolling(), **NANS))


@pytest.mark.parametrize("step", [6, 8])
def test_a_kill_between_skipped_steps_changes_nothing(
    step: int, pool: Forks, calm: Calm, pack: Pack, fast: Path
) -> None:
    """How many were skipped in a row decides when a run goes back: it is a part of its state."""
    out, site = fast / "run", ("rename", f"checkpoints/step_{step:09d}.json", 0)
    assert pool.run(rolling(), pack.folder, out, **NANS, sites=[str(out), "after", site]) == -signal.SIGKILL
    assert newest(out) == step
    assert pool.run(rolling(), pack.folder, out, **NANS) == 0
    assert same(state(out), calm(rolling(), **NANS))


def test_other_images_after_going_back(pack: Pack) -> None:
    fed = InputSpec((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)
    made = Feed(pack, load(small("simclr")).specs(), 8, 0, None, fed, Share(), torch.device("cpu"))
    before, before_views = made.ids(3).copy(), next(made.views(3))
    made.detour = 1
    after, after_views = made.ids(3), next(made.views(3))
    assert sorted(before) != sorted(after)
    assert not np.array_equal(before_views.key_B2, after_views.key_B2)
    assert not set(map(int, made.ids(0))) & set(map(int, made.ids(1)))  # an epoch still shows each image once


# Too little memory


@pytest.mark.parametrize(("fits", "said"), [(4, "accumulate 2 fits.*batch_size 4$"), (2, "accumulate 4 fits.*size 2$")])
def test_what_would_fit_is_measured(
    fits: int, said: str, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the failed attempt nothing may be left in memory when a smaller one is tried."""
    method = named("methods", "simclr").SimCLR
    loss, left = method.loss, list[Any]()

    class Activations:
        """Stands for what a forward pass has allocated."""

    def limited(self: Any, views: Any, progress: float) -> Any:
        held = Activations()
        count = next(iter(views.crops.values())).shape[1]
        assert not [ref for ref in left if ref() is not None]
        if count > fits:
            left.append(weakref.ref(held))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(self, views, progress)

    monkeypatch.setattr(method, "loss", limited)
    with pytest.raises(UsageError, match=f"step 1: 8 images at once do not fit.*{said}") as error:
        pretrain(small("simclr"), data=pack.folder, out=tmp_path / "run")
    assert error.value.exit_code == 64 and len(left) >= 1
    done = pretrain(small("simclr", accumulate=8 // fits, steps=1), data=pack.folder, out=tmp_path / "other")
    assert done.step == 1  # the suggestion is true


def test_where_nothing_fits_that_is_said(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, views: Any, progress: float) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(named("methods", "simclr").SimCLR, "loss", never)
    with pytest.raises(UsageError, match="nor do 2: use smaller views or another backbone"):
        pretrain(small("simclr"), data=pack.folder, out=tmp_path / "run")


# Several processes


def torchrun(folder: Path, recipe: dict[str, Any], pack: Pack, out: Path, restarts: int = 0) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             f"--max-restarts={restarts}", "-m", "ssl_pretrain.cli", "pretrain", str(path), "--data", str(pack.folder),
             "--out", str(out)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(words, env=env, stdout=log, stderr=log, text=True)


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started now."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_with_the_others(pack: Pack, tmp_path: Path) -> None:
    """Five runs; torchrun restarts the group, which continues from the newest checkpoint."""
    recipe = small("simclr", steps=40, save_every_steps=EVERY, accelerator="cpu")
    assert torchrun(tmp_path, recipe, pack, tmp_path / "calm").wait(300) == 0
    expected = state(tmp_path / "calm")
    for number in range(5):
        out = tmp_path / f"run{number}"
        u = rng.uniform(rng.fold_in(rng.key(number, "ranks"), 0), 2)
        process = torchrun(tmp_path, recipe, pack, out, restarts=2)
        give_up = time.monotonic() + 300
        while marked(out) < 2 + int(10 * u[0]):
            assert process.poll() is None and time.monotonic() < give_up, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.003)
        os.kill(ranks(process)[int(2 * u[1])], signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
        assert same(state(out), expected), number
        whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", names("methods"))
def test_a_run_cut_in_two_goes_on_with_twice_as_many_processes(
    method: str, pool: Forks, calm: Calm, pack: Pack, tmp_path: Path
) -> None:
    """In float64 and by SGD; the second half on two ranks, against one process all the way."""
    assert method in METHODS
    exact = {"precision": "64-true", "optimizer": "sgd", "lr": 1e-2, "accelerator": "cpu"}
    recipe = small(method, steps=6, save_every_steps=1, **exact)
    if isinstance(recipe["backbone"], dict):  # torch draws drop path for each rank by itself
        recipe["backbone"] = {**recipe["backbone"], "drop_path": 0.0}
    if "local_size_px" in recipe["method"]:  # timm interpolates position embeddings in float32
        recipe["method"] = {**recipe["method"], "local_size_px": recipe["method"]["global_size_px"]}
    assert pool.run(recipe, pack.folder, tmp_path / "run", asked_on=[2, signal.SIGTERM]) == 75
    assert newest(tmp_path / "run") == 3
    assert torchrun(tmp_path, recipe, pack, tmp_path / "run").wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    one, two = calm(recipe)["method"], state(tmp_path / "run")["method"]
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-10
