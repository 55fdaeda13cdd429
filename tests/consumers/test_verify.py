"""`export --verify` with the real consumers: every target that a backbone has passes, by the verb itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import shaken

from ssl_pretrain import artefact
from ssl_pretrain.cli import main

pytest.importorskip("ultralytics", reason="needs the consumers: make test-consumers")
pytest.importorskip("transformers", reason="needs the consumers: make test-consumers")
pytest.importorskip("onnxruntime", reason="needs the consumers: make test-consumers")
pytest.importorskip("mmengine", reason="needs the consumers: make test-consumers")

BACKBONES = {
    "resnet18": {"normalize": False},
    "resnet50": {},
    "convnext_tiny": {},
    "vit_small_patch16_224": {},
    "ultralytics/yolo12n": {"img_size": 64},
}
ANYWHERE = ("safetensors", "onnx")
TIMMS = (*ANYWHERE, "timm", "hf", "torchvision", "mmdet")
TARGETS = {name: TIMMS for name in BACKBONES} | {
    "resnet18": (*TIMMS, "ultralytics"),
    "ultralytics/yolo12n": (*ANYWHERE, "torchvision", "ultralytics", "mmdet"),
}
REFUSED = {
    ("resnet50", "ultralytics"): "pads with zeros",
    ("convnext_tiny", "ultralytics"): "has no place for convnext_tiny",
    ("vit_small_patch16_224", "ultralytics"): "has no place for vit_small_patch16_224",
    ("ultralytics/yolo12n", "timm"): "timm has no network",
    ("ultralytics/yolo12n", "hf"): "transformers has no network",
}
CASES = [(name, target) for name, targets in TARGETS.items() for target in targets]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artefact of each, with statistics and weights that a fresh network does not have."""
    folder = tmp_path_factory.mktemp("artefacts")
    return {
        name: artefact.write(folder / name.replace("/", "_"), shaken(name, **options), {})
        for name, options in BACKBONES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{target}-{name}" for name, target in CASES])
def test_every_target_holds_the_weights(name: str, target: str, exported, tmp_path: Path) -> None:
    words = ["export", str(exported[name]), "--to", target, "--out", str(tmp_path / "out"), "--images", "none"]
    assert main([*words, "--verify"]) == 0
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["equal"] and report["tolerance"] <= 1e-4 and report["maps"]
    assert all(each["difference"] <= 1e-4 and each["control"] > 0.05 for each in report["maps"].values())
    worst = max(each["difference"] for each in report["maps"].values())
    control = min(each["control"] for each in report["maps"].values())
    share = report["initialised"] / report["parameters"]
    print(f"{name} {target} {report['consumer']}: {worst:.1e}, control {control:.2f}, {share:.1%}, {report['trained']}")


@pytest.mark.parametrize(("name", "target"), REFUSED, ids=[f"{target}-{name}" for name, target in REFUSED])
def test_what_a_consumer_cannot_take_is_refused_in_words(name, target, exported, tmp_path, capsys) -> None:
    words = ["export", str(exported[name]), "--to", target, "--out", str(tmp_path / "out"), "--images", "none"]
    assert main(words) == 64
    assert REFUSED[name, target] in capsys.readouterr().err
