"""Presets: what a kind of microscopy changes in the views that a method's paper prescribes.

The papers' views are made for photographs. Under a microscope there is no up, so flips, right-angle turns and rotation
by any angle cost nothing; solarizing makes pictures that no microscope gives; and what differs from one instrument to
the next (light, stain, focus, sensor) can be imitated. Strengths are the method's own, cut down where the modality
wants less, so a method that asks for little colour (`color: 0.5`) is not given more; one that changes no colours at
all (MAE, which would have to predict what the extra ops did) gets the geometry only.

Of 180 views of drawn bright fields that SimCLR's own strengths give, 17 % are wholly burnt out or black and 34 % have
a standard deviation below 0.01; with `brightfield` 0 % and 2 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.extras import Extra, placed
from ssl_pretrain.views.extras.defocus import Defocus
from ssl_pretrain.views.extras.dust import Dust
from ssl_pretrain.views.extras.illumination import Illumination
from ssl_pretrain.views.extras.sensor_noise import SensorNoise
from ssl_pretrain.views.extras.stain import Stain
from ssl_pretrain.views.extras.white_balance import WhiteBalance


def natural(spec: ViewSpec) -> ViewSpec:
    """The method's paper, unchanged."""
    return spec


def brightfield(spec: ViewSpec) -> ViewSpec:
    """Unstained cells in transmitted light (urine sediment): a nearly white field, faint objects, a colour cast.

    ============= ================== =================================================================================
    what          becomes            why
    ============= ================== =================================================================================
    brightness    at most 0.3        the field is nearly white: 0.8 (SimCLR) leaves 13 % of the views empty
    gray_p        times 3            each microscope's cast gives an image away: with 0.2 SimCLR learns the cast alone
    the others    as they are        there is hardly a colour but the cast, and weaker jitter would leave it
    white balance most views         the cast, varied
    illumination  half of the views  lamps off centre, vignettes
    defocus       a quarter          a little: focus differs from cell to cell, and tells some kinds apart
    dust          a tenth            specks must not count as objects
    noise         half               cheap cameras
    ============= ================== =================================================================================
    """
    spec = replace(
        spec,
        brightness=min(spec.brightness, 0.3),
        gray_p=min(1.0, 3 * spec.gray_p),
    )
    return _with(
        spec,
        Illumination(p=0.5),
        Dust(p=0.1),
        _defocus(spec, p=0.25),
        WhiteBalance(p=0.8),
        _noise(spec, p=0.5),
    )


def stained(spec: ViewSpec) -> ViewSpec:
    """Stained smears and sections (Giemsa, H&E): colour carries the class, and varies with the laboratory.

    ============= ================== =================================================================================
    what          becomes            why
    ============= ================== =================================================================================
    brightness    at most 0.25       bright field, as above
    contrast      at most 0.5        the same
    saturation    at most 0.3        `Stain` moves it along the dyes, as laboratories do
    hue           at most 0.03       a nucleus that turns from blue to red is another kind of cell
    gray_p        at most 0.2        colour is to be used
    stain         most views         amounts of each dye
    white balance half               cameras
    illumination  half               lamps off centre, vignettes
    defocus       a quarter          thick smears
    noise         a third            good cameras
    ============= ================== =================================================================================
    """
    spec = replace(
        spec,
        brightness=min(spec.brightness, 0.25),
        contrast=min(spec.contrast, 0.5),
        saturation=min(spec.saturation, 0.3),
        hue=min(spec.hue, 0.03),
        gray_p=min(spec.gray_p, 0.2),
    )
    return _with(
        spec,
        Stain(p=0.8),
        Illumination(p=0.5),
        _defocus(spec, p=0.25),
        WhiteBalance(p=0.5, gain=1.1),
        _noise(spec, p=0.3, shot=0.03, read=0.01),
    )


def tem(spec: ViewSpec) -> ViewSpec:
    """Transmission electron micrographs: grey, noisy, no colour, no stain that varies by hue.

    ============= ================== =================================================================================
    what          becomes            why
    ============= ================== =================================================================================
    brightness    at most 0.3        exposure and thickness of the section
    contrast      at most 0.6        set by stain, aperture and voltage; a factor near 0 would leave noise alone
    saturation    0                  images are grey, and so stay their views
    hue           0                  the same
    gray_p        0                  the same
    defocus       a third            focus is set anew for each picture
    noise         most views         few electrons; the same in all channels
    ============= ================== =================================================================================
    """
    spec = replace(
        spec,
        brightness=min(spec.brightness, 0.3),
        contrast=min(spec.contrast, 0.6),
        saturation=0.0,
        hue=0.0,
        gray_p=0.0,
    )
    return _with(spec, _defocus(spec, p=0.33), _noise(spec, p=0.8, shot=0.06, read=0.02, mono=True))


def _defocus(spec: ViewSpec, p: float) -> Defocus:
    """Up to 2 pixels in views of 224, and less in smaller ones, as in a picture that was made smaller."""
    return Defocus(p=p, radius_px=(0.5, max(0.5, spec.size_px / 112)))


def _noise(spec: ViewSpec, p: float, shot: float = 0.04, read: float = 0.015, mono: bool = False) -> SensorNoise:
    """These standard deviations in views of 224 pixels; less in smaller ones, where a pixel averages several."""
    share = min(1.0, spec.size_px / 224)
    return SensorNoise(p=p, shot=shot * share, read=read * share, mono=mono)


def _with(spec: ViewSpec, *ops: Extra) -> ViewSpec:
    """The ops in the chain, each in its place."""
    chain = spec.chain
    for op in ops:
        chain = placed(chain, op)
    return replace(spec, chain=chain)


PRESETS: dict[str, Callable[[ViewSpec], ViewSpec]] = {
    "natural": natural,
    "brightfield": brightfield,
    "stained": stained,
    "tem": tem,
}


def apply(name: str, spec: ViewSpec) -> ViewSpec:
    """The spec as the preset wants it; an unknown name raises `UsageError` that tells the nearest.

    Under every microscope there is any orientation and no solarizing; colours change only where the method's do.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}{nearest(name, list(PRESETS))}; there are: {', '.join(PRESETS)}")
    if name == "natural":
        return natural(spec)
    spec = replace(spec, hflip_p=0.5, vflip_p=0.5, turn_p=0.75, rotate_p=0.5, rotate_degrees=180.0, solarize_p=0.0)
    return PRESETS[name](spec) if spec.jitter_p else spec
