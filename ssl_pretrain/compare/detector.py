"""The light detector that every start gets, its training and its detections.

The same for all: pyramid and heads drawn from one key, images and views from another, BatchNorm in training mode.
Statistics that are frozen, as detectors do for ImageNet weights, would leave random weights without any; batches of 4
fields of 320 px give the deepest map 4 x 10 x 10 places or more to take them from.

Shapes: B images, D detections of an image, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead

from ssl_pretrain import rng
from ssl_pretrain.artefact import TOLERANCE, apart
from ssl_pretrain.compare import Kind
from ssl_pretrain.compare.data import Picture, batch, turned
from ssl_pretrain.compare.starts import Start
from ssl_pretrain.detectors._maps import load
from ssl_pretrain.detectors.torchvision import FINEST, PyramidBackbone
from ssl_pretrain.errors import NotProven, SslPretrainError
from ssl_pretrain.methods import OptimSpec
from ssl_pretrain.train.schedule import learning_rate

LEVELS = 5
"""Of both pyramids, P2-P6 and P3-P7."""
WARMUP, WEIGHT_DECAY, MOST_GRADIENT = 0.1, 0.05, 1.0
"""Share of the steps in which the rate rises; AdamW's decay of matrices; the norm at which gradients are clipped."""
DETECTIONS, LOWEST_SCORE = 100, 0.01
"""Kept of an image; COCO counts at most 100 of a class."""
RANDOM_APART = 1e-2
"""A detector that starts from random weights gives maps that are farther than this from the artefact's."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Of one image, in pixels of its file."""

    box_D4: NDArray[np.float64]
    score_D: NDArray[np.float64]
    label_D: NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """What one training left."""

    detections: tuple[Detections, ...]
    """One a test image."""
    curve: tuple[tuple[int, float], ...]
    """Steps done, and the figure that `judge` gave."""
    loss: tuple[float, ...]
    """Of each step."""
    order_sha256: str
    """Of which images were shown and how, over all steps: the same for all starts."""


def anchor_sizes(median_px: float) -> tuple[float, ...]:
    """Sides of the anchors of the five levels, each twice the last, so that one is the median object.

    It lies on the level on which published detectors have anchors of its size (32 px on the finest: Lin et al., 2017,
    for P2-P6, and Lin et al., "Focal Loss", 2017, for P3-P7), or on the finest when it is smaller than that. An object
    of 60 px is nearer to 64 than to 32, so it is of the second level.

    >>> anchor_sizes(60.0), anchor_sizes(10.0)[:2]
    ((30.0, 60.0, 120.0, 240.0, 480.0), (10.0, 20.0))
    """
    level = min(max(round(math.log2(median_px / 32)), 0), LEVELS - 1)
    return tuple(median_px * 2.0 ** (i - level) for i in range(LEVELS))


def build(
    start: Start, kind: Kind, classes: int, median_px: float, short_side_px: int, channels: int, seed: int
) -> tuple[nn.Module, float]:
    """The detector before its first step, on the CPU, and how far its body's maps are from the artefact's own.

    Pyramid and heads are drawn from a key of their own, so they are the same whatever the body is. Raises `NotProven`
    where the body does not hold the weights of its start, or holds them where it should be random.
    """
    with torch.random.fork_rng(devices=[]):  # torch's initialisers know no generator
        torch.manual_seed(rng.torch_seed(rng.key(seed, "compare body")))
        body = load(start.folder, start.pretrained)
        torch.manual_seed(rng.torch_seed(rng.key(seed, "compare heads")))
        backbone = PyramidBackbone(body, channels, FINEST["P2-P6" if kind == "fasterrcnn" else "P3-P7"])
        make = _faster_rcnn if kind == "fasterrcnn" else _retinanet
        detector = make(backbone, classes, anchor_sizes(median_px), short_side_px)
    return detector, _proven(detector, start)


