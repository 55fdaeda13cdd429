"""A run is a pure function of recipe, pack, seed and step: killed, continued, on one process or two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import VIT, small
from safetensors.torch import load_file

from ssl_pretrain import load_backbone, pretrain
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import SslPretrainError, Stopped, UsageError, WriteError
from ssl_pretrain.named import names
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.feed import Feed, Share
from ssl_pretrain.train.loop import Result
from ssl_pretrain.train.recipe import load

FED = InputSpec((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)


def state(folder: Path) -> dict[str, Any]:
    found = Checkpoints(folder / "checkpoints").newest()
    assert found is not None
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit: weights, teacher, centre, optimizer moments."""
    pairs = [(a["method"][key], b["method"][key]) for key in a["method"]]
    for i, moments in a["optimizer"]["state"].items():
        pairs += [(value, b["optimizer"]["state"][i][key]) for key, value in moments.items()]
    return a["step"] == b["step"] and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


def run(method: str, pack: Pack, out: Path, *words: str, **train: Any) -> Result:
    return pretrain(small(method, **train), data=pack.folder, out=out, words=words)


def command(folder: Path, recipe: dict[str, Any], pack: Pack, out: Path, *before: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start = list(before) or [sys.executable]
    return [*start, "-m", "ssl_pretrain.cli", "pretrain", str(path), "--data", str(pack.folder), "--out", str(out)]


# What a step sees


def feed(pack: Pack, method: str = "dino", batch_size: int = 8, share: Share | None = None, seed: int = 0) -> Feed:
    specs = load(small(method)).specs()
    return Feed(pack, specs, batch_size, seed, None, FED, share or Share(), torch.device("cpu"))


def by_image(feed: Feed, epoch: int) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch):
        ids = np.split(np.split(feed.ids(step), feed.share.ranks)[feed.share.rank], feed.share.parts)
        for part, views in zip(ids, feed.views(step), strict=True):
            for place, image in enumerate(part):
                found[int(image)] = {name: crops[:, place] for name, crops in views.crops.items()}
                found[int(image)]["key"] = torch.from_numpy(views.key_B2[place].astype(np.int64))
    return found


