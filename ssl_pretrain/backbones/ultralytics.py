"""The Ultralytics family: what comes before the neck of a YOLO detector, built by Ultralytics' own code.

`create("ultralytics/yolo12n")`; Ultralytics is AGPL-3.0. It is fed RGB in 0..1, as Ultralytics' trainer feeds it.

YOLOv12 exists twice, as Ultralytics' yolo12 and as the authors' yolov12 (sunsmarterjie/yolov12), in packages that are
both called ultralytics. These are different networks, and Ultralytics loads the part of one that fits the other without
a word. So an artefact says which of them it is of, and the other refuses it.

Importing Ultralytics writes a `settings.json` into the user's configuration (the environment variable `YOLO_CONFIG_DIR`
says where) when there is none, sets print options of torch and NumPy, and puts one that tries again in the place of
`torch.save`. It would also ask two name servers whether there is a network, to report usage: here it is imported as if
offline, and in such a process does neither. `detectors/ultralytics.py` imports it as its user would.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No word to the network while Ultralytics is imported; afterwards the environment is as it was.

    Without this it would also set OMP_NUM_THREADS to 1, which every process that is started later inherits.
    """
    before = {name: os.environ.get(name) for name in ("YOLO_OFFLINE", "OMP_NUM_THREADS")}
    if "ultralytics" not in sys.modules:
        os.environ["YOLO_OFFLINE"] = "true"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


with _offline():
    import ultralytics
    from ultralytics.nn.modules import block
    from ultralytics.nn.tasks import DetectionModel

INPUT_PX = 640
"""What Ultralytics trains its detectors at."""
FINEST_STRIDE = 8
"""P3, the finest map that these detectors take."""
OURS, AUTHORS = "ultralytics", "sunsmarterjie/yolov12"
INSTALL = {
    OURS: "pip install -U ultralytics",
    AUTHORS: "pip install git+https://github.com/sunsmarterjie/yolov12, which replaces the package ultralytics",
}


def create(
    model: str,
    img_size: int | None = None,
    patch_size: int | None = None,
    pool: str | None = None,
    drop_path: float | None = None,
) -> Backbone:
    """The backbone of a detector of Ultralytics (`yolo12n`, `yolo11s`, `yolo26n`, `yolov8m`...), with random weights.

    img_size    side of the input in pixels, a multiple of the coarsest stride (32); 640 unless given

    Raises `UsageError` for an unknown name, and for options that such a network does not have.
    """
    given = {"patch_size": patch_size, "pool": pool, "drop_path": drop_path}
    odd = [f"backbone.{name}" for name, value in given.items() if value is not None]
    if odd:
        raise UsageError(f"ultralytics/{model} has no {' and no '.join(odd)}: leave it out")
    return Ultralytics(model, InputSpec((0.0,) * 3, (1.0,) * 3, img_size or INPUT_PX))


def maskable(model: str) -> bool:
    """Never: none of these is a plain ViT; `UsageError` for a name that the installed Ultralytics does not know."""
    _definition(model)
    return False


def from_config(config: dict[str, Any]) -> Backbone:
    """The architecture that `Backbone.config` described, with random weights.

    Raises `UsageError` where the installed package is the other implementation of YOLOv12, or does not know the model.
    """
    made = config["ultralytics"]
    if made["implementation"] not in (None, installed()):
        raise UsageError(
            f"{config['architecture']} is of {made['implementation']} ({made['package']} {made['version']}), but "
            f"{installed()} is installed ({ultralytics.__version__}), whose YOLOv12 is another network: "
            f"{INSTALL[made['implementation']]}"
        )
    card = config["pretrained_cfg"]
    spec = InputSpec(tuple(card["mean"]), tuple(card["std"]), int(card["input_size"][-1]))
    return Ultralytics(config["architecture"].partition("/")[2], spec)


def detector(model: str, nc: int) -> Any:
    """The whole detector for `nc` classes, with random weights: Ultralytics' `DetectionModel`, of type `Any`."""
    return DetectionModel({**_definition(model)[0], "nc": nc}, verbose=False)


def installed() -> str:
    """Which implementation the installed package is: `ultralytics`, or `sunsmarterjie/yolov12`."""
    area_attention = vars(block).get("AAttn")  # Ultralytics has had it since 8.3.78
    return OURS if area_attention is None else implementation(area_attention(64, 2, 1)) or OURS


def implementation(network: nn.Module) -> str | None:
    """Which implementation a network is of, by its area attention: one projection to q, k and v, or one to q and k.

    None for a network without any: in these the two do not differ.
    """
    attentions = [module for module in network.modules() if type(module).__name__ == "AAttn"]
    if not attentions:
        return None
    return AUTHORS if "qk" in dict(attentions[0].named_children()) else OURS