def train(
    detector: nn.Module,
    pictures: Sequence[Picture],
    test: Sequence[Picture],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    evaluate_at: Sequence[int],
    judge: Callable[[Sequence[Detections]], float],
    progress: Callable[[int, float], None],
) -> Trained:
    """Fine-tunes all layers with AdamW, warm-up, a cosine and clipped gradients, and detects on the test images.

    evaluate_at   steps after which `judge` is asked; after the last one it always is
    progress      called after each step with the steps done and the loss

    Raises `SslPretrainError` when the loss is not finite.
    """
    detector.to(device).train()
    optimizer, spec = _optimizer(detector, lr), OptimSpec("adamw", lr, warmup=WARMUP)
    shown_sha, losses, curve = hashlib.sha256(), list[float](), list[tuple[int, float]]()
    found: tuple[Detections, ...] = ()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(steps):
            # torchvision samples proposals and anchors from torch's own generator.
            torch.manual_seed(rng.torch_seed(rng.fold_in(rng.key(seed, "compare sampling"), step)))
            images, targets = _batch(pictures, step, batch_size, seed, device, shown_sha)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / (steps + 1), spec)  # no step at a rate of 0
            loss = sum(detector(images, targets).values(), torch.zeros((), device=device))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise SslPretrainError(f"the detector's loss is {losses[-1]} at step {step}: give a smaller --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), MOST_GRADIENT)
            optimizer.step()
            progress(step + 1, losses[-1])
            if step + 1 in evaluate_at or step + 1 == steps:
                found = tuple(detect(detector, test, batch_size, device))
                curve.append((step + 1, judge(found)))
    return Trained(found, tuple(curve), tuple(losses), shown_sha.hexdigest())


def detect(detector: nn.Module, test: Sequence[Picture], batch_size: int, device: torch.device) -> list[Detections]:
    """What the detector finds, best first, in pixels of each file; it is in training mode again afterwards."""
    detector.eval()
    found = []
    with torch.no_grad():  # inference_mode would make what is cached here unusable in training
        for i in range(0, len(test), batch_size):
            pictures = test[i : i + batch_size]
            for picture, result in zip(pictures, detector([_tensor(p.pixels_HWC, device) for p in pictures]),
                                       strict=True):  # fmt: skip
                box_D4 = result["boxes"].double().cpu().numpy() / picture.scale_4
                score_D, label_D = (result[name].cpu().numpy() for name in ("scores", "labels"))
                found.append(Detections(box_D4, score_D.astype(np.float64), label_D.astype(np.int64)))
    detector.train()
    return found


def _faster_rcnn(backbone: PyramidBackbone, classes: int, sizes: Sequence[float], short_side_px: int) -> nn.Module:
    """Light: a quarter of the usual proposals, and heads of 256 instead of 1024."""
    anchors = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * LEVELS)
    detector: nn.Module = FasterRCNN(
        backbone,
        min_size=short_side_px,
        max_size=3 * short_side_px,
        image_mean=backbone.input.mean,
        image_std=backbone.input.std,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=500,
        rpn_post_nms_top_n_test=300,
        box_head=TwoMLPHead(backbone.out_channels * 7**2, 256),
        box_predictor=FastRCNNPredictor(256, classes + 1),
        box_score_thresh=LOWEST_SCORE,
        box_detections_per_img=DETECTIONS,
        box_batch_size_per_image=128,
    )
    return detector


def _retinanet(backbone: PyramidBackbone, classes: int, sizes: Sequence[float], short_side_px: int) -> nn.Module:
    """With GroupNorm in its heads, as torchvision's second version has it."""
    octave = (2 ** (-1 / 3), 1.0, 2 ** (1 / 3))
    anchors = AnchorGenerator(tuple(tuple(size * part for part in octave) for size in sizes),
                              ((0.5, 1.0, 2.0),) * LEVELS)  # fmt: skip
    norm = partial(nn.GroupNorm, math.gcd(32, backbone.out_channels))
    detector: nn.Module = RetinaNet(
        backbone,
        classes + 1,
        min_size=short_side_px,
        max_size=3 * short_side_px,
        image_mean=backbone.input.mean,
        image_std=backbone.input.std,
        anchor_generator=anchors,
        head=RetinaNetHead(backbone.out_channels, len(octave) * 3, classes + 1, norm_layer=norm),
        score_thresh=LOWEST_SCORE,
        detections_per_img=DETECTIONS,
    )
    return detector


def _proven(detector: Any, start: Start) -> float:
    """Feeds the body the artefact's own probe; how far its maps are from what they must be."""
    expected = load_file(start.folder / "probe.safetensors")
    body = detector.backbone.body
    body.eval()
    with torch.no_grad():
        maps = body(expected["input"])
    body.train()
    far = max(apart(map_BCHW, expected[f"map_{i}"]) for i, map_BCHW in enumerate(maps))
    if start.pretrained and far > TOLERANCE:
        raise NotProven(f"the detector does not hold the weights of {start.folder}: its maps are {far:.1e} apart")
    if not start.pretrained and far < RANDOM_APART:
        raise NotProven(f"the detector that should be random holds the weights of {start.folder}")
    return far


def _optimizer(detector: nn.Module, lr: float) -> torch.optim.AdamW:
    """Decay for matrices and kernels only."""
    weights = [weight for weight in detector.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def _tensor(pixels_HWC: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(3, H, W) in 0..1."""
    # A copy where the pixels cannot be written: torch warns of tensors on such arrays.
    pixels = torch.from_numpy(pixels_HWC if pixels_HWC.flags.writeable else pixels_HWC.copy())
    return pixels.to(device).permute(2, 0, 1).float() / 255


def _batch(
    pictures: Sequence[Picture], step: int, batch_size: int, seed: int, device: torch.device, shown_sha: Any
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The images (3, H, W) of a step and their targets; adds what is shown to the hash."""
    images, targets = [], []
    for shown in batch(len(pictures), step, batch_size, seed):
        picture = pictures[shown.index]
        shown_sha.update(f"{picture.digest} {shown.turns} {shown.flip} ".encode())
        pixels_HWC, box_N4 = turned(picture.pixels_HWC, picture.box_N4, shown.turns, shown.flip)
        images.append(_tensor(pixels_HWC, device))
        boxes = torch.from_numpy(box_N4).float().to(device)
        targets.append({"boxes": boxes, "labels": torch.from_numpy(picture.label_N).to(device)})
    return images, targets
