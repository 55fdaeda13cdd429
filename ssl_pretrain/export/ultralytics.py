"""For Ultralytics: `ultralytics.pt`, a whole detector with a new neck and head that `YOLO(...).train()` starts from.

A whole network, because `.train()` builds its own and takes over only what came with such a file; in FP32, because
Ultralytics' own `save` halves the precision. The file is a pickle of Ultralytics' classes (AGPL-3.0).

Besides Ultralytics' own backbones it takes ResNets, which Ultralytics builds by its layers `TorchVision` and `Index`.
Two things differ there, and are made up for in the weights. Ultralytics feeds RGB in 0..1 as it is. And it sets eps of
every BatchNorm to 1e-3 where a ResNet has 1e-5: the weight is scaled by sqrt((var + 1e-3) / (var + 1e-5)), exact in
evaluation for any running variance, and in training as far as a batch has that variance.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ssl_pretrain.artefact import TOLERANCE, apart, load_backbone
from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.backbones.ultralytics import Ultralytics, detector
from ssl_pretrain.detectors.ultralytics import bare, levels, maps
from ssl_pretrain.errors import NotProven
from ssl_pretrain.export import Arrived, parts, probe
from ssl_pretrain.export._folding import fold
from ssl_pretrain.files import write_durably

# isort: split
import ultralytics  # after our own backbones, which import it as if offline
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import SETTINGS

FILE = "ultralytics.pt"
CLASSES = 80
"""Of the head in the file; training replaces it by one for the classes of the data."""
RESNET_LAYERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
"""Where Ultralytics' `TorchVision` layer has the parts of a ResNet, the last two of which it leaves out."""
FED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Mean and std of Ultralytics: none."""
IMAGES, BATCH, SIDE_PX = 4, 2, 64
TRACKERS = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


def write(folder: Path) -> str:
    """Adds `ultralytics.pt`; returns the lines that train from it.

    Raises `UsageError` for a backbone that Ultralytics has no place for, and for a ResNet that was fed a mean.
    """
    buffer = io.BytesIO()
    model = _loaded(load_backbone(folder).backbone)
    # What Ultralytics' own files have; its restricted loading (ULTRALYTICS_SAFE_LOAD) accepts these types too.
    torch.save({"epoch": -1, "model": model, "train_args": {}, "version": ultralytics.__version__}, buffer)
    write_durably(folder / FILE, buffer.getvalue())
    return f"""from ultralytics import YOLO  # AGPL-3.0
model = YOLO("{folder / FILE}")
model.train(data="data.yaml")  # never model.model.load_state_dict(...): training builds the network anew"""


def arrive(folder: Path) -> Arrived:
    """The maps in Ultralytics' trainer when it starts to train from the file; then it trains two steps.

    Trained network and moving average must give the same. Nothing is written outside a temporary folder.
    """
    backbone = load_backbone(folder).backbone
    taken, rgb_BCHW = levels(backbone), probe(folder, backbone.input).rgb_BCHW
    own = isinstance(backbone, Ultralytics)
    with tempfile.TemporaryDirectory() as name, _untracked():
        watch = _Watch(taken, rgb_BCHW)
        model = YOLO(str(folder / FILE))
        model.add_callback("on_train_start", watch.start)
        model.add_callback("on_train_batch_end", watch.step)
        model.train(
            data=str(_data(Path(name))), epochs=1, imgsz=SIDE_PX, batch=BATCH, nbs=BATCH, device="cpu", workers=0,
            optimizer="SGD", lr0=0.001, warmup_epochs=0, amp=False, mosaic=0.0, scale=0.0, translate=0.0,
            val=False, save=False, plots=False, verbose=False, project=name, name="run",
        )  # fmt: skip
        fresh = maps(YOLO(_definition(backbone, Path(name))).model, taken, rgb_BCHW)
    if not watch.losses or not all(math.isfinite(loss) for loss in watch.losses):
        raise NotProven(f"Ultralytics' losses in training are {watch.losses}: not finite numbers")
    notes = [f"of the maps, Ultralytics takes {', '.join(taken)}"] if len(taken) < len(backbone.strides) else []
    if not own:
        notes.append("BatchNorm's eps is 1e-3 in Ultralytics: the weights are scaled for that")
    return Arrived(
        consumer=f"ultralytics {ultralytics.__version__}, {type(bare(model.model)).__name__}",
        route=f'YOLO("{FILE}").train(), trained network and moving average at on_train_start',
        maps=watch.maps,
        fresh=fresh,
        initialised=watch.parts[0],
        parameters=watch.parts[1],
        random=watch.parts[2],
        trained=f"{len(watch.losses)} steps, loss {watch.losses[0]:.2f} -> {watch.losses[-1]:.2f}",
        notes=tuple(notes),
    )


class _Watch:
    """Reads a training of Ultralytics from inside."""

    def __init__(self, taken: dict[str, int], rgb_BCHW: Tensor) -> None:
        self.taken, self.rgb_BCHW = taken, rgb_BCHW
        self.maps: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.parts: tuple[int, int, tuple[str, ...]] = (0, 0, ())

    def start(self, trainer: Any) -> None:
        """At `on_train_start`: the maps, in both networks."""
        self.maps = maps(trainer.model, self.taken, self.rgb_BCHW)
        average = maps(trainer.ema.ema, self.taken, self.rgb_BCHW)
        for name, map_BCHW in self.maps.items():
            far = apart(average[name], map_BCHW)
            if far > TOLERANCE:
                raise NotProven(f"the trainer's moving average has another {name} than its network: {far:.1e} apart")
        network = bare(trainer.model)
        resnet = type(network.model[0]).__name__ == "TorchVision"
        self.parts = parts(network, network.model[: 1 if resnet else max(self.taken.values()) + 1])

    def step(self, trainer: Any) -> None:
        """At `on_train_batch_end`: the loss."""
        self.losses.append(float(trainer.loss.detach()))


