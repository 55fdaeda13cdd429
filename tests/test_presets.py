"""The presets: what they change of a method's views, what they must leave, and that objects stay visible."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ssl_pretrain.data.synthetic import field
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import dino, mae, simclr
from ssl_pretrain.views import ViewSpec, fused, presets, reference
from ssl_pretrain.views.extras import Extra
from ssl_pretrain.views.plan import plan

SPECS = [*simclr.Config().views(), *dino.Config().views(), *simclr.Config(color=0.1).views()]
MICROSCOPY = [name for name in presets.PRESETS if name != "natural"]
COLOURS = ("brightness", "contrast", "saturation", "hue")


def rendered(spec: ViewSpec, images: list[torch.Tensor]) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1]: one view of each image."""
    spec = replace(spec, count=1)
    drawn = plan([spec], np.arange(len(images)), np.array([x.shape[:2] for x in images]), epoch=0, seed=3)
    return torch.cat([reference.view(spec, row, x) for row, x in zip(drawn.of(0)[:, 0], images, strict=True)])


def fields_of_view(count: int) -> list[torch.Tensor]:
    return [torch.from_numpy(field(1, i, (160, 128)).pixels_HWC.copy()) for i in range(count)]


def ops(spec: ViewSpec) -> dict[str, Extra]:
    return {type(op).__name__: op for op in spec.extras}


def test_names() -> None:
    assert tuple(presets.PRESETS) == ("natural", "brightfield", "stained", "tem")
    for name in presets.PRESETS:
        assert isinstance(presets.apply(name, SPECS[0]), ViewSpec)
    with pytest.raises(UsageError, match=r"no preset is called 'steined' \(did you mean 'stained'\?\); there are: nat"):
        presets.apply("steined", SPECS[0])


def test_natural_is_the_paper() -> None:
    for spec in SPECS:
        assert presets.apply("natural", spec) == spec


@pytest.mark.parametrize("name", MICROSCOPY)
def test_there_is_no_up(name: str) -> None:
    for spec in [*SPECS, *mae.Config().views()]:
        new = presets.apply(name, spec)
        assert (new.hflip_p, new.vflip_p, new.turn_p, new.solarize_p) == (0.5, 0.5, 0.75, 0.0)
        assert new.rotate_p > 0 and new.rotate_degrees == 180


@pytest.mark.parametrize("name", MICROSCOPY)
def test_no_colour_op_gets_stronger(name: str) -> None:
    for spec in SPECS:
        new = presets.apply(name, spec)
        for key in COLOURS:
            assert vars(new)[key] <= vars(spec)[key]
        assert new.brightness <= 0.3
        assert new.jitter_p == spec.jitter_p and new.blur_p == spec.blur_p
    weak = presets.apply(name, SPECS[-1])
    assert weak.contrast == pytest.approx(0.08) and weak.brightness == pytest.approx(0.08)


@pytest.mark.parametrize("name", MICROSCOPY)
def test_what_is_the_methods_own_stays(name: str) -> None:
    mine = {"hflip_p", "vflip_p", "turn_p", "rotate_p", "rotate_degrees", "solarize_p", "gray_p", "chain", *COLOURS}
    for spec in [*SPECS, *mae.Config().views()]:
        new = presets.apply(name, spec)
        assert all(vars(new)[f.name] == vars(spec)[f.name] for f in fields(spec) if f.name not in mine)


@pytest.mark.parametrize("name", MICROSCOPY)
def test_mae_gets_the_geometry_only(name: str) -> None:
    (spec,) = mae.Config().views()
    new = presets.apply(name, spec)
    assert not new.extras and new.gray_p == 0 and all(vars(new)[key] == 0 for key in COLOURS)


def test_brightfield() -> None:
    view, first_global, *_ = (presets.apply("brightfield", spec) for spec in SPECS)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.3, 0.8, 0.8, 0.2)
    assert view.gray_p == pytest.approx(0.6) and first_global.gray_p == pytest.approx(0.6)
    assert presets.apply("brightfield", replace(SPECS[0], gray_p=0.0)).gray_p == 0
    assert presets.apply("brightfield", replace(SPECS[0], gray_p=0.5)).gray_p == 1
    assert list(ops(view)) == ["Illumination", "Dust", "Defocus", "WhiteBalance", "SensorNoise"]
    assert [op for op in view.chain if isinstance(op, str)] == ["blur", "jitter", "gray", "solarize"]
    assert view.chain.index("blur") == 2 and view.chain.index("jitter") == 5


def test_stained() -> None:
    view = presets.apply("stained", SPECS[0])
    assert view.hue <= 0.05 and view.gray_p == 0.2
    assert presets.apply("stained", replace(SPECS[0], gray_p=0.1)).gray_p == 0.1
    assert list(ops(view)) == ["Stain", "Illumination", "Defocus", "WhiteBalance", "SensorNoise"]


def test_tem_stays_gray() -> None:
    spec = replace(presets.apply("tem", SPECS[0]), size_px=48)
    assert (spec.saturation, spec.hue, spec.gray_p) == (0, 0, 0)
    assert list(ops(spec)) == ["Defocus", "SensorNoise"]
    gray = [x[..., :1].expand(-1, -1, 3) for x in fields_of_view(12)]
    y = rendered(spec, gray)
    torch.testing.assert_close(y[:, 0], y[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, 0], y[:, 2], atol=1e-5, rtol=0)


def test_small_views_are_as_pictures_that_were_made_smaller() -> None:
    local, large = (ops(presets.apply("brightfield", spec)) for spec in (SPECS[3], SPECS[0]))
    assert SPECS[3].size_px == 96
    assert vars(local["Defocus"])["radius_px"] == (0.5, 96 / 112)
    assert vars(large["Defocus"])["radius_px"] == (0.5, 2.0)
    assert vars(local["SensorNoise"])["shot"] == pytest.approx(0.04 * 96 / 224)
    assert vars(large["SensorNoise"])["shot"] == 0.04


def test_ops_go_into_the_chain_of_the_recipe() -> None:
    spec = replace(SPECS[0], chain=("jitter", "gray"))
    assert [type(op).__name__ for op in presets.apply("tem", spec).chain] == ["Defocus", "str", "str", "SensorNoise"]


@pytest.mark.parametrize("name", MICROSCOPY)
def test_objects_stay_visible(name: str) -> None:
    images = fields_of_view(40)
    spec = replace(SPECS[0], size_px=48, scale=(0.2, 0.6))
    natural, ours = (rendered(s, images).mean(1) for s in (spec, presets.apply(name, spec)))
    assert ours.min() >= 0 and ours.max() <= 1

    def emptied(x: torch.Tensor) -> float:
        return ((x < 0.004) | (x > 0.996)).float().mean((1, 2)).gt(0.9).float().mean().item()

    assert emptied(natural) > 0.1, "SimCLR's own strengths burn bright fields out"
    assert emptied(ours) <= 0.025


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_engines_agree(name: str) -> None:
    images = fields_of_view(6)
    spec = replace(presets.apply(name, SPECS[0]), size_px=40)
    drawn = plan([spec], np.arange(6), np.array([x.shape[:2] for x in images]), epoch=0, seed=1)
    ours, theirs = (engine.render(drawn, images, (0, 0, 0), (1, 1, 1))["view"] for engine in (fused, reference))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
