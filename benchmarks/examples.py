"""What lightly's examples do with a batch: network, loss, optimizer, method by method (`peers.Lightly` feeds them).

Followed: `examples/pytorch/simclr.py`, `dino.py` and `mae.py` of lightly 1.6. The widths of heads and the sides of
views are those of our recipe, so that the work is the same; optimizers and the order of a step are the examples'.

Shapes: B images, N tokens, K kept and M masked ones, D width.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.methods import MethodConfig


class Example(ABC):
    """The part of an example that differs from method to method."""

    transform: Callable[..., Any]
    module: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """Of a batch's views (B, 3, S, S)."""

    def before_step(self) -> None:  # noqa: B027  most have nothing to do
        """With the gradients."""


def _normalize(backbone: Backbone) -> dict[str, Any]:
    return {"mean": list(backbone.input.mean), "std": list(backbone.input.std)}


class SimCLRExample(Example):
    """examples/pytorch/simclr.py, with blur."""

    def __init__(self, backbone: Backbone, config: MethodConfig) -> None:
        c: Any = config
        head = SimCLRProjectionHead(backbone.dim, c.hidden_dim, c.output_dim, c.head_layers)
        self.module = nn.Sequential(backbone, head)
        self.transform = SimCLRTransform(
            input_size=c.size_px, cj_strength=c.color, min_scale=c.scale[0], normalize=_normalize(backbone)
        )
        self.criterion = NTXentLoss(c.temperature)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.06)

    def loss(self, views: list[Tensor]) -> Tensor:
        x0_BCHW, x1_BCHW = views
        found: Tensor = self.criterion(self.module(x0_BCHW), self.module(x1_BCHW))
        return found


class DINOExample(Example):
    """examples/pytorch/dino.py."""

    def __init__(self, backbone: Backbone, config: MethodConfig) -> None:
        c: Any = config
        size = backbone.dim, c.hidden_dim, c.bottleneck_dim, c.prototypes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's older weight norm
            self.student = nn.Sequential(backbone, DINOProjectionHead(*size))
            self.teacher = nn.Sequential(copy.deepcopy(backbone), DINOProjectionHead(*size)).requires_grad_(False)
        self.criterion = DINOLoss(output_dim=c.prototypes, warmup_teacher_temp_epochs=5)
        self.module = nn.ModuleList([self.student, self.teacher, self.criterion])
        self.transform = DINOTransform(
            global_crop_size=c.global_size_px, global_crop_scale=c.global_scale, local_crop_size=c.local_size_px,
            local_crop_scale=c.local_scale, n_local_views=c.local_count, normalize=_normalize(backbone),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1e-3)

    def loss(self, views: list[Tensor]) -> Tensor:
        utils.update_momentum(self.student, self.teacher, m=0.998)
        with torch.no_grad():
            teacher_out = [self.teacher(view) for view in views[:2]]
        found: Tensor = self.criterion(teacher_out, [self.student(view) for view in views], epoch=10)
        return found

    def before_step(self) -> None:
        self.student[1].cancel_last_layer_gradients(current_epoch=10)


class MAEExample(Example):
    """examples/pytorch/mae.py."""

    def __init__(self, backbone: Backbone, config: MethodConfig) -> None:
        c: Any = config
        vit: Any = backbone._modules["network"]
        self.patch_px, self.masked = vit.patch_embed.patch_size[0], c.mask_ratio
        self.transform = MAETransform(input_size=c.size_px, min_scale=c.scale[0], normalize=_normalize(backbone))
        # Such as the example's: a network that takes one size, with its positions added to a flat row of tokens.
        vit = timm.create_model(
            backbone.name, num_classes=0, img_size=c.size_px, patch_size=self.patch_px, global_pool="avg", fc_norm=False
        )
        encoder = MaskedVisionTransformerTIMM(vit=vit)
        decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, patch_size=self.patch_px, embed_dim=vit.embed_dim,
            decoder_embed_dim=c.decoder_dim, decoder_depth=c.decoder_depth, decoder_num_heads=c.decoder_heads,
        )  # fmt: skip
        self.encoder, self.decoder = encoder, decoder
        self.module = nn.ModuleList([encoder, decoder])
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1.5e-4)

    def loss(self, views: list[Tensor]) -> Tensor:
        (x_BCHW,), tokens = views, self.encoder.sequence_length
        keep_BK, masked_BM = utils.random_token_mask(
            (len(x_BCHW), tokens), mask_ratio=self.masked, device=x_BCHW.device
        )
        embedded_BKD = self.decoder.embed(self.encoder.encode(images=x_BCHW, idx_keep=keep_BK))
        filled_BND = utils.repeat_token(self.decoder.mask_token, (len(x_BCHW), tokens))
        filled_BND = utils.set_at_index(filled_BND, keep_BK, embedded_BKD.type_as(filled_BND))
        prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(filled_BND), masked_BM))
        target = utils.get_at_index(utils.patchify(x_BCHW, self.patch_px), masked_BM - 1)  # without the class token
        return nn.functional.mse_loss(prediction, target)


EXAMPLES: dict[str, Callable[[Backbone, MethodConfig], Example]] = {
    "simclr": SimCLRExample,
    "dino": DINOExample,
    "mae": MAEExample,
}
