"""MMEngine's own registry, initialisation and checkpoints deliver the weights; mmdet itself where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import shaken
from torch import nn

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from mmengine.config import Config
from mmengine.model import BaseModule, ImgDataPreprocessor
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint

from ssl_pretrain import artefact, load_backbone
from ssl_pretrain.detectors import mmdet as adapter
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import _verify
from ssl_pretrain.export import mmdet as target

pytestmark = pytest.mark.filterwarnings("ignore")  # MMEngine's own code is older than what it runs on
VIT = {"img_size": 32, "patch_size": 8}


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    folder = artefact.write(tmp_path / "a", shaken("test_resnet", img_size=64), {})
    target.write(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {"img_size": 64}), ("test_vit", VIT), ("resnet18", {"img_size": 64})]
)
def test_the_weights_arrive(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken(name, **options), {})
    target.write(folder)
    report = _verify.examine("mmdet", folder)
    assert report["equal"]
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1
    if importlib.util.find_spec("mmdet"):
        assert report["random"] == ["neck", "bbox_head"] and report["trained"].startswith("2 steps, loss ")
    else:
        assert report["notes"][0] == "mmdet is not installed: no detector was built or trained"
        assert (name == "resnet18") == ("load_checkpoint(strict=True)" in report["notes"][-1])


def test_the_written_config_builds_what_was_exported(resnet: Path) -> None:
    base = Config({"model": {"backbone": {"type": "ResNet", "depth": 50, "init_cfg": {"type": "Pretrained"}},
                             "neck": {"type": "FPN", "in_channels": [256, 512, 1024, 2048], "num_outs": 5},
                             "data_preprocessor": {"type": "DetDataPreprocessor", "mean": [1, 2, 3]}}})  # fmt: skip
    base.merge_from_dict(Config.fromfile(str(resnet / target.CONFIG)).to_dict())
    model, loaded = base.model, load_backbone(resnet)
    assert set(model.backbone) == {"type", "path"}, "nothing of the base's ResNet is left"
    built = MODELS.build(model.backbone)
    assert model.neck == {"type": "FPN", "in_channels": built.channels, "num_outs": 5}
    assert model.data_preprocessor.type == "DetDataPreprocessor" and model.data_preprocessor.bgr_to_rgb is True
    assert base.custom_imports["imports"] == ["ssl_pretrain.detectors.mmdet"]
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    fed = {key: value for key, value in model.data_preprocessor.items() if key != "type"}
    x_BCHW = ImgDataPreprocessor(**fed)({"inputs": [image]})["inputs"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.input.mean, loaded.input.std))
    assert torch.allclose(x_BCHW[0], (image.flip(0) / 255 - mean) / std, atol=1e-5), "it reads BGR"
    with torch.inference_mode():
        ours, found = loaded(x_BCHW)[1:], built.eval()(x_BCHW)
    assert isinstance(found, tuple) and all(torch.equal(a, b) for a, b in zip(ours, found, strict=True))


@pytest.mark.parametrize(("levels", "strides"), [("P2-P6", [4, 8, 16, 32, 64]), ("P3-P7", [8, 16, 32, 64, 128])])
def test_a_plain_vit_has_a_neck_of_its_own(levels: Any, strides: list[int], tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken("test_vit", img_size=28, patch_size=14), {})
    target.write(folder)
    model = Config.fromfile(str(folder / target.CONFIG)).model
    for part in (model.backbone, model.neck):
        assert part.pop("_delete_") is True
    model.neck.levels = levels
    backbone, neck = MODELS.build(model.backbone), MODELS.build(model.neck)
    found = neck(backbone(torch.rand(1, 3, 128, 256)))
    assert [256 // m.shape[-1] for m in found] == strides and {m.shape[1] for m in found} == {256}
    assert (backbone.strides, backbone.channels) == ([16], [64])
    with pytest.raises(UsageError, match="there are 'P2-P6' and 'P3-P7'"):
        adapter.SSLPyramid(64, 16, levels="P4")


@pytest.mark.parametrize("norm_eval", [False, True])
def test_batch_norm_keeps_its_statistics_only_on_request(resnet: Path, norm_eval: bool) -> None:
    backbone = MODELS.build({"type": "SSLBackbone", "path": str(resnet), "norm_eval": norm_eval})
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for _ in range(2):  # when it is built, and when a runner comes back from validation
        before = [m.running_mean.clone() for m in norms]
        assert backbone.training and not any(m.training == norm_eval for m in norms)
        backbone(torch.rand(2, 3, 64, 64))[-1].sum().backward()
        assert all(torch.equal(a, m.running_mean) == norm_eval for a, m in zip(before, norms, strict=True))
        assert not any(m.training for m in backbone.eval().modules())
        backbone.train()
    assert all(p.requires_grad for p in backbone.parameters())


def test_mmengine_does_not_draw_the_weights_again(resnet: Path) -> None:
    class Detector(BaseModule):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

    def changed(detector: Detector) -> bool:
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        detector.init_weights()  # as the runner does before training
        return any(not torch.equal(before[key], value) for key, value in detector.state_dict().items())

    ours = MODELS.build({"type": "SSLBackbone", "path": str(resnet)})
    assert not changed(Detector(ours))
    assert changed(Detector(load_backbone(resnet).backbone.network)), "the control: timm's own init_weights would"


def test_the_checkpoint_is_read_whole_by_mmengine(tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken("resnet18", img_size=64), {})
    target.write(folder)
    network = torchvision.models.resnet18(weights=None)
    network.fc = nn.Identity()
    load_checkpoint(network, str(folder / target.WEIGHTS), map_location="cpu", strict=True)
    expected = load_backbone(folder).backbone.weights()
    assert all(torch.equal(expected[key], value) for key, value in network.state_dict().items())
    config = Config.fromfile(str(folder / target.CONFIG))
    assert config.model.backbone.init_cfg == {"type": "Pretrained", "checkpoint": str(folder / target.WEIGHTS)}
    assert (config.model.backbone.frozen_stages, config.model.backbone.norm_eval) == (-1, False)
    if importlib.util.find_spec("mmdet"):
        return
    weights = torch.load(folder / target.WEIGHTS, weights_only=True)
    weights["layer3.0.conv1.weight"].zero_()
    torch.save(weights, folder / target.WEIGHTS)
    with pytest.raises(DataError, match=r"mmdet\.pth gives other maps"):
        target.arrive(folder)


def test_lost_weights_are_seen(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.load
    monkeypatch.setattr(adapter, "load", lambda folder, pretrained: real(folder, False))
    assert _verify.examine("mmdet", resnet)["verdict"].startswith("the weights did not arrive")
    monkeypatch.setattr(adapter, "load", lambda folder, pretrained: real(folder))
    assert _verify.examine("mmdet", resnet)["verdict"].startswith("not proven")
    monkeypatch.setattr(adapter, "load", real)
    config = (resnet / target.CONFIG).read_text()
    (resnet / target.CONFIG).write_text(config.replace("bgr_to_rgb=True", "bgr_to_rgb=False"))
    assert _verify.examine("mmdet", resnet)["verdict"].startswith("the weights did not arrive")
