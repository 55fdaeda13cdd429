"""Kornia's modules as ops of a view, and its pipelines compiled into a spec."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Set
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

from ssl_pretrain.errors import UsageError
from ssl_pretrain.views import ViewSpec, fused, reference
from ssl_pretrain.views.extras import create, kornia_op
from ssl_pretrain.views.extras.kornia_op import KorniaOp, of, refusal
from ssl_pretrain.views.kornia import KorniaViews, from_kornia
from ssl_pretrain.views.plan import INDEX, Plan, plan

S = 48
CROP = K.RandomResizedCrop((S, S), scale=(0.2, 1.0), align_corners=False)
NEEDED: dict[str, dict[str, Any]] = {
    "ColorJiggle": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1},
    "ColorJitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1},
    "RandomAffine": {"degrees": 30},
    "RandomBrightness": {"brightness": [0.5, 1.5]},
    "RandomContrast": {"contrast": [0.5, 1.5]},
    "RandomFisheye": {"center_x": [-0.3, 0.3], "center_y": [-0.3, 0.3], "gamma": [0.9, 1.2]},
    "RandomGamma": {"gamma": [0.5, 2.0], "gain": [0.8, 1.2]},
    "RandomGaussianBlur": {"kernel_size": 5, "sigma": [0.5, 2.0]},
    "RandomHue": {"hue": [-0.2, 0.2]},
    "RandomMotionBlur": {"kernel_size": [3, 9], "angle": 35.0, "direction": 0.5},
    "RandomRotation": {"degrees": 30},
    "RandomRotation90": {"times": [0, 3]},
    "RandomSaturation": {"saturation": [0.5, 1.5]},
    "RandomShear": {"shear": 10},
}
"""The options that have no default, or a default that does nothing."""
CLASSES = [name for name in K.__all__ if isinstance(vars(K).get(name), type)]
OPS = [name for name in CLASSES if not refusal(vars(K)[name])]


@pytest.fixture
def views_NCSS() -> Tensor:
    """Eight smooth views in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(coarse, (S, S), mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.fixture
def rows_NP() -> Tensor:
    """Eight seeds, far apart and at both ends."""
    first = [0, 1, 2, 3, 5_000_000, 2**24 - 1, 77, 123_456]
    return torch.tensor([first, first[::-1]], dtype=torch.float32).T.contiguous()


def pictures(sizes: list[tuple[int, int]], waves: int = 7) -> list[Tensor]:
    """Smooth uint8 images; how smooth: `waves` random values along a side."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for height, width in sizes:
        x = nn.functional.interpolate(
            torch.rand(1, 3, waves, waves, generator=generator), (height, width), mode="bicubic", align_corners=False
        )
        made.append((255 * x[0].clamp(0, 1)).byte().permute(1, 2, 0).contiguous())
    return made


# Kornia's modules as extra ops


def test_the_list_of_ops_is_kornias() -> None:
    """A new class in Kornia shows here: say whether it can be an op."""
    assert len(OPS) == 46
    assert set(kornia_op.REFUSED) <= set(CLASSES)


@pytest.mark.parametrize("name", OPS)
def test_every_op(name: str, views_NCSS: Tensor, rows_NP: Tensor) -> None:
    """Runs, in range; the same bits in any batch; draws nothing but from its seeds; leaves every generator alone."""
    options = {"p": 0.5} | NEEDED.get(name, {})
    op = of(name, options)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    together_NCSS = op.apply(views_NCSS.clone(), rows_NP)
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[0], torch.get_rng_state())
    assert together_NCSS.shape == views_NCSS.shape and together_NCSS.dtype == torch.float32
    assert together_NCSS.min() >= 0 and together_NCSS.max() <= 1  # and so no NaN
    torch.manual_seed(99)  # what others draw in between does not matter
    for size in (1, 3):
        parts = [op.apply(x.clone(), row) for x, row in zip(views_NCSS.split(size), rows_NP.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), together_NCSS)
    assert torch.equal(of(name, options).apply(views_NCSS.clone(), rows_NP), together_NCSS)
    changed_N = [not torch.equal(a, b) for a, b in zip(views_NCSS, together_NCSS, strict=True)]
    assert any(changed_N) and not all(changed_N)  # the module's own p


BY_BATCH = {"ColorJiggle", "ColorJitter", "RandomChannelDropout", "RandomMotionBlur", "RandomRain"}


@pytest.mark.parametrize(
    "name", [*sorted(BY_BATCH), "RandomGaussianNoise", "RandomAffine", "RandomJPEG", "RandomErasing"]
)
def test_all_at_once(name: str, views_NCSS: Tensor, rows_NP: Tensor) -> None:
    """What an accelerator does where it can: all views in one call, each with the parameters drawn for it."""
    op = of(name, {"p": 0.5} | NEEDED.get(name, {}))
    assert kornia_op.batchable(op.module, S) == (name not in BY_BATCH)
    if name not in BY_BATCH:
        seeds = [int(a) * 2**24 + int(b) for a, b in rows_NP.tolist()]
        with torch.random.fork_rng(devices=[]):
            together_NCSS = kornia_op._together(op.module, views_NCSS.clone(), seeds)
        torch.testing.assert_close(together_NCSS, op.apply(views_NCSS.clone(), rows_NP), atol=1e-5, rtol=0)


def test_one_kernel_size_of_a_batch_is_found_by_its_shape() -> None:
    """The three trial views happen to draw one kernel size, so that trying finds no difference."""
    module = K.RandomMotionBlur((3, 4), 35.0, 0.5)
    with torch.random.fork_rng(devices=[]):
        assert [int(kornia_op._drawn(module, S, seed)["ksize_factor"]) for seed in (1, 2, 3)] == [3, 3, 3]
    assert not kornia_op.batchable(module, S)


def test_a_view_that_draws_the_op_is_kornias(views_NCSS: Tensor, rows_NP: Tensor) -> None:
    """Skipping what the module's gate leaves alone gives what Kornia gives, which computes and discards it."""
    for name in OPS:
        op = of(name, {"p": 0.5} | NEEDED.get(name, {}))
        for x, row, made in zip(views_NCSS, rows_NP, op.apply(views_NCSS.clone(), rows_NP), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(row[0]) * 2**24 + int(row[1]))
                theirs = op.module(x[None]).clamp(0, 1)[0]
            assert torch.equal(made, theirs), name


def test_what_the_gate_leaves_alone_costs_nothing(views_NCSS: Tensor, rows_NP: Tensor) -> None:
    class Counted(K.RandomInvert):
        calls = 0

        def apply_transform(self, *args: Any, **kwargs: Any) -> Tensor:
            Counted.calls += 1
            return super().apply_transform(*args, **kwargs)

    made_NCSS = KorniaOp(Counted(p=0.5)).apply(views_NCSS.clone(), rows_NP)
    assert Counted.calls == sum(not torch.equal(a, b) for a, b in zip(made_NCSS, views_NCSS, strict=True)) < 8


def test_a_class_that_changes_what_it_skips_is_not_skipped(views_NCSS: Tensor, rows_NP: Tensor) -> None:
    class Dark(K.RandomInvert):
        def apply_non_transform(self, input: Tensor, params: Any, flags: Any, transform: Any = None) -> Tensor:
            return input * 0

    made_NCSS = KorniaOp(Dark(p=0.5)).apply(views_NCSS.clone(), rows_NP)
    assert all(torch.equal(a, 1 - b) or not a.any() for a, b in zip(made_NCSS, views_NCSS, strict=True))


def test_parameters_are_two_words_of_the_plan() -> None:
    """24 bits each; every bit that torch's generator keeps differs between views."""
    op = of("RandomHue", {"hue": [-0.5, 0.5]})
    spec = ViewSpec("view", S, (0.2, 1.0), count=2, chain=("blur", op, "gray"))
    drawn = plan([spec], np.arange(3000), np.full((3000, 2), 60), epoch=1, seed=2)
    gate, *words = np.moveaxis(drawn.extra(0, 0).reshape(-1, 3), 1, 0)
    assert (gate == 1).all() and op.p == 1
    for word in words:
        assert word.min() >= 0 and word.max() < 2**24 and (word == np.floor(word)).all()
        assert ks_2samp(word / 2**24, np.linspace(0, 1, 3000)).pvalue > 1e-3
    assert np.array_equal(op.parameters(np.array([[0.0, 1 - 2**-53]]), S), [[0, 2**24 - 1]])
    seeds = {(int(a) * 2**24 + int(b)) % 2**32 for a, b in zip(*words, strict=True)}
    assert len(seeds) >= 5999
    shifts = []
    for seed in sorted(seeds)[::3]:
        with torch.random.fork_rng(devices=[]):
            shifts.append(float(kornia_op._drawn(op.module, S, seed)["hue_factor"]))
    assert ks_2samp(shifts, np.random.default_rng(0).uniform(-0.5, 0.5, 20000)).pvalue > 1e-3


def test_an_op_is_itself_and_keeps_its_module() -> None:
    module = K.RandomInvert(p=1.0)
    first, second = KorniaOp(module), KorniaOp(module)
    assert first == first and first != second and len({first, second}) == 2
    module.p = 0.0
    assert first.module.p == 1.0 and first.place == "camera" and first.name == "RandomInvert"


def test_nan_stays_out(views_NCSS: Tensor, rows_NP: Tensor) -> None:
    class Broken(K.IntensityAugmentationBase2D):
        def apply_transform(self, input: Tensor, params: Any, flags: Any, transform: Any = None) -> Tensor:
            return torch.where(input < 0.5, torch.nan, 2.0)

    made_NCSS = KorniaOp(Broken(p=1.0)).apply(views_NCSS.clone(), rows_NP)
    assert torch.equal(made_NCSS, torch.where(views_NCSS < 0.5, views_NCSS, 1.0))


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(OPS)))
def test_what_cannot_be_an_op_says_why(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} cannot be an op of a view: it [^\n]+$"):
        of(name, {})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("RandomJPG", {}, r"no op is called 'RandomJPG' \(did you mean 'RandomJPEG'\?\)"),
        ("RandomJPEG", {"quality": [50, 95]}, r"no option 'quality' \(did you mean 'jpeg_quality'\?\); it has: jpeg_q"),
        ("RandomAffine", {}, "RandomAffine needs degrees"),
        ("RandomJPEG", {"jpeg_quality": [50, 500]}, "RandomJPEG: jpeg_quality out of bounds"),
        ("RandomGaussianBlur", {"kernel_size": 4, "sigma": [1, 2]}, "RandomGaussianBlur: Kernel size must be an odd"),
        ("RandomJPEG", {"same_on_batch": True}, "every view draws its own"),
        ("RandomHorizontalFlip", {"p_batch": 0.5}, "views know no batch; give p"),
    ],
)
def test_wrong_options_read_as_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        of(name, options)
    assert "\n" not in str(caught.value)


