"""What a step sees: which images, and their views. Position comes from the step alone; there is no loader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.methods import Views
from ssl_pretrain.views import ViewSpec, fused
from ssl_pretrain.views.plan import plan


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes."""

    rank: int = 0
    ranks: int = 1
    parts: int = 1
    """Gradient accumulation: pieces of this rank's share."""


class Feed:
    """Draws the views of any step of a run, for one rank."""

    def __init__(
        self,
        pack: Pack,
        specs: tuple[ViewSpec, ...],
        batch_size: int,
        seed: int,
        window_px: int | None,
        fed: InputSpec,
        share: Share,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pack, self.specs, self.batch_size, self.seed = pack, specs, batch_size, seed
        self.window_px, self.fed, self.share, self.device, self.dtype = window_px, fed, share, device, dtype
        self.steps_per_epoch = len(pack) // batch_size
        # Images are counted in the order of their content, so that renaming files changes nothing.
        self._by_content = np.lexsort(pack.sha256_N32.view(">u8").T[::-1])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def ids(self, step: int) -> np.ndarray:
        """The global batch of a step: (batch_size,) images, by their rank in the order of content.

        An epoch's last, incomplete batch is left out.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = rng.permutation(rng.fold_in(rng.key(self.seed, "order"), epoch), len(self.pack))
            self._order = (epoch, order)
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def places(self, ids_B: np.ndarray) -> np.ndarray:
        """Where these images stand in the pack."""
        places_B: np.ndarray = self._by_content[ids_B]
        return places_B

    def views(self, step: int) -> Iterator[Views]:
        """This rank's views of a step, one `Views` for each part of the accumulation."""
        mine = np.split(self.ids(step), self.share.ranks)[self.share.rank]
        for ids in np.split(mine, self.share.parts):
            yield self.draw(ids, step // self.steps_per_epoch)

    def draw(self, ids_B: np.ndarray, epoch: int) -> Views:
        """The views of these images in this epoch."""
        place_B = self.places(ids_B)
        size_B2, scale_B = self.pack.size_N2[place_B], self.pack.scale_N[place_B]
        drawn = plan(self.specs, ids_B, size_B2, epoch, self.seed, self.window_px, scale_B)
        images = [image(self.pack, int(place)) for place in place_B]
        crops = fused.render(drawn, images, self.fed.mean, self.fed.std, self.device, self.dtype)
        return Views(crops, rng.fold_in(rng.fold_in(rng.key(self.seed, "method"), epoch), ids_B))


def image(pack: Pack, place: int) -> torch.Tensor:
    """An image of the pack, uint8 (H, W, 3), without a copy."""
    with warnings.catch_warnings():  # torch has no read-only tensors and says so; nobody writes into this one
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(pack.image(place))
