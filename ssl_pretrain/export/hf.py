"""For Hugging Face transformers: an artefact is what `AutoModel` reads; a plain ViT is also written as its own ViT.

`hf/` has the same weights under the names of `ViTModel`, `Dinov2Model` (layer scale) or `Dinov2WithRegistersModel`, for
what is built on these. Detectors with timm's networks inside take the artefact: `ssl_pretrain.detectors.hf`.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ssl_pretrain.artefact import TOLERANCE, MapBackbone, apart, load_backbone
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export import Arrived, Probe, parts, probe
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import EXTRAS

CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
FILES = ("model.safetensors", "preprocessor_config.json", "config.json")
"""Of `hf/`."""
OPTIONS = {"vit": {"add_pooling_layer": False}}
"""Else `ViTModel` has a layer more, with random weights."""
STRIDES = (8, 16, 32)
"""Of the maps that RT-DETR takes."""
BLOCK = {
    "norm1": ("layernorm_before", "norm1"),
    "attn.qkv": ("attention.attention", "attention.attention"),
    "attn.proj": ("attention.output.dense", "attention.output.dense"),
    "ls1.gamma": ("", "layer_scale1.lambda1"),
    "norm2": ("layernorm_after", "norm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
    "ls2.gamma": ("", "layer_scale2.lambda1"),
}
"""In a block: timm's name -> `ViTModel`'s and the DINOv2s', as in files; version 5 renames while it loads."""
AROUND = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def write(folder: Path) -> str:
    """Adds `hf/` for a plain ViT and nothing else; returns the lines. `UsageError` for a network that is not timm's."""
    source = load_backbone(folder)
    if source.card["family"] != "timm":
        raise UsageError(
            f"transformers has no network {source.backbone.name}: it is of the family {source.card['family']}; "
            "export it --to onnx or --to safetensors"
        )
    lines = [
        "from transformers import AutoImageProcessor, AutoModel",
        f'model, processor = AutoModel.from_pretrained("{folder}"), AutoImageProcessor.from_pretrained("{folder}")',
    ]
    for name in FILES:
        (folder / "hf" / name).unlink(missing_ok=True)  # of another backbone that was exported here before
    native = _native(source)
    if native is not None:
        config, weights = native
        content = save(weights, metadata={"format": "pt"}), _json(_processor(source.input)), _json(config)
        for name, file in zip(FILES, content, strict=True):
            write_durably(folder / "hf" / name, file)
        options = "".join(f", {key}={value}" for key, value in OPTIONS.get(config["model_type"], {}).items())
        lines.append(f'vit = AutoModel.from_pretrained("{folder / "hf"}"{options})  # {CLASSES[config["model_type"]]}')
    if set(STRIDES) <= set(source.strides):
        taken = [source.strides.index(stride) for stride in STRIDES]
        lines += [
            f"# a detector with TimmBackboneConfig(backbone={source.backbone.name!r}, out_indices={taken}) inside:",
            "from ssl_pretrain.detectors.hf import load_into",
            f'load_into(detector, "{folder}")',
        ]
    return "\n".join(lines)


def arrive(folder: Path) -> Arrived:
    """RT-DETR with the backbone inside, two training steps; for a plain ViT, Hugging Face's own ViT or `AutoModel`.

    What `AutoModel` gives is compared for every backbone.
    """
    for package in ("transformers", "scipy"):  # by scipy it matches boxes with queries while training
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise UsageError(f"{package} is not installed: pip install {EXTRAS['transformers']}") from error
    import transformers

    transformers.logging.set_verbosity_error()
    source = load_backbone(folder)
    probed = probe(folder, source.input)
    far = _apart(_auto(folder, probed), probed)
    if far > TOLERANCE:
        raise DataError(f"AutoModel.from_pretrained of {folder} gives other maps, {far:.1e} apart")
    note = f"AutoModel.from_pretrained gives the same maps, {far:.1e} apart"
    if set(STRIDES) <= set(source.strides):
        return _rt_detr(folder, source, probed, note)
    path, notes = folder, [note]
    if _native(source) is not None:
        notes.append(_alike(folder / "hf", source))
        if probed.x_BCHW.shape[-1] == source.input.size_px:  # else ViTModel refuses it, and Dinov2Model resamples
            path = folder / "hf"
    loaded, fresh = _model(path)
    initialised, parameters, random = parts(loaded, [loaded])
    return Arrived(
        consumer=f"transformers {transformers.__version__}, {type(loaded).__name__}",
        route=f'AutoModel.from_pretrained("{path}")',
        maps=_hidden(loaded, probed.x_BCHW, source),
        fresh=_hidden(fresh, probed.x_BCHW, source),
        initialised=initialised,
        parameters=parameters,
        random=random,
        notes=tuple(notes),
    )


