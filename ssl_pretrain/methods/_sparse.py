"""A dense convolutional network made to compute at visible places alone, as a sparse one would; for masked modelling.

As SparK's authors emulate it (Tian et al., ICLR 2023): after each layer what is masked is set to zero again, and norms
see the visible places alone. Hooks do it, which are there inside `sparse` only: parameters, their names and the network
outside are as they were. A layer that is not known here is refused: it could mix in what is masked, or add constants.
An average pool counts masked places as zeros, as in the authors' code; one whose windows do not overlap meets none.

Legend: B images, C channels, N = grid x grid patches, K of them visible, r places a side of a patch in a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.layers import GELU, DropPath, GELUTanh, LayerNorm2d, LayerScale, LayerScale2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ssl_pretrain.errors import UsageError


class Visible:
    """Which positions of maps of any resolution are visible: the patches `keep_BK` of a grid x grid."""

    def __init__(self, keep_BK: Tensor, grid: int) -> None:
        self.keep_BK, self.grid = keep_BK, grid
        seen_BN = torch.zeros(len(keep_BK), grid**2, dtype=torch.bool, device=keep_BK.device)
        self._seen_B1GG = seen_BN.scatter(1, keep_BK, True).view(-1, 1, grid, grid)
        self._at: dict[int, Tensor] = {}

    def at(self, side: int) -> Tensor:
        """(B, 1, side, side): true where visible."""
        if side not in self._at:
            r = side // self.grid
            self._at[side] = self._seen_B1GG.repeat_interleave(r, 2).repeat_interleave(r, 3)
        return self._at[side]

    def only(self, x_BCHW: Tensor, value: float = 0.0) -> Tensor:
        """The map with everything masked set to a value."""
        return x_BCHW.masked_fill(~self.at(self._side(x_BCHW)), value)

    def only_last(self, x_BHWC: Tensor) -> Tensor:
        """The same for channels in the last place."""
        return self.only(x_BHWC.movedim(-1, 1)).movedim(1, -1)

    def pack(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, K r, r): the visible patches of r x r positions alone, one below the other."""
        r = self._side(x_BCHW) // self.grid
        split = x_BCHW.reshape(*x_BCHW.shape[:2], self.grid, r, self.grid, r).transpose(3, 4)
        patches_BCNR = split.reshape(*x_BCHW.shape[:2], self.grid**2, r * r)
        kept = patches_BCNR.gather(2, self.keep_BK[:, None, :, None].expand(-1, x_BCHW.shape[1], -1, r * r))
        return kept.reshape(*x_BCHW.shape[:2], -1, r)

    def unpack(self, packed_BCHW: Tensor) -> Tensor:
        """The reverse of `pack`: a map, zero where masked."""
        images, channels, _, r = packed_BCHW.shape
        kept_BCKR = packed_BCHW.reshape(images, channels, -1, r * r)
        index = self.keep_BK[:, None, :, None].expand_as(kept_BCKR)
        empty = kept_BCKR.new_zeros(images, channels, self.grid**2, r * r)
        patches_BCNR = empty.scatter(2, index, kept_BCKR)
        split = patches_BCNR.reshape(images, channels, self.grid, self.grid, r, r).transpose(3, 4)
        return split.reshape(images, channels, self.grid * r, self.grid * r)

    def _side(self, x_BCHW: Tensor) -> int:
        if x_BCHW.ndim != 4 or x_BCHW.shape[2] != x_BCHW.shape[3] or x_BCHW.shape[2] % self.grid:
            raise UsageError(
                f"SparK needs layers that keep places: one gives {tuple(x_BCHW.shape[1:])}, which {self.grid} x "
                f"{self.grid} patches do not divide"
            )
        return x_BCHW.shape[2]


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, LayerNorm2d)
"""Over places, or of maps with channels second: they see the visible places alone."""
_KEEP_ZERO = (
    nn.Identity, nn.Sequential, nn.Dropout, nn.Dropout2d, DropPath, LayerScale, LayerScale2d, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, GELU, GELUTanh, nn.Mish, nn.Hardswish, nn.Tanh,
)  # fmt: skip
"""Of each place by itself, and of zero they make zero."""


@contextmanager
def sparse(network: nn.Module, visible: Visible) -> Iterator[None]:
    """Within it, the network computes as if only the visible places were there; without, it is as it was."""
    with ExitStack() as stack:
        for module in network.modules():
            for handle in _hooked(module, visible):
                stack.callback(handle.remove)
        yield


def _hooked(module: nn.Module, visible: Visible) -> list[RemovableHandle]:
    def before(change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))

    def after(change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        return module.register_forward_hook(lambda _, given, made: change(made))

    def refuse(x: Tensor) -> Tensor:
        raise UsageError(f"SparK does not know what {type(module).__name__} does with masked places")

    if isinstance(module, _NORMS):
        return [before(visible.pack), after(visible.unpack)]
    if isinstance(module, nn.MaxPool2d):
        return [before(lambda x_BCHW: visible.only(x_BCHW, -math.inf)), after(visible.only)]
    if isinstance(module, nn.Conv2d | nn.AvgPool2d):
        return [after(visible.only)]
    if isinstance(module, nn.Linear | nn.LayerNorm):
        return [after(visible.only_last)]
    if isinstance(module, GlobalResponseNorm):  # a norm over places to which zeros add nothing; then a bias
        return [after(visible.only if module.channel_dim == 1 else visible.only_last)]
    inner = next(module.children(), None) is not None
    return [] if inner or isinstance(module, _KEEP_ZERO) else [before(refuse)]


class NoAttention(TorchFunctionMode):
    """Refuses networks with attention, a function and no layer, in which masked places would take their share."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.scaled_dot_product_attention, nn.functional.softmax, torch.softmax, Tensor.softmax):
            raise UsageError(f"SparK is for convolutional networks, and {self.name} has attention")
        return func(*args, **(kwargs or {}))
