"""For MMDetection: a config of its kind, and a ResNet also as a checkpoint for its own ResNet.

MMEngine loads loosely: what does not fit is printed and stays random. A detector's weights are drawn, and a checkpoint
is read, by `init_weights`, which MMEngine's runner calls; so it is after that call that `arrive` looks.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from ssl_pretrain.artefact import TOLERANCE, MapBackbone, apart, load_backbone
from ssl_pretrain.detectors import _maps
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import BOXES, Arrived, Probe, parts, probe, trained
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import named

WEIGHTS = "mmdet.pth"
CONFIG = "mmdet_config.py"
"""Not `mmdet.py`, which Python would import for the package where it stands."""
BASE = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
"""Of MMDetection's configs, one whose levels are those of the written config."""
VERIFIED = "retinanet/retinanet_r50_fpn_1x_coco.py"
"""That which `arrive` builds: it needs no compiled operators in training."""


def write(folder: Path) -> str:
    """Adds `mmdet_config.py`, and `mmdet.pth` for a ResNet; returns the lines that load them.

    Raises `UsageError` for a backbone that no pyramid can be built on.
    """
    backbone = load_backbone(folder)
    if _maps.is_usual_resnet(backbone):
        content = io.BytesIO()
        torch.save(backbone.backbone.weights(), content)
        write_durably(folder / WEIGHTS, content.getvalue())
    write_durably(
        folder / CONFIG, (_resnet if _maps.is_usual_resnet(backbone) else _registered)(folder, backbone).encode()
    )
    return f"""from mmengine.config import Config
cfg = Config.fromfile("configs/{BASE}")  # or another with a ResNet and an FPN
cfg.merge_from_dict(Config.fromfile("{folder / CONFIG}").to_dict())
# then Runner.from_cfg(cfg).train(): weights are loaded there, by init_weights"""


def _input(backbone: MapBackbone) -> str:
    """MMDetection reads images as BGR, 0..255."""
    mean, std = ([round(255 * v, 6) for v in values] for values in (backbone.input.mean, backbone.input.std))
    return f"    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True),"


def _resnet(folder: Path, backbone: MapBackbone) -> str:
    return f"""# To be merged over a config with a ResNet and an FPN.
model = dict(
{_input(backbone)}
    backbone=dict(
        depth={_maps.RESNET_DEPTHS[backbone.backbone.name]},
        style="pytorch",
        # Stock configs have 1 and True: the first layers, and BatchNorm's statistics, stay as pretraining left them.
        frozen_stages=-1,
        norm_eval=False,
        norm_cfg=dict(type="BN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint={json.dumps(str(folder / WEIGHTS))}),
    ),
    neck=dict(in_channels={list(backbone.channels[1:])}),
)
"""


def _registered(folder: Path, backbone: MapBackbone) -> str:
    head = f"""# To be merged over a config with a backbone and an FPN.
custom_imports = dict(imports=["ssl_pretrain.detectors.mmdet"], allow_failed_imports=False)
model = dict(
{_input(backbone)}
    backbone=dict(_delete_=True, type="SSLBackbone", path={json.dumps(str(folder))}),
"""
    if not _maps.is_plain(backbone):
        channels = [backbone.channels[i] for i in _maps.detector_levels(backbone)]
        return f"{head}    neck=dict(in_channels={channels}),\n)\n"
    width, stride = backbone.channels[-1], _maps.even_stride(backbone)
    return f"""{head}    # For Faster R-CNN and its kin; RetinaNet, FCOS and others from stride 8 need levels="P3-P7".
    neck=dict(_delete_=True, type="SSLPyramid", in_channels={width}, stride={stride}, levels="P2-P6"),
)
"""


def arrive(folder: Path) -> Arrived:
    """The maps in MMDetection's RetinaNet after `init_weights`, of an image it normalised; then it is trained.

    Where MMDetection is not installed: those of the backbone that MMEngine's registry builds, without a detector.
    Raises `UsageError` where MMEngine is not installed either.
    """
    try:
        import mmengine
    except ModuleNotFoundError as error:
        raise UsageError("mmengine is not installed: pip install mmengine, or openmim for all of mmdet") from error
    from mmengine.config import Config

    artefact = load_backbone(folder)
    probed = probe(folder, artefact.input)
    snippet = Config.fromfile(str(folder / CONFIG))
    try:
        import mmdet
    except ModuleNotFoundError as error:
        if error.name != "mmdet":
            raise UsageError(f"mmdet is installed but {error.name} is not, which it needs") from error
        return _without_mmdet(folder, artefact, probed, snippet, f"mmengine {mmengine.__version__}")
    configs = Path(mmdet.__file__).parent / ".mim" / "configs"
    detector = _detector(configs / VERIFIED, snippet, loaded=True)
    maps = _named_maps(detector, artefact, probed)
    fresh = _named_maps(_detector(configs / VERIFIED, snippet, loaded=False), artefact, probed)
    initialised, parameters, random = parts(detector, [detector.backbone])
    return Arrived(
        consumer=f"mmdet {mmdet.__version__}, {type(detector).__name__}",
        route=f"{CONFIG} over {VERIFIED}, after init_weights, before training",
        maps=maps,
        fresh=fresh,
        initialised=initialised,
        parameters=parameters,
        random=random,
        trained=_trained(detector, probed),
    )


