"""Hugging Face transformers: `AutoModel`, its own ViTs and its detectors hold the weights, or it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shaken
from torch import nn

from ssl_pretrain import artefact, backbones
from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.detectors.hf import check, load_into
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import _verify, hf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="transformers' detectors match by scipy, which is not installed")

SMALL = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 8}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return artefact.write(tmp_path / "a", shaken(), {})


def inside(name: str = "test_resnet", out: tuple[int, ...] = (2, 3, 4)) -> Any:
    return transformers.TimmBackboneConfig(backbone=name, out_indices=list(out), use_pretrained_backbone=False)


def rt_detr(backbone: Any = None, channels: tuple[int, ...] = (48, 192, 96), version: str = "") -> nn.Module:
    config = getattr(transformers, f"RTDetr{version}Config")(
        backbone_config=backbone or inside(), encoder_in_channels=list(channels), encoder_hidden_dim=32,
        decoder_in_channels=[32] * 3, num_denoising=0, **SMALL,
    )  # fmt: skip
    detector: nn.Module = getattr(transformers, f"RTDetr{version}ForObjectDetection")(config)
    return detector


# What `export --to hf --verify` proves


@pytest.mark.parametrize(
    ("name", "options", "consumer"),
    [
        ("test_resnet", {}, "RTDetrForObjectDetection"),
        ("test_convnext", {}, "RTDetrForObjectDetection"),
        ("test_vit", {"img_size": 64, "patch_size": 8}, "ViTModel"),
        ("test_vit2", {"img_size": 64, "patch_size": 8}, "TimmWrapperModel"),
        pytest.param("resnet18", {"normalize": False}, "RTDetrForObjectDetection", marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_dinov2", {"img_size": 112}, "Dinov2Model", marks=pytest.mark.slow),
        pytest.param(
            "vit_small_patch14_reg4_dinov2", {"img_size": 112}, "Dinov2WithRegistersModel", marks=pytest.mark.slow
        ),
    ],
)
def test_the_weights_arrive(name: str, options: dict[str, Any], consumer: str, tmp_path: Path) -> None:
    artefact.write(tmp_path / "a", shaken(name, **options), {})
    hf.write(tmp_path / "a")
    report = _verify.examine("hf", tmp_path / "a")
    assert report["equal"], report
    assert report["consumer"].endswith(consumer) and report["notes"][0].startswith("AutoModel.from_pretrained gives")
    assert max(figures["difference"] for figures in report["maps"].values()) < 1e-5
    assert min(figures["control"] for figures in report["maps"].values()) > 0.1
    if consumer == "RTDetrForObjectDetection":
        assert report["trained"].startswith("2 steps, loss ")
        assert 0 < report["initialised"] < report["parameters"] and "model.decoder" in report["random"]
    else:
        assert report["initialised"] == report["parameters"] and not report["random"]


def test_the_lines_load_what_was_trained_and_how_it_is_fed(tmp_path: Path) -> None:
    trained = shaken("test_vit", img_size=64, patch_size=8)
    artefact.write(tmp_path / "a", trained, {})
    names: dict[str, Any] = {}
    exec(hf.write(tmp_path / "a"), names)
    x_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        tokens = trained.network.forward_features(x_BCHW)
        for model in (names["model"], names["vit"]):
            assert torch.allclose(model.eval()(x_BCHW).last_hidden_state, tokens, atol=1e-5)
    assert tuple(names["processor"].data_config["mean"]) == trained.input.mean
    beside = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a" / "hf")
    assert tuple(beside.image_mean) == trained.input.mean and tuple(beside.image_std) == trained.input.std


@pytest.mark.slow
@pytest.mark.parametrize("size", [(112, 112), (140, 84), (42, 56)])
def test_dinov2_with_registers_is_the_same_at_every_size(size: tuple[int, int], tmp_path: Path) -> None:
    trained = shaken("vit_small_patch14_reg4_dinov2", img_size=112)
    trained.position_embedding.data.normal_(std=0.2)
    hf.write(artefact.write(tmp_path / "a", trained, {}))
    model = transformers.AutoModel.from_pretrained(tmp_path / "a" / "hf").eval()
    x_BCHW = torch.randn(1, 3, *size)
    with torch.inference_mode():
        assert torch.allclose(model(x_BCHW).last_hidden_state, trained.network.forward_features(x_BCHW), atol=1e-5)


def test_a_vit_whose_size_is_not_the_probes_is_still_compared(tmp_path: Path) -> None:
    artefact.write(
        tmp_path / "a", shaken("test_vit", img_size=40, patch_size=8), {}
    )  # 5 x 5 patches, the probe has 4 x 4
    hf.write(tmp_path / "a")
    report = _verify.examine("hf", tmp_path / "a")
    assert report["equal"] and report["consumer"].endswith("TimmWrapperModel")
    assert any("hf/ (ViTModel) is 0.0e+00 apart at 40 px" in note for note in report["notes"])


@pytest.mark.parametrize("key", ["layernorm.bias", "encoder.layer.0.attention.attention.key.weight"])
def test_a_wrong_conversion_is_caught(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact.write(tmp_path / "a", shaken("test_vit", img_size=64, patch_size=8), {})
    real = hf._converted

    def lossy(*given: Any) -> dict[str, torch.Tensor]:
        weights = real(*given)
        assert weights is not None
        if key == "layernorm.bias":
            del weights[key]
        else:
            weights[key] = torch.zeros_like(weights[key])
        return weights

    monkeypatch.setattr(hf, "_converted", lossy)
    hf.write(tmp_path / "a")
    with pytest.raises(DataError, match=r"does not fit ViTModel|gives other maps than the artefact"):
        hf.arrive(tmp_path / "a")


def test_a_network_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    artefact.write(tmp_path / "p", backbones.create("pixels/8"), {})
    with pytest.raises(UsageError, match="transformers has no network pixels/8"):
        hf.write(tmp_path / "p")
    with pytest.raises(UsageError, match="take networks of timm, and not pixels/8"):
        load_into(rt_detr(), tmp_path / "p")


def test_another_backbone_in_the_same_folder_leaves_no_old_files(tmp_path: Path) -> None:
    hf.write(artefact.write(tmp_path / "a", shaken("test_vit", img_size=64, patch_size=8), {}))
    assert (tmp_path / "a" / "hf" / "config.json").is_file()
    hf.write(artefact.write(tmp_path / "a", shaken(), {}))
    assert not any((tmp_path / "a" / "hf").iterdir())


# The detectors' own side


def resnet_config(out: list[str], **more: Any) -> Any:
    return transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=out
    )


DETECTORS: dict[str, tuple[str, Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "RT-DETR": ("test_resnet", rt_detr, "model.backbone.model._backbone", (8, 16, 32)),
    "RT-DETRv2": ("test_resnet", lambda: rt_detr(version="V2"), "model.backbone.model._backbone", (8, 16, 32)),
    "RT-DETR, ConvNeXt": (
        "test_convnext", lambda: rt_detr(inside("test_convnext", (1, 2, 3)), (32, 48, 64)),
        "model.backbone.model._backbone", (8, 16, 32),
    ),
    "DETR": (
        "test_resnet",
        lambda: transformers.DetrForObjectDetection(
            transformers.DetrConfig(backbone_config=inside(out=(1, 2, 3, 4)), **SMALL)
        ),
        "model.backbone.model", (4, 8, 16, 32),
    ),
    "Deformable DETR": (
        "test_resnet",
        lambda: transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(backbone_config=inside(), **SMALL)
        ),
        "model.backbone.model", (8, 16, 32),
    ),
    "Mask2Former": (
        "test_resnet",
        lambda: transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(
                backbone_config=inside(out=(1, 2, 3, 4)), feature_size=32, mask_feature_size=32, hidden_dim=32,
                encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
                num_attention_heads=2, num_queries=8,
            )
        ),
        "model.pixel_level_module.encoder._backbone", (4, 8, 16, 32),
    ),
    "DETR, its own ResNet": (
        "resnet18",
        lambda: transformers.DetrForObjectDetection(
            transformers.DetrConfig(backbone_config=resnet_config(["stage4"]), **SMALL)
        ),
        "model.backbone.model", (32,),
    ),
    "RT-DETR, its own ResNet": (
        "resnet50d",
        lambda: rt_detr(transformers.RTDetrResNetConfig(out_indices=[2, 3, 4]), (512, 1024, 2048)),
        "model.backbone.model", (8, 16, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * ("its own" in kind)) for kind in DETECTORS],
)
def test_a_detector_holds_weights_and_statistics(kind: str, tmp_path: Path) -> None:
    name, build, where, strides = DETECTORS[kind]
    folder = artefact.write(tmp_path / "a", shaken(name), {})
    detector = build().train()
    with pytest.raises(DataError, match=r"does not give the maps of .*load_into puts the weights in") as error:
        check(detector, folder)
    assert "\n" not in str(error.value)
    modes = [module.training for module in detector.modules()]
    loaded = load_into(detector, folder)
    assert [module.training for module in detector.modules()] == modes, "it is left as it was"
    assert loaded.apart < 1e-5 and loaded.where == where and loaded.strides == strides
    assert 0 < loaded.initialised < loaded.parameters == sum(p.numel() for p in detector.parameters())
    assert loaded.input == load_backbone(folder).input
    state = detector.get_submodule(where).state_dict()
    assert any(not torch.all(state[key] == 1) for key in state if key.endswith("running_var")) or "Conv" in kind


def zeros(network: nn.Module) -> None:
    network.get_parameter("layer4.0.conv2.weight").data.zero_()


def default_statistics(network: nn.Module) -> None:
    for key, buffer in network.named_buffers():
        if key.endswith("running_mean"):
            buffer.zero_()


def blue_for_red(network: nn.Module) -> None:
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight.data = first.weight.data.flip(1)


@pytest.mark.parametrize("bug", [zeros, default_statistics, blue_for_red])
def test_what_is_lost_later_is_found_by_check(bug: Callable[[nn.Module], None], folder: Path) -> None:
    detector = rt_detr()
    where = load_into(detector, folder).where
    bug(detector.get_submodule(where))
    with pytest.raises(DataError, match="does not give the maps"):
        check(detector, folder)


def test_the_two_silent_ways_are_caught_and_mended(folder: Path) -> None:
    unloaded = rt_detr(inside(f"local-dir:{folder}"))
    reset = transformers.TimmBackbone.from_pretrained(f"local-dir:{folder}", out_indices=[2, 3, 4])
    expected, found = shaken().weights(), reset._backbone.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in found if key.endswith("weight"))
    for model in (unloaded, reset):
        with pytest.raises(DataError, match="does not give the maps"):
            check(model, folder)
        assert load_into(model, folder).apart < 1e-5


def test_a_saved_detector_still_holds_them(folder: Path, tmp_path: Path) -> None:
    detector = rt_detr()
    load_into(detector, folder)
    detector.save_pretrained(tmp_path / "saved")
    again = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "saved")
    assert check(again, folder).apart < 1e-5


def test_a_detector_with_another_network_or_none_is_refused(folder: Path) -> None:
    other = rt_detr(inside("test_convnext", (1, 2, 3)), (32, 48, 64))
    with pytest.raises(
        UsageError, match=r"has no backbone test_resnet: that at model.backbone.model._backbone"
    ) as error:
        load_into(other, folder)
    assert "\n" not in str(error.value) and "TimmBackboneConfig(backbone='test_resnet'" in str(error.value)
    with pytest.raises(UsageError, match="it has none of timm's and no ResNetBackbone"):
        load_into(nn.Linear(2, 2), folder)