def test_recipes_name_ops_by_class() -> None:
    op = create("RandomJPEG", {"jpeg_quality": [50, 95], "p": 0.3})
    assert isinstance(op, KorniaOp)
    assert (op.module.jpeg_quality, op.module.p, op.p) == ((50, 95), 0.3, 1.0)


def test_an_op_that_changes_the_size_is_found() -> None:
    class Half(K.IntensityAugmentationBase2D):
        def apply_transform(self, input: Tensor, params: Any, flags: Any, transform: Any = None) -> Tensor:
            return input[..., ::2, ::2]

    with pytest.raises(UsageError, match=r"Half cannot be an op of a view: it makes \(3, 24, 24\) of \(3, 48, 48\)"):
        from_kornia(nn.Sequential(CROP, Half(p=0.01)))


# Pipelines: what becomes of each module


def spec_of(*modules: nn.Module) -> ViewSpec:
    """The spec of modules that the plan all knows."""
    views = from_kornia(K.AugmentationSequential(CROP, *modules))
    assert views.slow == () and views.spec.extras == ()
    return views.spec


@pytest.mark.parametrize(
    ("module", "fields", "chain"),
    [
        (K.RandomHorizontalFlip(p=0.3), {"hflip_p": 0.3}, ()),
        (K.RandomVerticalFlip(p=0.4), {"vflip_p": 0.4}, ()),
        (K.RandomRotation90((-1.5, 2.5), p=0.8), {"turn_p": 0.8 * 0.75}, ()),
        (K.RandomRotation90((-2.5, 1.5), p=1.0), {"turn_p": 0.75}, ()),
        (K.RandomRotation90((0, 0), p=1.0), {"turn_p": 0.0}, ()),
        (
            K.ColorJitter(0.4, 0.3, 0.2, 0.1, p=0.8),
            {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1},
            ("jitter",),
        ),
        (
            K.ColorJitter((0.6, 1.4), [0.7, 1.3], torch.tensor([0.0, 2.5]), (-0.2, 0.2)),
            {"jitter_p": 1.0, "brightness": 0.4, "contrast": 0.3, "saturation": 1.5, "hue": 0.2},
            ("jitter",),
        ),
        (K.RandomGrayscale(p=0.2), {"gray_p": 0.2}, ("gray",)),
        (
            K.RandomGaussianBlur((7, 7), (0.1, 2.0), p=0.5),
            {"blur_p": 0.5, "blur_sigma": (0.1, 2.0), "blur_kernel_px": 7},
            ("blur",),
        ),
        (
            K.RandomGaussianBlur(9, torch.tensor([0.5, 1.5]), separable=False),
            {"blur_p": 0.5, "blur_sigma": (0.5, 1.5), "blur_kernel_px": 9},
            ("blur",),
        ),
        (K.RandomSolarize((0.3, 0.3), (0, 0), p=0.2), {"solarize_p": 0.2, "solarize_threshold": 0.3}, ("solarize",)),
        (K.RandomSolarize(0.0, 0.0, p=0.2), {"solarize_p": 0.2, "solarize_threshold": 0.5}, ("solarize",)),
    ],
)
def test_known_modules(module: nn.Module, fields: dict[str, Any], chain: tuple[str, ...]) -> None:
    """Only its own fields, and every other op is off."""
    wanted = {"hflip_p": 0.0} | fields
    ratio = CROP._param_generator.ratio
    plain = ViewSpec("view", S, (0.2, 1.0), ratio=ratio, **wanted, chain=chain)
    made = spec_of(module)
    assert {k: pytest.approx(v) if isinstance(v, float) else v for k, v in vars(plain).items()} == vars(made)