def test_an_image_has_the_same_view_in_every_batch_and_on_every_rank(pack: Pack) -> None:
    alone = by_image(feed(pack, batch_size=8), epoch=1)
    assert len(alone) == 40
    large = by_image(feed(pack, batch_size=32), epoch=1)
    assert len(large) == 32
    ranks = [by_image(feed(pack, batch_size=8, share=Share(rank, 2, parts=2)), epoch=1) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 20 and not set(ranks[0]) & set(ranks[1])
    for others in (large, *ranks):
        for image, crops in others.items():
            assert all(torch.equal(crop, alone[image][name]) for name, crop in crops.items())


def test_another_epoch_or_seed_gives_other_views_and_another_order(pack: Pack) -> None:
    first, second = by_image(feed(pack), epoch=0), by_image(feed(pack), epoch=1)
    seeded = by_image(feed(pack, seed=1), epoch=0)
    for others in (second, seeded):
        assert not any(torch.equal(first[i]["global_0"], others[i]["global_0"]) for i in range(40))
    assert list(first) != list(second) and sorted(first) == sorted(second)


# Continuing


@pytest.mark.parametrize("method", names("methods"))
def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(method: str, pack: Pack, tmp_path: Path) -> None:
    backbone = VIT if method == "dino" else None  # with its drop path, which torch draws
    recipe = small(method, backbone, save_every_steps=3)
    pretrain(recipe, data=pack.folder, out=tmp_path / "calm")
    kept = Checkpoints(tmp_path / "calm" / "checkpoints")
    for path in kept.folder.glob("step_000000006*"):
        path.unlink()
    middle = kept.newest()
    assert middle is not None and middle["step"] == 3
    again = pretrain(recipe, data=pack.folder, out=tmp_path / "calm")
    undisturbed = pretrain(recipe, data=pack.folder, out=tmp_path / "other")
    assert again.step == undisturbed.step == 6
    assert same(state(tmp_path / "calm"), state(tmp_path / "other"))
    weights = [load_file(tmp_path / f / "artefact" / "model.safetensors") for f in ("calm", "other")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    lines = [json.loads(line) for line in (tmp_path / "calm" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]  # none twice


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_moments_lie_in_memory_as_their_weights_do(optimizer: str, pack: Pack, tmp_path: Path) -> None:
    """Convnets are channels-last. Fused kernels walk weights and moments side by side: those of a checkpoint that has
    them in another order would move the wrong weights."""
    recipe = small("simclr", save_every_steps=3, optimizer=optimizer)
    pretrain(recipe, data=pack.folder, out=tmp_path / "run")
    calm, kept = state(tmp_path / "run"), Checkpoints(tmp_path / "run" / "checkpoints")
    for path in kept.folder.glob("step_000000006*"):
        path.unlink()
    middle = kept.newest()
    assert middle is not None and middle["step"] == 3
    moments = [m for each in middle["optimizer"]["state"].values() for m in each.values() if torch.is_tensor(m)]
    filters = [m for m in moments if m.ndim == 4 and min(m.shape[1:]) > 1]
    assert filters and all(m.is_contiguous(memory_format=torch.channels_last) for m in filters)
    for each in middle["optimizer"]["state"].values():
        each.update({name: m.contiguous() for name, m in each.items() if torch.is_tensor(m)})
    kept.save(3, middle)
    pretrain(recipe, data=pack.folder, out=tmp_path / "run")
    assert same(state(tmp_path / "run"), calm)


def test_sigkill_then_the_same_command_ends_with_the_same_bits(pack: Pack, tmp_path: Path) -> None:
    """The real thing, in a process that is killed while it runs; twice, the second time in another step."""
    recipe = small("dino", steps=14, save_every_steps=1)
    words = command(tmp_path, recipe, pack, tmp_path / "killed")
    for least in (3, 8):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        checkpoints = tmp_path / "killed" / "checkpoints"
        give_up = time.monotonic() + 120
        while not any(int(p.stem[5:]) >= least for p in checkpoints.glob("step_*.json")):
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state(tmp_path / "killed")["step"] < 14
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    subprocess.run(command(tmp_path, recipe, pack, tmp_path / "calm"), stdout=subprocess.DEVNULL, check=True)
    assert same(state(tmp_path / "killed"), state(tmp_path / "calm"))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*tmp*"))


def test_a_signal_stops_at_a_step_with_code_75_and_continues(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Feed.views

    def signalled(self: Feed, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(self, step)

    monkeypatch.setattr(Feed, "views", signalled)
    with pytest.raises(Stopped, match="SIGTERM at step 4 of 6") as stopped:
        run("simclr", pack, tmp_path / "a")
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(Feed, "views", drawn)
    run("simclr", pack, tmp_path / "a")
    run("simclr", pack, tmp_path / "b")
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))


def test_a_finished_run_says_so_and_changes_nothing(pack: Pack, tmp_path: Path) -> None:
    run("simclr", pack, tmp_path / "a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.suffix in (".pt", ".safetensors", ".jsonl")}
    assert run("simclr", pack, tmp_path / "a").step == 6
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_recipe_or_other_images_do_not_continue_a_run(pack: Pack, images: Path, tmp_path: Path) -> None:
    run("simclr", pack, tmp_path / "a")
    with pytest.raises(UsageError, match=r"train.lr was 0.001 and is 0.01"):
        run("simclr", pack, tmp_path / "a", lr=0.01)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(images.iterdir())[:20]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="other images"):
        pretrain(small("simclr"), data=fewer, out=tmp_path / "a")
    assert run("simclr", pack, tmp_path / "a", log_every_steps=3).step == 6  # this does not matter


def test_a_torn_checkpoint_is_passed_over(pack: Pack, tmp_path: Path) -> None:
    run("simclr", pack, tmp_path / "a", save_every_steps=3)
    newest = tmp_path / "a" / "checkpoints" / "step_000000006.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / ".step_000000009.pt.tmp-1").write_bytes(b"half")
    assert state(tmp_path / "a")["step"] == 3
    run("simclr", pack, tmp_path / "a", save_every_steps=3)
    assert state(tmp_path / "a")["step"] == 6
    assert not list(newest.parent.glob(".*tmp*"))


def test_a_crash_between_checkpoint_and_artefact_is_made_good(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise WriteError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ssl_pretrain.artefact.write_durably", full)
        with pytest.raises(WriteError, match="No space left"):
            run("simclr", pack, tmp_path / "a")
    assert state(tmp_path / "a")["step"] == 6 and not (tmp_path / "a" / "artefact").exists()
    result = run("simclr", pack, tmp_path / "a")
    assert load_backbone(result.artefact).card["step"] == 6


def test_two_writers_of_one_folder(pack: Pack, tmp_path: Path) -> None:
    from ssl_pretrain.train.lock import locked

    with locked(tmp_path / "a"), pytest.raises(WriteError, match=rf"written by another process \(pid {os.getpid()} on"):
        run("simclr", pack, tmp_path / "a")
    run("simclr", pack, tmp_path / "a", steps=1)


@pytest.mark.parametrize("backbone", [VIT, "test_resnet"])
def test_non_finite_gradients_are_skipped_and_then_stop_the_run(
    backbone: Any, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Feed.views
    broken = {2}

    def poisoned(self: Feed, step: int) -> Any:
        for views in drawn(self, step):
            if step in broken:
                views.crops["global_0"].fill_(float("nan"))
            yield views

    monkeypatch.setattr(Feed, "views", poisoned)
    result = pretrain(small("dino", backbone), data=pack.folder, out=tmp_path / "a")
    assert result.step == 6
    assert all(torch.isfinite(t).all() for t in state(tmp_path / "a")["method"].values())
    broken.update(range(1, 10))
    with pytest.raises(SslPretrainError, match="too many steps with a non-finite gradient, again") as error:
        pretrain(small("dino", backbone), data=pack.folder, out=tmp_path / "b")
    assert error.value.exit_code == 70


def test_accumulation_changes_nothing_for_dino_without_batch_statistics(pack: Pack, tmp_path: Path) -> None:
    """DINO's centre moves once a step, whatever parts the batch was cut into."""
    # One size of crops, as timm interpolates position embeddings in float32; no drop path, as torch draws it per part.
    words = ("--method.local_size_px", "48", "--backbone.drop_path", "0")
    for out, parts in (("whole", 1), ("parts", 4)):
        recipe = small("dino", VIT, accumulate=parts, precision="64-true", optimizer="sgd", lr=1e-2)
        pretrain(recipe, data=pack.folder, out=tmp_path / out, words=words)
    whole, parts_ = state(tmp_path / "whole")["method"], state(tmp_path / "parts")["method"]
    assert max((whole[key] - parts_[key]).abs().max().item() for key in whole) < 1e-10


@pytest.mark.parametrize(("method", "backbone"), [("simclr", "test_resnet"), ("dino", "test_resnet"), ("mae", VIT)])
def test_one_and_two_processes_train_the_same_network(method: str, backbone: Any, pack: Pack, tmp_path: Path) -> None:
    """torchrun with two gloo ranks on the CPU, BatchNorm and all, against one process with the same global batch.

    SGD, as Adam would hide gradients that are wrong by a factor.
    """
    settings = {"steps": 4, "precision": "64-true", "accelerator": "cpu", "optimizer": "sgd", "lr": 1e-2}
    recipe = small(method, backbone, log_every_steps=1, **settings)
    pretrain(recipe, data=pack.folder, out=tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = command(tmp_path, recipe, pack, tmp_path / "two", *torchrun)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = state(tmp_path / "one")["method"], state(tmp_path / "two")["method"]
    assert set(one) == set(two)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-10
    logs = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    lines = [[found for line in log if "train/loss" in (found := json.loads(line))] for log in logs]
    assert len(lines[0]) == len(lines[1]) == 4
    for a, b in zip(*lines, strict=True):
        assert a["train/gradient_norm"] == pytest.approx(b["train/gradient_norm"], rel=1e-10)
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)  # Fabric hands it on in float32 under DDP


def test_two_processes_that_fabric_starts_save_before_they_stop(pack: Pack, tmp_path: Path) -> None:
    """Lightning kills all processes when one leaves with an error: rank 0 must have saved by then."""
    recipe = small("simclr", VIT, steps=100000, devices=2, accelerator="cpu")
    process = subprocess.Popen(command(tmp_path, recipe, pack, tmp_path / "a"), stdout=subprocess.DEVNULL)
    log, give_up = tmp_path / "a" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert state(tmp_path / "a")["step"] > 0


def test_the_run_folder_has_what_was_promised(pack: Pack, tmp_path: Path) -> None:
    result = pretrain(
        {**small("simclr", steps=5), "probe": {"data": "synthetic:12:1", "every_epochs": 1, "size_px": 32}},
        data=pack.folder, out=tmp_path / "runs" / "a",
    )  # fmt: skip
    folder = result.folder
    for name in ("recipe.yaml", "metrics.jsonl", "artefact/config.json", "best/model.safetensors", "checkpoints"):
        assert (folder / name).exists(), name
    assert list((folder / "tensorboard").iterdir())
    assert 0 <= result.scores["balanced_accuracy_low"] <= result.scores["balanced_accuracy"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "knn/balanced_accuracy" in line][-1]
    assert last["knn/balanced_accuracy"] == pytest.approx(result.scores["balanced_accuracy"], abs=1e-6)
    card = json.loads((folder / "artefact" / "config.json").read_text())["ssl_pretrain"]
    assert card["scores"]["accuracy"] == result.scores["accuracy"] and card["pack"] == pack.fingerprint
