"""SparK: the emulation is a sparse convolution, what is masked stays unseen, and the network is left as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small
from torch import Tensor, nn

from ssl_pretrain import backbones, load_backbone, methods, pretrain, rng
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views, spark
from ssl_pretrain.methods._sparse import NoAttention, Visible, sparse
from ssl_pretrain.methods.spark import SparK, spark_loss
from ssl_pretrain.train.checkpoint import Checkpoints

KEEP = torch.tensor([[0, 3, 4, 7, 9, 15], [1, 2, 5, 10, 11, 12], [0, 1, 2, 3, 13, 14]])
"""6 of 4 x 4 patches in each of three images."""


def built(backbone: str = "test_resnet", **changes: object) -> SparK:
    torch.manual_seed(0)
    method = methods.create(spark.Config(**{"size_px": 128, "decoder_dim": 32, **changes}), backbones.create(backbone))
    assert isinstance(method, SparK)
    return method


def seen(count: int = 4, size_px: int = 128) -> Views:
    crops = torch.randn(1, count, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))
    return Views({"view": crops}, rng.fold_in(rng.key(0, "test"), np.arange(count)))


def shaken(backbone: backbones.Backbone) -> backbones.Backbone:
    """In float64 with no parameter at its starting value, which hides much (zero biases, unit gains)."""
    for parameter in backbone.double().parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return backbone


# The emulation against formulas of its own


def test_packing_is_what_indexing_says() -> None:
    x = torch.randn(3, 5, 12, 12)
    visible = Visible(KEEP, 4)
    packed = visible.pack(x)
    assert packed.shape == (3, 5, 18, 3)
    for b in range(3):
        for k, patch in enumerate(KEEP[b].tolist()):
            row, column = divmod(patch, 4)
            expected = x[b, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert torch.equal(packed[b, :, 3 * k : 3 * k + 3], expected)
    assert torch.equal(visible.unpack(packed), visible.only(x)) and torch.equal(visible.only(x), x * visible.at(12))


def normed_by_hand(x_BCHW: Tensor, seen_BHW: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """The formula over a list of the visible places; also their mean and unbiased variance."""
    places_NC = torch.stack([x_BCHW[b, :, i, j] for b, i, j in seen_BHW.nonzero().tolist()])
    mean = places_NC.sum(0) / len(places_NC)
    squares = (places_NC - mean).square().sum(0)
    y_NC = (places_NC - mean) / (squares / len(places_NC) + norm.eps).sqrt() * norm.weight + norm.bias
    y = torch.zeros_like(x_BCHW)
    for n, (b, i, j) in enumerate(seen_BHW.nonzero().tolist()):
        y[b, :, i, j] = y_NC[n]
    return y, mean, squares / (len(places_NC) - 1)


def test_batch_norm_knows_visible_places_alone() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(3, 5, 8, 8, dtype=torch.float64)).requires_grad_()
    visible = Visible(KEEP, 4)
    expected, mean, variance = normed_by_hand(x, visible.at(8)[:, 0], norm)
    with sparse(norm, visible):
        found = norm(x)
    assert (found - expected).abs().max() < 1e-12
    assert (norm.running_mean - 0.1 * mean).abs().max() < 1e-12
    assert (norm.running_var - (0.9 + 0.1 * variance)).abs().max() < 1e-12
    assert int(norm.num_batches_tracked) == 1
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((weight * y).sum(), x)[0] for y in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    assert not gradients[0].masked_select(~visible.at(8)).any()
    dense = copy.deepcopy(norm)(x)
    assert (dense * visible.at(8) - expected).abs().max() > 0.1, "the test would not see the usual mistake"


def conv_by_hand(x_BCHW: Tensor, in_BHW: Tensor, out_BHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """At each visible place of the output, the sum over the visible places of the input that its kernel reaches."""
    y = torch.zeros(len(x_BCHW), conv.out_channels, *out_BHW.shape[1:], dtype=x_BCHW.dtype)
    size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    assert conv.bias is not None
    for b, i, j in out_BHW.nonzero().tolist():
        total = conv.bias.clone()
        for u in range(size):
            for v in range(size):
                row, column = stride * i + u - padding, stride * j + v - padding
                inside = 0 <= row < x_BCHW.shape[2] and 0 <= column < x_BCHW.shape[3]
                if inside and in_BHW[b, row, column]:
                    total = total + conv.weight[:, :, u, v] @ x_BCHW[b, :, row, column]
        y[b, :, i, j] = total
    return y


def pooled_by_hand(x_BCHW: Tensor, in_BHW: Tensor, out_BHW: Tensor) -> Tensor:
    """3 x 3 windows, two places apart: the largest of what is visible."""
    y = torch.zeros(*x_BCHW.shape[:2], *out_BHW.shape[1:], dtype=x_BCHW.dtype)
    for b, i, j in out_BHW.nonzero().tolist():
        rows, columns = range(max(0, 2 * i - 1), 2 * i + 2), range(max(0, 2 * j - 1), 2 * j + 2)
        y[b, :, i, j] = torch.stack([x_BCHW[b, :, r, c] for r in rows for c in columns if in_BHW[b, r, c]]).amax(0)
    return y


def test_a_stack_of_layers_is_a_sparse_convolution() -> None:
    torch.manual_seed(0)
    first, norm, last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, stride=2, padding=1)
    stack = nn.Sequential(first, norm, nn.SiLU(), nn.MaxPool2d(3, 2, 1), last).double()
    nn.init.normal_(norm.bias, -2)  # so that the largest of a window is often below zero
    x, visible = torch.randn(3, 3, 16, 16, dtype=torch.float64), Visible(KEEP, 4)
    at = {side: visible.at(side)[:, 0] for side in (16, 8, 4)}
    y = normed_by_hand(conv_by_hand(x, at[16], at[16], first), at[16], norm)[0]
    y = pooled_by_hand(y * y.sigmoid(), at[16], at[8])
    expected = conv_by_hand(y, at[8], at[4], last)
    with sparse(stack, visible):
        found = stack(visible.only(x))
    assert y.min() < 0 and (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_convnext3", "resnet18", "repvgg_a0"])
def test_a_square_of_visible_patches_is_an_image_of_its_own(name: str) -> None:
    """Zero padding is what a sparse convolution has around it: the whole network, statistics too, must say the same."""
    torch.manual_seed(0)
    network = shaken(backbones.create(name))
    alone = copy.deepcopy(network)
    x, visible = torch.randn(3, 3, 128, 128, dtype=torch.float64), Visible(torch.tensor([[5, 6, 9, 10]] * 3), 4)
    with sparse(network, visible):
        maps = network.maps(visible.only(x))
    for found, expected in zip(maps, alone.maps(x[:, :, 32:96, 32:96]), strict=True):
        r = found.shape[2] // 4
        whole = torch.zeros_like(found)
        whole[:, :, r : 3 * r, r : 3 * r] = expected
        assert (found - whole).abs().max() < 1e-11 * expected.abs().max()
    for found, expected in zip(network.buffers(), alone.buffers(), strict=True):
        assert (found - expected).abs().max() < 1e-11


# What is masked


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_nothing_that_is_masked_reaches_the_encoder(name: str) -> None:
    method = built(name)
    shaken(method.backbone).float()
    views = seen(3)
    visible = Visible(method.mask(views)[0], method.grid)
    x = views.crops["view"][0]
    spoiled = torch.where(visible.at(128), x, math.nan)
    found, spoiled_too = (copy.deepcopy(method).encode(image, visible) for image in (x, spoiled))
    assert [m.shape[-1] for m in found] == [4, 8, 16, 32]
    for a, b in zip(found, spoiled_too, strict=True):
        assert torch.equal(a, b)
        assert not a.masked_select(~visible.at(a.shape[-1])).any(), (
            "a constant of the layers stands where all is masked"
        )
    moved = x.clone()
    moved[:, :, :, :] += visible.at(128) * 0.1
    assert not torch.equal(copy.deepcopy(method).encode(moved, visible)[0], found[0])


def test_masks_are_drawn_per_image_and_belong_to_it() -> None:
    method = built(size_px=320)
    views = seen(6, 320)
    keep, masked = method.mask(views)
    assert keep.shape == (6, 40) and masked.shape == (6, 60)  # 100 patches of 32 px
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(100).expand(6, -1))
    assert len({tuple(sorted(row)) for row in keep.tolist()}) == 6
    part, _ = method.mask(Views({"view": views.crops["view"][:, 3:5]}, views.key_B2[3:5]))
    assert torch.equal(keep[3:5], part)
    assert built(patch_px=64).mask(seen())[0].shape == (4, 2)  # 4 patches of 64 px


def test_the_loss_is_over_masked_patches_alone() -> None:
    method = built()
    views = seen()
    keep, _ = method.mask(views)
    before = method.loss(views, 0.0)["loss"]

    def spoil(where: Tensor) -> Tensor:
        handle = method.to_pixels.register_forward_hook(lambda _, given, drawn: drawn + where)
        loss = method.loss(views, 0.0)["loss"]
        handle.remove()
        return loss

    visible = Visible(keep, method.grid).at(128)
    assert spoil(visible) == before
    assert spoil(~visible) != before


def test_the_loss_is_the_authors() -> None:
    drawn, image = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    shown = torch.zeros(4, 9, dtype=torch.bool).scatter(1, torch.randn(4, 9).argsort(1)[:, :3], True)
    mean, deviation = image.mean(-1, keepdim=True), (image.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((drawn - (image - mean) / deviation) ** 2).mean(2)
    expected = (error * ~shown).sum() / (~shown).sum()
    masked = (~shown).nonzero()[:, 1].view(4, 6, 1).expand(-1, -1, 12)
    assert abs(spark_loss(drawn.gather(1, masked), image.gather(1, masked), norm_pix=True) - expected) < 1e-12


def test_predicting_nothing_costs_chance_and_autocast_changes_nothing_of_the_loss() -> None:
    method = built()
    nn.init.zeros_(method.to_pixels.weight)
    assert method.loss(seen(), 0.0)["loss"].item() == pytest.approx(method.chance(4)["loss"], abs=1e-3)
    nn.init.normal_(method.to_pixels.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(seen(), 0.0)["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()


# The network


def test_the_network_is_left_as_it_was() -> None:
    plain = backbones.create("test_resnet")
    method = SparK(spark.Config(size_px=128, decoder_dim=32), copy.deepcopy(plain))
    assert list(method.backbone.weights()) == list(plain.weights())
    x = torch.randn(2, 3, 64, 64)
    method.eval(), plain.eval()
    assert torch.equal(method.backbone(x), plain(x))  # building it moved no statistic
    method.loss(seen(), 0.0)
    assert torch.equal(method.backbone(x), plain(x))  # it is dense outside
    unknown = nn.Softplus()
    with pytest.raises(UsageError, match="does not know what Softplus"), sparse(unknown, Visible(KEEP, 4)):
        unknown(x)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in (unknown, *method.modules()))


def test_what_cannot_be_sparse_is_refused_in_words() -> None:
    def refused(backbone: str, match: str, **changes: object) -> None:
        with pytest.raises(UsageError, match=match):
            built(backbone, **changes)

    refused("test_vit", "plain ViT: use mae")
    refused("test_efficientnet", "keep places")  # squeeze and excitation: a mean over all places
    refused("test_efficientnet_evos", "EvoNorm2dS0")
    refused("test_resnet", "multiple of 32", patch_px=16)
    refused("test_resnet", "twice the patch", size_px=32)
    refused("test_resnet", "twice the patch", size_px=80)
    refused("test_resnet", "decoder_dim", decoder_dim=40)
    refused("test_resnet", "mask_ratio", mask_ratio=1.5)
    with pytest.raises(UsageError, match="has attention"), NoAttention("it"):
        nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4))


def test_the_decoder_gets_every_level_that_it_was_promised() -> None:
    for levels in (1, 2, 4):
        method = built(levels=levels)
        assert len(method.densify) == levels and len(method.decoder) == 5
        method.loss(seen(), 0.0)["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in (d.mask_C11 for d in method.densify))


def test_gradients_are_clipped_as_a_whole() -> None:
    method = built(clip=1e-3)
    method.loss(seen(), 0.0)["loss"].backward()
    method.before_step(0.0)
    norm = nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_reconstructions_stand_beside_their_image() -> None:
    method = built().eval()
    views = seen(3)
    visible = Visible(method.mask(views)[0], method.grid).at(128)
    with torch.no_grad():
        shown, drawn, image = method.pictures(views)["reconstruction"].unflatten(0, (3, 3)).unbind(1)
    assert torch.equal(image, views.crops["view"][0])
    assert torch.equal(shown, image * visible) and torch.equal(drawn * visible, shown)
    assert not torch.equal(drawn, shown)


def test_published_constants_are_the_defaults() -> None:
    config = spark.Config()
    assert (config.mask_ratio, config.scale, config.clip, config.decoder_dim) == (0.6, (0.67, 1.0), 5.0, 512)
    spec = config.optim("convnet")
    assert (spec.lr, spec.weight_decay, spec.weight_decay_end, spec.betas) == (2e-4, 0.04, 0.2, (0.9, 0.95))


# A run


def test_a_run_leaves_an_ordinary_network_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = {**small("spark", steps=4, save_every_steps=2), "data": "synthetic:16"}
    whole = pretrain(recipe, out=tmp_path / "whole")
    pretrain(recipe, out=tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob("step_000000004*"):
        path.unlink()
    again = pretrain(recipe, out=tmp_path / "cut")
    states = [Checkpoints(result.folder / "checkpoints").newest() for result in (whole, again)]
    assert states[0] is not None and states[1] is not None and whole.step == again.step == 4
    assert all(torch.equal(states[0]["method"][key], states[1]["method"][key]) for key in states[0]["method"])
    loaded = load_backbone(whole.artefact)
    ordinary = backbones.create("test_resnet").eval()
    assert list(loaded.backbone.weights()) == list(ordinary.weights())
    ordinary.load_weights(loaded.backbone.weights())
    x = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), ordinary.maps(x), strict=True))
