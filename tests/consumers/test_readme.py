"""The README's line for each consumer, and its two detectors, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shaken

from ssl_pretrain import artefact, load_backbone
from ssl_pretrain.artefact import apart
from ssl_pretrain.cli import main
from ssl_pretrain.export import probe
from ssl_pretrain.named import names

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)`", TEXT, flags=re.MULTILINE))
SMALL = {
    "epochs": 1, "imgsz": 64, "batch": 2, "device": "cpu", "workers": 0, "amp": False, "plots": False, "val": False,
    "save": False, "verbose": False, "mosaic": 0.0,
}  # fmt: skip


def exported(name: str, target: str, folder: Path, **options: Any) -> Path:
    source = artefact.write(folder / "a", shaken(name, **options), {})
    assert main(["export", str(source), "--to", target, "--out", str(folder / "out"), "--images", "none"]) == 0
    return folder / "out"


def run(line: str, out: Path, imports: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(f"{imports}\nfound = {line.replace('OUT', str(out))}", scope)
    return scope


def test_there_is_a_line_for_every_consumer() -> None:
    assert sorted(LINES) == names("export")


def test_timm(tmp_path: Path) -> None:
    out = exported("test_resnet", "timm", tmp_path)
    shown = probe(out, load_backbone(out).input)
    with torch.inference_mode():
        maps = run(LINES["timm"], out, "import timm")["found"].eval()(shown.x_BCHW)
    assert all(apart(found, own) < 1e-5 for found, own in zip(maps, shown.maps.values(), strict=True))


def test_torchvision(tmp_path: Path) -> None:
    out = exported("test_resnet", "torchvision", tmp_path)
    imports = "from ssl_pretrain.detectors.torchvision import fpn"
    held = run(LINES["torchvision"], out, imports)["found"].body.backbone.weights()
    assert all(torch.equal(held[key], own) for key, own in load_backbone(out).backbone.weights().items())


def test_safetensors(tmp_path: Path) -> None:
    out = exported("test_resnet", "safetensors", tmp_path)
    imports = "import timm\nfrom safetensors.torch import load_file\n"
    held = run(LINES["safetensors"], out, f"{imports}network = timm.create_model('test_resnet', num_classes=0)")
    own = load_backbone(out).backbone.weights()
    assert all(torch.equal(value, own[key]) for key, value in held["network"].state_dict().items())


def test_hf(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = exported("test_resnet", "hf", tmp_path)
    held = run(LINES["hf"], out, "from transformers import AutoModel")["found"].state_dict()
    own = load_backbone(out).backbone.weights()
    found = {key.removeprefix("timm_model."): value for key, value in held.items()}
    assert own.keys() == found.keys() and all(torch.equal(value, own[key]) for key, value in found.items())


def test_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    out = exported("test_resnet", "onnx", tmp_path)
    shown = probe(out, load_backbone(out).input)
    torch.save(shown.x_BCHW, tmp_path / "x.pt")
    imports = "from onnxruntime import InferenceSession\nimport torch\n"
    maps = run(LINES["onnx"], out, f"{imports}images = torch.load({str(tmp_path / 'x.pt')!r}).numpy()")["found"]
    pairs = zip(maps, shown.maps.values(), strict=True)
    assert all(apart(torch.from_numpy(found), own) < 1e-4 for found, own in pairs)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_detector_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact.write(tmp_path / "runs" / "simclr" / "artefact", shaken(), {})
    monkeypatch.chdir(tmp_path)
    (block,) = [text for text in blocks() if "fpn(" in text]
    scope: dict[str, Any] = {}
    exec(block, scope)
    held = scope["detector"].backbone.body.backbone.weights()
    own = load_backbone("runs/simclr").backbone.weights()
    assert all(torch.equal(held[key], value) for key, value in own.items())


@pytest.mark.slow
def test_the_detectors_of_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for one short epoch: both prove the weights when their training starts."""
    ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from ssl_pretrain.detectors.ultralytics import check
    from ssl_pretrain.export import ultralytics as target

    seen: list[float] = []

    class Small(ultralytics.YOLO):
        def train(self, **options: Any) -> Any:
            self.add_callback("on_train_start", lambda trainer: seen.append(check(trainer.model, "runs/yolo12n")))
            return super().train(**SMALL, project=str(tmp_path / "trained"), **options)

    artefact.write(tmp_path / "runs" / "yolo12n" / "artefact", shaken("ultralytics/yolo12n", img_size=64), {})
    (tmp_path / "data").mkdir()
    described = target._data(tmp_path / "data").read_text()
    for name in ("data.yaml", "cells.yaml"):
        (tmp_path / name).write_text(described)
    monkeypatch.chdir(tmp_path)
    words = ["export", "runs/yolo12n", "--to", "ultralytics", "--out", "out", "--images", "none"]
    assert main(words) == 0
    monkeypatch.setattr(ultralytics, "YOLO", Small)
    exec(f"from ultralytics import YOLO\n{LINES['ultralytics'].replace('OUT', 'out')}", {})
    (block,) = [text for text in blocks() if "attach(" in text]
    exec(block, {})
    assert len(seen) == 2 and max(seen) < 1e-5