def test_crop_and_normalise() -> None:
    crop = K.RandomResizedCrop((32, 32), scale=torch.tensor([0.25, 0.5]), ratio=(0.5, 2.0))
    views = from_kornia(nn.Sequential(crop, K.Normalize((0.5, 0.4, 0.3), torch.tensor([0.1, 0.2, 0.3]))))
    assert (views.spec.size_px, views.spec.scale, views.spec.ratio) == (32, (0.25, 0.5), (0.5, 2.0))
    assert views.mean == pytest.approx((0.5, 0.4, 0.3)) and views.std == pytest.approx((0.1, 0.2, 0.3))
    one = from_kornia(nn.Sequential(crop, K.Normalize(0.5, 0.25)))
    assert (one.mean, one.std) == ((0.5,) * 3, (0.25,) * 3)
    none = from_kornia(crop)
    assert (none.mean, none.std, none.spec.chain, none.spec.hflip_p) == ((0.0,) * 3, (1.0,) * 3, (), 0.0)


def test_resize_shows_the_whole_image() -> None:
    spec = from_kornia(nn.Sequential(K.Resize((S, S)), K.RandomHorizontalFlip())).spec
    sizes = np.random.default_rng(0).integers(30, 900, (20000, 2))
    boxes = plan([spec], np.arange(20000), sizes, 0, 0).of(0)[:, 0, :4]
    whole = (boxes[:, :2] == 0).all(axis=1) & (boxes[:, 2:] == sizes).all(axis=1)
    assert whole.mean() > 0.99
    assert (boxes[:, 2:] / sizes).min() > 0.9


