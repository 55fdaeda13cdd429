"""The timm family: any timm model that gives a feature vector and feature maps. Weights are never downloaded.

Keys of the state are timm's own, so `timm.create_model("local-dir:...")` loads what is exported from here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import PatchEmbed
from timm.models import group_parameters
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone, InputSpec, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest


def create(
    model: str,
    img_size: int | None = None,
    patch_size: int | None = None,
    pool: str | None = None,
    drop_path: float | None = None,
) -> Backbone:
    """A timm model with random weights.

    img_size    side of the input in pixels; a ViT's position embedding is made for it (other sizes are interpolated)
    patch_size  ViT only: side of a patch in pixels instead of the model's own
    pool        ViT only: `token` (class token) or `avg` (mean of the normalised patch tokens)
    drop_path   rate of stochastic depth while training (Huang et al., 2016)
    """
    args: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    if not maskable(model):
        if patch_size is not None or pool is not None:
            raise UsageError(f"{model} is not a plain ViT: it takes neither backbone.patch_size nor backbone.pool")
        return TimmPyramid(model, args, img_size)
    sizes = {"img_size": img_size, "patch_size": patch_size}
    args |= {name: value for name, value in sizes.items() if value is not None}
    if pool is not None:
        # Without fc_norm=False timm moves the final norm behind the mean and the encoder alone would lack it.
        args |= {"global_pool": pool, "fc_norm": False}
    return TimmViT(model, args)


def maskable(model: str) -> bool:
    """Whether it is a plain ViT; `UsageError` for a name that timm does not know."""
    if model not in timm.list_models():
        raise UsageError(f"timm has no model {model!r}{nearest(model, timm.list_models())}; see timm.list_models()")
    return bool(timm.models.is_model_in_modules(model, ["vision_transformer"]))


def from_config(config: dict[str, Any]) -> Backbone:
    """The architecture that `Backbone.config` described, with random weights."""
    args, card = dict(config.get("model_args", {})), config["pretrained_cfg"]
    size_px = int(card["input_size"][-1])
    vit = maskable(config["architecture"])
    made = TimmViT(config["architecture"], args) if vit else TimmPyramid(config["architecture"], args, size_px)
    made.input = InputSpec(tuple(card["mean"]), tuple(card["std"]), size_px)
    return made


def pretrained(model: str) -> Backbone:
    """A timm model with the weights that timm publishes for it."""
    backbone = create(model)
    backbone.load_weights(published(model)[0])
    return backbone


def published(model: str) -> tuple[dict[str, Tensor], InputSpec]:
    """The weights that timm publishes (of `NAME` or `NAME.TAG`), and what their network was fed.

    The only function here that may reach the network. Raises `UsageError` where they cannot be had.
    """
    maskable(model.partition(".")[0])  # refuses a name that timm does not know
    if not timm.models.is_model_pretrained(model):  # timm would give random weights, or say so in a log
        tags = ", ".join(timm.list_pretrained(f"{model.partition('.')[0]}.*")[:4])
        raise UsageError(f"timm publishes no weights of {model!r}{f'; there are {tags}' if tags else ''}")
    hub = logging.getLogger("huggingface_hub")  # offline it tells each of a dozen retries
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        network = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # timm, huggingface_hub and urllib each raise their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"no published weights of {model!r} could be had ({reason}); offline, use an artefact"
        ) from error
    finally:
        hub.setLevel(level)
    card = network.pretrained_cfg
    return network.state_dict(), InputSpec(tuple(card["mean"]), tuple(card["std"]), card["input_size"][-1])


def at_hand(model: str) -> Path | None:
    """The file with the published weights where it lies in a cache of this machine already; asks nobody."""
    card = timm.get_pretrained_cfg(model)
    if card is None:
        return None
    names = (card.hf_hub_filename,) if card.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = [try_to_load_from_cache(card.hf_hub_id, name) for name in names] if card.hf_hub_id else []
    files = [Path(path) for path in found if isinstance(path, str)]
    if card.url:
        files.append(Path(torch.hub.get_dir()) / "checkpoints" / Path(card.url).name)
    return next((path for path in files if path.is_file()), None)


def from_file(config: dict[str, Any], file: Path) -> Backbone:
    """The architecture that `Backbone.config` described with published weights out of a file; nothing is fetched.

    It is fed what they were trained with. Draws nothing from the global generator.
    """
    model, card = config["architecture"], timm.get_pretrained_cfg(config["architecture"])
    args = {**config.get("model_args", {}), "pretrained_cfg_overlay": {"file": str(file)}}
    with torch.random.fork_rng(devices=[]):
        backbone = from_config(config)
        try:
            network = timm.create_model(model, pretrained=True, num_classes=0, **args)
        except Exception as error:  # a torn or foreign file: safetensors, torch and timm each raise their own kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"the published weights of {model} in {file} cannot be read ({reason})") from error
    backbone.load_weights(network.state_dict())
    backbone.input = InputSpec(tuple(card.mean), tuple(card.std), backbone.input.size_px)
    return backbone


class _Timm(Backbone):
    """What both kinds share; abstract."""

    map_indices: int | None
    """Which maps: None for every stage, n for the last n blocks."""

    def __init__(self, model: str, args: dict[str, Any], img_size: int | None) -> None:
        super().__init__()
        self.network = _network(model, args)
        self.name, self.args, self.dim = model, args, self.network.num_features
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())
        self.family = "convnet" if batch_norm else "vit"
        card = self.network.pretrained_cfg
        self.input = InputSpec(tuple(card["mean"]), tuple(card["std"]), img_size or card["input_size"][-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        z_BD: Tensor = self.network.forward_head(self.network.forward_features(x_BCHW), pre_logits=True)
        return z_BD

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """The maps that timm's `features_only=True` gives."""
        maps: list[Tensor] = self.network.forward_intermediates(
            x_BCHW, indices=self.map_indices, intermediates_only=True
        )
        return maps

    def config(self) -> dict[str, Any]:
        """The `config.json` that timm and Hugging Face read; without drop path, which belongs to one training."""
        card = self.network.pretrained_cfg
        return {
            "architecture": self.name,
            "num_classes": 0,
            "num_features": self.dim,
            "model_args": {key: value for key, value in self.args.items() if key != "drop_path_rate"},
            "pretrained_cfg": {
                **{key: card[key] for key in ("interpolation", "crop_pct", "first_conv", "classifier", "pool_size")},
                "mean": list(self.input.mean),
                "std": list(self.input.std),
                "input_size": [3, self.input.size_px, self.input.size_px],
                "num_classes": 0,
            },
        }

    def layers(self) -> dict[str, int]:
        """By timm's own matcher: stem and embeddings, then block by block; a norm at the end goes with the last."""
        matcher = self.network.group_matcher(coarse=False)
        depths = group_parameters(self.network, matcher, reverse=True)
        return {f"network.{name}": depth for name, depth in depths.items()}

    def weights(self) -> dict[str, Tensor]:
        """Under timm's own keys."""
        state: dict[str, Tensor] = self.network.state_dict()
        return state

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Strictly, under timm's own keys."""
        self.network.load_state_dict(weights)


