"""The weights arrive: what is loaded gives the maps of what was trained, here and in timm, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import shaken
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_pretrain import artefact, backbones, load_backbone
from ssl_pretrain.cli import main
from ssl_pretrain.errors import DataError, UsageError

ASKED_FOR: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("resnet50", {}),
    ("convnext_tiny", {"drop_path": 0.1}),
    ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "pool": "avg", "drop_path": 0.1}),
    ("vit_small_patch16_224", {"pool": "token"}),
    ("vit_base_patch16_224", {"pool": "avg"}),
]
LARGE = ("resnet50", "vit_small_patch16_224", "vit_base_patch16_224")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "artefact", shaken("test_resnet"), {"method": "simclr", "step": 3})


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*asked, id=asked[0], marks=[pytest.mark.slow] * (asked[0] in LARGE)) for asked in ASKED_FOR],
)
def test_maps_are_those_of_what_was_trained_and_of_timm(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained = shaken(name, **options)
    artefact.write(tmp_path / "a", trained, {})
    loaded = load_backbone(tmp_path / "a")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, features_only=True).eval()
    x_BCHW = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        maps, expected, timms = loaded(x_BCHW), trained.maps(x_BCHW), theirs(x_BCHW)
        fresh = backbones.create(name, **options).eval().maps(x_BCHW)
    assert len(maps) == len(expected) == len(timms) == len(loaded.strides) == len(loaded.channels)
    for i, found in enumerate(maps):
        assert torch.equal(found, expected[i]) and torch.equal(found, timms[i])
        assert not torch.allclose(found, fresh[i]), "the control: another network must not pass"
        assert found.shape == (2, loaded.channels[i], 96 // loaded.strides[i], 64 // loaded.strides[i])
    assert list(loaded.strides) == theirs.feature_info.reduction()
    assert list(loaded.channels) == theirs.feature_info.channels()
    assert not loaded.training and trained.input == loaded.input


def test_a_detector_trains_it(folder: Path) -> None:
    loaded = load_backbone(folder).train()
    sum(found.square().mean() for found in loaded(torch.randn(2, 3, 64, 64))).backward()
    trained = [p.grad is not None for p in loaded.parameters()]
    assert all(trained) and loaded.card["method"] == "simclr"


def test_what_is_not_what_was_exported_is_refused(folder: Path) -> None:
    weights_file = folder / "model.safetensors"
    content, config = weights_file.read_bytes(), (folder / "config.json").read_text()
    weights = load_file(weights_file)

    def refused(kind: type[Exception], says: str) -> None:
        with pytest.raises(kind, match=says) as error:
            load_backbone(folder)
        assert "\n" not in str(error.value)
        weights_file.write_bytes(content)
        (folder / "config.json").write_text(config)

    tampered = {key: value + 1e-3 if key == "conv1.weight" else value for key, value in weights.items()}
    save_file(tampered, weights_file)
    refused(DataError, "sha-256 differs")
    weights_file.write_bytes(content[:-9])
    refused(DataError, "cannot be read")
    weights_file.unlink()
    refused(DataError, "cannot be read")
    card = json.loads(config)
    card["architecture"] = "resnet18"
    (folder / "config.json").write_text(json.dumps(card))
    refused(DataError, "do not fit resnet18")
    card = json.loads(config)
    card["ssl_pretrain"]["schema"] = 99
    (folder / "config.json").write_text(json.dumps(card))
    refused(UsageError, "another version")
    (folder / "config.json").write_text("{}")
    refused(UsageError, "not an artefact")
    probe = load_file(folder / "probe.safetensors")
    save_file({key: value * 1.01 for key, value in probe.items()}, folder / "probe.safetensors")
    refused(DataError, "does not give the maps")


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    broken = shaken("test_resnet")
    next(broken.parameters()).data[0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        artefact.write(tmp_path / "a", broken, {})
    assert not (tmp_path / "a").exists()


def test_the_export_verb_writes_a_whole_copy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    said, line = capsys.readouterr().out.splitlines()
    assert said == "BatchNorm statistics are kept as pretraining left them"
    assert line.startswith('timm.create_model("local-dir:')
    x_BCHW = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for ours, theirs in zip(load_backbone(folder)(x_BCHW), eval(line, {"timm": timm}).eval()(x_BCHW), strict=True):
            assert torch.equal(ours, theirs)
    (folder / "model.safetensors").write_bytes(b"no")
    assert main(["export", str(folder), "--to", "timm", "--out", str(tmp_path / "out2")]) == 65
    assert not (tmp_path / "out2").exists()


def test_any_backbone_can_be_named(folder: Path) -> None:
    assert artefact.resolve(str(folder)).name == "test_resnet"
    assert artefact.resolve("pixels").dim == 16 * 16 * 3
    a, b = artefact.resolve("random:test_vit", 64), artefact.resolve("random:test_vit", 64)
    x_BCHW = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(a(x_BCHW), b(x_BCHW)) and not a.training
    with pytest.raises(UsageError, match="did you mean"):
        artefact.resolve("random:resnet19")


def test_published_weights_that_cannot_be_had_are_an_error_and_not_random(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, num_classes: int = 0) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return real(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"no published weights of 'test_resnet' could be had \(no network\)"):
        artefact.resolve("timm:test_resnet")


def test_the_card_of_a_vit_tells_its_tokens(tmp_path: Path) -> None:
    artefact.write(tmp_path / "a", shaken("test_vit", img_size=32, patch_size=8), {})
    assert load_backbone(tmp_path / "a").card["tokens"] == {"class": True, "prefix": 1, "patch_px": 8, "grid": [4, 4]}
    artefact.write(tmp_path / "b", shaken("test_vit3", img_size=32, patch_size=8), {})  # its token is a register
    assert load_backbone(tmp_path / "b").card["tokens"]["class"] is False
    assert "tokens" not in load_backbone(artefact.write(tmp_path / "c", shaken("test_resnet"), {})).card
