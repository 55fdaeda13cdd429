"""SparK: a convolutional network sees 40 % of the patches, as if nothing else were there; a decoder draws the others.

Tian, Jiang, Diao, Lin, Wang, Yuan. "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023. Sparse convolution is emulated by dense ones (`_sparse.py`); the network itself is not changed.
What is easily done wrong, and stands here as in the authors' code: norms see visible places alone, so that no statistic
knows how much was masked; masks are drawn per image in units of the coarsest cell, so that all levels share one; the
decoder gets every level, gaps filled with a learned embedding of that level. Ours: AdamW where the authors use LAMB,
and a max pool that ignores masked places where theirs are zeros (the same behind a ReLU, as in ResNet).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from lightly.models.utils import patchify, unpatchify
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact, train_only
from ssl_pretrain.methods._sparse import NoAttention, Visible, sparse
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """SparK with the constants of the authors' ImageNet runs."""

    masks_maps: ClassVar[bool] = True

    size_px: int = 224
    """Side of the view."""
    scale: tuple[float, float] = (0.67, 1.0)
    """Share of the area that it shows."""
    mask_ratio: float = 0.6
    """Share of the patches that the encoder does not see."""
    patch_px: int | None = None
    """Side of a patch; null takes the backbone's coarsest stride, of which it must be a multiple."""
    levels: int = 4
    """Maps that the decoder gets, from the coarsest (authors: strides 32, 16, 8 and 4)."""
    decoder_dim: int = 512
    """Width of the decoder at the coarsest stride; it halves with each doubling of the resolution."""
    norm_pix_loss: bool = True
    """Normalises each target patch by its own mean and deviation."""
    clip: float = 5.0
    """Largest norm of the whole gradient; 0 switches it off."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UsageError(f"method.mask_ratio is {self.mask_ratio}: it is a share between 0 and 1")
        if self.levels < 1:
            raise UsageError(f"method.levels is {self.levels}: it must be at least 1")

    def views(self) -> tuple[ViewSpec, ...]:
        """One crop and a flip: masking is the augmentation."""
        return (ViewSpec(name="view", size_px=self.size_px, scale=self.scale),)

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """AdamW with the constants of the authors' LAMB (beta_2 of ResNet, of ConvNeXt); 40 warm-up epochs of 1600."""
        betas = (0.9, 0.95) if family == "convnet" else (0.9, 0.999)
        return OptimSpec("adamw", lr=2e-4, weight_decay=0.04, weight_decay_end=0.2, betas=betas, warmup=0.025)

    def vit(self) -> ViTDefaults:
        """Never asked for: plain ViTs are refused."""
        return ViTDefaults(pool="avg", drop_path=0.0)