def _loaded(backbone: Backbone) -> Any:
    """A `DetectionModel` that holds the backbone; neck and head are drawn from seed 0."""
    levels(backbone)  # refuses what has no place
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(backbone, Ultralytics):
            model = detector(backbone.name.partition("/")[2], CLASSES)
        else:
            model = DetectionModel(_around_resnet(backbone.name), verbose=False)
    weights = backbone.weights() if isinstance(backbone, Ultralytics) else _resnet_weights(backbone, model)
    there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    odd = [name for name, tensor in weights.items() if there.get(name) != tensor.shape]
    if odd:
        raise NotProven(f"Ultralytics {ultralytics.__version__} builds {backbone.name} without {odd[0]}")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _resnet_weights(backbone: Backbone, model: nn.Module) -> dict[str, Tensor]:
    """Under the keys of a `DetectionModel` that begins with Ultralytics' `TorchVision` layer; input and eps adapted.

    Raises `UsageError` where the ResNet was fed a mean: its first convolution pads with zeros.
    """

    def renamed(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"model.0.m.{RESNET_LAYERS[part]}" + (f".{rest}" if rest else "")

    weights = {renamed(name): tensor for name, tensor in backbone.weights().items()}
    stem, fed = renamed("conv1.weight"), InputSpec(*FED, backbone.input.size_px)
    weights[stem], _ = fold(weights[stem], None, True, of=backbone.input, to=fed)
    theirs = dict(model.named_modules())
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            key = renamed(name.removeprefix("network."))
            variance = weights[f"{key}.running_var"].double()
            scale = ((variance + theirs[key].eps) / (variance + module.eps)).sqrt()
            weights[f"{key}.weight"] = (weights[f"{key}.weight"].double() * scale).float()
    return weights


def _around_resnet(name: str) -> dict[str, Any]:
    """A detector of Ultralytics' layers: a ResNet, and a path aggregation network (Liu et al., 2018) on C3 to C5."""
    c3, c4, c5 = (128, 256, 512) if name in ("resnet18", "resnet34") else (512, 1024, 2048)
    up: list[Any] = [-1, 1, "nn.Upsample", [None, 2, "nearest"]]
    return {
        "nc": CLASSES,
        "backbone": [
            [-1, 1, "TorchVision", [c5, name, None, True, 2, True]],  # 0: its input, and what its 8 parts give
            [0, 1, "Index", [c3, 6]],
            [0, 1, "Index", [c4, 7]],
            [0, 1, "Index", [c5, 8]],
        ],
        "head": [
            [-1, 1, "SPPF", [512, 5]],  # 4
            up,
            [[-1, 2], 1, "Concat", [1]],
            [-1, 1, "C2f", [256]],  # 7
            up,
            [[-1, 1], 1, "Concat", [1]],
            [-1, 1, "C2f", [128]],  # 10: stride 8
            [-1, 1, "Conv", [128, 3, 2]],
            [[-1, 7], 1, "Concat", [1]],
            [-1, 1, "C2f", [256]],  # 13: stride 16
            [-1, 1, "Conv", [256, 3, 2]],
            [[-1, 4], 1, "Concat", [1]],
            [-1, 1, "C2f", [512]],  # 16: stride 32
            [[10, 13, 16], 1, "Detect", ["nc"]],
        ],
    }


def _definition(backbone: Backbone, folder: Path) -> str:
    """What `YOLO` builds the same detector from, with nothing loaded."""
    if isinstance(backbone, Ultralytics):
        return f"{backbone.name.partition('/')[2]}.yaml"
    path = folder / f"{backbone.name}.yaml"
    path.write_text(yaml.safe_dump(_around_resnet(backbone.name)), encoding="utf-8")
    return str(path)


def _data(folder: Path) -> Path:
    """A few images with a bright square to find, as Ultralytics wants them; its YAML."""
    random = torch.Generator().manual_seed(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(IMAGES):
        image_CHW = 0.4 * torch.rand((3, SIDE_PX, SIDE_PX), generator=random)
        image_CHW[:, 16:48, 8 + 4 * i : 40 + 4 * i] += 0.5
        to_pil_image(image_CHW).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"0 {(24 + 4 * i) / SIDE_PX} 0.5 0.5 0.5\n")
    described = {"path": str(folder), "train": "images", "val": "images", "names": {0: "square"}}
    (folder / "data.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
    return folder / "data.yaml"


@contextlib.contextmanager
def _untracked() -> Iterator[None]:
    """Without the experiment trackers that are on in Ultralytics' settings; the user's file is not touched."""
    before = {name: SETTINGS[name] for name in TRACKERS if name in SETTINGS}
    dict.update(SETTINGS, dict.fromkeys(before, False))  # its own update writes the file
    try:
        yield
    finally:
        dict.update(SETTINGS, before)
