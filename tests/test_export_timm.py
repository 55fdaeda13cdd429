"""timm and plain safetensors: the consumer holds the weights, by the lines that the export gives, or it is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import shaken
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_pretrain import artefact, backbones
from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import _verify, safetensors
from ssl_pretrain.export import timm as timm_target
from ssl_pretrain.named import named

TARGETS = {"timm": timm_target, "safetensors": safetensors}
ASKED_FOR: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("test_resnet", {"normalize": False}),
    ("test_convnext", {"drop_path": 0.1}),
    ("test_vit", {"img_size": 64, "patch_size": 8, "pool": "avg"}),
    ("test_vit3", {"img_size": 64, "patch_size": 8}),
    ("resnet50", {}),
    ("vit_small_patch16_224", {}),
]
LARGE = ("resnet50", "vit_small_patch16_224")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "a", shaken(), {})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*asked, id="-".join(map(str, asked)), marks=[pytest.mark.slow] * (asked[0] in LARGE))
     for asked in ASKED_FOR],
)  # fmt: skip
def test_the_consumer_holds_the_weights(name: str, options: dict[str, Any], target: str, tmp_path: Path) -> None:
    trained = shaken(name, **options)
    artefact.write(tmp_path / "a", trained, {})
    lines = TARGETS[target].write(tmp_path / "a")
    report = _verify.examine(target, tmp_path / "a")
    assert report["equal"] and len(report["maps"]) == len(trained.strides), report
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1
    assert report["initialised"] == report["parameters"] and not report["random"]
    # And by the lines themselves.
    x_BCHW = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        expected = trained.maps(x_BCHW)
        if target == "timm":
            found = eval(lines, {"timm": timm}).eval()(x_BCHW)
        else:
            names: dict[str, Any] = {}
            exec(lines, names)
            found = names["network"].eval().forward_intermediates(x_BCHW, intermediates_only=True)[-len(expected) :]
    assert all(torch.allclose(own, theirs, atol=1e-5) for own, theirs in zip(expected, found, strict=True))


def random_weights(network: nn.Module) -> None:
    network.load_state_dict(timm.create_model("test_resnet", features_only=True).state_dict())


def default_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def blue_for_red(network: nn.Module) -> None:
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight.data = first.weight.data.flip(1)


def one_tensor_of_zeros(network: nn.Module) -> None:
    list(network.parameters())[-1].data.zero_()


@pytest.mark.parametrize("bug", [random_weights, default_statistics, blue_for_red, one_tensor_of_zeros])
def test_a_consumer_that_loses_something_is_caught(
    bug: Callable[[nn.Module], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _verify.examine("timm", folder)["equal"]
    real = timm.create_model

    def faulty(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        network = real(name, pretrained=pretrained, **options)
        if pretrained:
            bug(network)
        return network

    monkeypatch.setattr(timm, "create_model", faulty)
    report = _verify.examine("timm", folder)
    assert not report["equal"] and "did not arrive" in report["verdict"]


def test_a_network_of_another_family_is_refused_by_timm_and_kept_by_safetensors(tmp_path: Path) -> None:
    artefact.write(tmp_path / "a", backbones.create("pixels/8"), {})
    with pytest.raises(UsageError, match=r"timm has no network pixels/8.*--to onnx or --to safetensors") as error:
        timm_target.write(tmp_path / "a")
    assert "\n" not in str(error.value)
    names: dict[str, Any] = {}
    exec(safetensors.write(tmp_path / "a"), names)
    assert names["network"].name == "pixels/8"
    assert _verify.examine("safetensors", tmp_path / "a")["verdict"].startswith("not proven"), "it has no weights"


def test_one_file_says_how_its_network_is_built_and_fed(folder: Path) -> None:
    safetensors.write(folder)
    with safetensors.safe_open(folder / "backbone.safetensors", framework="pt") as file:
        said = file.metadata()
    card = load_backbone(folder).card
    assert said["architecture"] == "test_resnet" and said["format"] == "pt"
    assert json.loads(said["input"])["mean"] == card["input"]["mean"] and said["shapes_sha256"] == card["shapes_sha256"]
    ours, theirs = load_file(folder / "model.safetensors"), load_file(folder / "backbone.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_file_that_was_changed_or_is_of_another_artefact_is_caught(folder: Path, tmp_path: Path) -> None:
    safetensors.write(folder)
    file = folder / "backbone.safetensors"
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    save_file({**weights, "layer1.0.conv1.weight": torch.zeros_like(weights["layer1.0.conv1.weight"])}, file, metadata)
    report = _verify.examine("safetensors", folder)
    assert not report["equal"] and "did not arrive" in report["verdict"]
    save_file({key: value for key, value in weights.items() if key != "layer4.0.bn2.bias"}, file, metadata)
    with pytest.raises(DataError, match=r"does not fit test_resnet: .*layer4.0.bn2.bias") as error:
        safetensors.arrive(folder)
    assert "\n" not in str(error.value)
    safetensors.write(folder)
    artefact.write(folder, shaken(normalize=False), {})  # the same weights, another input
    with pytest.raises(DataError, match="not of this artefact: export it again"):
        safetensors.arrive(folder)


@pytest.mark.parametrize(("target", "package"), [("hf", "transformers"), ("onnx", "onnxruntime")])
def test_a_consumer_that_is_not_installed_is_told_in_a_line(
    target: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'ssl-pretrain\[(hf|onnx)\]'") as error:
        named("export", target).arrive(folder)
    assert "\n" not in str(error.value)