def _auto(folder: Path, probed: Probe) -> dict[str, Tensor]:
    """What `AutoModel` gives of the probe, normalised as `AutoImageProcessor` says."""
    from transformers import AutoImageProcessor, AutoModel

    fed = AutoImageProcessor.from_pretrained(folder).data_config
    model = AutoModel.from_pretrained(folder).eval()
    mean_C11, std_C11 = (torch.tensor(fed[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        every = model((probed.rgb_BCHW - mean_C11) / std_C11, output_hidden_states=True).hidden_states
    return {f"map_{i}": map_BCHW for i, map_BCHW in enumerate(every[-len(probed.maps) :])}


def _apart(maps: dict[str, Tensor], probed: Probe) -> float:
    """Largest difference from the probe's maps, by their largest value."""
    return max(apart(maps[name], map_BCHW) for name, map_BCHW in probed.maps.items())


def _rt_detr(folder: Path, source: MapBackbone, probed: Probe, note: str) -> Arrived:
    """A small RT-DETR: the maps before, then two steps on one image with two boxes."""
    import transformers

    from ssl_pretrain.detectors.hf import load_into

    taken = [source.strides.index(stride) for stride in STRIDES]
    detector, fresh = _small_rt_detr(source, taken), _small_rt_detr(source, taken)
    loaded = load_into(detector, folder)
    processor = transformers.RTDetrImageProcessor(
        do_resize=False,
        do_rescale=False,
        do_normalize=True,
        image_mean=list(loaded.input.mean),
        image_std=list(loaded.input.std),
    )
    x_BCHW = processor(images=list(probed.rgb_BCHW), return_tensors="pt")["pixel_values"]
    found = []
    for model in (detector.eval(), fresh.eval()):
        with torch.inference_mode():
            maps = model.get_submodule(loaded.where)(x_BCHW)
        found.append({f"map_{i}": map_BCHW for i, map_BCHW in zip(taken, maps, strict=True)})
    initialised, parameters, random = parts(detector, [detector.get_submodule(loaded.where)])
    return Arrived(
        consumer=f"transformers {transformers.__version__}, {type(detector).__name__}",
        route=f'load_into(detector, "{folder}"), before training',
        maps=found[0],
        fresh=found[1],
        initialised=initialised,
        parameters=parameters,
        random=random,
        trained=_trained(detector, x_BCHW),
        notes=(
            note,
            "RTDetrImageProcessor normalises only when told: do_normalize=True, image_mean, image_std",
            "RT-DETR freezes the backbone's BatchNorms unless freeze_backbone_batch_norms=False",
        ),
    )


def _small_rt_detr(source: MapBackbone, taken: list[int]) -> Any:
    """With timm's network inside and little else, from a configuration: nothing is downloaded."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

    width, channels = 32, [source.channels[i] for i in taken]
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=TimmBackboneConfig(
                backbone=source.backbone.name,
                out_indices=taken,
                use_pretrained_backbone=False,  # which older versions would download
            ),
            encoder_in_channels=channels,
            feat_strides=list(STRIDES),
            d_model=width,
            encoder_hidden_dim=width,
            encoder_ffn_dim=width,
            encoder_attention_heads=2,
            decoder_in_channels=[width] * len(taken),
            decoder_ffn_dim=width,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_queries=10,
            num_denoising=0,
            num_labels=2,
        )
    )


def _trained(detector: Any, x_BCHW: Tensor) -> str:
    """Two steps on one image with two boxes, in words; raises `DataError` where a loss is not finite."""
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.4]])}
    ]
    optimizer = torch.optim.AdamW(detector.train().parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = detector(pixel_values=x_BCHW, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not torch.isfinite(torch.tensor(losses)).all():
        raise DataError(f"{type(detector).__name__} does not train: losses {losses}")
    return f"2 steps, loss {losses[0]:.2f} -> {losses[1]:.2f}"


def _model(path: Path) -> tuple[nn.Module, nn.Module]:
    """What `AutoModel` makes of a folder, and a fresh one; a tensor that is missing or left over is an error."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(path)
    options = OPTIONS.get(config.model_type, {})
    loaded, told = AutoModel.from_pretrained(path, output_loading_info=True, **options)
    wrong = {what: keys for what, keys in told.items() if keys}
    if wrong:
        raise DataError(f"{path} does not fit {type(loaded).__name__}: {wrong}")
    return loaded.eval(), AutoModel.from_config(config, **options).eval()


def _alike(path: Path, source: MapBackbone) -> str:
    """How far the ViT in `hf/` is from the artefact at the size it is made for, in words; `DataError` if too far."""
    side = source.input.size_px
    x_BCHW = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(1))
    loaded, _ = _model(path)
    with torch.inference_mode():
        own = source(x_BCHW)
    expected = Probe(x_BCHW, x_BCHW, {f"map_{i}": map_BCHW for i, map_BCHW in enumerate(own)})
    far = _apart(_hidden(loaded, x_BCHW, source), expected)
    if far > TOLERANCE:
        raise DataError(f"{path} gives other maps than the artefact, {far:.1e} apart at {side} px")
    kind = type(loaded).__name__
    said = f"hf/ ({kind}) is {far:.1e} apart at {side} px"
    if kind != "Dinov2WithRegistersModel":
        said += "; at other sizes it resamples positions otherwise than timm and gives other maps"
    return said


def _hidden(model: nn.Module, x_BCHW: Tensor, source: MapBackbone) -> dict[str, Tensor]:
    """The outputs of the last blocks, as maps, by their names in the probe."""
    with torch.inference_mode():
        every = model(x_BCHW, output_hidden_states=True).hidden_states
    stride = source.strides[-1]
    height, width = x_BCHW.shape[-2] // stride, x_BCHW.shape[-1] // stride
    last = every[-len(source.strides) :]
    if last[0].ndim == 3:
        last = [h_BND[:, -height * width :].mT.unflatten(2, (height, width)) for h_BND in last]
    return {f"map_{i}": map_BCHW for i, map_BCHW in enumerate(last)}


def _native(source: MapBackbone) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration and weights of the same ViT in transformers' own classes; None where these have no such network."""
    weights = source.backbone.weights()
    if not {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"} <= weights.keys():
        return None
    network: Any = source.backbone.get_submodule("network")
    registers, mlp = weights.get("reg_token"), network.blocks[0].mlp
    scaled = "blocks.0.ls1.gamma" in weights
    model_type = "dinov2_with_registers" if registers is not None else "dinov2" if scaled else "vit"
    converted = _converted(weights, model_type, network.patch_embed.num_patches)
    hidden, width = weights["blocks.0.mlp.fc1.weight"].shape
    if converted is None or not isinstance(mlp.act, nn.GELU) or hidden % width:
        return None
    kind: dict[str, Any] = {"intermediate_size": hidden} if model_type == "vit" else {"mlp_ratio": hidden // width}
    if registers is not None:
        kind["num_register_tokens"] = registers.shape[1]
    return {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": network.blocks[0].attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": network.norm.eps,
        "image_size": source.input.size_px,
        "patch_size": source.strides[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "torch_dtype": "float32",
        **kind,
    }, converted


def _converted(weights: dict[str, Tensor], model_type: str, patches: int) -> dict[str, Tensor] | None:
    """timm's tensors under transformers' names; None where one has no place there."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key in AROUND:
            found[AROUND[key]] = tensor
            continue
        part = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|)", key)
        names = BLOCK.get(part[2]) if part else None
        if part is None or names is None:
            return None
        place = f"encoder.layer.{part[1]}.{names[model_type != 'vit']}"
        if part[2] == "attn.qkv":
            for name, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{place}.{name}{part[3]}"] = third
        else:
            found[place + part[3]] = tensor
    width = weights["cls_token"].shape[-1]
    positions = found["embeddings.position_embeddings"]
    if positions.shape[1] == patches:  # timm gives the class token none here
        found["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, width), positions], dim=1)
    if model_type != "vit":
        found["embeddings.mask_token"] = torch.zeros(1, width)  # only its pretraining has it
        for i in range(sum(key.endswith(".norm1.weight") for key in weights)):
            for name in ("layer_scale1", "layer_scale2"):
                found.setdefault(f"encoder.layer.{i}.{name}.lambda1", torch.ones(width))
    return {key: tensor.detach().float().contiguous() for key, tensor in found.items()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def _processor(fed: InputSpec) -> dict[str, Any]:
    """What `AutoImageProcessor` reads beside `hf/config.json`."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": fed.size_px, "width": fed.size_px},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(fed.mean),
        "image_std": list(fed.std),
    }
