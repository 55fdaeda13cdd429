"""Views: what a method sees of an image. Specified as data, drawn by `plan`, carried out by an engine.

Legend: B images, V views of a spec, H W pixels. Images are uint8 (H, W, 3); views are float (B, 3, S, S).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view and how many of it are cut from an image; the ops bear Kornia's names, in this order."""

    name: str
    """`global_0`, `local`...: the key under which the method finds its tensors."""
    size_px: int
    """Side of the square view."""
    scale: tuple[float, float]
    """RandomResizedCrop: share of the source's area (of the window's, where the recipe sets one)."""
    count: int = 1
    """V: views of this kind per image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height, drawn log-uniformly."""
    hflip_p: float = 0.5
    """RandomHorizontalFlip."""
    vflip_p: float = 0.0
    """RandomVerticalFlip."""
    turn_p: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees (equally likely)."""
    blur_p: float = 0.0
    """RandomGaussianBlur. Before the colour ops, as optics come before a camera's colours."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation in pixels of the view."""
    jitter_p: float = 0.0
    """ColorJitter, its four ops in an order drawn per sample."""
    brightness: float = 0.0
    """Factor drawn from [max(0, 1 - b), 1 + b]."""
    contrast: float = 0.0
    """Factor drawn from [max(0, 1 - c), 1 + c]."""
    saturation: float = 0.0
    """Factor drawn from [max(0, 1 - s), 1 + s]."""
    hue: float = 0.0
    """Shift drawn from [-h, h] turns of the colour circle."""
    gray_p: float = 0.0
    """RandomGrayscale."""
    solarize_p: float = 0.0
    """RandomSolarize."""
    solarize_threshold: float = 0.5
    """Values at or above are inverted."""