class Ultralytics(Backbone):
    """The first layers of a `DetectionModel`; their last outputs at strides 8, 16 and 32 (P3 to P5) are its maps.

    Images must have sides that are multiples of the coarsest stride.
    """

    def __init__(self, model: str, spec: InputSpec) -> None:
        super().__init__()
        definition, self.yaml_sha256 = _definition(model)
        whole = DetectionModel(definition, verbose=False)
        # As in a DetectionModel the layers are called `model`: the keys are then those that `YOLO(...).model` has.
        self.network = nn.ModuleDict({"model": whole.model[: len(definition["backbone"])]})
        self.name, self.input, self.family = f"ultralytics/{model}", spec, "convnet"
        self._count = len(definition["backbone"])
        self._kept = {i for i in whole.save if i < self._count}
        found = self._levels(model)
        self.layer_indices = tuple(index for index, _ in found.values())
        """Of the layer that gives each map, in `DetectionModel.model` too."""
        self.strides = tuple(found)
        self.channels = tuple(channels for _, channels in found.values())
        self.dim = self.channels[-1]
        if spec.size_px % self.strides[-1]:
            raise UsageError(
                f"{self.name} takes images whose sides are multiples of {self.strides[-1]} px, not {spec.size_px}"
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The mean over all places of the last map (B, D)."""
        return self.maps(x_BCHW)[-1].mean((2, 3))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """P3 to P5. Raises `UsageError` for images whose sides are no multiples of the coarsest stride."""
        height, width = x_BCHW.shape[-2:]
        if height % self.strides[-1] or width % self.strides[-1]:
            raise UsageError(
                f"{self.name} takes images whose sides are multiples of {self.strides[-1]} px, not {width} x {height}"
            )
        outputs = self._outputs(x_BCHW, {*self._kept, *self.layer_indices})
        return [outputs[index] for index in self.layer_indices]

    def config(self) -> dict[str, Any]:
        """The model's name and input, and by whose code it is built."""
        return {
            "architecture": self.name,
            "num_classes": 0,
            "num_features": self.dim,
            "pretrained_cfg": {
                "mean": list(self.input.mean),
                "std": list(self.input.std),
                "input_size": [3, self.input.size_px, self.input.size_px],
                "num_classes": 0,
            },
            "ultralytics": {
                "package": "ultralytics",
                "version": ultralytics.__version__,
                "implementation": implementation(self.network),
                "yaml_sha256": self.yaml_sha256,
                "layers": self._count,
            },
        }

    def layers(self) -> dict[str, int]:
        """By the index in Ultralytics' list of layers."""
        return {name: int(name.split(".")[2]) for name, _ in self.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        """Under Ultralytics' own keys (`model.0.conv.weight`), which fit `YOLO(...).model`."""
        return self.network.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Strictly, under Ultralytics' own keys."""
        self.network.load_state_dict(weights)

    def _outputs(self, x_BCHW: Tensor, wanted: set[int]) -> dict[int, Any]:
        """What these layers give, by index; each layer says in `f` which layers before it feeds from (-1: the last)."""
        outputs: dict[int, Any] = {}
        layers: Any = self.network["model"]
        last: Any = x_BCHW
        for i, layer in enumerate(layers):
            if layer.f != -1:
                sources = layer.f if isinstance(layer.f, list) else [layer.f]
                fed = [last if j == -1 else outputs[j] for j in sources]
                last = fed if isinstance(layer.f, list) else fed[0]
            last = layer(last)
            if i in wanted:
                outputs[i] = last
        return outputs

    def _levels(self, model: str) -> dict[int, tuple[int, int]]:
        """By stride, fine to coarse: the last layer with a map of that stride, and its channels; found by a dry run."""
        side, training = 256, self.training
        with torch.no_grad():
            outputs = self.eval()._outputs(torch.zeros(1, 3, side, side), set(range(self._count)))
        self.train(training)
        maps = {i: out for i, out in outputs.items() if isinstance(out, Tensor) and out.ndim == 4}
        if any(side % out.shape[-1] for out in maps.values()):
            raise UsageError(f"ultralytics/{model} has maps whose stride is no whole number: choose another model")
        last = {side // out.shape[-1]: (i, out.shape[1]) for i, out in maps.items()}
        return {stride: last[stride] for stride in sorted(last) if stride >= FINEST_STRIDE}


def _definition(model: str) -> tuple[dict[str, Any], str]:
    """What the installed Ultralytics' YAML says of a detector (a new copy), and the sha-256 of its text.

    Its own files alone are looked at: Ultralytics itself would also take one of that name from the working directory.
    """
    files = _files()
    scaled = re.fullmatch(r"(yolov?\d+)([a-z])(.*)", model)
    for stem, scale in [(model, ""), *([] if scaled is None else [(scaled[1] + scaled[3], scaled[2])])]:
        if stem in files:
            text = files[stem].read_text(encoding="utf-8")
            definition = yaml.safe_load(text)
            sizes = list(definition.get("scales", {}))
            scale = scale or (sizes[0] if len(sizes) == 1 else "")
            if _detects(definition) and (scale in sizes or not (scale or sizes)):
                definition |= {"scale": scale, "yaml_file": f"{model}.yaml"}
                return definition, hashlib.sha256(text.encode()).hexdigest()
    raise UsageError(f"Ultralytics {ultralytics.__version__} has no detector {model!r}{nearest(model, _names(files))}")


def _files() -> dict[str, Path]:
    return {path.stem: path for path in (Path(ultralytics.__file__).parent / "cfg" / "models").rglob("yolo*.yaml")}


def _detects(definition: dict[str, Any]) -> bool:
    return definition["head"][-1][2] in ("Detect", "v10Detect")


def _names(files: dict[str, Path]) -> list[str]:
    """The detectors that there are files for, each in all its sizes."""
    names = []
    for stem, path in files.items():
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
        sizes = list(definition.get("scales", {}))
        if _detects(definition):
            names += [re.sub(r"(\d+)", rf"\g<1>{size}", stem, count=1) for size in sizes] if sizes[1:] else [stem]
    return sorted(names)
