"""When a probe is due, and whether it may take the time: the other processes wait for the one that probes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ssl_pretrain.train.recipe import ProbeSection

FREE_S = 60.0
"""Seconds that probes may take beside their share: without them a run of minutes would have a curve of one point."""


class Pace:
    """Probes of a run by epochs or by minutes, put off while they would take more than `probe.max_share` of the time.

    What is put off is done as soon as there is time for it. Which steps are probed may thus depend on the machine; what
    is trained does not.
    """

    def __init__(
        self,
        section: ProbeSection,
        steps_per_epoch: int,
        steps: int,
        at_end: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.section, self.every_steps = section, section.every_epochs * steps_per_epoch
        self.steps, self.at_end, self.clock = steps, at_end, clock
        self.began = self.last = clock()
        self.seconds = self.cost = 0.0
        """That all probes took, and the last one."""
        self.owed = False

    def due(self, step: int) -> bool:
        """Whether to probe after this step; after the last one whatever it takes."""
        now = self.clock()
        if self.section.every_minutes is None:
            self.owed |= step % self.every_steps == 0
        else:
            self.owed |= now - self.last >= 60 * self.section.every_minutes
        if self.at_end and step == self.steps:
            return True
        if self.at_end and self.section.every_minutes is None and self.steps - step < self.every_steps / 2:
            return False  # the last step's, which comes at once, is the same again
        return self.owed and self.seconds + self.cost <= FREE_S + self.section.max_share * (now - self.began)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Around a probe."""
        began = self.clock()
        yield
        self.last = self.clock()
        self.cost = self.last - began
        self.seconds += self.cost
        self.owed = False

    def figures(self) -> dict[str, float]:
        """Of the last probe the seconds, and of all the share of the time so far."""
        return {"seconds": self.cost, "share": self.seconds / max(self.last - self.began, 1e-9)}
