"""For Detectron2: a ResNet as a file of its own model zoo's kind, other backbones through its registry.

Detectron2 never refuses a file: what does not fit is a line in its log. So keys, strides and the input are written
out in a config, and `arrive` compares maps.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.artefact import MapBackbone, load_backbone
from ssl_pretrain.detectors import _maps
from ssl_pretrain.errors import UsageError
from ssl_pretrain.export import BOXES, Arrived, Probe, parts, probe, trained
from ssl_pretrain.files import write_durably

WEIGHTS, CONFIG = "detectron2.pkl", "detectron2.yaml"
BASE = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
ABSENT = (
    "detectron2 is not installed, and has no package to install: build github.com/facebookresearch/detectron2 and "
    "give that environment by --python"
)


def write(folder: Path) -> str:
    """Adds `detectron2.yaml`, and `detectron2.pkl` for a ResNet; returns the lines that load them.

    Raises `UsageError` for a backbone that no pyramid can be built on.
    """
    backbone = load_backbone(folder)
    if not _maps.is_usual_resnet(backbone):
        _ = _maps.even_stride(backbone) if _maps.is_plain(backbone) else _maps.detector_levels(backbone)
        write_durably(folder / CONFIG, _registered(folder, backbone).encode())
        return _lines(folder, "from ssl_pretrain.detectors.detectron2 import add_config\n", "add_config(cfg)\n")
    content = io.BytesIO()
    arrays = {name: tensor.numpy() for name, tensor in converted(backbone.backbone.weights()).items()}
    _Pickler(content, protocol=4).dump(
        # The heuristics match by the end of a name: keys have no prefix, and a model's differs from kind to kind.
        {"model": arrays, "__author__": "ssl_pretrain", "matching_heuristics": True}
    )
    write_durably(folder / WEIGHTS, content.getvalue())
    write_durably(folder / CONFIG, _resnet(folder, backbone).encode())
    return _lines(folder)


def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's state under Detectron2's names.

    Its frozen BatchNorm has no counters, and its BatchNorm does not miss them: they are left out.

    >>> list(converted({"conv1.weight": torch.ones(1), "layer1.0.downsample.1.running_var": torch.ones(1)}))
    ['stem.conv1.weight', 'res2.0.shortcut.norm.running_var']
    """
    return {_renamed(name): tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def _renamed(name: str) -> str:
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    stage = re.match(r"layer(\d)\.", name)
    return f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"


class _Pickler(pickle.Pickler):
    """Writes arrays so that any numpy reads them: numpy 2 names modules that numpy 1 has not."""

    def reducer_override(self, obj: object) -> Any:
        """An array from its shape, type and bytes."""
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def _lines(folder: Path, imports: str = "", node: str = "") -> str:
    return f"""from detectron2 import model_zoo
from detectron2.config import get_cfg
{imports}cfg = get_cfg()
{node}cfg.merge_from_file(model_zoo.get_config_file("{BASE}"))
cfg.merge_from_file("{folder / CONFIG}")
# then trainer = DefaultTrainer(cfg) and trainer.resume_or_load(resume=False), which reads MODEL.WEIGHTS"""


def _input(backbone: MapBackbone) -> str:
    """Detectron2 feeds 0..255; by default BGR, and of another mean and std."""
    mean, std = ([round(255 * v, 6) for v in values] for values in (backbone.input.mean, backbone.input.std))
    return f"""  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
INPUT:
  FORMAT: RGB
"""


def _resnet(folder: Path, backbone: MapBackbone) -> str:
    depth = _maps.RESNET_DEPTHS[backbone.backbone.name]
    width = 64 if depth < 50 else 256
    return f"""VERSION: 2
MODEL:
  WEIGHTS: {json.dumps(str(folder / WEIGHTS))}
  BACKBONE:
    # The default 2 would freeze the stem and the first stage as pretraining left them.
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {width}
    # The default True is another network, which takes these weights without a word.
    STRIDE_IN_1X1: False
    # SyncBN on several GPUs. The default FrozenBN would keep the statistics of pretraining for ever.
    NORM: BN
{_input(backbone)}"""


def _registered(folder: Path, backbone: MapBackbone) -> str:
    return f"""VERSION: 2
MODEL:
  # The artefact has the weights; a base config names those of another network here.
  WEIGHTS: ""
  BACKBONE:
    # ssl_pretrain_retinanet_fpn for RetinaNet and FCOS
    NAME: ssl_pretrain_fpn
  SSL_PRETRAIN:
    ARTEFACT: {json.dumps(str(folder))}
{_input(backbone)}"""


def arrive(folder: Path) -> Arrived:
    """The maps in a Faster R-CNN of Detectron2, of an image that it normalised itself; then it is trained.

    Raises `UsageError` where Detectron2 is not installed.
    """
    try:
        import detectron2
    except ModuleNotFoundError as error:
        raise UsageError(ABSENT) from error
    artefact = load_backbone(folder)
    probed, native = probe(folder, artefact.input), _maps.is_usual_resnet(artefact)
    cfg = _config(folder, native)
    detector, image_CHW = _detector(cfg, native, loaded=True), _read(cfg, probed)
    maps = _named_maps(detector, artefact, image_CHW)
    fresh = _named_maps(_detector(cfg, native, loaded=False), artefact, image_CHW)
    notes = () if native else ("Detectron2's FREEZE_AT and RESNETS settings mean nothing for this backbone",)
    initialised, parameters, random = parts(detector, [detector.backbone.bottom_up])
    return Arrived(
        consumer=f"detectron2 {detectron2.__version__}, {type(detector).__name__}",
        route=f"{CONFIG} over {BASE}, DetectionCheckpointer.load, before training",
        maps=maps,
        fresh=fresh,
        initialised=initialised,
        parameters=parameters,
        random=random,
        trained=_trained(detector, image_CHW),
        notes=notes,
    )


def _config(folder: Path, native: bool) -> Any:
    """By the lines of `write`, on the CPU."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    cfg = get_cfg()
    if not native:
        from ssl_pretrain.detectors.detectron2 import add_config

        add_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(BASE))
    cfg.merge_from_file(str(folder / CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _detector(cfg: Any, native: bool, loaded: bool) -> Any:
    """As Detectron2's trainer makes it; without `loaded`, with random weights."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    if not native:
        cfg.MODEL.SSL_PRETRAIN.PRETRAINED = loaded
    detector = build_model(cfg)
    if loaded:
        DetectionCheckpointer(detector).load(cfg.MODEL.WEIGHTS)
    return detector


def _read(cfg: Any, probed: Probe) -> Tensor:
    """The probe's image (3, H, W) as Detectron2's data loader gives it by its config."""
    image_CHW = 255 * probed.rgb_BCHW[0]
    return image_CHW.flip(0) if cfg.INPUT.FORMAT == "BGR" else image_CHW


def _named_maps(detector: Any, artefact: MapBackbone, image_CHW: Tensor) -> dict[str, Tensor]:
    """By the indices in the artefact; of a plain ViT, Detectron2 takes the last map only."""
    height, width = image_CHW.shape[-2:]
    detector.eval()
    with torch.inference_mode():
        fed_BCHW = detector.preprocess_image([{"image": image_CHW}]).tensor[..., :height, :width]
        if _maps.is_plain(artefact):
            maps = detector.backbone.bottom_up.body(fed_BCHW)
            return {f"map_{len(maps) - 1}": maps[-1]}
        named = detector.backbone.bottom_up(fed_BCHW)
    strides = list(artefact.strides)
    return {f"map_{strides.index(2 ** int(name[-1]))}": map_BCHW for name, map_BCHW in named.items()}


def _trained(detector: Any, image_CHW: Tensor) -> str:
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    side = image_CHW.shape[-1]
    truth = Instances((side, side), gt_boxes=Boxes(BOXES * side), gt_classes=torch.zeros(2, dtype=torch.long))
    detector.train()
    with EventStorage():
        return trained(detector, lambda: sum(detector([{"image": image_CHW, "instances": truth}]).values()))
