"""Distillation: a small network learns to give what a large, finished one gives for the same view.

Hinton, Vinyals, Dean. "Distilling the Knowledge in a Neural Network", 2015; without labels, so by features:
  features   regression of the pooled feature, through a head that is thrown away: Navaneet et al., "SimReg", BMVC 2021
  maps       regression of the coarsest map, where detectors live: Romero et al., "FitNets", ICLR 2015
  relations  the similarities within a batch: Tung, Mori. "Similarity-Preserving Knowledge Distillation", ICCV 2019
Both see the same crop (Beyer et al., "A good teacher is patient and consistent", CVPR 2022). What the teacher gives is
standardised by channel over the global batch, so that no channel drowns the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightly.models.modules.heads import ProjectionHead
from lightly.utils.dist import gather
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import artefact
from ssl_pretrain.backbones import Backbone, InputSpec, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
from ssl_pretrain.views import ViewSpec

EPS = 1e-8  # a variance below this is none: a channel that a ReLU silences


@dataclass(frozen=True)
class Config(MethodConfig):
    """What is learned from whom."""

    teacher: str = ""
    """Required: a run or artefact folder, `timm:NAME` (published weights, which timm may download), `random:NAME`."""
    features: float = 1.0
    """Weight of the pooled features."""
    maps: float = 1.0
    """Weight of the coarsest maps; 0 also saves the networks' second pass."""
    relations: float = 1.0
    """Weight of the similarities within the batch."""
    size_px: int = 224
    """Side of the view."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that it shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s), the same for teacher and student."""
    hidden_dim: int = 2048
    """Width of the hidden layer between the student's feature and the teacher's."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UsageError("method.teacher is missing: distill needs a run or artefact folder, or timm:NAME")
        for key, least in (("features", 0), ("maps", 0), ("relations", 0), ("hidden_dim", 1)):
            if vars(self)[key] < least:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be at least {least}")
        if not self.features + self.relations > 0:
            raise UsageError("method.features and method.relations are both 0: maps alone leave the feature untrained")

    def views(self) -> tuple[ViewSpec, ...]:
        """One crop, seen by both."""
        strong = 0.4 * self.color
        return (
            ViewSpec(
                name="view", size_px=self.size_px, scale=self.scale, jitter_p=0.8, brightness=strong, contrast=strong,
                saturation=strong / 2, hue=strong / 4, gray_p=0.2, blur_p=0.1,
            ),
        )  # fmt: skip

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """SimReg's SGD for BatchNorm networks; AdamW as DeiT's distillation for ViTs."""
        if family == "convnet":
            return OptimSpec("sgd", lr=0.05, weight_decay=1e-4, warmup=0.05)
        return OptimSpec("adamw", lr=2.5e-4, weight_decay=0.05)

    def vit(self) -> ViTDefaults:
        """Class token, no stochastic depth."""
        return ViTDefaults(pool="token", drop_path=0.0)


class Distill(Method):
    """Student, its way to the teacher's widths, and the teacher."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone, network = config, backbone, _resolved(config)
        self.teacher = Teacher(network, backbone.input)
        if config.features:
            hidden = (backbone.dim, config.hidden_dim, nn.BatchNorm1d(config.hidden_dim), nn.ReLU())
            self.head = ProjectionHead([hidden, (config.hidden_dim, network.dim, None, None)])
        if config.maps:
            self.map_head = nn.Conv2d(backbone.channels[-1], network.channels[-1], kernel_size=1)

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """The weighted sum of the terms; those of weight 0 are left out."""
        x_BCHW, config = views.crops["view"][0], self.config
        teacher_BD, student_BD = self.teacher.features(x_BCHW), self.backbone(x_BCHW)
        terms = {}
        if config.features:
            terms["features"] = regression_loss(self.head(student_BD), teacher_BD)
        if config.maps:
            teacher_BDHW = self.teacher.map(x_BCHW)
            student_BDHW = resized(self.map_head(self.backbone.maps(x_BCHW)[-1]), teacher_BDHW.shape[-2:])
            terms["maps"] = regression_loss(student_BDHW, teacher_BDHW)
        if config.relations:
            terms["relations"] = relation_loss(student_BD, teacher_BD)
        loss = torch.stack([vars(config)[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def before_step(self, progress: float) -> None:
        """Nothing."""

    def after_step(self, progress: float) -> None:
        """The teacher stands still."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """A student that gives every image the teacher's mean, and sees no two images alike: 1 each."""
        weights = {name: vars(self.config)[name] for name in ("features", "maps", "relations")}
        return {"loss": sum(weights.values()), **{name: 1.0 for name in weights if weights[name]}}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}


class Teacher(nn.Module):
    """A frozen network in evaluation mode for good, fed as it was trained; what it gives is standardised by channel.

    It stands in a tuple, into which torch does not look: no checkpoint, optimizer, `train()` or shared BatchNorm knows
    it. In its place the checkpoint holds a hash of its weights, so that no run goes on with another teacher.
    """

    scale_311: Tensor
    shift_311: Tensor

    def __init__(self, network: Backbone, fed: InputSpec) -> None:
        super().__init__()
        self._held = (network.eval().requires_grad_(False),)
        digest = hashlib.sha256()
        for name, tensor in sorted(network.weights().items()):
            digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._sha256 = digest.digest()
        from_311, to_311 = (torch.tensor([[*spec.mean], [*spec.std]]).view(2, 3, 1, 1) for spec in (fed, network.input))
        self.register_buffer("scale_311", from_311[1] / to_311[1], persistent=False)
        self.register_buffer("shift_311", (from_311[0] - to_311[0]) / to_311[1], persistent=False)
        self.feature_norm = nn.BatchNorm1d(network.dim, EPS, affine=False, track_running_stats=False)
        self.map_norm = nn.BatchNorm2d(network.channels[-1], EPS, affine=False, track_running_stats=False)

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Of images normalised for the student: pooled features (B, D), of mean 0 and variance 1."""
        z_BD = self._held[0](x_BCHW * self.scale_311 + self.shift_311)
        with torch.autocast(z_BD.device.type, enabled=False):
            return cast(Tensor, self.feature_norm(*exact(z_BD)))

    @torch.no_grad()
    def map(self, x_BCHW: Tensor) -> Tensor:
        """Of images normalised for the student: the coarsest map (B, D, H', W'), of mean 0 and variance 1."""
        m_BDHW = self._held[0].maps(x_BCHW * self.scale_311 + self.shift_311)[-1]
        with torch.autocast(m_BDHW.device.type, enabled=False):
            return cast(Tensor, self.map_norm(*exact(m_BDHW)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        """What `.to()` and `.double()` come down to."""
        self._held[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return cast(Teacher, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Tensor:
        """The hash, as it goes into `state_dict`."""
        return torch.tensor(list(self._sha256), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises `UsageError` for the state of a run with another teacher."""
        if bytes(state.tolist()) != self._sha256:
            raise UsageError("method.teacher does not hold the weights that the run began with")


def regression_loss(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Squared error relative to the target's own square over all ranks (FitNets, equation 3; SimReg, section 3).

    A standardised target has the square 1 but for channels that a ReLU silences, which count for nothing here. The
    target (1, -1) and the prediction (1, 0): (0 + 1) / (1 + 1). Predicting the mean, (0, 0), costs 1.

    >>> regression_loss(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [-1.0]])).item()
    0.5
    """
    with torch.autocast(prediction_BD.device.type, enabled=False):
        prediction_BD, target_BD = exact(prediction_BD, target_BD.detach())
        square = target_BD.square().mean()
        if dist.is_initialized():
            dist.all_reduce(square)
            square /= dist.get_world_size()
        return F.mse_loss(prediction_BD, target_BD) / square.clamp_min(EPS)


def relation_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Squared difference of the cosines between the images of all ranks, relative to the teacher's own.

    Tung and Mori (section 3), of features less their mean, without an image's similarity to itself. The teacher has
    two images at 1 and two at -1, so six pairs with a cosine of 1 or -1. A student that puts the third beside the first
    two, (1, 1, 1, -3), errs by 2 in the three pairs of the third: 3 * 4 / 6 = 2.

    >>> teacher, student = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [1.0], [-3.0]])
    >>> relation_loss(student, teacher).item()
    2.0
    """
    with torch.autocast(student_BD.device.type, enabled=False):
        student_BD, teacher_BD = exact(student_BD, teacher_BD.detach())
        if dist.is_initialized():
            # A class token is a strided part of all tokens, which NCCL does not take.
            student_BD, teacher_BD = (torch.cat(gather(z_BD.contiguous())) for z_BD in (student_BD, teacher_BD))
        student_BB, teacher_BB = _cosines(student_BD), _cosines(teacher_BD)
        return (student_BB - teacher_BB).square().sum() / teacher_BB.square().sum().clamp_min(EPS)


def resized(map_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, antialiased, as two matrix products: `interpolate` sums its gradient in no fixed order on a GPU.

    >>> resized(torch.tensor([[[[0.0, 4.0]]]]), (1, 4)).flatten().tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    with torch.autocast(map_BCHW.device.type, enabled=False):
        (map_BCHW,) = exact(map_BCHW)
        sides = []
        for n, m in zip(map_BCHW.shape[-2:], size, strict=True):
            eye_11NN = torch.eye(n, dtype=map_BCHW.dtype, device=map_BCHW.device)[None, None]
            sides.append(F.interpolate(eye_11NN, (n, m), mode="bilinear", antialias=True)[0, 0])
        return sides[0].T @ map_BCHW @ sides[1]


def _cosines(z_BD: Tensor) -> Tensor:
    """Between each two rows less their mean; 0 on the diagonal."""
    z_BD = F.normalize(z_BD - z_BD.mean(0), dim=1, eps=1e-6)
    return (z_BD @ z_BD.T).fill_diagonal_(0)


def _resolved(config: Config) -> Backbone:
    """The network that `config.teacher` names; what torch draws next does not depend on it."""
    with torch.random.fork_rng(devices=[]):
        try:
            network = artefact.resolve(config.teacher, config.size_px)
        except UsageError as error:
            raise UsageError(f"method.teacher: {error}") from error
    if isinstance(network, MaskableBackbone) and config.size_px % network.patch_px:
        raise UsageError(f"method.size_px {config.size_px} is no multiple of the teacher's patches, {network.patch_px}")
    return network
