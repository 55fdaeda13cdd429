"""How far the features have moved from those that a run started with, on crops that never change.

Shapes: N crops, S side in pixels, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import named

CROPS, NEIGHBOURS, CHUNK = 512, 20, 64
FILE = "start.safetensors"


class Drift:
    """Holds the features at the start; call it with the backbone as it is now.

    They are kept in the run's folder, as a continued run does not have the starting weights any more.
    """

    def __init__(self, pack: Pack, window_px: int | None, start_ND: Tensor) -> None:
        self.pack, self.window_px, self.start_ND = pack, window_px, start_ND

    def __call__(self, backbone: Backbone) -> Mapping[str, float]:
        """`knn_agreement` and `cosine`, both 1 where nothing moved; neighbours that have nothing in common agree by
        20 / 511, and cosines of unrelated features depend on their means: it is the first that can be compared.
        """
        now_ND = features(backbone, self.pack, self.window_px)
        cosine = torch.nn.functional.cosine_similarity(self.start_ND, now_ND).mean().item()
        return {"knn_agreement": agreement(self.start_ND, now_ND, NEIGHBOURS), "cosine": cosine}


def opened(folder: Path, backbone: Backbone, pack: Pack, window_px: int | None, step: int) -> Drift | None:
    """The meter of a run.

    At its first step the features are computed and written into its folder; later they are read from there, and None
    says that they cannot be.
    """
    if step == 0:
        start_ND = features(backbone, pack, window_px)
        write_durably(folder / FILE, save_safetensors({"start_ND": start_ND}))
        return Drift(pack, window_px, start_ND)
    try:
        return Drift(pack, window_px, load_safetensors((folder / FILE).read_bytes())["start_ND"])
    except (OSError, SafetensorError, KeyError):
        return None


def agreement(a_ND: Tensor, b_ND: Tensor, k: int) -> float:
    """Share of the k nearest others (by cosine) of each point that are the same in both spaces, on average.

    Four points on a circle at 0, 10, 30 and 90 degrees have the nearest 10, 0, 10 and 30. When the last one moves to
    -5 degrees, it becomes the nearest of the first, and the first its own: two of four agree.

    >>> def circle(*degrees: float) -> Tensor:
    ...     radians = torch.tensor(degrees).deg2rad()
    ...     return torch.stack([radians.cos(), radians.sin()], dim=1)
    >>> agreement(circle(0, 10, 30, 90), circle(0, 10, 30, -5), k=1)
    0.5
    """
    k = min(k, len(a_ND) - 1)
    if k < 1:
        return 1.0
    a_NK, b_NK = _nearest(a_ND, k), _nearest(b_ND, k)
    common_NK = (a_NK[:, :, None] == b_NK[:, None, :]).any(-1)
    return common_NK.double().mean().item()


def _nearest(z_ND: Tensor, k: int) -> Tensor:
    z_ND = torch.nn.functional.normalize(z_ND.double())
    return (z_ND @ z_ND.T).fill_diagonal_(-torch.inf).topk(k).indices


def features(backbone: Backbone, pack: Pack, window_px: int | None, count: int | None = None) -> Tensor:
    """Features (N, D) of length 1 of the fixed crops, on the CPU; draws nothing and leaves the backbone as it was."""
    embed, size_px = named("probe", "features").embed, backbone.input.size_px
    numbers = np.array_split(np.arange(count or CROPS), -(-(count or CROPS) // CHUNK))
    parts = [embed(backbone, crops(pack, of, size_px, window_px)) for of in numbers]
    return torch.from_numpy(np.concatenate(parts))


def crops(pack: Pack, numbers_N: np.ndarray, size_px: int, window_px: int | None) -> np.ndarray:
    """Unaugmented squares (N, S, S, 3), uint8: a function of the images, the size and the window alone.

    Crop i is of image i, in the order of content, and begins again where the images end. Its side is the recipe's
    window, or half the short side of the image.
    """
    at_N2 = rng.uniform(rng.fold_in(rng.key(0, "drift"), numbers_N), 2)
    found = []
    for place, at_2 in zip(pack.by_content_N[numbers_N % len(pack)], at_N2, strict=True):
        image_HWC = pack.image(int(place))
        short = min(image_HWC.shape[:2])
        side = short // 2 if window_px is None else round(window_px * float(pack.scale_N[place]))
        side = min(max(side, 1), short)
        top, left = (int(share * (length - side + 1)) for share, length in zip(at_2, image_HWC.shape, strict=False))
        crop_CSS = torch.from_numpy(image_HWC[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        resized = interpolate(crop_CSS[None].float(), (size_px, size_px), mode="bilinear", antialias=True)
        found.append(resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())
    return np.stack(found)
