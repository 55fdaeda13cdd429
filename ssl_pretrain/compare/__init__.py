"""Does it help my detector? The same light detector, fine-tuned from several starts and judged on the same images.

    data        two sides, nested fractions of the labels, batches
    starts      random weights, ImageNet's where they are at hand, this backbone, other artefacts
    detector    Faster R-CNN or RetinaNet, its training and its detections
    judging     COCO's mean average precision and its intervals
    running     all runs, each once, and what they say
    drawing     the table and the picture

Everything but the weights is the same for all starts: heads, steps, images and their order, flips and turns, and the
resamples of the test images. A finished run is a file in `runs/` and is never repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ssl_pretrain.errors import UsageError

PROTOCOL = "compare/v1"
Kind = Literal["fasterrcnn", "retinanet"]
MOST_SEEDS = 10
"""As many as there are quantiles of Student's t in `judging`."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common. Raises `UsageError` for what makes no sense."""

    detector: Kind = "fasterrcnn"
    fractions: tuple[float, ...] = (0.1, 1.0)
    """Of the labels; the images of a smaller one are among those of a larger one."""
    seeds: int = 3
    """Each draws its own fractions, heads, order of images and random weights. 2 or more give an honest interval."""
    steps: int = 300
    batch_size: int = 4
    """BatchNorm takes its statistics from these, so there are 4 or more."""
    short_side_px: int = 320
    lr: float = 3e-4
    """Peak rate of AdamW, for all layers."""
    channels: int = 64
    """Width of the pyramid and heads; published detectors have 256."""
    point_px: int = 80
    """Side of the square around a labelled point."""
    evaluations: int = 4
    """Points of the learning curve, the last one included."""
    rounds: int = 200
    """Resamples of the test images."""
    seed: int = 0
    """The first seed; also of the split, where the data set has none."""

    def __post_init__(self) -> None:
        wrong = {
            f"there are the detectors {' and '.join(get_args(Kind))}": self.detector not in get_args(Kind),
            "fractions are above 0, at most 1, and each once": not self.fractions
            or not all(0 < fraction <= 1 for fraction in self.fractions)
            or len(set(self.fractions)) < len(self.fractions),
            f"seeds are 1 to {MOST_SEEDS}": not 1 <= self.seeds <= MOST_SEEDS,
            "steps, channels, point-px and rounds are 1 or more, the seed 0 or more": min(
                self.steps, self.channels, self.point_px, self.rounds, self.seed + 1
            )
            < 1,
            "the batch has 4 images or more, for BatchNorm": self.batch_size < 4,
            "the shorter side has 64 px or more": self.short_side_px < 64,
            "the learning rate is finite and above 0": not 0 < self.lr < math.inf,
            "evaluations are 1 to steps": not 1 <= self.evaluations <= self.steps,
        }
        for words, is_wrong in wrong.items():
            if is_wrong:
                raise UsageError(f"compare: {words}")
