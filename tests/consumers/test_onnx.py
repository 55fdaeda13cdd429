"""ONNX: onnxruntime gives the maps of the artefact, at any batch and size, and what is lost is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shaken

from ssl_pretrain import artefact, backbones
from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import _verify
from ssl_pretrain.export import onnx as target

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, by which torch exports, is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder and the lines; exporting takes seconds, so it is done once."""
    folder = artefact.write(tmp_path_factory.mktemp("onnx") / "a", shaken(), {})
    return folder, target.write(folder)


@pytest.fixture
def folder(exported: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in exported[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


SIZES = [(1, 64, 64), (3, 96, 224), (2, 160, 32)]


def apart(trained: Backbone, folder: Path, size: tuple[int, int, int]) -> float:
    """Largest difference of onnxruntime's maps from torch's, by their largest value."""
    x_BCHW = torch.randn(size[0], 3, *size[1:])
    session = onnxruntime.InferenceSession(folder / "backbone.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": x_BCHW.numpy()})
    with torch.inference_mode():
        expected = [map_BCHW.numpy() for map_BCHW in trained.maps(x_BCHW)]
    assert [theirs.shape for theirs in found] == [own.shape for own in expected]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


def test_the_weights_arrive_at_every_size_by_the_lines(exported: tuple[Path, str]) -> None:
    folder, lines = exported
    report = _verify.examine("onnx", folder)
    assert report["equal"] and set(report["maps"]) == {f"map_{i}" for i in range(5)}, report
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1
    assert "at another batch and size, (2, 3, " in report["notes"][0]
    trained = shaken()
    assert max(apart(trained, folder, size) for size in SIZES) < 1e-5
    x_BCHW = torch.randn(2, 3, 64, 96)
    names: dict[str, Any] = {"images": x_BCHW.numpy()}
    exec(lines, names)
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(names["map_4"]), trained.maps(x_BCHW)[4], atol=1e-4, rtol=1e-4)


def test_the_file_says_how_it_is_fed_and_nothing_of_this_machine(exported: tuple[Path, str]) -> None:
    content = (exported[0] / "backbone.onnx").read_bytes()
    card = load_backbone(exported[0]).card
    model = onnx.load_from_string(content)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["input"]) == card["input"] and json.loads(said["levels"]) == card["levels"]
    assert said["architecture"] == "test_resnet" and said["weights_sha256"] == card["weights_sha256"]
    assert model.opset_import[0].version == 18
    shapes = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output]
    assert shapes[2] == ["batch", 48, "height / 8", "width / 8"]
    onnx.checker.check_model(model, full_check=True)
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert str(Path(backbones.__file__).parents[2]).encode() not in content


def changed(folder: Path, change: Callable[[np.ndarray], np.ndarray], name: str) -> None:
    model = onnx.load(folder / "backbone.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith(name))
    values = np.ascontiguousarray(change(onnx.numpy_helper.to_array(tensor)))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "backbone.onnx")


@pytest.mark.parametrize(
    ("change", "name"), [(np.zeros_like, "layer4.0.conv2.weight"), (lambda w: w[:, ::-1], "conv1.0.weight")]
)
def test_a_changed_graph_is_caught(change: Callable[[np.ndarray], np.ndarray], name: str, folder: Path) -> None:
    changed(folder, change, name)
    with pytest.raises(DataError, match=r"gives other maps than torch at \(2, 3, \d+, \d+\)"):
        target.arrive(folder)


def test_a_file_of_another_artefact_is_caught(folder: Path) -> None:
    artefact.write(folder, shaken(normalize=False), {})  # the same weights, fed otherwise
    with pytest.raises(DataError, match="not of this artefact: export it again"):
        target.arrive(folder)


def test_what_cannot_be_exported_is_told_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UsageError, match="cannot export test_resnet to ONNX for every image size: no such operator"):
        target.write(folder)
    monkeypatch.setattr(target, "LARGEST", 1000)
    with pytest.raises(UsageError, match="larger than the 2 GB"):
        target.write(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"img_size": 64, "patch_size": 8}),
        ("test_convnext", {}),
        ("resnet50", {}),
        ("convnext_tiny", {}),
        ("vit_small_patch16_224", {}),
        ("ultralytics/yolo12n", {"img_size": 128}),
    ],
)
def test_other_networks_arrive_at_every_size(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name.startswith("ultralytics/"):
        pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    trained = shaken(name, **options)
    if "vit" in name:
        trained.network.pos_embed.data.normal_(std=0.2)  # so that resampling shows
    folder = artefact.write(tmp_path / "a", trained, {})
    target.write(folder)
    report = _verify.examine("onnx", folder)
    assert report["equal"], report
    side = trained.input.size_px
    assert max(apart(trained, folder, size) for size in [*SIZES, (1, side, side)]) < 2e-5
