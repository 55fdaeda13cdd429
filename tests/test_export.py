"""An export proves itself: what arrives passes, and what is lost, blind, damaged or not installed is told in a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from ssl_pretrain import artefact, backbones, export
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.cli import main
from ssl_pretrain.errors import DataError, NotProven, UsageError
from ssl_pretrain.export import _statistics, _verify, parts
from ssl_pretrain.export._folder import prepare
from ssl_pretrain.export._folding import fold
from ssl_pretrain.export._statistics import reestimate

SHARE = st.floats(0.05, 0.95)
THREE = st.tuples(SHARE, SHARE, SHARE)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "a", shaken(), {"method": "simclr", "recipe": {"data": "synthetic:3"}})


# Folding


@settings(deadline=None, max_examples=40)
@given(THREE, THREE, THREE, THREE, st.sampled_from([1.0, 255.0]), st.booleans())
def test_a_folded_convolution_gives_what_the_old_one_gave(mean, std, theirs, their_std, high, bgr) -> None:
    torch.manual_seed(0)
    old, p_BCHW = nn.Conv2d(3, 4, 3, dtype=torch.float64), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    of, to = InputSpec(mean, std, 6), InputSpec(*(tuple(high * v for v in values) for values in (theirs, their_std)), 6)
    expected = old((p_BCHW - column(of.mean)) / column(of.std))
    new = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    weight, bias = fold(old.weight.data, old.bias.data, False, of=of, to=to, high=high, bgr=bgr)
    new.load_state_dict({"weight": weight, "bias": bias})
    fed = (high * p_BCHW - column(to.mean)) / column(to.std)
    torch.testing.assert_close(new(fed.flip(1) if bgr else fed), expected, rtol=1e-9, atol=1e-9)


def column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def test_a_shift_is_not_folded_under_padding_and_a_scale_is() -> None:
    imagenet = InputSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64)
    weight = torch.randn(4, 3, 3, 3)
    with pytest.raises(UsageError, match=r"mean \(0.485, 0.456, 0.406\).*pads with zeros.*backbone.normalize false"):
        fold(weight, None, True, of=imagenet, to=InputSpec((0.0,) * 3, (1.0,) * 3, 64))
    caffe = InputSpec((123.675, 116.28, 103.53), (1.0,) * 3, 64)  # 255 times the same mean, rounded
    moved, bias = fold(weight, None, True, of=imagenet, to=caffe, high=255.0, bgr=True)
    assert bias is None
    torch.testing.assert_close(moved[:, 2], weight[:, 0] / (255 * 0.229))


# BatchNorm


def test_statistics_are_those_of_the_images(tmp_path: Path) -> None:
    """The first BatchNorm sees the stem's output: its statistics can be worked out without it."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64 + 32 * (i % 2), 3), np.uint8)).save(tmp_path / f"{i}.png")
    backbone = shaken()
    assert reestimate(backbone, tmp_path, 96) == 5
    first = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    hook = first.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    backbone(_statistics._batch(list(_statistics._chosen(tmp_path)), backbone, 96))
    hook.remove()
    assert len(seen[0]) == 5
    torch.testing.assert_close(first.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var, seen[0].var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert not backbone.training and first.momentum == 0.1


def test_images_without_contrast_are_refused(tmp_path: Path) -> None:
    backbone = backbones.create("test_resnet").eval()
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(DataError, match=r"without sound values: give other --images"):
        reestimate(backbone, tmp_path, 64)
    (tmp_path / "black.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image of .* can be read"):
        reestimate(backbone, tmp_path, 64)


def test_an_export_is_an_artefact_with_statistics_of_the_runs_images(exported: Path, tmp_path: Path) -> None:
    said = prepare(exported, tmp_path / "out", None, 96)
    assert said == "BatchNorm statistics are of 3 whole images of synthetic:3, at 96 px"
    new, old = artefact.load_backbone(tmp_path / "out"), artefact.load_backbone(exported)
    assert new.card["batch_norm"] == {"images": 3, "size_px": 96} and new.card["method"] == "simclr"
    differing = {
        key for key, value in new.backbone.weights().items() if not torch.equal(value, old.backbone.weights()[key])
    }
    assert differing and all("running" in key or "num_batches" in key for key in differing)
    assert prepare(exported, tmp_path / "kept", "none", 96) == "BatchNorm statistics are kept as pretraining left them"
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_images_that_are_gone_are_told(tmp_path: Path) -> None:
    source = artefact.write(tmp_path / "a", shaken(), {"recipe": {"data": str(tmp_path / "gone")}})
    assert "gone is not here; --images says where" in prepare(source, tmp_path / "out", None, 96)
    with pytest.raises(DataError, match="there is no folder or pack"):
        prepare(source, tmp_path / "out", str(tmp_path / "gone"), 96)
    with pytest.raises(UsageError, match="is the artefact itself"):
        prepare(source, source, None, 96)


def test_networks_without_batch_norm_say_nothing_of_it(tmp_path: Path) -> None:
    source = artefact.write(tmp_path / "a", shaken("test_vit", img_size=32, patch_size=8), {})
    assert prepare(source, tmp_path / "out", None, 96) == ""


def test_without_normalisation_the_contract_says_so(tmp_path: Path) -> None:
    plain = shaken("test_resnet", normalize=False)
    assert plain.input == InputSpec((0.0,) * 3, (1.0,) * 3, plain.input.size_px)
    artefact.write(tmp_path / "a", plain, {})
    assert artefact.load_backbone(tmp_path / "a").input == plain.input


# Verification, by consumers that do as they are told

CONSUMER = """
from pathlib import Path
import torch
from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.export import Arrived, probe

def write(folder: Path) -> str:
    return "consume it"

def arrive(folder: Path) -> Arrived:
    mine = load_backbone(folder)
    shown = probe(folder, mine.input)
    print("a consumer prints what it likes")
    maps = {f"map_{i}": found for i, found in enumerate(mine(shown.x_BCHW))}
    fresh = {name: torch.randn_like(found) for name, found in maps.items()}
    BEHAVIOUR
    return Arrived("consumer 1.0", "as told", maps, fresh, 3, 4, ("head",))
"""
BEHAVIOURS = {
    "honest": "",
    "lost": "maps, fresh = fresh, {name: 0 * found for name, found in fresh.items()}",
    "slightly": "maps['map_1'] = maps['map_1'] * 1.001",
    "blind": "fresh = maps",
    "broken": "maps['map_0'] = maps['map_0'] * float('nan')",
    "smaller": "maps['map_0'] = maps['map_0'][..., :1]",
    "nothing": "maps, fresh = {}, {}",
    "absent": "raise UsageError('consumer is not installed: pip install consumer')",
    "crashes": "raise RuntimeError('out of luck')",
}


@pytest.fixture
def consumers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one's own, found here by the package's path and in a new process by the environment."""
    mine = tmp_path / "mine" / "export"
    mine.mkdir(parents=True)
    for name, line in BEHAVIOURS.items():
        (mine / f"told_{name}.py").write_text(CONSUMER.replace("BEHAVIOUR", line))
    monkeypatch.setenv("SSL_PRETRAIN_PATH", str(tmp_path / "mine"))
    monkeypatch.setattr(export, "__path__", [*export.__path__, str(mine)])
    yield
    for name in BEHAVIOURS:  # those of the next test stand in another folder
        sys.modules.pop(f"ssl_pretrain.export.told_{name}", None)


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("honest", "the weights arrived"),
        ("lost", "the weights did not arrive: map_"),
        ("slightly", "the weights did not arrive: map_1 is 1.0e-03 apart"),
        ("blind", "not proven: a consumer that loaded nothing gives the same maps"),
        ("broken", "the weights did not arrive: map_0"),
        ("smaller", "the weights did not arrive: map_0"),
    ],
)
@pytest.mark.usefixtures("consumers")
def test_what_arrived_is_judged(behaviour: str, says: str, exported: Path) -> None:
    found = _verify.examine(f"told_{behaviour}", exported)
    assert found["verdict"].startswith(says) and found["equal"] is (behaviour == "honest")
    assert found["random"] == ["head"] and found["initialised"] / found["parameters"] == 0.75
    json.dumps(found, allow_nan=False)
    _verify.table(found)


@pytest.mark.usefixtures("consumers")
def test_no_maps_are_no_proof(exported: Path) -> None:
    with pytest.raises(NotProven, match="the consumer shows no maps: the artefact has map_0"):
        _verify.examine("told_nothing", exported)


@pytest.mark.parametrize(
    ("behaviour", "code", "says"),
    [
        ("honest", 0, "the weights arrived"),
        ("lost", 1, "the weights did not arrive: map_"),
        ("absent", 64, "not verified: consumer is not installed: pip install consumer"),
        ("crashes", 1, "could not be built: RuntimeError: out of luck"),
    ],
)
@pytest.mark.usefixtures("consumers")
def test_the_verb_answers_with_its_code(behaviour, code, says, exported, tmp_path, capsys) -> None:
    words = ["export", str(exported), "--to", f"told_{behaviour}", "--out", str(tmp_path / "out"), "--images", "none"]
    assert main([*words, "--verify"]) == code
    shown = " ".join("".join(capsys.readouterr()).split())
    assert says in shown
    report = tmp_path / "out" / "export_report.json"
    assert report.exists() is (behaviour in ("honest", "lost"))
    assert not report.exists() or json.loads(report.read_text())["equal"] is (code == 0)


def test_shares_are_counted_once() -> None:
    net = nn.ModuleDict({"body": nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)}), "head": nn.Linear(1, 1)})
    net["again"] = net["body"]["a"]  # shared
    assert parts(net, [net["body"]["a"]]) == (9, 15, ("body.b", "head"))


# At the command line


def test_bad_words_are_answered_in_a_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*words: str) -> str:
        code = main(["export", str(exported), "--out", str(tmp_path / "out"), *words])
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and code == 64, shown
        return shown

    assert "did you mean 'torchvision'" in says("--to", "torchvison")
    assert "--size-px is 3" in says("--size-px", "3")
    assert "did you mean '--verify'" in says("--verfy")
    wrong = says("--to", "timm", "--images", "none", "--verify", "--python", str(tmp_path / "no"))
    assert "no: No such file or directory; give the interpreter of an environment" in wrong
