"""A backbone in Ultralytics: it is trained there from what was pretrained, or the user is told that it is not."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before Ultralytics is imported: it asks for the network then, and writes settings.
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics_settings_")

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("ultralytics", reason="Ultralytics is not installed: pip install 'ssl-pretrain[ultralytics]'")

from conftest import small
from ultralytics import YOLO
from ultralytics.nn.modules import block
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils import SETTINGS, dist

from ssl_pretrain import artefact, backbones, load_backbone, pretrain
from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.backbones import ultralytics as family
from ssl_pretrain.cli import main
from ssl_pretrain.data import readers
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.detectors.ultralytics import attach, check, levels, maps
from ssl_pretrain.errors import DataError, NotProven, UsageError
from ssl_pretrain.export import ultralytics as target
from ssl_pretrain.export._verify import examine

atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], True)
YOLO12N = "ultralytics/yolo12n"


def shaken(name: str, **options: Any) -> Backbone:
    """Random weights, with BatchNorm statistics that default ones cannot pass for."""
    torch.manual_seed(1)
    backbone = backbones.create(name, **{"img_size": 64, **options})
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "artefact", shaken(YOLO12N), {"method": "simclr", "step": 3})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return target._data(tmp_path / "data")


class Enough(Exception):
    """A training that has started and need not go on."""


def train(model: YOLO, data: Path, at_start: Callable[[Any], None] | None = None, **options: Any) -> None:
    """Trains two steps, or with `at_start` none: it is called with the trainer when Ultralytics is about to begin."""

    def stop(trainer: Any) -> None:
        at_start(trainer)
        raise Enough

    if at_start is not None:
        model.add_callback("on_train_start", stop)
    settings = {
        "data": str(data), "epochs": 1, "imgsz": 64, "batch": 2, "nbs": 2, "device": "cpu", "workers": 0, "amp": False,
        "warmup_epochs": 0, "optimizer": "SGD", "lr0": 0.001, "plots": False, "val": False, "save": False,
        "project": str(data.parent / "runs"), **options,
    }  # fmt: skip
    try:
        model.train(**settings)
    except Enough:
        assert at_start is not None


# The backbone


@pytest.mark.parametrize("name", ["yolo12n", "yolo11n", "yolo26n", "yolov8n", "yolov9t", "yolov10n"])
def test_maps_are_those_of_ultralytics_own_network(name: str) -> None:
    ours = shaken(f"ultralytics/{name}")
    theirs = YOLO(f"{name}.yaml").model.eval()
    rgb_BCHW = torch.rand(2, 3, 96, 64)
    fresh = maps(theirs, levels(ours), rgb_BCHW)
    missing, unexpected = theirs.load_state_dict(ours.weights(), strict=False)
    first_of_neck = len(theirs.yaml["backbone"])
    assert not unexpected and all(int(key.split(".")[1]) >= first_of_neck for key in missing)
    with torch.inference_mode():
        expected = ours.maps(rgb_BCHW)
    for i, (stride, channels) in enumerate(zip(ours.strides, ours.channels, strict=True)):
        found = maps(theirs, levels(ours), rgb_BCHW)[f"map_{i}"]
        assert torch.equal(found, expected[i]) and not torch.allclose(fresh[f"map_{i}"], expected[i])
        assert found.shape == (2, channels, 96 // stride, 64 // stride)
    assert ours.strides == (8, 16, 32)
    neck = {source for layer in theirs.model[first_of_neck:] for source in torch.tensor(layer.f).flatten().tolist()}
    assert set(ours.layer_indices[:2]) <= neck, "the maps must be what the neck takes"


def test_the_feature_is_the_mean_of_the_last_map() -> None:
    backbone = shaken(YOLO12N)
    x_BCHW = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(backbone(x_BCHW), backbone.maps(x_BCHW)[-1].mean((2, 3)))
    assert backbone(x_BCHW).shape == (2, backbone.dim)


def test_depth_follows_the_layers() -> None:
    backbone = backbones.create(YOLO12N)
    depth = backbone.layers()
    assert set(depth) == {name for name, _ in backbone.named_parameters()} and set(depth.values()) == set(range(9))
    assert depth["network.model.0.conv.weight"] == 0 and backbone.input == InputSpec((0.0,) * 3, (1.0,) * 3, 640)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("yolo12q", {}, r"no detector 'yolo12q' \(did you mean 'yolo12"),
        ("yolo12", {}, r"no detector 'yolo12' \(did you mean 'yolo12"),
        ("yolo12n-seg", {}, "no detector 'yolo12n-seg'"),
        ("yolo12n", {"patch_size": 8, "pool": "avg"}, "no backbone.patch_size and no backbone.pool: leave it out"),
        ("yolo12n", {"drop_path": 0.1}, "has no backbone.drop_path"),
        ("yolo12n", {"img_size": 100}, "multiples of 32 px, not 100"),
        ("yolov3-tiny", {}, "stride is no whole number"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        backbones.create(f"ultralytics/{name}", **options)
    assert "\n" not in str(error.value)


def test_images_of_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 32 px, not 80 x 64"):
        backbones.create(YOLO12N)(torch.rand(1, 3, 64, 80))


def test_a_yaml_in_the_working_directory_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yolo12n.yaml").write_text("nonsense")
    (tmp_path / "yolo12.yaml").write_text("nonsense")
    monkeypatch.chdir(tmp_path)
    assert backbones.create(YOLO12N).channels == (128, 128, 256)


def test_the_artefact_gives_the_same_and_tells_whose_network_it_is(folder: Path) -> None:
    trained, loaded = shaken(YOLO12N), load_backbone(folder)
    x_BCHW = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        for expected, found in zip(trained.maps(x_BCHW), loaded(x_BCHW), strict=True):
            assert torch.equal(expected, found)
    made = json.loads((folder / "config.json").read_text())["ultralytics"]
    assert made["implementation"] == "ultralytics" and len(made["yaml_sha256"]) == 64 and loaded.input == trained.input
    assert backbones.create("ultralytics/yolov8n").config()["ultralytics"]["implementation"] is None


def test_the_other_yolov12_is_refused_before_its_weights_are_looked_at(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["ultralytics"]["implementation"] = family.AUTHORS
    config["architecture"] = "ultralytics/yolov12n"
    with pytest.raises(UsageError, match=r"of sunsmarterjie/yolov12 .* another network: pip install git\+https"):
        family.from_config(config)
    config["ultralytics"]["implementation"] = None  # without area attention there is one implementation only
    config["architecture"] = "ultralytics/yolov8n"
    assert family.from_config(config).name == "ultralytics/yolov8n"


def test_the_authors_attention_is_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AAttn(nn.Module):
        def __init__(self, dim: int, num_heads: int, area: int) -> None:
            super().__init__()
            self.qk, self.v = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)

    assert family.installed() == family.OURS and family.implementation(nn.Sequential(AAttn(8, 1, 1))) == family.AUTHORS
    monkeypatch.setattr(block, "AAttn", AAttn)
    assert family.installed() == family.AUTHORS
    with pytest.raises(UsageError, match=r"is of ultralytics .* sunsmarterjie/yolov12 is installed"):
        load_backbone(folder)


def test_importing_the_family_asks_nobody_and_leaves_the_environment(tmp_path: Path) -> None:
    code = """
