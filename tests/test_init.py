"""Continued pretraining: what a run starts from arrives or is refused, and what learns how fast is what was said."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import VIT, small
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_pretrain import artefact, backbones, methods, pretrain
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.methods import OptimSpec, config_class
from ssl_pretrain.named import names
from ssl_pretrain.train import drift, optim, setup, source
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.init import fill
from ssl_pretrain.train.recipe import load

VIT_48 = {"img_size": 48, "patch_size": 8, "pool": "token"}


def shaken(name: str = "test_resnet", seed: int = 1, **options: Any) -> Backbone:
    """Random weights and BatchNorm statistics that default ones cannot pass for."""
    torch.manual_seed(seed)
    backbone = backbones.create(name, **options)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.05)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return backbone.eval()


def fresh(name: str = "test_resnet", **options: Any) -> Backbone:
    torch.manual_seed(0)
    return backbones.create(name, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def refused(kind: type[Exception], says: str, backbone: Backbone, init: object, partial: bool = False) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    with pytest.raises(kind, match=says) as error:
        fill(backbone, str(init), partial)
    assert "\n" not in str(error.value)
    assert same(before, backbone.weights()), "what is refused changes nothing"


# What is found in a file


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ("", ""), ("", "backbone."), ("state_dict", "module."), ("model", "encoder."), ("teacher", "module.backbone."),
        ("student", "model.encoder."), ("state.model", "trunk."),
    ],
)  # fmt: skip
def test_weights_are_found_under_any_one_place_and_prefix(place: str, prefix: str, tmp_path: Path) -> None:
    theirs, backbone = shaken(), fresh()
    found: Any = prefixed(theirs.weights(), prefix) | {f"{prefix}fc.weight": torch.zeros(10, 96)}
    for key in reversed(place.split(".")) if place else ():
        found = {key: found, "epoch": 7, "optimizer": {"state": {0: {"moment": torch.ones(3)}}}}
    torch.save(found, tmp_path / "weights.pth")
    filled = fill(backbone, str(tmp_path / "weights.pth"))
    assert same(backbone.weights(), theirs.weights())
    assert filled.share == 1 and not filled.missing and not filled.adapted
    assert filled.unexpected == ("fc.weight",) and "not used: 1 (fc.weight)" in str(filled)
    where = " / ".join(part for part in (place, prefix.removesuffix(".")) if part)
    assert (f", under {where}: " if where else "weights.pth: ") in str(filled)


def test_safetensors_artefacts_and_runs_are_sources(tmp_path: Path) -> None:
    theirs = shaken()
    save_file(prefixed(theirs.weights(), "model."), tmp_path / "w.safetensors")
    artefact.write(tmp_path / "run" / "artefact", theirs, {})
    for init in ("w.safetensors", "run", "run/artefact"):
        backbone = fresh()
        filled = fill(backbone, str(tmp_path / init))
        assert same(backbone.weights(), theirs.weights()) and not filled.warning
    (tmp_path / "w.safetensors").write_bytes(b"no")
    refused(DataError, "cannot be read", fresh(), tmp_path / "w.safetensors")


def test_half_precision_and_what_namespaces_say_are_read(tmp_path: Path) -> None:
    theirs, backbone = shaken(), fresh()
    halves = {name: t.half() if t.is_floating_point() else t for name, t in theirs.weights().items()}
    torch.save({"model": halves, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    fill(backbone, str(tmp_path / "w.pt"))
    assert same(backbone.weights(), {k: t.float() if t.is_floating_point() else t for k, t in halves.items()})


def test_of_teacher_and_student_the_teacher_is_meant_and_else_nothing_is_guessed(tmp_path: Path) -> None:
    one, two = shaken(seed=1), shaken(seed=2)
    torch.save({"student": prefixed(one.weights(), "backbone."), "teacher": two.weights()}, tmp_path / "both.pt")
    backbone = fresh()
    assert "under teacher (not student.backbone):" in str(fill(backbone, str(tmp_path / "both.pt")))
    assert same(backbone.weights(), two.weights())
    torch.save({"model": one.weights(), "state_dict_ema": two.weights()}, tmp_path / "timm.pt")
    fill(fresh(), str(tmp_path / "timm.pt"))
    torch.save({"left": one.weights(), "right": two.weights()}, tmp_path / "two.pt")
    refused(UsageError, r"2 networks that fit test_resnet alike \(left, right\)", fresh(), tmp_path / "two.pt")
    torch.save({"left": one.weights(), "right": one.weights()}, tmp_path / "twice.pt")
    fill(backbone, str(tmp_path / "twice.pt"))
    assert same(backbone.weights(), one.weights())


def test_what_fills_too_little_is_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    weights, path = shaken().weights(), tmp_path / "w.pt"
    torch.save({name: t for name, t in weights.items() if not name.startswith("layer3")}, path)
    refused(UsageError, r"fills only \d\d% of test_resnet .* missing \d+ \(layer3.*init_partial", fresh(), path)
    backbone, random = fresh(), fresh().weights()
    filled = fill(backbone, str(path), partial=True)
    assert "left random, not in the source" in str(filled) and all(n.startswith("layer3") for n in filled.missing)
    for name, tensor in backbone.weights().items():
        assert torch.equal(tensor, (random if name.startswith("layer3") else weights)[name])
    # Norms and biases are two thirds of the tensors and one per cent of the values.
    torch.save({name: t for name, t in weights.items() if t.ndim > 1}, path)
    refused(UsageError, r"fills only \d\d%", fresh(), path)
    wrong = {name: t.flatten() if name == "conv1.0.weight" else t for name, t in weights.items()}
    torch.save(wrong, path)
    assert fill(fresh(), str(path)).mismatched[0].startswith("conv1.0.weight (")
    refused(
        UsageError, r"holds no tensor that fits test_vit \(0 %\): another arch", fresh("test_vit"), path, partial=True
    )


def test_what_is_not_there_or_not_weights_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    refused(UsageError, r"w\.pt does not exist; it is random, timm", fresh(), path)
    (tmp_path / "empty").mkdir()
    refused(UsageError, "not an artefact or a finished run", fresh(), tmp_path / "empty")
    (tmp_path / "w.onnx").write_bytes(b"")
    refused(UsageError, "is no checkpoint: expected one of .safetensors", fresh(), tmp_path / "w.onnx")
    torch.save({"model": nn.Linear(2, 2)}, path)
    refused(UsageError, r"holds a pickled torch\.nn\.modules\.linear\.Linear.*any code", fresh(), path)
    for content in (b"", b"nothing that torch wrote"):
        path.write_bytes(content)
        refused(DataError, "cannot be read|no checkpoint", fresh(), path)
    weights = shaken().weights()
    weights["conv1.0.weight"][0] = torch.nan
    torch.save(weights, path)
    refused(DataError, "conv1.0.weight holds values that are not finite", fresh(), path)
    artefact.write(tmp_path / "a", shaken("test_convnext"), {})
    refused(UsageError, r"a \(test_convnext\)", fresh(), tmp_path / "a")


# Position embeddings and patches


def test_position_embeddings_are_interpolated_to_our_grid(tmp_path: Path) -> None:
    theirs, backbone = shaken("test_vit", img_size=32, patch_size=8, pool="token"), fresh("test_vit", **VIT_48)
    torch.save(theirs.weights(), tmp_path / "w.pt")
    filled = fill(backbone, str(tmp_path / "w.pt"))
    assert filled.adapted == ("pos_embed (1, 17, 64) to (1, 37, 64)",) and filled.share == 1
    positions = theirs.weights()["pos_embed"]
    grid = positions[:, 1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    larger = nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    found = backbone.weights()
    assert torch.equal(found["pos_embed"][:, :1], positions[:, :1]), "the class token keeps its position"
    torch.testing.assert_close(found["pos_embed"][:, 1:], larger)
    assert same(found | {"pos_embed": positions}, theirs.weights())
    uneven = theirs.weights() | {"pos_embed": torch.zeros(1, 16, 64)}  # 15 patches are no square, 16 no class token
    torch.save(uneven, tmp_path / "w.pt")
    assert fill(backbone, str(tmp_path / "w.pt")).mismatched == ("pos_embed (1, 16, 64) for (1, 37, 64)",)


def test_a_larger_patch_sees_in_an_enlarged_image_what_the_smaller_saw(tmp_path: Path) -> None:
    theirs = shaken("test_vit", img_size=48, patch_size=8, pool="token")
    backbone = fresh("test_vit", img_size=96, patch_size=16, pool="token")
    torch.save(theirs.weights(), tmp_path / "w.pt")
    assert fill(backbone, str(tmp_path / "w.pt")).adapted == (
        "patch_embed.proj.weight (64, 3, 8, 8) to (64, 3, 16, 16)",
    )
    x_BCHW = torch.randn(5, 3, 8, 8)
    larger_BCHW = nn.functional.interpolate(x_BCHW, (16, 16), mode="bicubic", antialias=True)
    small, large = (b.weights()["patch_embed.proj.weight"] for b in (theirs, backbone))
    torch.testing.assert_close(
        torch.einsum("bchw,dchw->bd", larger_BCHW, large), torch.einsum("bchw,dchw->bd", x_BCHW, small),
        atol=1e-4, rtol=1e-3,
    )  # fmt: skip


# timm's published weights


def test_published_weights_and_what_their_network_was_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, theirs = timm.create_model, shaken()

    def published(name: str, pretrained: bool = False, **args: Any) -> nn.Module:
        network = real(name, **args)
        if pretrained:
            network.load_state_dict(theirs.weights())
            network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.4, 0.5, 0.6)}
        return network

    monkeypatch.setattr(timm, "create_model", published)
    backbone = fresh()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    filled = fill(backbone, "timm")
    assert torch.equal(torch.rand(1), expected), "a head after it must be the same"
    assert same(backbone.weights(), theirs.weights())
    assert "warning: its network was fed mean (0.4, 0.5, 0.6)" in str(filled)
    assert "timm's published test_resnet.r160_in1k" in str(fill(fresh(), "timm:test_resnet.r160_in1k"))


def test_published_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **args: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return real(name, **args)

    monkeypatch.setattr(timm, "create_model", offline)
    refused(UsageError, r"no published weights of 'test_resnet' could be had \(no network\)", fresh(), "timm")
    refused(UsageError, "timm publishes no weights of 'botnet50ts_256'$", fresh(), "timm:botnet50ts_256")
    refused(UsageError, "no weights of 'test_resnet.x'; there are test_resnet.r160", fresh(), "timm:test_resnet.x")
    refused(UsageError, "did you mean", fresh(), "timm:resnet19")


# Methods


def recipe_of(method: str, init: object, backbone: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    recipe = small(method, backbone, **train)
    named = recipe["backbone"] if isinstance(recipe["backbone"], dict) else {"name": recipe["backbone"]}
    return {**recipe, "backbone": {**named, "init": str(init)}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for name, options in (("test_resnet", {}), ("test_vit", VIT_48)):
        save_file(shaken(name, **options).weights(), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("test_resnet", "test_vit")}


@pytest.mark.parametrize("method", names("methods"))
def test_every_backbone_of_a_method_starts_the_same_and_heads_as_ever(method: str, weights: dict[str, Path]) -> None:
    plain = small(method)
    name = "test_vit" if isinstance(plain["backbone"], dict) else "test_resnet"
    said: list[str] = []
    built = setup.method(load(recipe_of(method, weights[name])), said.append)
    random = setup.method(load(plain))
    assert len(said) == 1 and said[0].startswith(f"{name} starts from")
    theirs = load_file(weights[name])
    theirs = {k: t for k, t in theirs.items() if k != "pos_embed"}  # resampled where the views are of another size
    mine = [b for b in built.modules() if isinstance(b, Backbone)]
    assert optim.trunk(built) in mine and built.backbone in mine
    for backbone in mine if method != "distill" else [built.backbone]:
        assert same({k: t for k, t in backbone.weights().items() if k != "pos_embed"}, theirs)
    if method in ("dino", "ibot", "dinov2", "byol"):
        assert len(mine) == 2 and same(mine[0].weights(), mine[1].weights())
    inside = {f"{n}.{p}" for n, b in built.named_modules() if isinstance(b, Backbone) for p, _ in b.named_parameters()}
    heads = {n: p for n, p in built.named_parameters() if n not in inside and not n.startswith("encoder.")}
    others = dict(random.named_parameters())
    assert heads and all(torch.equal(p, others[n]) for n, p in heads.items())


def test_a_run_tells_what_it_starts_from_and_random_is_null(
    pack: Pack, weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        pretrain(recipe_of("simclr", tmp_path / "no.pt"), data="/no/such/images", out=tmp_path / "a")
    pretrain(recipe_of("simclr", "random", steps=1), data=pack.folder, out=tmp_path / "random")
    pretrain(small("simclr", steps=1), data=pack.folder, out=tmp_path / "null")
    a, b = (load_file(tmp_path / name / "artefact" / "model.safetensors") for name in ("random", "null"))
    assert same(a, b) and not (tmp_path / "random" / drift.FILE).exists()
    assert "starts from" not in capsys.readouterr().out
    pretrain(recipe_of("simclr", tmp_path / "random", steps=1), data=pack.folder, out=tmp_path / "next")
    out = "".join(capsys.readouterr().out.split("\n"))
    assert f"test_resnet starts from {tmp_path / 'random' / 'artefact'} (test_resnet): " in out


# What learns


def state(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / f"step_{step:09d}.pt", weights_only=True)
    return found


@pytest.mark.parametrize(("method", "name"), [("dino", "test_resnet"), ("byol", "test_resnet"), ("mae", "test_vit")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_frozen_trunk_keeps_its_bits_while_heads_learn(
    method: str, name: str, optimizer: str, pack: Pack, weights: dict[str, Path], tmp_path: Path
) -> None:
    train: dict[str, Any] = {"freeze_backbone": 0.5, "weight_decay": 0.5, "save_every_steps": 3, "warmup": 0.0}
    recipe = recipe_of(method, weights[name], VIT if name == "test_vit" else None, optimizer=optimizer, **train)
    pretrain(recipe, data=pack.folder, out=tmp_path / "a")
    built = setup.method(load(recipe), lambda _: None)
    start, middle, end = built.state_dict(), state(tmp_path / "a", 3)["method"], state(tmp_path / "a", 6)["method"]
    trunks = [f"{n}." for n, b in built.named_modules() if isinstance(b, Backbone)] + ["encoder."]
    inside = {key for key in start if key.startswith(tuple(trunks))}
    assert all(torch.equal(start[key], middle[key]) for key in inside), "weights and statistics"
    trained = {key for key, p in built.named_parameters() if p.requires_grad and key not in inside}
    still = {key for key in trained if torch.equal(start[key], middle[key])}
    assert len(still) < len(trained) / 4, still
    moved = {key for key in inside if start[key].is_floating_point() and not torch.equal(start[key], end[key])}
    assert len(moved) > len(inside) / 2
    assert len(state(tmp_path / "a", 3)["optimizer"]["state"]) < len(state(tmp_path / "a", 6)["optimizer"]["state"])


def test_rates_fall_with_depth_as_counted_by_hand() -> None:
    config = config_class("simclr")(size_px=32, hidden_dim=32, output_dim=16)
    method = methods.create(config, fresh("test_vit", **VIT_48))
    spec = OptimSpec("adamw", lr=1.0, weight_decay=0.1, weight_decay_end=0.3, warmup=0.5, layer_decay=0.5)
    optimizer = optim.create(method, spec)
    assert optim.set_rates(optimizer, spec, 0.25) == 0.5
    names_of = {p: name for name, p in method.named_parameters()}
    rates = {names_of[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(names_of) == sum(len(group["params"]) for group in optimizer.param_groups)
    network = "backbone.network."
    by_hand = {  # six blocks: the last learns at the full rate, here 0.5
        "head.layers.0.weight": 0.5, f"{network}norm.weight": 0.5, f"{network}blocks.5.mlp.fc1.weight": 0.5,
        f"{network}blocks.4.attn.qkv.bias": 0.25, f"{network}blocks.3.norm1.weight": 0.125,
        f"{network}blocks.0.attn.qkv.weight": 0.5**6, f"{network}pos_embed": 0.5**7, f"{network}cls_token": 0.5**7,
        f"{network}patch_embed.proj.weight": 0.5**7,
    }  # fmt: skip
    assert {name: rates[name] for name in by_hand} == by_hand
    assert len(optimizer.param_groups) == 2 * 7 and len(set(rates.values())) == 7
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == group["decays"] for p in group["params"])
        assert group["weight_decay"] == (pytest.approx(0.1 + 0.2 * 0.1464466) if group["decays"] else 0)
    slow = optim.scales(method.backbone, OptimSpec("adamw", lr=1.0, layer_decay=0.5, patch_rate=0.2))
    shares = {names_of[p]: share for p, share in slow.items()}
    assert shares[f"{network}patch_embed.proj.bias"] == 0.2 * 0.5**6 and shares[f"{network}pos_embed"] == 0.5**6
    alone = optim.scales(method.backbone, OptimSpec("adamw", lr=1.0, patch_rate=0.2))
    assert sorted(set(alone.values())) == [0.2, 1.0]
    pyramid = optim.scales(fresh(), spec)  # a stem and four stages of one block
    assert sorted(set(pyramid.values())) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert pyramid[fresh_parameter(pyramid, (32, 16, 3, 3))] == 0.0625


def fresh_parameter(found: dict[Tensor, float], shape: tuple[int, ...]) -> Tensor:
    return next(p for p in found if tuple(p.shape) == shape)


def test_without_layer_decay_the_groups_are_what_checkpoints_hold() -> None:
    method = methods.create(config_class("simclr")(size_px=32, hidden_dim=32, output_dim=16), fresh())
    optimizer = optim.create(method, OptimSpec("adamw", lr=1.0, weight_decay=0.1))
    trained = list(method.parameters())
    assert [g["params"] for g in optimizer.param_groups] == [
        [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1],
    ]  # fmt: skip
    assert all("scale" not in group for group in optimizer.param_groups)
    with pytest.raises(UsageError, match="states no order of its layers"):
        backbones.create("pixels/16").layers()


@pytest.mark.parametrize(
    ("train", "says"), [({"freeze_backbone": 1.0}, "share of the run"), ({"layer_decay": 1.5}, "at most 1")]
)
def test_impossible_values(train: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(small("simclr", **train))


# Drift


def test_drift_is_one_at_the_start_and_less_later(pack: Pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drift, "CROPS", 60)
    backbone = shaken().train()
    before = torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    meter = drift.opened(tmp_path, backbone, pack, None, step=0)
    assert meter is not None and meter(backbone) == {"knn_agreement": 1.0, "cosine": pytest.approx(1.0, abs=1e-6)}
    assert backbone.training and same(kept, backbone.weights()) and torch.equal(before, torch.get_rng_state())
    again = drift.opened(tmp_path, shaken(seed=3), pack, None, step=4)
    assert again is not None and torch.equal(again.start_ND, meter.start_ND), "read, not computed"
    seen = [1.0]
    for scale in (1e-3, 1e-2, 1e-1):  # of the weights' own size
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
        seen.append(meter(backbone)["knn_agreement"])
    assert seen == sorted(seen, reverse=True) and 0.95 > seen[2] > seen[3] > 20 / 59, seen
    assert drift.agreement(torch.randn(1, 4), torch.randn(1, 4), 20) == 1
    (tmp_path / drift.FILE).unlink()
    assert drift.opened(tmp_path, backbone, pack, None, step=4) is None


def test_agreement_is_a_plain_count() -> None:
    generator = torch.Generator().manual_seed(0)
    a_ND = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    b_ND = a_ND + torch.randn(30, 5, generator=generator, dtype=torch.float64)

    def nearest(z_ND: np.ndarray, i: int) -> set[int]:
        cosine_N = z_ND @ z_ND[i] / np.linalg.norm(z_ND, axis=1)
        return set([int(j) for j in np.argsort(-cosine_N) if j != i][:7])

    shares = [len(nearest(a_ND.numpy(), i) & nearest(b_ND.numpy(), i)) / 7 for i in range(30)]
    assert drift.agreement(a_ND, b_ND, 7) == pytest.approx(np.mean(shares)) and 0.2 < np.mean(shares) < 0.9


def test_crops_are_of_the_images_alone(pack: Pack) -> None:
    crops = drift.crops(pack, np.arange(90), 32, None)
    assert crops.shape == (90, 32, 32, 3) and crops.dtype == np.uint8
    assert np.array_equal(drift.crops(pack, np.arange(70, 90), 32, None), crops[70:])
    assert not np.array_equal(crops[0], crops[40]), "the same image, another place"
    assert not np.array_equal(crops, drift.crops(pack, np.arange(90), 32, 20))


# All of it, killed and continued


def test_a_run_with_all_of_it_continues_without_its_source_to_the_same_bits(
    pack: Pack, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "CROPS", 64)
    own = shutil.copy(weights["test_vit"], tmp_path / "own.safetensors")
    train: dict[str, Any] = {"steps": 10, "freeze_backbone": 0.5, "layer_decay": 0.7, "save_every_steps": 3}
    recipe = {**recipe_of("dino", own, VIT, **train), "probe": {"every_epochs": 1}}
    pretrain(recipe, data=pack.folder, out=tmp_path / "calm")
    with monkeypatch.context() as patched:  # stops in the middle of the frozen part
        save = Checkpoints.save

        def killed(self: Checkpoints, step: int, state: dict[str, Any]) -> Path:
            save(self, step, state)
            raise KeyboardInterrupt

        patched.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, data=pack.folder, out=tmp_path / "cut")
    Path(own).unlink()
    with pytest.raises(UsageError, match="does not exist"):
        pretrain(recipe, data=pack.folder, out=tmp_path / "new")
    pretrain(recipe, data=pack.folder, out=tmp_path / "cut")
    a, b = state(tmp_path / "calm", 10), state(tmp_path / "cut", 10)
    assert same(a["method"], b["method"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    shares = {group["scale"] for group in a["optimizer"]["param_groups"]}
    assert shares == {0.7**i for i in range(7)}, "the stem, six blocks of which the last is as fast as the heads"
    for i, moments in a["optimizer"]["state"].items():
        assert same(moments, b["optimizer"]["state"][i])
    curves = []
    for name in ("calm", "cut"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([line for line in lines if "drift/cosine" in line])
    assert curves[0] == curves[1] and [line["step"] for line in curves[0]] == [5, 10]
    assert curves[0][0]["drift/knn_agreement"] == 1.0 > curves[0][1]["drift/knn_agreement"] > 0
    assert curves[0][0]["drift/cosine"] > curves[0][1]["drift/cosine"]


def test_the_meter_does_not_touch_the_training(
    pack: Pack, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**recipe_of("byol", weights["test_resnet"]), "probe": {"every_epochs": 1}}
    monkeypatch.setattr(drift, "CROPS", 30)
    pretrain(recipe, data=pack.folder, out=tmp_path / "with")
    monkeypatch.setattr(drift, "opened", lambda *_: None)
    pretrain(recipe, data=pack.folder, out=tmp_path / "without")
    assert same(state(tmp_path / "with", 6)["method"], state(tmp_path / "without", 6)["method"])
    assert (tmp_path / "with" / drift.FILE).exists() and not (tmp_path / "without" / drift.FILE).exists()


@pytest.mark.slow
def test_two_processes_freeze_and_decay_as_one_does(pack: Pack, weights: dict[str, Path], tmp_path: Path) -> None:
    train: dict[str, Any] = {"steps": 4, "precision": "64-true", "accelerator": "cpu", "optimizer": "sgd", "lr": 1e-2}
    train |= {"freeze_backbone": 0.5, "layer_decay": 0.7}
    recipe = recipe_of("dino", weights["test_resnet"], **train)
    pretrain(recipe, data=pack.folder, out=tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
             "ssl_pretrain.cli", "pretrain", str(tmp_path / "recipe.yaml"), "--data", str(pack.folder),
             "--out", str(tmp_path / "two")]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "".join(done.stdout.split("\n")).count("starts from") == 1
    one, two = state(tmp_path / "one", 4)["method"], state(tmp_path / "two", 4)["method"]
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-10


def test_asked() -> None:
    assert [source.asked(init) for init in (None, "random", "timm", "x.pt")] == [False, False, True, True]
