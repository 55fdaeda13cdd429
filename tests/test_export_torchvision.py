"""torchvision holds what was exported: by the printed lines, in its own ResNet, and not when something is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import shaken
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_pretrain import artefact, load_backbone
from ssl_pretrain.artefact import apart
from ssl_pretrain.detectors._maps import RESNET_DEPTHS
from ssl_pretrain.detectors.torchvision import PyramidBackbone, fpn
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import probe
from ssl_pretrain.export import torchvision as target
from ssl_pretrain.export._verify import examine

RESNETS = sorted(RESNET_DEPTHS)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = artefact.write(tmp_path_factory.mktemp("e") / "a", shaken("resnet18", img_size=64), {})
    return folder, target.write(folder)


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_have_the_same_names_and_shapes_in_timm_and_torchvision(name: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=0).state_dict()
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    theirs = {key: value for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_the_printed_lines_work_as_they_are(resnet18: tuple[Path, str]) -> None:
    folder, lines = resnet18
    by_fpn, _, by_own_file = lines.partition("# or without this package")
    probed = probe(folder, load_backbone(folder).input)
    for text, first in ((by_fpn, 0), (f"#{by_own_file}\n", 1)):
        scope: dict[str, Any] = {}
        exec(f"from torchvision.models.detection import FasterRCNN\n{text}", scope)
        detector = scope["detector"].eval()
        with torch.inference_mode():
            normalised = detector.transform.normalize(probed.rgb_BCHW[0])[None]
            maps = detector.backbone.body(normalised)
        found = list(maps.values()) if isinstance(maps, dict) else maps
        expected = list(probed.maps.values())[first:]
        assert all(apart(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
        assert all(p.requires_grad for p in detector.parameters())
    assert isinstance(detector.backbone.body.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"img_size": 64}),
        ("test_vit", {"img_size": 32, "patch_size": 8}),
        pytest.param("resnet18", {"img_size": 64}, marks=pytest.mark.slow),
        pytest.param("test_vit", {"img_size": 98, "patch_size": 14}, marks=pytest.mark.slow),
        pytest.param("resnet50", {"img_size": 128}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {"img_size": 128}, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_224", {}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_arrive_in_faster_rcnn(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken(name, **options), {})
    target.write(folder)
    report = examine("torchvision", folder)
    assert report["equal"] and report["trained"].startswith("2 steps, loss ")
    assert len(report["maps"]) == len(load_backbone(folder).strides)
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1
    assert report["random"] == ["backbone.fpn", "rpn", "roi_heads"]
    assert (folder / target.OWN_FILE).is_file() == (name in RESNETS)


def test_what_is_lost_on_the_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artefact.write(tmp_path / "a", shaken("test_resnet", img_size=64), {})

    def verdict(told: Any) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(target, "fpn", told)
            patched.setattr(target, "_trained", lambda detector, probed: "")
            return str(examine("torchvision", folder)["verdict"])

    def altered(change: Any) -> Any:
        def told(path: Path, levels: Any, pretrained: bool = True) -> PyramidBackbone:
            backbone = fpn(path, levels=levels, pretrained=pretrained)
            change(backbone)
            return backbone

        return told

    def other_input(backbone: PyramidBackbone) -> None:
        backbone.input = type(backbone.input)((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64)

    def zeroed(backbone: PyramidBackbone) -> None:
        backbone.body.backbone.network.layer1[0].conv1.weight.data.zero_()

    def default_statistics(backbone: PyramidBackbone) -> None:
        for module in backbone.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()

    assert verdict(lambda path, levels, pretrained=True: fpn(path, pretrained=False)).startswith(
        "the weights did not arrive"
    )
    blind = "not proven: a consumer that loaded nothing gives the same maps"
    assert verdict(lambda path, levels, pretrained=True: fpn(path)) == blind
    for change in (other_input, zeroed, default_statistics):
        assert verdict(altered(change)).startswith("the weights did not arrive"), change
    assert verdict(altered(lambda backbone: None)) == "the weights arrived"


def test_a_file_for_torchvisions_resnet_that_is_not_the_artefact_is_refused(resnet18: tuple[Path, str]) -> None:
    folder, _ = resnet18
    whole = (folder / target.OWN_FILE).read_bytes()
    weights = load_file(folder / target.OWN_FILE)
    weights["layer4.1.bn2.weight"] *= 1.01
    save_file(weights, folder / target.OWN_FILE)
    with pytest.raises(DataError, match=r"torchvision\.safetensors gives torchvision other maps"):
        target.arrive(folder)
    (folder / target.OWN_FILE).write_bytes(whole)


def test_a_backbone_without_a_pyramid_is_refused(tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken("test_vit", img_size=128, patch_size=64), {})
    with pytest.raises(UsageError, match="patches of 64 px"):
        target.write(folder)