def _detector(base: Path, snippet: Any, loaded: bool) -> Any:
    """By the lines of `write`, as MMEngine's runner builds it; without `loaded`, with random weights."""
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.registry import MODELS

    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(str(base))
    cfg.merge_from_dict(snippet.to_dict())
    if cfg.model.neck.type == "SSLPyramid":
        cfg.model.neck.levels = "P3-P7"
    if not loaded and cfg.model.backbone.type == "SSLBackbone":
        cfg.model.backbone.pretrained = False
    elif not loaded:
        cfg.model.backbone.init_cfg = None
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    return detector


def _named_maps(detector: Any, artefact: MapBackbone, probed: Probe) -> dict[str, Tensor]:
    height, width = probed.rgb_BCHW.shape[-2:]
    bgr_CHW = 255 * probed.rgb_BCHW[0].flip(0)
    detector.eval()
    with torch.inference_mode():
        fed_BCHW = detector.data_preprocessor({"inputs": [bgr_CHW]})["inputs"][..., :height, :width]
        if _maps.is_plain(artefact):
            maps = detector.backbone.body(fed_BCHW)
            return {f"map_{len(maps) - 1}": maps[-1]}
        maps = detector.backbone(fed_BCHW)
    return {f"map_{i}": map_BCHW for i, map_BCHW in zip(_maps.detector_levels(artefact), maps, strict=True)}


def _trained(detector: Any, probed: Probe) -> str:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    side = probed.rgb_BCHW.shape[-1]
    detector.train()

    def loss() -> Tensor:
        sample = DetDataSample(metainfo={"img_shape": (side, side), "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=BOXES * side, labels=torch.zeros(2, dtype=torch.long))
        data = {"inputs": [255 * probed.rgb_BCHW[0].flip(0)], "data_samples": [sample]}
        found: Tensor = detector.parse_losses(detector(**detector.data_preprocessor(data, True), mode="loss"))[0]
        return found

    return trained(detector, loss, rate=1e-2)


def _without_mmdet(folder: Path, artefact: MapBackbone, probed: Probe, snippet: Any, version: str) -> Arrived:
    """The registered backbone between MMEngine's own image preprocessing and its own `init_weights`."""
    from mmengine.model import BaseModule, ImgDataPreprocessor
    from mmengine.registry import MODELS

    named("detectors", "mmdet")  # registers the backbone

    class Detector(BaseModule):  # type: ignore[misc]  # mmengine has no types
        """As MMDetection's: a module of MMEngine that holds a backbone, and is drawn anew when training begins."""

        def __init__(self, pretrained: bool) -> None:
            super().__init__()
            self.data_preprocessor = ImgDataPreprocessor(**snippet.model.data_preprocessor, pad_size_divisor=32)
            self.backbone = MODELS.build({"type": "SSLBackbone", "path": str(folder), "pretrained": pretrained})

    built, control = Detector(True), Detector(False)
    built.init_weights()
    control.init_weights()
    notes = ["mmdet is not installed: no detector was built or trained"]
    if _maps.is_usual_resnet(artefact):
        notes.append(_checkpoint(folder, artefact, probed))
    initialised, parameters, random = parts(built, [built.backbone])
    return Arrived(
        consumer=f"{version}, SSLBackbone",
        route=f'MODELS.build(dict(type="SSLBackbone", path="{folder}")), after init_weights',
        maps=_named_maps(built, artefact, probed),
        fresh=_named_maps(control, artefact, probed),
        initialised=initialised,
        parameters=parameters,
        random=random,
        notes=tuple(notes),
    )


def _checkpoint(folder: Path, artefact: MapBackbone, probed: Probe) -> str:
    """`mmdet.pth` read by MMEngine into torchvision's ResNet, whose names MMDetection's has too; in words.

    Raises `DataError` where it gives other maps.
    """
    from mmengine.runner import load_checkpoint

    network = torchvision.models.get_model(artefact.backbone.name, weights=None)
    network.fc = torch.nn.Identity()
    load_checkpoint(network, str(folder / WEIGHTS), map_location="cpu", strict=True, logger="silent")
    kept: list[Tensor] = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda module, inputs, map_BCHW: kept.append(map_BCHW))
    with torch.inference_mode():
        network.eval()(probed.x_BCHW)
    expected = list(probed.maps.values())[-len(kept) :]
    far = max(apart(found, own) for found, own in zip(kept, expected, strict=True))
    if far > TOLERANCE:
        raise DataError(f"{folder / WEIGHTS} gives other maps ({far:.1e} apart): export again")
    return f"{WEIGHTS} by load_checkpoint(strict=True) into torchvision's {artefact.backbone.name}: {far:.1e} apart"