REASONS: dict[str, tuple[nn.Module, str]] = {
    "unknown": (K.RandomGaussianNoise(), "nothing like it"),
    "jiggle": (K.ColorJiggle(0.1), "nothing like it"),
    "rotation": (K.RandomRotation(30), "nothing like it"),  # Kornia's has black corners
    "times": (K.RandomRotation90((0, 3)), "unequally likely"),
    "once": (K.RandomRotation90((1, 1)), "unequally likely"),
    "order": (K.ColorJitter(0.1, order=(0, 1, 2, 3)), "order of its ops is fixed"),
    "brightness": (K.ColorJitter((0.5, 1.2)), "brightness (0.5, 1.2) is not symmetric"),
    "darker": (K.ColorJitter((0.5, 0.8)), "brightness (0.5, 0.8) is not symmetric"),
    "hue": (K.ColorJitter(hue=(0.0, 0.1)), "hue (0, 0.1) is not symmetric"),
    "weights": (K.RandomGrayscale(torch.tensor([0.2, 0.2, 0.6])), "rgb_weights"),
    "kernel": (K.RandomGaussianBlur((3, 5), (0.1, 2.0)), "3 x 5"),
    "border": (K.RandomGaussianBlur(3, (0.1, 2.0), border_type="constant"), "border is constant"),
    "threshold": (K.RandomSolarize(0.1, 0.0), "threshold is drawn"),
    "addition": (K.RandomSolarize((0.5, 0.5), 0.1), "adds before"),
}


