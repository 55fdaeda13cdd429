"""What a step sees: which images, and their views. Position comes from the step alone; there is no loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.methods import Views
from ssl_pretrain.train.residency import Store, Where, as_tensor, open_store
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.engine import TORCH
from ssl_pretrain.views.plan import Plan, corners, plan

DETOUR = 1_000_000
"""Epochs: more than any run has."""


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes."""

    rank: int = 0
    ranks: int = 1
    parts: int = 1
    """Gradient accumulation: pieces of this rank's share."""


class Lookahead:
    """Draws one part of a step ahead: on a CUDA stream of its own, beside what runs; without one, at once.

    There is no thread: whoever calls `prepare` draws, and what goes wrong is raised there.
    """

    def __init__(self, draw: Callable[[int, int], Views], stream: torch.cuda.Stream | None = None) -> None:
        self.draw, self.stream = draw, stream
        self._ahead: tuple[tuple[int, int], Views, torch.cuda.Event | None] | None = None

    def prepare(self, step: int, part: int) -> None:
        """Draws what `take` will probably be asked for next; what was drawn before and not taken is dropped."""
        self._ahead = None
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            views = self.draw(step, part)
        self._ahead = (step, part), views, self.stream.record_event() if self.stream is not None else None

    def take(self, step: int, part: int) -> Views:
        """The views of a part of a step: those that were prepared if they are of this one, else drawn now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != (step, part):
            return self.draw(step, part)
        _, views, drawn = ahead
        if self.stream is not None and drawn is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_event(drawn)
            for crops in views.crops.values():
                crops.record_stream(current)  # else their memory could be given away while this stream reads it
        return views


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
        where: Where = "mapped",
    ) -> None:
        self.pack, self.specs, self.batch_size, self.seed = pack, specs, batch_size, seed
        self.window_px, self.fed, self.share, self.device, self.dtype = window_px, fed, share, device, dtype
        self.where, self.steps_per_epoch = where, len(pack) // batch_size
        self.steps: int | None = None
        """Of the run, where it is known: nothing is drawn ahead of its end."""
        self.detour = 0
        """How often the run was rolled back: each time the rest of it goes through the images another way."""
        self.engine = TORCH
        """What makes the views."""
        self._orders: dict[int, np.ndarray] = {}
        cuda = device.type == "cuda"
        stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self.lookahead = Lookahead(self.part, stream)
        self.looks_ahead = cuda
        """Whether the next views are drawn while a step runs; on a CPU nothing would be gained by it."""

    @cached_property
    def store(self) -> Store:
        """The images, where they are kept; opened at the first draw, when every rank has seen what memory is free."""
        return open_store(self.where, self.pack, self.device)

    def epoch(self, step: int) -> int:
        """The epoch's number, of which its order and its views are functions."""
        return step // self.steps_per_epoch + self.detour * DETOUR

    def ids(self, step: int) -> np.ndarray:
        """The global batch of a step: (batch_size,) images, by their rank in the order of content.

        An epoch's last, incomplete batch is left out.
        """
        epoch, place = self.epoch(step), step % self.steps_per_epoch
        if epoch not in self._orders:  # two are kept, as a step and the one ahead of it can lie in two epochs
            self._orders = {known: self._orders[known] for known in list(self._orders)[-1:]}
            self._orders[epoch] = rng.permutation(rng.fold_in(rng.key(self.seed, "order"), epoch), len(self.pack))
        return self._orders[epoch][place * self.batch_size : (place + 1) * self.batch_size]

    def places(self, ids_B: np.ndarray) -> np.ndarray:
        """Where these images stand in the pack."""
        places_B: np.ndarray = self.pack.by_content_N[ids_B]
        return places_B

    def views(self, step: int) -> Iterator[Views]:
        """This rank's views of a step, one `Views` for each part of the accumulation.

        When the next part is asked for, the work on this one is queued: that is when a GPU has time for what follows,
        be it the first part of the next step.
        """
        for part in range(self.share.parts):
            yield self.lookahead.take(step, part)
            following = (step, part + 1) if part + 1 < self.share.parts else (step + 1, 0)
            if self.looks_ahead and not self._over(following[0]):
                self.lookahead.prepare(*following)

    def part(self, step: int, part: int) -> Views:
        """This rank's views of one part of a step."""
        views = self.draw(np.split(self._mine(step), self.share.parts)[part], self.epoch(step))
        if self.where == "mapped" and part == 0 and not self._over(step + 1):
            self.pack.read_ahead(self.places(self._mine(step + 1)))  # after this step's own images were read
        return views

    def _mine(self, step: int) -> np.ndarray:
        """This rank's share of the global batch."""
        return np.split(self.ids(step), self.share.ranks)[self.share.rank]

    def _over(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def plan(self, ids_B: np.ndarray, epoch: int) -> Plan:
        """All random choices for the views of these images in this epoch."""
        place_B = self.places(ids_B)
        size_B2, scale_B = self.pack.size_N2[place_B], self.pack.scale_N[place_B]
        return plan(self.specs, ids_B, size_B2, epoch, self.seed, self.window_px, scale_B)

    def draw(self, ids_B: np.ndarray, epoch: int) -> Views:
        """The views of these images in this epoch."""
        place_B, drawn = self.places(ids_B), self.plan(ids_B, epoch)
        images, flat = partial(self.store.images, place_B), partial(self.store.flat, place_B)
        mean, std = self.fed.mean, self.fed.std
        size_B2 = self.pack.size_N2[place_B]
        crops = self.engine.render(drawn, images, flat, size_B2, mean, std, self.device, self.dtype)
        key_B2 = rng.fold_in(rng.fold_in(rng.key(self.seed, "method"), epoch), ids_B)
        return Views(crops, key_B2, {spec.name: corners(drawn, i) for i, spec in enumerate(drawn.specs)})


def image(pack: Pack, place: int) -> torch.Tensor:
    """An image of the pack, uint8 (H, W, 3), without a copy."""
    return as_tensor(pack.image(place))
