"""The backbone in a detector's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from defusedxml import ElementTree
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet

from ssl_pretrain import artefact
from ssl_pretrain.detectors import _maps
from ssl_pretrain.detectors.torchvision import PyramidBackbone, fpn
from ssl_pretrain.errors import UsageError

VIT = {"img_size": 32, "patch_size": 8}
LEVELS = {FasterRCNN: "P2-P6", MaskRCNN: "P2-P6", RetinaNet: "P3-P7", FCOS: "P3-P7"}


def exported(folder: Path, name: str, **options: Any) -> Path:
    return artefact.write(folder / "a", shaken(name, **options), {})


def detector_on(backbone: PyramidBackbone, kind: type[nn.Module] = FasterRCNN, size_px: int = 96) -> nn.Module:
    return kind(
        backbone, num_classes=3, image_mean=backbone.input.mean, image_std=backbone.input.std, min_size=64,
        max_size=size_px,
    )  # fmt: skip


def targets(height: int, width: int) -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    return [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}]


def losses(detector: nn.Module, images: list[Tensor], truth: list[dict[str, Tensor]], steps: int) -> list[float]:
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=0.001)
    found = []
    for _ in range(steps):
        loss = sum(detector(images, truth).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", VIT)])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k is MaskRCNN)) for k in LEVELS])
def test_torchvisions_detectors_hold_the_weights_and_train(
    kind: type[nn.Module], name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trained, folder = shaken(name, **options), exported(tmp_path, name, **options)
    backbone = fpn(folder, out_channels=64, levels=LEVELS[kind])
    detector = detector_on(backbone, kind)
    image = torch.rand(3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trained.input.mean, trained.input.std))
    with torch.inference_mode():
        fed = detector.transform([image])[0].tensors
        ours, theirs = trained.maps((image[None] - mean) / std), detector.eval().backbone.body(fed)
        fresh = detector_on(fpn(folder, 64, levels=LEVELS[kind], pretrained=False), kind).eval().backbone.body(fed)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(ours, fresh, strict=True)), "the control"
    found = losses(detector, [image], targets(64, 96), steps=3)
    assert all(np.isfinite(found)) and found[-1] < found[0]
    weights = dict(backbone.body.backbone.network.named_parameters())
    idle = {key for key, p in weights.items() if p.grad is None}
    assert idle == {key for key, p in weights.items() if not p.requires_grad}, "what DistributedDataParallel fails on"
    assert idle == (set() if name == "test_resnet" else {"norm.weight", "norm.bias"})
    assert all(p.grad.any() for key, p in weights.items() if key not in idle)


@pytest.mark.parametrize("patch_px", [4, 8, 14, 16, 32])
@pytest.mark.parametrize(("levels", "strides"), [("P2-P6", [4, 8, 16, 32]), ("P3-P7", [8, 16, 32])])
def test_levels_of_a_plain_vit_have_the_strides_that_anchors_go_by(
    patch_px: int, levels: Any, strides: list[int], tmp_path: Path
) -> None:
    folder = exported(tmp_path, "test_vit", img_size=2 * patch_px, patch_size=patch_px)
    backbone = fpn(folder, out_channels=8, levels=levels).eval()
    with torch.inference_mode():
        for height, width in ((160, 96), (50, 70), (33, 1)):
            found = list(backbone(torch.randn(2, 3, height, width)).values())
            expected = [(2, 8, -(-height // s), -(-width // s)) for s in strides]
            assert [tuple(m.shape) for m in found[: len(strides)]] == expected and len(found) == 5
    images, _ = detector_on(backbone).transform([torch.rand(3, 61, 90)])
    with torch.inference_mode():
        grids = [m.shape[-2:] for m in backbone(images.tensors).values()]
    assert [images.tensors.shape[-1] // w for _, w in grids][: len(strides)] == strides, "what AnchorGenerator divides"


class Places(nn.Module):
    """Stands for a ViT whose map tells the mean place of each patch."""

    def __init__(self, patch_px: int) -> None:
        super().__init__()
        self.strides = (patch_px,)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(x_BCHW, self.strides[0])]


@pytest.mark.parametrize("patch_px", [8, 12, 14, 16])
def test_a_resampled_map_does_not_drift_from_the_image(patch_px: int) -> None:
    y, x = torch.meshgrid(torch.arange(224) + 0.5, torch.arange(448) + 0.5, indexing="ij")
    found = _maps.last_map(Places(patch_px), torch.stack([y, x])[None])[0]
    stride = 8 if patch_px == 8 else 16
    assert found.shape == (2, 224 // stride, 448 // stride)
    rows, columns = (torch.arange(size // stride) + 0.5 for size in (224, 448))
    inside = (slice(1, -2), slice(1, -2))  # at the border bilinear resampling holds the last value
    assert torch.allclose(found[0][inside], (rows * stride)[1:-2, None].expand_as(found[0][inside]), atol=1e-2)
    assert torch.allclose(found[1][inside], (columns * stride)[None, 1:-2].expand_as(found[1][inside]), atol=1e-2)


def test_what_no_pyramid_can_be_built_on_is_refused_in_words(tmp_path: Path) -> None:
    folder = exported(tmp_path, "test_vit", img_size=128, patch_size=64)
    with pytest.raises(UsageError, match=r"test_vit has patches of 64 px: a detector's have 4 to 32"):
        fpn(folder)
    with pytest.raises(UsageError, match=r"there are 'P2-P6' and 'P3-P7'"):
        fpn(folder, levels="P4-P6")
    odd = artefact.MapBackbone(shaken("test_resnet"), {})
    odd.strides = (2, 8, 16, 32)
    assert _maps.detector_levels(odd, 8) == [1, 2, 3]
    with pytest.raises(UsageError, match=r"have strides \[8, 16, 32\]: this pyramid is built on \[4, 8, 16, 32\]"):
        _maps.detector_levels(odd, 4)
    odd.strides = (2, 4, 8, 8, 16)
    with pytest.raises(UsageError, match=r"strides \[2, 4, 8, 8, 16\]: a detector's double from 4 on"):
        _maps.detector_levels(odd)


def labelled_smears(folder: Path, count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of BCCD at half size, (3, 240, 320) in 0..1, and their boxes."""
    images, truth = [], []
    for path in sorted((folder / "Annotations").glob("*.xml"))[:count]:
        image = Image.open(folder / "JPEGImages" / f"{path.stem}.jpg").convert("RGB").resize((320, 240))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        corners = [
            [float(box.find(key).text) / 2 for key in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(path).iter("bndbox")
        ]
        boxes = torch.tensor(corners)
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 1).all(dim=1)]
        truth.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)})
    return images, truth


@pytest.mark.slow
def test_a_faster_rcnn_learns_real_cells_from_an_exported_backbone(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "bccd" / "Annotations").is_dir():
        pytest.skip("BCCD is not among the real images")
    trained, folder = shaken("resnet18"), exported(tmp_path, "resnet18")
    images, truth = labelled_smears(real_data / "bccd", 2)
    detector = detector_on(fpn(folder), size_px=320)
    detector.transform.min_size = (240,)
    with torch.inference_mode():
        fed = detector.eval().transform(images)[0].tensors
        ours, theirs = trained.maps(fed), detector.backbone.body(fed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "before the first step"
    found = losses(detector, images, truth, steps=8)
    assert all(np.isfinite(found)) and min(found[-3:]) < 0.9 * found[0], found
