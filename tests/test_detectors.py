"""The backbone in a detector's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN

from ssl_pretrain import artefact, backbones
from ssl_pretrain.detectors.torchvision import fpn
from ssl_pretrain.errors import UsageError


def test_faster_rcnn_holds_the_weights_and_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = backbones.create("test_resnet").eval()
    artefact.write(tmp_path / "a", trained, {})
    backbone = fpn(tmp_path / "a", out_channels=16)
    detector = FasterRCNN(
        backbone, num_classes=3, image_mean=backbone.input.mean, image_std=backbone.input.std, min_size=64, max_size=96
    )
    inside = detector.backbone.body.backbone.weights()
    assert all(torch.equal(value, inside[key]) for key, value in trained.weights().items())
    image = torch.rand(3, 64, 96)
    fed = detector.transform([image])[0].tensors
    with torch.inference_mode():
        ours = trained.maps((image[None] - torch.tensor(trained.input.mean).view(3, 1, 1)) / torch.tensor(
            trained.input.std).view(3, 1, 1))  # fmt: skip
        theirs = detector.eval().backbone.body(fed)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    before = {key: value.clone() for key, value in inside.items()}
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=0.01)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = []
    for _ in range(3):
        loss = sum(detector([image], targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = detector.backbone.body.backbone.weights()
    moved = [not torch.equal(before[key], after[key]) for key, _ in trained.network.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


def test_a_plain_vit_is_refused_in_words(tmp_path: Path) -> None:
    artefact.write(tmp_path / "a", backbones.create("test_vit", img_size=32, patch_size=8), {})
    with pytest.raises(UsageError, match=r"all maps of .* have stride 8: a plain ViT has no pyramid"):
        fpn(tmp_path / "a")
