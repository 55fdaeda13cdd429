"""For ONNX: `backbone.onnx`, with the maps as outputs, for any batch, height and width.

torch's exporter by `torch.export` makes it: the older one by TorchScript has no antialiased resampling, by which a ViT
of timm adapts its position embedding to another image size.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.artefact import TOLERANCE, MapBackbone, apart, load_backbone
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import Arrived, probe
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import EXTRAS

FILE = "backbone.onnx"
OPSET = 18
"""The first in which resampling can be antialiased."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that one file can hold."""
REDRAWN = 16
"""Tensors with fewer values are scales and sizes, and stay as they are in the control."""


def _needs(*packages: str) -> None:
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise UsageError(f"{package} is not installed: pip install {EXTRAS['onnx']}") from error


class _Maps(nn.Module):
    def __init__(self, backbone: MapBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images))


def write(folder: Path) -> str:
    """Adds `backbone.onnx` in FP32; returns the lines that run it.

    Raises `UsageError` where onnx and onnxscript are not installed, or torch cannot export the network for every size.
    """
    _needs("onnx", "onnxscript")  # torch's exporter would ask for the latter in other words
    import onnx

    backbone = load_backbone(folder)
    if 4 * sum(t.numel() for t in backbone.state_dict().values()) > LARGEST:
        raise UsageError(f"{backbone.backbone.name} is larger than the 2 GB that one ONNX file can hold")
    model = _exported(backbone)
    _silence(model.graph)
    onnx.helper.set_model_props(model, _contract(backbone))
    for output, stride in zip(model.graph.output, backbone.strides, strict=True):
        batch, _, height, width = output.type.tensor_type.shape.dim
        batch.dim_param, height.dim_param, width.dim_param = "batch", f"height / {stride}", f"width / {stride}"
    write_durably(folder / FILE, model.SerializeToString())
    names = ", ".join(f"map_{i}" for i in range(len(backbone.strides)))
    return "\n".join((
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{folder / FILE}")',
        f'{names} = session.run(None, {{"images": images}})',
        f"# images: float32 (B, 3, H, W), RGB in 0..1 less {list(backbone.input.mean)}, divided by "
        f"{list(backbone.input.std)}; H and W any multiple of {max(backbone.strides)}",
    ))  # fmt: skip


def _exported(backbone: MapBackbone) -> Any:
    """The graph, traced at a height and width that differ.

    At its own square size a ViT leaves its position embedding as it is, and the graph would not have the resampling.
    """
    stride, batch = max(backbone.strides), torch.export.Dim("batch")
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    example_BCHW = torch.zeros(2, 3, 4 * stride, 6 * stride)
    try:
        program = torch.onnx.export(
            _Maps(backbone).eval(),
            (example_BCHW,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[f"map_{i}" for i in range(len(backbone.strides))],
            dynamic_shapes=({0: batch, 2: height, 3: width},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"torch {torch.__version__} cannot export {backbone.backbone.name} to ONNX for every image size: {reason}"
        ) from error
    assert program is not None
    return program.model_proto


def _silence(graph: Any) -> None:
    """Takes out what torch notes for its own developers: stack traces, with the folders of this machine in them."""
    for said in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del said.metadata_props[:]
        said.ClearField("doc_string")
    del graph.value_info[:]


def _contract(backbone: MapBackbone) -> dict[str, str]:
    """What the file's metadata says: how it is fed, what it gives, and of which weights."""
    card = backbone.card
    return {
        "architecture": backbone.backbone.name,
        "input": json.dumps(card["input"]),
        "levels": json.dumps(card["levels"]),
        "weights_sha256": card["weights_sha256"],
    }


def arrive(folder: Path) -> Arrived:
    """The maps that onnxruntime gives of the probe, and of two images of another height and width.

    The control is the same graph with the values of every weight in another order.
    """
    _needs("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    backbone = load_backbone(folder)
    model = onnx.load(folder / FILE)
    contract = {entry.key: entry.value for entry in model.metadata_props}
    if contract != _contract(backbone):
        raise DataError(f"{folder / FILE} is not of this artefact: export it again")
    fed = json.loads(contract["input"])
    mean_C11, std_C11 = (torch.tensor(fed[key]).view(3, 1, 1) for key in ("mean", "std"))
    x_BCHW = (probe(folder, backbone.input).rgb_BCHW - mean_C11) / std_C11
    stride = max(backbone.strides)
    size = (2, 3, x_BCHW.shape[-2] + stride, max(x_BCHW.shape[-1] // (2 * stride), 1) * stride)
    other_BCHW = torch.randn(size, generator=torch.Generator().manual_seed(1))
    content = model.SerializeToString()
    with torch.inference_mode():
        expected = backbone(other_BCHW)
    far = max(apart(found, own) for found, own in zip(_run(content, other_BCHW).values(), expected, strict=True))
    if far > TOLERANCE:
        raise DataError(f"{folder / FILE} gives other maps than torch at {size}: {far:.1e} apart")
    count = sum(parameter.numel() for parameter in backbone.parameters())
    return Arrived(
        consumer=f"onnxruntime {onnxruntime.__version__}, InferenceSession on CPU, opset {OPSET}",
        route=f'onnxruntime.InferenceSession("{folder / FILE}")',
        maps=_run(content, x_BCHW),
        fresh=_run(_reordered(model), x_BCHW),
        initialised=count,
        parameters=count,
        notes=(f"at another batch and size, {size}, it is {far:.1e} apart from torch",),
    )


def _run(content: bytes, x_BCHW: Tensor) -> dict[str, Tensor]:
    """Outputs of a model by their names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": x_BCHW.numpy()})
    return {name: torch.from_numpy(map_BCHW) for name, map_BCHW in zip(names, found, strict=True)}


def _reordered(model: Any) -> bytes:
    """The same network with the values of each weight in a seeded other order: as good as random."""
    import onnx

    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    random = np.random.default_rng(0)
    for tensor in fresh.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= REDRAWN:
            moved = random.permutation(values.reshape(-1)).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, tensor.name))
    return bytes(fresh.SerializeToString())
