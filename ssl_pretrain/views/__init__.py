"""Views: what a method sees of an image. Specified as data, drawn by `plan`, carried out by an engine.

Legend: B images, V views of a spec, H W pixels. Images are uint8 (H, W, 3); views are float (B, 3, S, S).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssl_pretrain.errors import UsageError

if TYPE_CHECKING:
    from ssl_pretrain.views.extras import Extra

CHAIN = ("blur", "jitter", "gray", "solarize")
"""The ops after the geometry, in the order of light: optics blur before a camera has colours."""


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view and how many of it are cut from an image. The ops bear the names of Kornia's classes.

    Geometry comes first and in this order: crop and resize, horizontal flip, vertical flip, turn, rotation; then the
    ops of `chain`.
    """

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
    rotate_p: float = 0.0
    """RandomRotation about the crop's centre, antialiased. Corners show what lies beyond the crop, beyond the image its
    mirror image: no black."""
    rotate_degrees: float = 180.0
    """Angle drawn from [-d, d]."""
    blur_p: float = 0.0
    """RandomGaussianBlur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation in pixels of the view."""
    blur_kernel_px: int | None = None
    """Side of the kernel (odd); null takes 3 of the largest standard deviations on each side."""
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
    hue_space: Literal["hsv", "yiq"] = "hsv"
    """Where hue is turned: HSV is what every paper used; in YIQ it is linear, faster where nothing is
    compiled, and another augmentation."""
    gray_p: float = 0.0
    """RandomGrayscale."""
    solarize_p: float = 0.0
    """RandomSolarize."""
    solarize_threshold: float = 0.5
    """Values at or above are inverted."""
    chain: tuple[str | Extra, ...] = CHAIN
    """The ops after the geometry, in order: names out of `CHAIN` (left out: never done) and extra ops."""

    def __post_init__(self) -> None:
        names = [op for op in self.chain if isinstance(op, str)]
        if set(names) - set(CHAIN) or len(set(names)) < len(names):
            raise UsageError(f"the chain {names} of {self.name} is not of {', '.join(CHAIN)}, each at most once")
        for key, value in vars(self).items():
            if key.endswith("_p") and not 0 <= value <= 1:
                raise UsageError(f"{key} of {self.name} is {value}: it is a probability, 0 to 1")
            if key in ("brightness", "contrast", "saturation", "hue", "rotate_degrees") and not value >= 0:
                raise UsageError(f"{key} of {self.name} is {value}: it must be 0 or more")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UsageError(f"blur_sigma of {self.name} is {self.blur_sigma}: it needs 0 < low <= high")

    @property
    def extras(self) -> tuple[Extra, ...]:
        """The extra ops of the chain, in order."""
        return tuple(op for op in self.chain if not isinstance(op, str))


def __getattr__(name: str) -> Any:
    """`from_kornia`, when it is asked for: Kornia takes a second to import."""
    if name == "from_kornia":
        from ssl_pretrain.views.kornia import from_kornia

        return from_kornia
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