class TimmPyramid(_Timm):
    """ResNet, ConvNeXt...: each stage gives a map, from fine to coarse."""

    map_indices = None

    def __init__(self, model: str, args: dict[str, Any], img_size: int | None) -> None:
        super().__init__(model, args, img_size)
        self.strides = tuple(level["reduction"] for level in self.network.feature_info)
        self.channels = tuple(level["num_chs"] for level in self.network.feature_info)


class TimmViT(_Timm, MaskableBackbone):
    """A plain ViT; the patch tokens after its last blocks, before the final norm, are its maps."""

    map_indices = 3

    def __init__(self, model: str, args: dict[str, Any]) -> None:
        super().__init__(model, {**args, "dynamic_img_size": True}, args.get("img_size"))
        self.grid = self.network.patch_embed.grid_size
        self.patch_px = self.network.patch_embed.patch_size[0]
        self.prefix_tokens = self.network.num_prefix_tokens
        self.class_token = self.network.cls_token is not None
        self.strides = (self.patch_px,) * self.map_indices
        self.channels = (self.dim,) * self.map_indices

    @property
    def patch_embedding(self) -> nn.Module:
        """A convolution."""
        embedding: nn.Module = self.network.patch_embed
        return embedding

    @property
    def position_embedding(self) -> nn.Parameter:
        """(1, prefix + N, D), or (1, N, D) for the few ViTs that give their prefix tokens no position."""
        embedding: nn.Parameter = self.network.pos_embed
        return embedding

    def tokens(self, x_BCHW: Tensor, keep_BK: Tensor) -> Tensor:
        """The encoder on visible patches only (MAE, He et al. 2022, section 3)."""
        vit = self.network
        t_BND = vit._pos_embed(vit.patch_embed(x_BCHW))
        prefix, patches = t_BND[:, : self.prefix_tokens], t_BND[:, self.prefix_tokens :]
        kept = patches.gather(1, keep_BK.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        t_BKD: Tensor = vit.norm(vit.blocks(vit.norm_pre(torch.cat([prefix, kept], dim=1))))
        return t_BKD

    def masked(self, x_BCHW: Tensor, mask_BN: Tensor, token_D: Tensor) -> Tensor:
        """The mask token stands in for the patch embedding, before positions are added (iBOT; BEiT, section 2.3)."""
        vit = self.network
        t_BHWD = vit.patch_embed(x_BCHW)  # `dynamic_img_size` makes timm keep the grid until positions are added
        t_BHWD = torch.where(mask_BN.view(*t_BHWD.shape[:3], 1), token_D.to(t_BHWD), t_BHWD)
        t_BND: Tensor = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(t_BHWD))))
        return t_BND


def _network(model: str, args: dict[str, Any]) -> Any:
    """The timm model without its classifier; `Any`, as timm's models share these members but no type."""
    try:
        network = timm.create_model(model, pretrained=False, num_classes=0, **args)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"timm does not build {model} with {args}: {str(error).splitlines()[0]}") from error
    patch_embed = network._modules.get("patch_embed")
    if isinstance(patch_embed, PatchEmbed) and patch_embed.strict_img_size and "dynamic_img_size" not in args:
        raise UsageError(f"{model} takes images of one size only, and detectors have others: choose another backbone")
    return network