class SparK(Method):
    """Encoder, for each level a norm, a mask embedding and a projection, and a light decoder to pixels."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        if isinstance(backbone, MaskableBackbone):
            raise UsageError(f"SparK is for convolutional networks, and {backbone.name} is a plain ViT: use mae")
        super().__init__()
        self.config, self.backbone = config, backbone
        last = {stride: i for i, stride in enumerate(backbone.strides)}
        self.levels = [last[stride] for stride in sorted(last, reverse=True)][: config.levels]
        strides = [backbone.strides[i] for i in self.levels]
        self.patch_px = strides[0] if config.patch_px is None else config.patch_px
        self._check(strides)
        self.grid = config.size_px // self.patch_px
        self.kept = min(max(1, round(self.grid**2 * (1 - config.mask_ratio))), self.grid**2 - 1)
        widths = [config.decoder_dim // 2**i for i in range(round(math.log2(strides[0])) + 1)]
        self.densify = nn.ModuleList(
            _Densify(backbone.channels[index], width, backbone.family, coarsest=i == 0)
            for i, (index, width) in enumerate(zip(self.levels, widths, strict=False))
        )
        self.decoder = nn.ModuleList(_UNetBlock(*pair) for pair in pairwise(widths))
        self.to_pixels = nn.Conv2d(widths[-1], 3, 1)
        self._initialize()
        with NoAttention(backbone.name):
            some = Visible(torch.arange(self.kept).unsqueeze(0), self.grid)
            train_only(backbone, config.size_px, lambda x_BCHW: self.encode(x_BCHW, some))

    def _check(self, strides: list[int]) -> None:
        """What would fail later, or give maps that the decoder cannot put together."""
        config, name = self.config, self.backbone.name
        halved = all(fine * 2 == coarse for coarse, fine in pairwise(strides))
        if not halved or strides[0] & (strides[0] - 1):
            raise UsageError(f"SparK needs maps whose strides are powers of 2 and halve: {name} has {sorted(strides)}")
        if self.patch_px < 1 or self.patch_px % strides[0]:
            raise UsageError(f"method.patch_px is {self.patch_px}: {name} needs a multiple of {strides[0]}")
        if config.size_px % self.patch_px or config.size_px < 2 * self.patch_px:
            raise UsageError(f"method.size_px is {config.size_px}: it must be twice the patch of {self.patch_px} px or "
                             "another multiple")  # fmt: skip
        if config.decoder_dim < strides[0] or config.decoder_dim % strides[0]:
            raise UsageError(f"method.decoder_dim is {config.decoder_dim}: it is halved down from stride {strides[0]} "
                             f"and must be a multiple of {strides[0]}")  # fmt: skip

    def _initialize(self) -> None:
        """The authors' initialisation of what is not the encoder."""
        for module in (*self.decoder.modules(), self.to_pixels):
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Mean squared error on the masked patches (section 3.3)."""
        x_BCHW = views.crops["view"][0]
        keep_BK, masked_BM = self.mask(views)
        drawn_BCHW = self.draw(x_BCHW, keep_BK)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            prediction, target = (patchify(x, self.patch_px) for x in exact(drawn_BCHW, x_BCHW))
            prediction, target = _take(prediction, masked_BM), _take(target, masked_BM)
            return {"loss": spark_loss(prediction, target, self.config.norm_pix_loss)}

    def mask(self, views: Views) -> tuple[Tensor, Tensor]:
        """Per image, the patches with the smallest noise are kept: (B, K) kept and (B, N - K) masked indices."""
        noise_BN = rng.uniform(rng.fold_in(views.key_B2, _MASK), self.grid**2)
        order_BN = torch.from_numpy(noise_BN.argsort(axis=1, kind="stable"))
        order_BN = order_BN.to(views.crops["view"].device, non_blocking=True)
        return order_BN[:, : self.kept], order_BN[:, self.kept :]

    def draw(self, x_BCHW: Tensor, keep_BK: Tensor) -> Tensor:
        """Encodes the visible patches (section 3.1), fills the gaps and decodes (3.2): (B, 3, H, W)."""
        visible = Visible(keep_BK, self.grid)
        maps = self.encode(x_BCHW, visible)
        dense = [densify(sparse, visible) for densify, sparse in zip(self.densify, maps, strict=True)]
        d_BCHW = torch.zeros_like(dense[0])
        for i, block in enumerate(self.decoder):
            d_BCHW = block(d_BCHW + dense[i] if i < len(dense) else d_BCHW)
        pixels_BCHW: Tensor = self.to_pixels(d_BCHW)
        return pixels_BCHW

    def encode(self, x_BCHW: Tensor, visible: Visible) -> list[Tensor]:
        """The maps of the visible patches, coarse to fine, zero where masked."""
        with sparse(self.backbone, visible):
            maps = self.backbone.maps(visible.only(x_BCHW))
        return [maps[i] for i in self.levels]

    def before_step(self, progress: float) -> None:
        """Clips the gradient as a whole."""
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.clip)

    def after_step(self, progress: float) -> None:
        """There is no teacher."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """Predicting each patch's mean: the unit variance of a normalised patch. Raw pixels have no such value."""
        return {"loss": 1.0} if self.config.norm_pix_loss else {}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Rows of three: what the encoder saw, what the decoder drew, the image."""
        image = views.crops["view"][0][:8]
        keep_BK, _ = self.mask(Views({"view": image[None]}, views.key_B2[: len(image)]))
        target = patchify(image, self.patch_px)
        drawn = patchify(self.draw(image, keep_BK).to(image), self.patch_px)
        if self.config.norm_pix_loss:
            drawn = drawn * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
        visible = Visible(keep_BK, self.grid)
        whole = torch.where(visible.at(image.shape[-1]), image, unpatchify(drawn, self.patch_px))
        return {"reconstruction": torch.stack([visible.only(image), whole, image], dim=1).flatten(0, 1)}


_MASK = 1
"""The draw number of masks under an image's key."""


def spark_loss(prediction_BMP: Tensor, target_BMP: Tensor, norm_pix: bool) -> Tensor:
    """Mean squared error over masked patches (section 3.3), each normalised by its mean and unbiased variance.

    A patch (0, 2) has mean 1 and unbiased variance 2, so its target is (-0.7071, 0.7071); predicting (0, 0.7071) costs
    (0.5 + 0) / 2 = 0.25.

    >>> drawn, target = torch.tensor([[[0.0, 0.5**0.5]]]), torch.tensor([[[0.0, 2.0]]])
    >>> round(spark_loss(drawn, target, norm_pix=True).item(), 4)
    0.25
    """
    if norm_pix:
        mean, variance = target_BMP.mean(-1, keepdim=True), target_BMP.var(-1, keepdim=True)
        target_BMP = (target_BMP - mean) / (variance + 1e-6) ** 0.5
    return (prediction_BMP - target_BMP).square().mean()


class _Densify(nn.Module):
    """Section 3.2: a norm of what is visible, the mask embedding where nothing is, a projection to the decoder."""

    def __init__(self, width: int, decoder_width: int, family: str, coarsest: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if family == "convnet" else LayerNorm2d(width)
        self.mask_C11 = nn.Parameter(nn.init.trunc_normal_(torch.empty(width, 1, 1), std=0.02, a=-0.02, b=0.02))
        kernel = 1 if coarsest else 3
        same = coarsest and width == decoder_width
        self.projection = nn.Identity() if same else nn.Conv2d(width, decoder_width, kernel, padding=kernel // 2)

    def forward(self, map_BCHW: Tensor, visible: Visible) -> Tensor:
        normed_BCHW = visible.unpack(self.norm(visible.pack(map_BCHW)))
        full_BCHW = torch.where(visible.at(map_BCHW.shape[-1]), normed_BCHW, self.mask_C11)
        projected_BCHW: Tensor = self.projection(full_BCHW)
        return projected_BCHW


class _UNetBlock(nn.Module):
    """The authors' decoder block: twice the resolution, two convolutions."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.convs = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True),
            nn.Conv2d(width, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out),
        )  # fmt: skip

    def forward(self, d_BCHW: Tensor) -> Tensor:
        drawn_BCHW: Tensor = self.convs(self.up(d_BCHW))
        return drawn_BCHW


def _take(patches_BNP: Tensor, index_BK: Tensor) -> Tensor:
    return patches_BNP.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, patches_BNP.shape[-1]))
