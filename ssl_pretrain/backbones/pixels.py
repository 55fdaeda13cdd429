"""The pixels family: no network at all, the image itself at 16x16. What every network has to beat.

`create("pixels/16")`; its k-NN score says how much of a data set is told by colour and size alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.errors import UsageError

SIDE_PX = 16
INPUT_PX = 64


def create(model: str = "", img_size: int | None = None) -> Backbone:
    """The image averaged down to `model` x `model` pixels; "" is 16.

    img_size    side in pixels of the images that a probe should cut; 64 unless given
    """
    if model and (not model.isdecimal() or int(model) == 0):
        raise UsageError(f"pixels/{model}: after the slash comes the side in pixels, as in pixels/{SIDE_PX}")
    return Pixels(int(model or SIDE_PX), img_size or INPUT_PX)


def maskable(model: str) -> bool:
    """Never: there is nothing to train."""
    return False


def from_config(config: dict[str, Any]) -> Backbone:
    """The baseline that `Backbone.config` described."""
    return Pixels(int(config["side_px"]), int(config["input_px"]))


class Pixels(Backbone):
    """A thumbnail, read row by row, as the feature vector."""

    def __init__(self, side_px: int, input_px: int) -> None:
        super().__init__()
        self.side_px = side_px
        self.name = f"pixels/{side_px}"
        self.family = "convnet"
        self.dim = 3 * side_px * side_px
        # Mean 0: cosine similarity then compares colours as they are, brightness apart.
        self.input = InputSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), input_px)
        self.strides = (max(input_px // side_px, 1),)
        self.channels = (3,)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The thumbnail, flattened channel by channel: (B, 3 * side * side)."""
        return self.maps(x_BCHW)[0].flatten(1)

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """One map: the thumbnail (B, 3, side, side), antialiased. Its stride holds at the size of `input` only."""
        side = (self.side_px, self.side_px)
        return [F.interpolate(x_BCHW, size=side, mode="bilinear", antialias=True, align_corners=False)]

    def config(self) -> dict[str, Any]:
        """The side of the thumbnail and of the input."""
        return {"architecture": self.name, "side_px": self.side_px, "input_px": self.input.size_px}

    def weights(self) -> dict[str, Tensor]:
        """None: there is nothing to learn."""
        return {}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes the empty state only."""
        self.load_state_dict(weights)
