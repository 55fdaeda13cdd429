"""Extra ops of a view: what does not fit the fused algebra, one file each, run on the views that draw them.

An extra is a frozen dataclass whose fields are the op's parameters; a recipe names it by its file, or names a class of
`kornia.augmentation` (see `kornia_op`). Its numbers are drawn with all others, by the plan, in numpy, and are the same
on every device; `apply` draws nothing.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ssl_pretrain.named import named

__path__ = pkgutil.extend_path(__path__, __name__)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Extra(ABC):
    """One extra op; its file holds one subclass."""

    p: float = 0.5
    """Probability that a view draws it."""

    draws: ClassVar[int] = 0
    """U: uniform random numbers that it wants for a view."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Names of its P parameters of a view."""

    @abstractmethod
    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """Uniform numbers in [0, 1) (N, U) -> parameters (N, P) of views of that side; exact in float32."""

    @abstractmethod
    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """Float views in [0, 1] and their parameters, on the same device -> views in [0, 1]; x may be overwritten."""


def create(name: str, options: dict[str, Any]) -> Extra:
    """The extra op in the file `name` with these parameters."""
    module = named("views.extras", name)
    mine = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    (kind,) = [c for c in mine if issubclass(c, Extra)]
    made: Extra = kind(**options)
    return made
