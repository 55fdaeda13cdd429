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
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_pretrain.config import build
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named, names, nearest

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
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "camera"
    """Where the light meets it; see `placed`."""

    def __post_init__(self) -> None:
        within(self, "p", 0, 1)

    @abstractmethod
    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """Uniform numbers in [0, 1) (N, U) -> parameters (N, P) of views of that side; exact in float32."""

    @abstractmethod
    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """Float views in [0, 1] and their parameters, on the same device -> views in [0, 1]; x may be overwritten."""

    def trial(self, size_px: int, device: torch.device) -> None:
        """The op on one gray view: what a device cannot do shows before anything heavy starts."""
        row_NP = torch.from_numpy(self.parameters(np.full((1, self.draws), 0.5), size_px).astype(np.float32))
        self.apply(torch.full((1, 3, size_px, size_px), 0.5, device=device), row_NP.to(device))


def create(name: str, options: dict[str, Any]) -> Extra:
    """The extra op in the file `name`, or of the class `name` of `kornia.augmentation`, with these parameters.

    Options are read as strictly as a recipe's sections: `UsageError`, in one line, for a name that there is not (with
    the nearest that there is) and for a value of the wrong type or beyond its range.
    """
    files = [file for file in names("views.extras") if file != "kornia_op"]
    if name in files:
        module = named("views.extras", name)
        mine = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        (kind,) = [c for c in mine if issubclass(c, Extra)]
        if isinstance(options, dict) and None in options.values():
            # To jsonargparse null is "not given", and passes every type.
            empty = next(key for key, value in options.items() if value is None)
            raise UsageError(f"{name}.{empty} holds nothing: give it a value or leave it out")
        made: Extra = build({name: options}, [], {name: kind})[name]
        return made
    # Here and not above: Kornia takes a second to import.
    import kornia.augmentation

    if name in vars(kornia.augmentation) and name[:1].isupper():
        from ssl_pretrain.views.extras.kornia_op import of

        return of(name, options)
    near = nearest(name, [*files, *(word for word in vars(kornia.augmentation) if word[:1].isupper())])
    raise UsageError(
        f"no extra op is called {name!r}{near}; there are: {', '.join(files)}, and the classes of kornia.augmentation"
    )


def placed(chain: tuple[str | Extra, ...], op: Extra) -> tuple[str | Extra, ...]:
    """The chain of a view with one more op, where the light of a microscope would meet it.

    1. `specimen`: what is stained, lit and dirty, before the image is formed: ahead of `blur`;
    2. `optics`: what the lenses do, and the colour that light has when it leaves them: after `blur`, ahead of the
       colour ops, which stand for the camera's processing;
    3. `camera`: noise and compression, which no colour op may touch up afterwards: at the end.

    Ops of one place keep the order in which they are put there.

    >>> from ssl_pretrain.views.extras.illumination import Illumination
    >>> placed(("blur", "jitter"), Illumination(p=1.0, gradient=0.1, vignette=0.2))
    (Illumination(p=1.0, gradient=0.1, vignette=0.2), 'blur', 'jitter')
    """
    later = (i for i, step in enumerate(chain) if _rank(step) > _rank(op))
    at = next(later, len(chain))
    return (*chain[:at], op, *chain[at:])


def _rank(step: str | Extra) -> int:
    if isinstance(step, str):
        return 1 if step == "blur" else 3
    return {"specimen": 0, "optics": 2, "camera": 4}[step.place]


def within(op: Extra, field: str, low: float, high: float) -> None:
    """Raises `UsageError` unless a field, or both ends of the range that it holds, lie between the two bounds."""
    value = vars(op)[field]
    ends = value if isinstance(value, tuple) else (value, value)
    # Written so that a NaN fails too.
    if not low <= ends[0] <= ends[1] <= high:
        name = f"{type(op).__module__.rpartition('.')[2]}.{field}"
        what = "a range, the lower end first," if isinstance(value, tuple) else "a number"
        raise UsageError(f"{name} is {value}: it is {what} between {low:g} and {high:g}")


def between(bounds: tuple[float, float], u: Floats) -> Floats:
    """Uniform numbers in [0, 1) -> uniform numbers between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u
