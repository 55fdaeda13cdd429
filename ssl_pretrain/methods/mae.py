"""MAE: a ViT sees a quarter of the patches and a small decoder draws the others.

He, Chen, Xie, Li, Dollar, Girshick. "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
The encoder runs on visible patches only; the target is each patch normalised by its own mean and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import init_weights
from lightly.models.utils import initialize_2d_sine_cosine_positional_embedding, patchify, unpatchify
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """MAE with the constants of the authors' ImageNet runs."""

    masks_patches: ClassVar[bool] = True

    size_px: int = 224
    """Side of the view."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the area that it shows."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    norm_pix_loss: bool = True
    """Normalises each target patch by its own mean and deviation."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UsageError(f"method.mask_ratio is {self.mask_ratio}: it is a share between 0 and 1")

    def views(self) -> tuple[ViewSpec, ...]:
        """One crop and a flip: masking is the augmentation."""
        return (ViewSpec(name="view", size_px=self.size_px, scale=self.scale),)

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """The authors' AdamW; 40 warm-up epochs of 400."""
        return OptimSpec("adamw", lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup=0.1)

    def vit(self) -> ViTDefaults:
        """The mean patch token: nothing in the loss asks the class token to say anything."""
        return ViTDefaults(pool="avg", drop_path=0.0)


class MAE(Method):
    """Encoder, mask tokens, decoder, and a linear layer to pixels."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        if not isinstance(backbone, MaskableBackbone):
            raise UsageError(f"MAE needs a plain ViT, and {backbone.name} is none")
        super().__init__()
        self.config, self.backbone, self.encoder = config, backbone, backbone
        patches = backbone.grid[0] * backbone.grid[1]
        self.kept = max(1, round(patches * (1 - config.mask_ratio)))
        self.decoder_embed = nn.Linear(backbone.dim, config.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            patches, config.decoder_dim, config.decoder_depth, config.decoder_heads, backbone.prefix_tokens
        )
        self.decoder_pred = nn.Linear(config.decoder_dim, 3 * backbone.patch_px**2)
        self._initialize()

    def _initialize(self) -> None:
        """The authors' initialisation: fixed sine-cosine positions, Xavier for linear layers and patch embedding."""
        self.apply(init_weights)
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
        positions = self.encoder.position_embedding
        with_prefix = positions.shape[1] > self.encoder.grid[0] * self.encoder.grid[1]
        initialize_2d_sine_cosine_positional_embedding(
            positions, num_prefix_tokens=self.encoder.prefix_tokens if with_prefix else 0
        )

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Mean squared error on the masked patches (section 3)."""
        x_BCHW = views.crops["view"][0]
        keep_BK, masked_BM = self.mask(views)
        prediction = self.forward_decoder(self.encoder.tokens(x_BCHW, keep_BK), keep_BK)
        target = patchify(x_BCHW, self.encoder.patch_px)
        return {"loss": mae_loss(_take(prediction, masked_BM), _take(target, masked_BM), self.config.norm_pix_loss)}

    def mask(self, views: Views) -> tuple[Tensor, Tensor]:
        """Per image, the patches with the smallest noise are kept: (B, K) kept and (B, N - K) masked indices."""
        noise_BN = rng.uniform(rng.fold_in(views.key_B2, _MASK), self.encoder.grid[0] * self.encoder.grid[1])
        order_BN = torch.from_numpy(noise_BN.argsort(axis=1, kind="stable"))
        order_BN = order_BN.to(views.crops["view"].device, non_blocking=True)
        return order_BN[:, : self.kept], order_BN[:, self.kept :]

    def forward_decoder(self, t_BKD: Tensor, keep_BK: Tensor) -> Tensor:
        """Puts the kept tokens at their places among mask tokens and draws every patch: (B, N, 3 p^2)."""
        prefix = self.encoder.prefix_tokens
        t_BKD = self.decoder_embed(t_BKD)
        full = self.decoder.mask_token.to(t_BKD).expand(len(t_BKD), self.decoder.num_patches, -1)
        full = full.scatter(1, keep_BK.unsqueeze(-1).expand(-1, -1, full.shape[-1]), t_BKD[:, prefix:])
        drawn: Tensor = self.decoder_pred(self.decoder(torch.cat([t_BKD[:, :prefix], full], dim=1)))
        return drawn[:, prefix:]

    def before_step(self, progress: float) -> None:
        """The paper leaves the gradients alone."""

    def after_step(self, progress: float) -> None:
        """There is no teacher."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """Predicting each patch's mean: the unit variance of a normalised patch. Raw pixels have no such value."""
        return {"loss": 1.0} if self.config.norm_pix_loss else {}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Rows of three: what the encoder saw, what the decoder drew, the image."""
        image = views.crops["view"][0][:8]
        keep_BK, _ = self.mask(Views({"view": image[None]}, views.key_B2[: len(image)]))
        target = patchify(image, self.encoder.patch_px)
        drawn = self.forward_decoder(self.encoder.tokens(image, keep_BK), keep_BK).to(target)
        if self.config.norm_pix_loss:
            drawn = drawn * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
        places = keep_BK.unsqueeze(-1).expand(-1, -1, target.shape[-1])
        seen = torch.zeros_like(target).scatter(1, places, _take(target, keep_BK))
        drawn = drawn.scatter(1, places, _take(target, keep_BK))
        rows = torch.stack([unpatchify(patches, self.encoder.patch_px) for patches in (seen, drawn, target)], dim=1)
        return {"reconstruction": rows.flatten(0, 1)}


_MASK = 1
"""The draw number of masks under an image's key."""


def mae_loss(prediction_BMP: Tensor, target_BMP: Tensor, norm_pix: bool) -> Tensor:
    """Mean squared error over masked patches, each target patch normalised by its mean and unbiased variance.

    A patch (0, 2) has mean 1 and unbiased variance 2, so its target is (-0.7071, 0.7071); predicting zeros costs
    the mean of the squares, 0.5 (the trivial loss is (P - 1) / P, which is 1 for a real patch of P = 768 values).

    >>> round(mae_loss(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 2.0]]]), norm_pix=True).item(), 4)
    0.5
    >>> round(mae_loss(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 2.0]]]), norm_pix=False).item(), 4)
    2.0
    """
    if norm_pix:
        mean, variance = target_BMP.mean(-1, keepdim=True), target_BMP.var(-1, keepdim=True)
        target_BMP = (target_BMP - mean) / (variance + 1e-6) ** 0.5
    return (prediction_BMP - target_BMP).square().mean()


def _take(patches_BNP: Tensor, index_BK: Tensor) -> Tensor:
    return patches_BNP.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, patches_BNP.shape[-1]))
