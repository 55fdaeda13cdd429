"""BatchNorm statistics as a detector will need them: of whole images at its own resolution, without augmentation.

Those of pretraining are a moving average over augmented crops, and most detectors freeze them for the whole training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchvision.transforms.v2.functional import center_crop

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.files import Rejected, find_images
from ssl_pretrain.data.pack import is_pack, open_pack
from ssl_pretrain.errors import DataError

IMAGES, BATCH = 128, 16
"""How many are looked at, and how many at once: the statistics are the mean of those of the batches."""


def has_batch_norm(backbone: Backbone) -> bool:
    """Whether there are any statistics to estimate."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())


def reestimate(backbone: Backbone, source: Path, size_px: int) -> int:
    """Sets the statistics of the backbone's BatchNorms from images of a pack or a folder; returns how many.

    Each image is scaled to a longer side of `size_px`. Raises `DataError` where none can be read, or where a statistic
    is not finite or a variance not positive.
    """
    images = list(_chosen(source))
    if not images:
        raise DataError(f"no image of {source} can be read, so BatchNorm is not re-estimated: give other --images")
    update_bn((_batch(images[i : i + BATCH], backbone, size_px) for i in range(0, len(images), BATCH)), backbone)
    for name, buffer in backbone.named_buffers():
        if not buffer.isfinite().all() or (name.endswith("running_var") and not (buffer > 0).all()):
            raise DataError(f"the images of {source} leave {name} without sound values: give other --images")
    return len(images)


def _chosen(source: Path) -> Iterator[np.ndarray]:
    """Up to `IMAGES` of the images, always the same ones, uint8 (H, W, 3); what cannot be read is left out."""
    key = rng.key(0, "batch norm")
    if is_pack(source):
        pack = open_pack(source)
        for number in rng.permutation(key, len(pack))[:IMAGES]:
            yield pack.image(int(pack.by_content_N[number]))
        return
    paths = find_images([source])
    for number in rng.permutation(key, len(paths))[:IMAGES]:
        with contextlib.suppress(Rejected):
            yield decode(paths[number])


def _batch(images: list[np.ndarray], backbone: Backbone, size_px: int) -> Tensor:
    """Normalised, and cut around their middles to the size that all have: one by one they would not show how much
    images differ.
    """
    scaled = []
    for image_HWC in images:
        height, width = image_HWC.shape[:2]
        share = size_px / max(height, width)
        x_1CHW = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1).unsqueeze(0).float() / 255
        side = max(1, round(height * share)), max(1, round(width * share))
        scaled.append(F.interpolate(x_1CHW, side, mode="bilinear", antialias=True, align_corners=False))
    coarsest = max(backbone.strides)
    height, width = (max(coarsest, min(x.shape[i] for x in scaled) // coarsest * coarsest) for i in (2, 3))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    return (torch.cat([center_crop(x, [height, width]) for x in scaled]) - mean) / std
