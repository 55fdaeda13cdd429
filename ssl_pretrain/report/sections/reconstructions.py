"""What the method itself has to show, such as MAE's reconstructions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ssl_pretrain.errors import DataError
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import Sheet, shown
from ssl_pretrain.train.checkpoint import Checkpoints

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 90
HEADINGS = {"reconstruction": ("what the encoder saw", "what the decoder drew", "the image")}
"""Of the columns of a method's pictures, by their name."""
WORDS = (
    "From the patches that the encoder saw, at the newest checkpoint. Under norm_pix_loss it draws texture only: each "
    "patch is given the brightness and contrast of the image."
)


@torch.no_grad()
def section(run: RunFolder) -> Section | None:
    """The method's own pictures by the newest checkpoint; nothing for a method that has none."""
    looked_at = run.feed.draw(run.feed.ids(0)[:8], epoch=0)
    if not run.method.pictures(looked_at):  # most have nothing, and their checkpoint need not be read
        return None
    state = Checkpoints(run.folder / "checkpoints").newest()
    if state is None:
        raise DataError("there is no checkpoint yet")
    try:
        run.method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise DataError("the newest checkpoint is not of this recipe") from error
    (name, x_NCHW), *_ = run.method.pictures(looked_at).items()
    tiles, headings = shown(x_NCHW, run.feed.fed), HEADINGS.get(name, ("", "", ""))
    side, left, head = 1.35, 0.15, 0.65
    step, rows = side + 0.07, math.ceil(len(tiles) / 6)
    sheet = Sheet(6 * step + 0.2 + 2 * left, head + rows * step + 0.1)
    sheet.text(left, 0.25, f"{run.name}: {name} at step {state['step']:,}", size=11)
    for i, tile in enumerate(tiles):
        (half, row), column = divmod(i // 3, rows), i % 3
        x = left + half * (3 * step + 0.2) + column * step
        if row == 0:
            sheet.text(x, head - 0.07, headings[column])
        sheet.picture(x, head + row * step, side, side, tile)
    alt = f"{len(tiles) // 3} images: {', '.join(headings)}"
    return Section("What the decoder draws", WORDS, sheet.figure, alt)
