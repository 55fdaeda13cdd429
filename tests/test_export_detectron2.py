"""A ResNet in Detectron2's names is the same network; its config says what Detectron2 would otherwise assume.

Detectron2 has no package to install: its names and strides are pinned here as rules, read from its ResNet
(detectron2/modeling/backbone/resnet.py). Where it is installed, the last tests build it.
"""

from __future__ import annotations

import io
import logging
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import shaken
from torch import Tensor

from ssl_pretrain import artefact, backbones, load_backbone
from ssl_pretrain.detectors._maps import RESNET_DEPTHS
from ssl_pretrain.errors import UsageError
from ssl_pretrain.export import detectron2 as target
from ssl_pretrain.export import probe

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def convolutions(depth: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Names and shapes of Detectron2's ResNet."""
    yield "stem.conv1", (64, 3, 7, 7)
    before = 64
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        width = 2 ** (stage - 2) * (64 if depth < 50 else 256)
        for block in range(blocks):
            name = f"res{stage}.{block}"
            if before != width:
                yield f"{name}.shortcut", (width, before, 1, 1)
            if depth < 50:
                yield f"{name}.conv1", (width, before, 3, 3)
                yield f"{name}.conv2", (width, width, 3, 3)
            else:
                inner = width // 4
                yield f"{name}.conv1", (inner, before, 1, 1)
                yield f"{name}.conv2", (inner, inner, 3, 3)
                yield f"{name}.conv3", (width, inner, 1, 1)
            before = width


def theirs(x_BCHW: Tensor, weights: dict[str, Tensor], depth: int, stride_in_1x1: bool = False) -> list[Tensor]:
    """What Detectron2's ResNet computes with such weights: the maps of res2 to res5."""

    def conv(name: str, x_BCHW: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        x_BCHW = F.conv2d(x_BCHW, weight, stride=stride, padding=weight.shape[-1] // 2)
        scale, shift, mean, var = (weights[f"{name}.norm.{part}"] for part in NORM)
        return F.batch_norm(x_BCHW, mean, var, scale, shift)

    x_BCHW, maps = F.max_pool2d(F.relu(conv("stem.conv1", x_BCHW, 2)), 3, 2, 1), []
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        for block in range(blocks):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            first, second = (stride, 1) if stride_in_1x1 or depth < 50 else (1, stride)
            out = conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", x_BCHW, first)), second)
            out = conv(f"{name}.conv3", F.relu(out)) if depth >= 50 else out
            shortcut = f"{name}.shortcut"
            x_BCHW = F.relu(out + (conv(shortcut, x_BCHW, stride) if f"{shortcut}.weight" in weights else x_BCHW))
        maps.append(x_BCHW)
    return maps


def apart(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("name", RESNET_DEPTHS)
def test_names_and_shapes_are_detectron2s(name: str) -> None:
    with torch.device("meta"):
        weights = backbones.create(name).weights()
    expected = {f"{conv}.weight": shape for conv, shape in convolutions(RESNET_DEPTHS[name])}
    expected |= {f"{key[:-7]}.norm.{part}": (shape[0],) for key, shape in list(expected.items()) for part in NORM}
    assert {key: tuple(value.shape) for key, value in target.converted(weights).items()} == expected


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_written_file_is_the_network(name: str, tmp_path: Path) -> None:
    folder, depth = artefact.write(tmp_path / "a", shaken(name, img_size=64), {}), RESNET_DEPTHS[name]
    target.write(folder)
    content = (folder / target.WEIGHTS).read_bytes()
    loaded = pickle.load(io.BytesIO(content), encoding="latin1")  # as Detectron2 does
    assert set(loaded) == {"model", "__author__", "matching_heuristics"} and loaded["matching_heuristics"] is True
    assert "Caffe2" not in loaded["__author__"], "its names would be changed"
    weights = {key: torch.from_numpy(value) for key, value in loaded["model"].items()}
    assert all(value.dtype == torch.float32 for value in weights.values())
    probed = probe(folder, load_backbone(folder).input)
    expected = list(probed.maps.values())[1:]
    assert max(apart(theirs(probed.x_BCHW, weights, depth), expected)) < 1e-5
    if depth >= 50:
        assert min(apart(theirs(probed.x_BCHW, weights, depth, True)[1:], expected[1:])) > 1e-2, "STRIDE_IN_1X1"
    weights["res5.1.conv2.weight"] = torch.zeros_like(weights["res5.1.conv2.weight"])
    assert apart(theirs(probed.x_BCHW, weights, depth), expected)[-1] > 1e-2


def test_the_file_names_nothing_that_another_numpy_lacks(tmp_path: Path) -> None:
    content = io.BytesIO()
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3.0, dtype=np.float32)}
    target._Pickler(content, protocol=4).dump(arrays)
    strings: list[str] = []
    named = set()
    for opcode, argument, _ in pickletools.genops(content.getvalue()):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            named.add(".".join(strings[-2:]))
    assert named <= {"numpy.ndarray", "builtins.bytearray"}
    back = pickle.loads(content.getvalue())
    assert all(np.array_equal(back[key], value) and back[key].flags.writeable for key, value in arrays.items())


@pytest.mark.parametrize(
    ("name", "backbone", "model"),
    [
        ("resnet18", "", {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "STRIDE_IN_1X1": False, "NORM": "BN"}),
        ("test_resnet", "ssl_pretrain_fpn", None),
        ("test_vit", "ssl_pretrain_fpn", None),
    ],
)
def test_the_config_says_what_detectron2_would_assume_otherwise(
    name: str, backbone: str, model: dict[str, Any] | None, tmp_path: Path
) -> None:
    trained = shaken(name, img_size=64)
    trained.input = type(trained.input)((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64)
    folder = artefact.write(tmp_path / "a: folder", trained, {})
    lines = target.write(folder)
    config = yaml.safe_load((folder / target.CONFIG).read_text())
    assert config["VERSION"] == 2 and config["INPUT"] == {"FORMAT": "RGB"}
    assert config["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert config["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert f'cfg.merge_from_file("{folder / target.CONFIG}")' in lines
    if model is not None:
        assert config["MODEL"]["RESNETS"] == model and config["MODEL"]["BACKBONE"] == {"FREEZE_AT": 0}
        assert config["MODEL"]["WEIGHTS"] == str(folder / target.WEIGHTS)
        return
    assert config["MODEL"]["BACKBONE"] == {"NAME": backbone} and config["MODEL"]["WEIGHTS"] == ""
    assert config["MODEL"]["SSL_PRETRAIN"] == {"ARTEFACT": str(folder)} and "add_config(cfg)" in lines
    assert not (folder / target.WEIGHTS).exists()


def test_without_detectron2_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artefact.write(tmp_path / "a", shaken("test_resnet", img_size=64), {})
    monkeypatch.setitem(__import__("sys").modules, "detectron2", None)
    with pytest.raises(UsageError, match="detectron2 is not installed") as error:
        target.arrive(folder)
    assert "\n" not in str(error.value)
    folder = artefact.write(tmp_path / "b", shaken("test_vit", img_size=128, patch_size=64), {})
    with pytest.raises(UsageError, match="patches of 64 px"):
        target.write(folder)


# The real one. Its own code warns of what it will have to change, which is nothing to us.
real = pytest.mark.filterwarnings("ignore")


@real
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"img_size": 64}),
        ("test_vit", {"img_size": 56, "patch_size": 14}),
        pytest.param("resnet18", {"img_size": 64}, marks=pytest.mark.slow),
        pytest.param("resnet50", {"img_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_arrive_in_detectron2(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from ssl_pretrain.export._verify import examine

    folder = artefact.write(tmp_path / "a", shaken(name, **options), {})
    target.write(folder)
    report = examine("detectron2", folder)
    assert report["equal"] and report["trained"].startswith("2 steps, loss ")
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("STRIDE_IN_1X1: False", "STRIDE_IN_1X1: True"),
        ("FORMAT: RGB", "FORMAT: BGR"),
        ("STD: [58.395", "STD: [1.0"),
        ("res3.0.conv2", "res3.0.conv9"),
    ],
)
def test_what_detectron2_takes_without_a_word_is_seen(
    wrong: str, right: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from ssl_pretrain.export._verify import examine

    folder = artefact.write(tmp_path / "a", shaken("resnet50", img_size=64), {})
    target.write(folder)
    for name in (target.CONFIG, target.WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(wrong.encode(), right.encode()))
    with caplog.at_level(logging.CRITICAL):
        verdict = examine("detectron2", folder)["verdict"]
    assert verdict.startswith("the weights did not arrive"), verdict


@real
def test_retinanets_pyramid_is_registered_too(tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from ssl_pretrain.detectors.detectron2 import add_config

    for name, options in (("test_resnet", {"img_size": 64}), ("test_vit", {"img_size": 32, "patch_size": 8})):
        cfg = get_cfg()
        add_config(cfg)
        with pytest.raises(UsageError, match="ARTEFACT is empty"):
            cfg.MODEL.BACKBONE.NAME = "ssl_pretrain"
            build_backbone(cfg)
        cfg.MODEL.SSL_PRETRAIN.ARTEFACT = str(artefact.write(tmp_path / name, shaken(name, **options), {}))
        assert set(build_backbone(cfg).output_shape()) in ({"res2", "res3", "res4", "res5"}, {"last_feat"})
        cfg.MODEL.BACKBONE.NAME = "ssl_pretrain_retinanet_fpn"
        backbone = build_backbone(cfg)
        levels = backbone(torch.rand(1, 3, 64, 96))
        assert {key: 96 // value.shape[-1] for key, value in levels.items()} == {
            "p3": 8, "p4": 16, "p5": 32, "p6": 48, "p7": 96}  # fmt: skip
        assert {key: spec.stride for key, spec in backbone.output_shape().items()} == {
            f"p{i}": 2**i for i in range(3, 8)
        }
        assert backbone.size_divisibility == 32