import os, socket, sys
def asked(*args, **kwargs): sys.exit("the network was asked")
socket.getaddrinfo = socket.create_connection = asked
before = dict(os.environ)
import ssl_pretrain.backbones.ultralytics
assert {k: os.environ.get(k) for k in ("YOLO_OFFLINE", "OMP_NUM_THREADS")} == {
    k: before.get(k) for k in ("YOLO_OFFLINE", "OMP_NUM_THREADS")}
"""
    env = {k: v for k, v in os.environ.items() if k not in ("YOLO_OFFLINE", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"YOLO_CONFIG_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_detector_side_imports_nothing_of_the_training_side() -> None:
    code = (
        "import sys, ssl_pretrain.detectors.ultralytics\n"
        "heavy = ('lightning', 'faiss', 'kornia', 'lightly', 'ssl_pretrain.train', 'ssl_pretrain.methods')\n"
        "found = [name for name in heavy if name in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_methods_train_it_and_the_trained_weights_arrive(method: str, pack: Pack, tmp_path: Path) -> None:
    sizes = {"size_px": 64} if method == "simclr" else {"global_size_px": 64, "local_size_px": 32}
    recipe = small(method, YOLO12N, steps=3, layer_decay=0.8)
    recipe["method"] |= sizes
    pretrain(recipe, data=pack.folder, out=tmp_path / "run")
    trained = load_backbone(tmp_path / "run")
    torch.manual_seed(0)
    before = backbones.create(YOLO12N).weights()
    moved = [not torch.equal(before[name], value) for name, value in trained.backbone.weights().items()]
    assert sum(moved) > 0.9 * len(moved) and trained.input.size_px == 64
    lines = target.write(artefact.find(tmp_path / "run"))
    assert 'YOLO("' in lines
    assert check(YOLO(str(tmp_path / "run" / "artefact" / target.FILE)), tmp_path / "run") < 1e-6


# The file


def test_the_file_starts_ultralytics_training(folder: Path) -> None:
    trackers = {name: SETTINGS[name] for name in target.TRACKERS if name in SETTINGS}
    lines = target.write(folder)
    report = examine("ultralytics", folder)
    assert report["equal"] and all(figures["difference"] < 1e-6 for figures in report["maps"].values()), report
    assert all(figures["control"] > 0.5 for figures in report["maps"].values())
    assert report["maps"].keys() == {"map_0", "map_1", "map_2"} and report["trained"].startswith("2 steps, loss ")
    assert 0.5 < report["initialised"] / report["parameters"] < 0.56 and report["random"][-1] == "model.21"
    assert trackers == {name: SETTINGS[name] for name in trackers}
    assert f'YOLO("{folder / target.FILE}")' in lines
    held = eval(lines.splitlines()[1].partition(" = ")[2], {"YOLO": YOLO})
    assert check(held, folder) < 1e-6


def test_the_file_is_fp32_and_passes_ultralytics_restricted_loading(folder: Path) -> None:
    target.write(folder)
    loaded, _ = torch_safe_load(str(folder / target.FILE), safe_only=True)
    weights = loaded["model"].state_dict()
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(weights[name], value) for name, value in shaken(YOLO12N).weights().items())
    head = weights["model.21.cv3.0.2.weight"]
    target.write(folder)
    again = YOLO(str(folder / target.FILE)).model.state_dict()["model.21.cv3.0.2.weight"]
    assert torch.equal(head, again), "neck and head are drawn from a seed"


def _zeroed(weights: dict[str, Any]) -> None:
    weights["model.6.m.0.0.attn.qkv.conv.weight"].zero_()


def _bgr(weights: dict[str, Any]) -> None:
    stem = weights["model.0.conv.weight"]
    stem.copy_(stem.flip(1))


def _forgotten_statistics(weights: dict[str, Any]) -> None:
    weights["model.4.cv2.bn.running_var"].fill_(1)


@pytest.mark.parametrize("bug", [_zeroed, _bgr, _forgotten_statistics])
def test_a_file_with_a_bug_is_not_believed(bug: Callable[[dict[str, Any]], None], folder: Path) -> None:
    target.write(folder)
    checkpoint = torch.load(folder / target.FILE, weights_only=False)
    bug(checkpoint["model"].state_dict())
    torch.save(checkpoint, folder / target.FILE)
    with pytest.raises(NotProven, match=r"does not hold the weights of .* apart"):
        check(YOLO(str(folder / target.FILE)), folder)


def test_the_verb_sees_a_bug_in_the_file(folder: Path) -> None:
    target.write(folder)
    checkpoint = torch.load(folder / target.FILE, weights_only=False)
    _zeroed(checkpoint["model"].state_dict())
    torch.save(checkpoint, folder / target.FILE)
    report = examine("ultralytics", folder)
    assert not report["equal"] and "did not arrive" in report["verdict"]


# attach


def test_weights_loaded_by_hand_are_lost_by_training(folder: Path, data: Path) -> None:
    model = YOLO("yolo12n.yaml")
    model.model.load_state_dict(load_backbone(folder).backbone.weights(), strict=False)
    assert check(model, folder) < 1e-6

    def look(trainer: Any) -> None:
        with pytest.raises(NotProven, match=r"does not hold the weights of .* attach"):
            check(trainer.model, folder)

    train(model, data, look)


def test_attached_weights_are_there_when_training_starts(folder: Path, data: Path) -> None:
    model = YOLO("yolo12n.yaml")
    with pytest.raises(NotProven):
        check(model, folder)
    expected, seen = load_backbone(folder).backbone.weights(), []

    def look(trainer: Any) -> None:
        for network in (trainer.model, trainer.ema.ema):
            held = network.state_dict()
            assert all(torch.equal(held[name], value) for name, value in expected.items())
            seen.append(check(network, folder))

    assert attach(model, folder) is model
    train(model, data, look)
    assert len(seen) == 2 and max(seen) < 1e-6


def test_an_attached_backbone_learns(folder: Path, data: Path) -> None:
    model, losses = attach(YOLO("yolo12n.yaml"), folder), []
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss.detach())))
    train(model, data)
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses)
    with pytest.raises(NotProven):
        check(model, folder)


@pytest.mark.parametrize("which", ["model", "ema"])
def test_what_is_lost_after_attach_stops_the_training(which: str, folder: Path, data: Path) -> None:
    model = attach(YOLO("yolo12n.yaml"), folder)

    def lose(trainer: Any) -> None:
        network = trainer.model if which == "model" else trainer.ema.ema
        _zeroed(network.state_dict())

    model.add_callback("on_pretrain_routine_end", lose)
    with pytest.raises(NotProven, match="does not hold"):
        train(model, data)


def test_a_resumed_training_is_left_alone(folder: Path) -> None:
    class Resumed:
        resume = True  # whatever else were touched would raise AttributeError

    model = attach(YOLO("yolo12n.yaml"), folder)
    for event in ("on_pretrain_routine_end", "on_train_start"):
        model.callbacks[event][-1](Resumed())


def test_attach_refuses_another_backbone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'another backbone than ultralytics/yolo12n .*YOLO\("yolo12n.yaml"\)'):
        attach(YOLO("yolov8n.yaml"), folder)
    with pytest.raises(UsageError, match="another backbone"):
        check(YOLO("yolo12s.yaml"), folder)
    artefact.write(tmp_path / "r", shaken("resnet18"), {})
    with pytest.raises(UsageError, match=r"attach takes backbones of Ultralytics, not resnet18: .* --to ultralytics"):
        attach(YOLO("yolo12n.yaml"), tmp_path / "r")


def test_attach_refuses_where_several_gpus_would_lose_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_ddp_file(trainer: Any) -> str:
        return f"overrides = {trainer.args}"

    monkeypatch.setattr(dist, "generate_ddp_file", generate_ddp_file)
    attach(YOLO("yolo12n.yaml"), folder)  # one GPU or none: nothing is lost
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="drops callbacks when it trains on several GPUs"):
        attach(YOLO("yolo12n.yaml"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_the_processes_for_several_gpus_start_from_it(lost: bool, folder: Path, data: Path) -> None:
    """The program that Ultralytics writes for them, run here by one process."""
    pytest.importorskip("cloudpickle", reason="Ultralytics needs cloudpickle for several GPUs")
    if "callbacks" not in Path(dist.__file__).read_text():
        pytest.skip("this Ultralytics drops callbacks, and attach refuses")
    model, programs = attach(YOLO("yolo12n.yaml"), folder), []

    def launch(trainer: Any) -> None:
        if lost:
            trainer.callbacks["on_pretrain_routine_end"].append(_lose)
        programs.append(dist.generate_ddp_file(trainer))

    train(model, data, launch, exist_ok=True)
    done = subprocess.run([sys.executable, programs[0]], capture_output=True, text=True, timeout=300)
    proven, last = "its maps are those of the artefact" in done.stdout + done.stderr, done.stderr.splitlines()[-1]
    if lost:
        assert not proven and "NotProven" in last, last
    else:
        assert proven and last.endswith("Enough"), last  # our own stop came along too, and after the proof


def _lose(trainer: Any) -> None:
    """Named, so that another process can be sent it."""
    _zeroed(trainer.model.state_dict())


# ResNets


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_arrives(name: str, tmp_path: Path) -> None:
    folder = artefact.write(tmp_path / "a", shaken(name, normalize=False), {})
    target.write(folder)
    report = examine("ultralytics", folder)
    assert report["equal"] and all(figures["difference"] < 1e-5 for figures in report["maps"].values()), report
    assert report["maps"].keys() == {"map_2", "map_3", "map_4"} and 0.5 < report["initialised"] / report["parameters"]
    assert len(report["notes"]) == 2


def resnet(tmp_path: Path, mean: float = 0.0, std: float = 1.0, dead: bool = False) -> Path:
    backbone = shaken("resnet18")
    backbone.input = InputSpec((mean,) * 3, (std, 2 * std, std), 64)
    if dead:
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var[::7] = torch.logspace(-9, -3, len(module.running_var[::7]))
    return artefact.write(tmp_path / "a", backbone, {})


@pytest.mark.parametrize("options", [{}, {"std": 0.25}, {"dead": True}])
def test_eps_and_std_are_made_up_for_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    folder = resnet(tmp_path, **options)
    target.write(folder)
    loaded = YOLO(str(folder / target.FILE))
    assert {m.eps for m in loaded.model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert check(loaded, folder) < 1e-5


def test_eps_that_is_not_made_up_for_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resnet(tmp_path)
    monkeypatch.setattr(Backbone, "named_modules", lambda self, *args: iter(()), raising=False)
    target.write(folder)
    monkeypatch.undo()
    with pytest.raises(NotProven, match="map_"):
        check(YOLO(str(folder / target.FILE)), folder)


def test_a_mean_under_padding_is_refused(tmp_path: Path) -> None:
    folder = resnet(tmp_path, mean=0.5)
    with pytest.raises(UsageError, match=r"backbone\.normalize false"):
        target.write(folder)
    assert not (folder / target.FILE).exists()


@pytest.mark.parametrize("name", ["test_vit", "convnext_atto", "resnet18d"])
def test_what_ultralytics_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 8} if name == "test_vit" else {"img_size": 64}
    folder = artefact.write(tmp_path / "a", shaken(name, **options), {})
    with pytest.raises(UsageError, match=f"no place for {name}: .* resnet18, resnet34"):
        target.write(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError):
        target.write(folder)


# Real cells


@pytest.mark.slow
def test_real_blood_cells_train_from_it(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "bccd").is_dir():
        pytest.skip("BCCD is not in the folder of real images (SSL_PRETRAIN_DATA)")
    labelled = readers.read(real_data / "bccd")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for one in labelled.images[:8]:
        (tmp_path / "images" / one.path.name).symlink_to(one.path)
        width, height = one.size_px
        lines = [
            f"{labelled.classes.index(label)} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height} "
            f"{(x1 - x0) / width} {(y1 - y0) / height}\n"
            for label, (x0, y0, x1, y1) in zip(one.labels, one.boxes_N4, strict=True)
        ]
        (tmp_path / "labels" / f"{one.path.stem}.txt").write_text("".join(lines))
    data = tmp_path / "data.yaml"
    described = {"path": str(tmp_path), "train": "images", "val": "images", "names": dict(enumerate(labelled.classes))}
    data.write_text(yaml.safe_dump(described))
    folder = artefact.write(tmp_path / "a", shaken(YOLO12N, img_size=224), {})
    target.write(folder)
    model, losses, apart = YOLO(str(folder / target.FILE)), [], []
    model.add_callback("on_train_start", lambda trainer: apart.append(check(trainer.model, folder)))
    model.add_callback("on_train_start", lambda trainer: apart.append(check(trainer.ema.ema, folder)))
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss.detach())))
    train(model, data, imgsz=224)
    assert len(apart) == 2 and max(apart) < 1e-6 and len(losses) == 4
    assert all(0 < loss < 1e4 for loss in losses)


def test_the_export_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "ultralytics", "--out", str(tmp_path / "out")]) == 0
    assert "ultralytics.pt" in "".join(capsys.readouterr().out.split("\n"))
    assert check(YOLO(str(tmp_path / "out" / target.FILE)), folder) < 1e-6