@pytest.mark.parametrize("case", REASONS)
def test_other_modules_stay_as_they_are(case: str, caplog: pytest.LogCaptureFixture) -> None:
    module, reason = REASONS[case]
    with caplog.at_level(logging.WARNING, "ssl_pretrain"):
        views = from_kornia(K.ImageSequential(CROP, K.RandomGrayscale(), module, K.RandomSolarize((0.5, 0.5), 0.0)))
    (op,) = views.spec.extras
    assert isinstance(op, KorniaOp) and type(op.module) is type(module) and str(op.module) == str(module)
    assert views.spec.chain == ("gray", op, "solarize")
    (line,) = views.slow
    assert line.startswith(f"{type(module).__name__}: ") and reason in line and line in caplog.text


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Mine(K.RandomHorizontalFlip):
        def apply_transform(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().apply_transform(*args, **kwargs).flip(1)

    views = from_kornia(nn.Sequential(CROP, Mine(p=0.5)))
    assert views.spec.hflip_p == 0 and views.slow == ("Mine: the plan has nothing like it",)


# Pipelines: order


BLUR, GRAY = K.RandomGaussianBlur(5, (0.1, 2.0)), K.RandomGrayscale(p=0.5)
JITTER, SOLARIZE = K.ColorJitter(0.4, 0.4, 0.4, 0.1), K.RandomSolarize((0.5, 0.5), 0.0)
NOISE, HFLIP = K.RandomGaussianNoise(), K.RandomHorizontalFlip()


def names(views: KorniaViews) -> list[str]:
    return [op if isinstance(op, str) else type(op.module).__name__ for op in views.spec.chain]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("modules", "chain"),
    [
        ([JITTER, GRAY, BLUR, SOLARIZE], ["jitter", "gray", "blur", "solarize"]),
        ([SOLARIZE, BLUR, GRAY, JITTER], ["solarize", "blur", "gray", "jitter"]),
        ([GRAY, NOISE, BLUR], ["gray", "RandomGaussianNoise", "blur"]),
        ([NOISE, JITTER, K.RandomInvert()], ["RandomGaussianNoise", "jitter", "RandomInvert"]),
        ([BLUR, JITTER, BLUR], ["blur", "jitter", "RandomGaussianBlur"]),
        ([JITTER, NOISE, JITTER], ["jitter", "RandomGaussianNoise", "ColorJitter"]),
        ([JITTER, BLUR, GRAY, SOLARIZE, HFLIP], ["jitter", "blur", "gray", "solarize"]),
        ([JITTER, NOISE, HFLIP, GRAY], ["jitter", "RandomGaussianNoise", "RandomHorizontalFlip", "gray"]),
        ([HFLIP, NOISE, HFLIP], ["RandomGaussianNoise", "RandomHorizontalFlip"]),
        ([HFLIP, HFLIP], ["RandomHorizontalFlip"]),
        ([NOISE, K.RandomRotation90((-1.5, 2.5))], ["RandomGaussianNoise", "RandomRotation90"]),
        ([GRAY, K.RandomRotation90((-1.5, 2.5)), K.RandomVerticalFlip()], ["gray"]),
    ],
)
def test_order_is_kept(modules: list[nn.Module], chain: list[str]) -> None:
    views = from_kornia(nn.Sequential(CROP, *modules))
    assert names(views) == chain
    assert len(views.slow) == len(views.spec.extras)
    hflips = sum(type(module) is K.RandomHorizontalFlip for module in modules)
    assert hflips == (views.spec.hflip_p > 0) + chain.count("RandomHorizontalFlip")


def test_one_module_twice_is_twice_in_torch_and_once_in_kornia() -> None:
    assert names(from_kornia(nn.Sequential(CROP, BLUR, BLUR))) == ["blur", "RandomGaussianBlur"]
    twice = K.ImageSequential(CROP, BLUR, BLUR)
    assert names(from_kornia(twice)) == ["blur"] and len(twice.forward_parameters(torch.Size((1, 3, 60, 60)))) == 2


def test_containers_are_taken_apart() -> None:
    nested = K.AugmentationSequential(HFLIP, CROP, K.ImageSequential(BLUR, nn.Sequential(GRAY, NOISE)), JITTER)
    views = from_kornia(nested)
    assert names(views) == ["blur", "gray", "RandomGaussianNoise", "jitter"] and views.spec.hflip_p == 0.5


