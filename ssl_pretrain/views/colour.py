"""The algebra of the colour ops, of all views of a spec at once, in numpy, before an image is touched.

With g the gray of a pixel and m the mean gray of the view, brightness, contrast, saturation and grayscale are all of
the form `a x + u g + v m`, and so is any chain of them, as the gray of that is `(a + u) g + v m` and its mean
`(a + u + v) m`. An op with a factor of at most 1 keeps values within [0, 1]; so a chain is broken only at hue, and
after a factor above 1, where clamping can matter. Such a piece is a *stage*: hue, then the three numbers, then a clamp.

Legend: N views, K stages, C columns of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import COLOUR_OPS, INDEX

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

GRAY_C = (0.299, 0.587, 0.114)
"""ITU-R BT.601, Kornia's and Pillow's (torchvision rounds the first to 0.2989). They sum to 1: white stays white."""
MAX_STAGES = 6
"""Four colour ops and grayscale, if each had a stage of its own."""
YIQ_33 = np.array([GRAY_C, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
"""RGB -> YIQ (NTSC 1953): luma, and the two chroma axes."""


def yiq_turn(turns: npt.ArrayLike) -> Floats:
    """(..., 3, 3): RGB -> RGB with the chroma of YIQ turned, in the sense of HSV's hue (red towards green).

    The luma stays, and gray stays gray.
    """
    angle = -2 * math.pi * np.asarray(turns, np.float64)
    turn = np.zeros((*angle.shape, 3, 3))
    turn[..., 0, 0] = 1
    turn[..., 1, 1] = turn[..., 2, 2] = np.cos(angle)
    turn[..., 2, 1] = np.sin(angle)
    turn[..., 1, 2] = -turn[..., 2, 1]
    return np.asarray(np.linalg.inv(YIQ_33) @ turn @ YIQ_33, np.float32)


@dataclass(frozen=True)
class Stages:
    """The colour ops of N views, as at most K stages each."""

    hue_NK: Floats
    """Turns of the colour circle; 0 is none."""
    auv_NK3: Floats
    """The three numbers of the linear part; (1, 0, 0) is none."""

    @property
    def linear_NK(self) -> Bools:
        """Whether the stage has a linear part."""
        return np.asarray((self.auv_NK3 != (1, 0, 0)).any(axis=2))


def stages(spec: ViewSpec, rows_NC: Floats, ops: Collection[str] = ("jitter", "gray")) -> Stages:
    """Colour jitter and grayscale (those that `ops` names, in this order) of N views as stages."""
    count = len(rows_NC)
    every_N = np.arange(count)
    hue_NK = np.zeros((count, MAX_STAGES))
    auv_NK3 = np.tile(np.array([1.0, 0.0, 0.0]), (count, MAX_STAGES, 1))
    stage_N = np.zeros(count, dtype=np.int64)
    full_N = np.zeros(count, dtype=np.bool_)  # the stage ends with a clamp that can matter
    begun_N = np.zeros(count, dtype=np.bool_)
    for op in ops:
        if op == "gray":
            gray_N = rows_NC[:, INDEX["gray"]] > 0
            stage_N += gray_N & full_N
            full_N &= ~gray_N
            begun_N |= gray_N
            _compose(auv_NK3, gray_N, stage_N, np.tile(np.array([0.0, 1.0, 0.0]), (count, 1)))
            continue
        jittered_N = rows_NC[:, INDEX["jitter"]] > 0
        for slot in range(4):
            op_N = rows_NC[:, INDEX["order_0"] + slot].astype(np.int64)
            amount_N = rows_NC[every_N, INDEX["brightness"] + op_N].astype(np.float64)
            hue_N = jittered_N & (op_N == COLOUR_OPS.index("hue")) & (amount_N != 0)
            linear_N = jittered_N & (op_N != COLOUR_OPS.index("hue")) & (amount_N != 1)
            stage_N += (hue_N & begun_N) | (linear_N & full_N)
            hue_NK[every_N[hue_N], stage_N[hue_N]] = amount_N[hue_N]
            _compose(auv_NK3, linear_N, stage_N, _linear(op_N, amount_N))
            full_N = np.where(linear_N, amount_N > 1, full_N & ~hue_N)
            begun_N |= hue_N | linear_N
    used = int(stage_N.max(initial=0)) + 1
    return Stages(hue_NK[:, :used].astype(np.float32), auv_NK3[:, :used].astype(np.float32))


def _linear(op_N: npt.NDArray[np.int64], factor_N: Doubles) -> Doubles:
    """(N, 3): a, u, v of brightness, contrast (towards the mean gray) or saturation (towards the pixel's gray)."""
    rest_N = 1 - factor_N
    u_N = np.where(op_N == COLOUR_OPS.index("saturation"), rest_N, 0)
    v_N = np.where(op_N == COLOUR_OPS.index("contrast"), rest_N, 0)
    return np.stack([factor_N, u_N, v_N], axis=1)


def _compose(auv_NK3: Doubles, chosen_N: Bools, stage_N: npt.NDArray[np.int64], then_N3: Doubles) -> None:
    """Append `then` to the present stage of the chosen views, in place."""
    rows = np.flatnonzero(chosen_N)
    a, u, v = auv_NK3[rows, stage_N[rows]].T
    a2, u2, v2 = then_N3[rows].T
    auv_NK3[rows, stage_N[rows]] = np.stack([a2 * a, a2 * u + u2 * (a + u), a2 * v + u2 * v + v2 * (a + u + v)], axis=1)