REFUSALS: dict[str, tuple[nn.Module, str]] = {
    "no size": (nn.Sequential(HFLIP, GRAY), "size of a view is not known: begin the pipeline with RandomResizedCrop"),
    "empty": (nn.Sequential(), "size of a view is not known"),
    "not square": (K.RandomResizedCrop((32, 48)), r"RandomResizedCrop to \(32, 48\) is not possible: views are square"),
    "one side": (K.Resize(32), "Resize to 32 is not possible: views are square"),
    "nearest": (K.RandomResizedCrop((S, S), resample="nearest"), "resample .* bilinearly"),
    "enlarged": (K.RandomResizedCrop((S, S), scale=(2.0, 2.0)), "0 < low <= high <= 1"),
    "crop p": (K.RandomResizedCrop((S, S), p=0.5), "p below 1 of RandomResizedCrop"),
    "colour before the crop": (nn.Sequential(GRAY, CROP), "RandomGrayscale comes before RandomResizedCrop"),
    "turn before the crop": (nn.Sequential(K.RandomRotation90((-1.5, 2.5)), CROP), "comes before RandomResizedCrop"),
    "two crops": (nn.Sequential(CROP, CROP), "RandomResizedCrop cannot be an op of a view: it changes the size"),
    "centre crop": (nn.Sequential(CROP, K.CenterCrop(32)), "CenterCrop is not possible: it changes the size"),
    "normalise early": (nn.Sequential(CROP, K.Normalize(0.5, 0.5), GRAY), "Normalize cannot .* after their last op"),
    "normalise at random": (nn.Sequential(CROP, K.Normalize(0.5, 0.5, p=0.5)), "p below 1 of Normalize"),
    "two channels": (nn.Sequential(CROP, K.Normalize((0.5, 0.5), (0.5, 0.5))), "mean of Normalize has 2 numbers"),
    "std": (nn.Sequential(CROP, K.Normalize(0.5, 0.0)), "above 0"),
    "same_on_batch": (nn.Sequential(CROP, K.RandomGrayscale(same_on_batch=True)), "same_on_batch of RandomGrayscale"),
    "all the same": (
        K.AugmentationSequential(K.RandomResizedCrop((S, S)), same_on_batch=True),
        "same_on_batch of RandomResizedCrop",
    ),
    "p_batch": (nn.Sequential(CROP, K.RandomHorizontalFlip(p_batch=0.5)), "p_batch of RandomHorizontalFlip"),
    "random_apply": (K.ImageSequential(CROP, GRAY, random_apply=1), "random_apply of ImageSequential"),
    "masks": (K.AugmentationSequential(CROP, data_keys=["input", "mask"]), "give AugmentationSequential data_keys"),
    "dictionaries": (K.AugmentationSequential(CROP, data_keys=None), "give AugmentationSequential data_keys"),
    "mix": (nn.Sequential(CROP, K.RandomMixUpV2()), "RandomMixUpV2 is not possible: it mixes"),
    "volumes": (nn.Sequential(CROP, K.RandomRotation3D(30)), "RandomRotation3D is not possible: it is for volumes"),
    "patches": (K.PatchSequential(GRAY, patchwise_apply=False), "PatchSequential is not possible"),
    "policy": (nn.Sequential(CROP, K.auto.TrivialAugment()), "TrivialAugment is not possible"),
    "foreign": (nn.Sequential(CROP, nn.ReLU()), "ReLU is not possible: it is not a 2-D augmentation"),
    "kernel too wide": (nn.Sequential(CROP, K.RandomBoxBlur((99, 99))), "RandomBoxBlur: "),
    "blur too wide": (
        nn.Sequential(CROP, K.RandomGaussianBlur(99, (0.1, 2.0))),
        "kernel of 99 is too wide for a view of 48",
    ),
    "even kernel": (nn.Sequential(CROP, K.RandomGaussianBlur(4, (0.1, 2.0))), "RandomGaussianBlur: Kernel size must"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_kept_is_refused_in_words(case: str) -> None:
    pipeline, words = REFUSALS[case]
    with pytest.raises(UsageError, match=words) as caught:
        from_kornia(pipeline)
    assert "\n" not in str(caught.value)


# Pipelines: the numbers


COUNT = 20000


def drawn_by_both(pipeline: nn.Sequential, size: tuple[int, int] = (300, 400)) -> tuple[Plan, list[dict[str, Tensor]]]:
    """Our plan of many views, and the parameters that each module draws for as many."""
    spec = from_kornia(pipeline).spec
    ours = plan([spec], np.arange(COUNT), np.tile(size, (COUNT, 1)), epoch=0, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ours, [module.forward_parameters((COUNT, 3, *size)) for module in pipeline]


def alike(ours: np.ndarray, theirs: Tensor) -> None:
    assert ks_2samp(ours.astype(np.float64).ravel(), theirs.double().numpy().ravel()).pvalue > 1e-3


def test_distributions_are_kornias() -> None:
    """Continuous parameters by a Kolmogorov-Smirnov test, gates to 5 standard deviations."""
    pipeline = nn.Sequential(
        K.RandomResizedCrop((S, S), scale=(0.1, 0.9), ratio=(0.6, 1.5)),
        K.RandomHorizontalFlip(p=0.3),
        K.RandomVerticalFlip(p=0.7),
        K.RandomGaussianBlur(7, (0.3, 1.7), p=0.35),
        K.ColorJitter(0.4, (0.7, 1.3), 1.6, (-0.2, 0.2), p=0.8),
        K.RandomGrayscale(p=0.15),
        K.RandomSolarize((0.4, 0.4), 0.0, p=0.25),
    )
    ours, (crop, hflip, vflip, blur, jitter, gray, solarize) = drawn_by_both(pipeline)
    corners_B42 = crop["src"]
    alike(ours.column(0, "left"), corners_B42[:, 0, 0])
    alike(ours.column(0, "top"), corners_B42[:, 0, 1])
    alike(ours.column(0, "width"), corners_B42[:, 1, 0] - corners_B42[:, 0, 0] + 1)
    alike(ours.column(0, "height"), corners_B42[:, 2, 1] - corners_B42[:, 1, 1] + 1)
    alike(ours.column(0, "sigma"), blur["sigma"])
    for name in ("brightness", "contrast", "saturation", "hue"):
        alike(ours.column(0, name), jitter[f"{name}_factor"])
    gates = {"hflip": hflip, "vflip": vflip, "blur": blur, "jitter": jitter, "gray": gray, "solarize": solarize}
    for name, params in gates.items():
        share = float(params["batch_prob"].double().mean())
        assert abs(ours.column(0, name).mean() - share) < 5 * math.sqrt(2 * 0.25 / COUNT), name


def test_a_flip_before_the_crop_is_one_after_it() -> None:
    """Where Kornia cuts from the right is distributed as where it cuts from the left."""
    _, (crop,) = drawn_by_both(nn.Sequential(K.RandomResizedCrop((S, S), scale=(0.1, 0.9))))
    left_B, right_B = crop["src"][:, 0, 0], crop["src"][:, 1, 0]
    alike((399 - right_B).numpy(), left_B)
    assert from_kornia(nn.Sequential(HFLIP, CROP)).spec == from_kornia(nn.Sequential(CROP, HFLIP)).spec


def test_turns_are_kornias() -> None:
    """Against right angles counted from what the module draws."""
    ours, (_, params) = drawn_by_both(nn.Sequential(CROP, K.RandomRotation90((-1.5, 2.5), p=0.7)))
    theirs = Counter(((params["times"].round() * params["batch_prob"]) % 4).int().tolist())
    mine = Counter(ours.column(0, "turn").astype(int).ravel().tolist())
    for turn in range(4):
        assert abs(mine[turn] - theirs[turn]) < 5 * math.sqrt(2 * 0.25 * COUNT), turn


# Pipelines: the pixels


def replayed(pipeline: nn.Sequential, ours: Plan, images: list[Tensor], extras: Set[int] = frozenset()) -> Tensor:
    """Kornia's own modules with the parameters of our plan, image by image, on float batches of one: (B, 3, S, S).

    `extras`: the places of the modules that the plan does not know.
    """
    spec = ours.specs[0]
    assert len(spec.extras) == len(extras)
    made = []
    for row, seeds, image in zip(ours.of(0)[:, 0], _seeds(ours), images, strict=True):
        x = image.permute(2, 0, 1)[None].float() / 255
        for i, module in enumerate(pipeline):
            if i in extras:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seeds.pop(0))
                    params = module.forward_parameters(tuple(x.shape))
            else:
                params = TRANSLATED[type(module)](row, spec) | {"forward_input_shape": torch.tensor(x.shape)}
            x = module(x, params=params)
            # Noise is not clamped by Kornia; extra ops are.
            x = x if type(module) is K.Normalize else x.clamp(0, 1)
        made.append(x)
    return torch.cat(made)


def _seeds(ours: Plan) -> list[list[int]]:
    """For each image the seeds of its view's extra ops."""
    words = [ours.extra(0, k)[:, 0, 1:].astype(int) for k in range(len(ours.specs[0].extras))]
    return [[int(w[b, 0]) * 2**24 + int(w[b, 1]) for w in words] for b in range(len(ours.buffer))]


def _gate(row: np.ndarray, name: str) -> dict[str, Tensor]:
    return {"batch_prob": torch.tensor([float(row[INDEX[name]])])}


def _number(row: np.ndarray, name: str) -> Tensor:
    return torch.tensor([row[INDEX[name]]], dtype=torch.float32)


def _crop(row: np.ndarray, spec: ViewSpec) -> dict[str, Tensor]:
    top, left, height, width = (int(v) for v in row[:4])
    right, bottom, last = left + width - 1, top + height - 1, spec.size_px - 1
    return {
        "src": torch.tensor([[[left, top], [right, top], [right, bottom], [left, bottom]]], dtype=torch.float32),
        "dst": torch.tensor([[[0, 0], [last, 0], [last, last], [0, last]]], dtype=torch.float32),
        "output_size": torch.tensor([[spec.size_px, spec.size_px]]),
        "batch_prob": torch.ones(1),
    }


def _jitter(row: np.ndarray, spec: ViewSpec) -> dict[str, Tensor]:
    factors = {f"{name}_factor": _number(row, name) for name in ("brightness", "contrast", "saturation", "hue")}
    order = torch.tensor([int(row[INDEX[f"order_{slot}"]]) for slot in range(4)])
    return _gate(row, "jitter") | factors | {"order": order}


TRANSLATED: dict[type, Any] = {
    K.RandomResizedCrop: _crop,
    K.RandomHorizontalFlip: lambda row, spec: _gate(row, "hflip"),
    K.RandomVerticalFlip: lambda row, spec: _gate(row, "vflip"),
    K.RandomRotation90: lambda row, spec: {"times": _number(row, "turn"), "batch_prob": torch.ones(1)},
    K.RandomGaussianBlur: lambda row, spec: _gate(row, "blur") | {"sigma": _number(row, "sigma")},
    K.ColorJitter: _jitter,
    K.RandomGrayscale: lambda row, spec: _gate(row, "gray"),
    K.RandomSolarize: lambda row, spec: (
        _gate(row, "solarize") | {"thresholds": torch.tensor([spec.solarize_threshold]), "additions": torch.zeros(1)}
    ),
    K.Normalize: lambda row, spec: {"batch_prob": torch.ones(1)},
}

IMAGENET = K.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLIPS = (K.RandomHorizontalFlip(), K.RandomVerticalFlip(), K.RandomRotation90((-1.5, 2.5), p=1.0))
EQUAL: dict[str, nn.Sequential] = {
    "crop": nn.Sequential(CROP),
    "geometry": nn.Sequential(CROP, *FLIPS, IMAGENET),
    "simclr": nn.Sequential(
        CROP,
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur(5, (0.1, 2.0), p=0.5),
        IMAGENET,
    ),
    "blur first": nn.Sequential(CROP, BLUR, JITTER, GRAY, K.Normalize(0.5, 0.25)),
    "gray first": nn.Sequential(CROP, GRAY, JITTER, BLUR),
    "solarize between": nn.Sequential(CROP, JITTER, SOLARIZE, BLUR, GRAY),
    "geometry last": nn.Sequential(CROP, JITTER, BLUR, SOLARIZE, GRAY, *FLIPS, IMAGENET),
    "extras": nn.Sequential(
        CROP, JITTER, NOISE, GRAY, K.RandomPlanckianJitter(p=0.5), BLUR, K.RandomInvert(p=0.5), IMAGENET
    ),
    "extras in between": nn.Sequential(
        CROP, GRAY, K.RandomGamma((0.5, 2.0), p=0.5), HFLIP, K.RandomRotation90((0, 3), p=0.5), BLUR, JITTER, BLUR
    ),
}
EXTRAS = {"extras": {2, 4, 6}, "extras in between": {2, 3, 4, 7}}
"""The places of what runs as an extra op: the flip after RandomGamma and the second blur too."""


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_pixels_are_kornias(engine: str, case: str) -> None:
    """Images smaller than the view: where nothing is made smaller, Kornia's resize is ours."""
    pipeline = EQUAL[case]
    views = from_kornia(pipeline)
    images = pictures([(40, 44), (33, 47), (48, 36), (24, 30)] * 6)
    sizes = np.array([image.shape[:2] for image in images])
    ours = plan([views.spec], np.arange(24), sizes, epoch=0, seed=5)
    render = {"fused": fused.render, "reference": reference.render}[engine]
    made_BCSS = render(ours, images, views.mean, views.std)["view"][0]
    wanted_BCSS = replayed(pipeline, ours, images, EXTRAS.get(case, set()))
    apart_BCSS = (made_BCSS - wanted_BCSS).abs() * torch.tensor(views.std).view(3, 1, 1)
    # Solarize is not continuous: where a value lies on the threshold, rounding decides.
    turned_share = float((apart_BCSS > 1e-2).double().mean())
    assert turned_share < (1e-3 if "olarize" in case or "last" in case else 1e-12), case
    assert float(apart_BCSS[apart_BCSS <= 1e-2].max()) < 1e-4, case
    assert float(apart_BCSS.mean()) < 1e-4, case


def test_smooth_images_made_smaller_are_near_kornias() -> None:
    """Where images shrink ours are antialiased: of what is smooth they show the same."""
    pipeline = nn.Sequential(CROP, K.RandomHorizontalFlip(), JITTER, GRAY)
    views = from_kornia(pipeline)
    images = pictures([(200, 260), (150, 150)] * 6, waves=4)
    ours = plan([views.spec], np.arange(12), np.array([i.shape[:2] for i in images]), epoch=0, seed=0)
    apart_BCSS = (views(images) - replayed(pipeline, ours, images)).abs()
    assert apart_BCSS.mean() < 1e-3 and apart_BCSS.max() < 1e-2


# The compiled pipeline, called


def test_three_lines_of_use() -> None:
    views = from_kornia(K.AugmentationSequential(CROP, HFLIP, JITTER, NOISE, IMAGENET))
    images = pictures([(60, 70), (90, 64), (64, 64)])
    before = torch.get_rng_state()
    x_BCSS = views(images)
    assert x_BCSS.shape == (3, 3, S, S) and x_BCSS.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(views(images), x_BCSS) and not torch.equal(views(images, epoch=1), x_BCSS)
    assert not torch.equal(views(images, seed=1), x_BCSS)
    assert torch.equal(views(images[1:], ids=[1, 2]), x_BCSS[1:])
    assert torch.equal(views(torch.stack([images[2]] * 2), ids=np.array([2, 2]))[1], x_BCSS[2])
    assert views(images, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("images", [[], [torch.zeros(3, 40, 40)], torch.zeros(2, 3, 40, 40, dtype=torch.uint8)])
def test_wrong_images_are_refused_in_words(images: Any) -> None:
    with pytest.raises(UsageError, match="uint8 images"):
        from_kornia(CROP)(images)
