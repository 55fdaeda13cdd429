"""Our methods beside lightly's own example loops: the same images, backbone, steps, batch and seeds, one probe.

    python benchmarks/quality.py --images chula_rbc12/images --labelled chula_rbc12 --steps 400 --seeds 3 [--json FILE]
    python benchmarks/quality.py --quick        # minutes on drawn fields, to see that it runs; its figures say nothing

`lightly` is the loop of lightly's examples with its transforms, DataLoader, heads, losses and constants; `paper` is our
method with the paper's, `auto` is `auto: true`. Only the sides of the views are set, alike for all. `random` is the
network as it starts, with BatchNorm statistics of the objects: those alone are worth seven points of a ResNet-18. What
is probed is what a run leaves behind (DINO's teacher), by k-NN on labelled objects, each image against all others;
intervals are over images, of differences over the same images, and so know nothing of seeds: their spread stands
beside. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform
from lightly.utils.scheduler import cosine_schedule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssl_pretrain import pretrain
from ssl_pretrain.artefact import resolve
from ssl_pretrain.backbones import Backbone, create
from ssl_pretrain.data import readers, sources
from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.probe import knn
from ssl_pretrain.probe.baselines import settled
from ssl_pretrain.probe.features import embed, pooled_maps
from ssl_pretrain.probe.objects import Objects, cut, leave_one_out
from ssl_pretrain.probe.statistics import paired, verdict

KINDS = "random", "lightly", "paper", "auto"
SIZE_PX, LOCAL_PX, LOCALS, POINT_PX = 64, 32, 4, 80
RESNET, VIT = {"name": "resnet18"}, {"name": "vit_tiny_patch16_224", "patch_size": 8}
MULTI_CROP = {"global_size_px": SIZE_PX, "local_size_px": LOCAL_PX, "local_count": LOCALS}
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simclr": (RESNET, {"size_px": SIZE_PX}),
    "dino": (RESNET, MULTI_CROP),
    "mae": (VIT, {"size_px": SIZE_PX}),
    "ibot": (VIT, MULTI_CROP),
    "dinov2": (VIT, MULTI_CROP),
    "byol": (RESNET, {"size_px": SIZE_PX}),
    "vicreg": (RESNET, {"size_px": SIZE_PX}),
    "densegeo": (RESNET, {"size_px": SIZE_PX}),
    "spark": (RESNET, {"size_px": 2 * SIZE_PX}),  # at 64 px it would have 2 x 2 patches
}
"""Backbone and the sides of the views; all else is the paper's or auto."""
QUICK_HEAD = ("--method.prototypes", "4096")
"""A paper's 65,536 prototypes take most of the time on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="folder of fields")
    parser.add_argument("--labelled", help="the labelled set to judge on")
    parser.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--window-px", type=int, help="of all views; for ours only, as lightly has no windows")
    parser.add_argument("--preset", help="of all views, which says what images they are; for ours only")
    parser.add_argument("--auto-with", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, for auto only")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--probes", type=int, default=1, help="during each of our runs, for benchmarks/choosing.py")
    parser.add_argument("--probed", help="a smaller labelled set for these; what --labelled names without")
    parser.add_argument("--workers", type=int, default=2, help="of lightly's DataLoader")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.images, given.labelled, given.out = "synthetic:8", "synthetic:8:1", given.out / "quick"
        given.steps, given.batch, given.seeds, given.workers = 2, 8, 1, 0
    if not (given.images and given.labelled):
        raise SystemExit("give --images and --labelled, or --quick")
    console = Console(width=150)
    cache = given.out / "cache"
    objects = leave_one_out(cut(readers.read(sources.folder(given.labelled, cache)), SIZE_PX, point_px=POINT_PX))
    folder, rows = sources.folder(given.images, cache), []
    folder = (
        folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    )  # lightly takes subfolders for classes
    given.count = len(LightlyDataset(str(folder)))
    for method in given.methods:
        for seed in range(given.seeds):
            rows.append(row(method, "random", seed, 0.0, settled(fresh(method, seed), objects.crops_NSSC), objects))
            for kind in (
                ("lightly", "paper", "auto")
                if method in LIGHTLY and not (given.window_px or given.preset)
                else ("paper", "auto")
            ):
                began = time.monotonic()
                trained = lightly(method, seed, folder, given) if kind == "lightly" else ours(method, kind, seed, given)
                minutes = (time.monotonic() - began) / 60
                rows.append(row(method, kind, seed, minutes, trained, objects))
                console.print(f"{method}, {kind}, seed {seed}: {rows[-1]['balanced_accuracy']['value']:.3f}")
    console.print(table(rows, given))
    for line in (compared := differences(rows)):
        console.print(line, highlight=False)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {torch.__version__}"
    console.print(f"{objects.source}; {machine}", highlight=False)
    if given.json:
        plain = [{key: value for key, value in each.items() if key != "tallies"} for each in rows]
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        given.json.write_text(
            json.dumps({"settings": settings, "machine": machine, "differences": compared, "rows": plain}, indent=2)
        )


def row(method: str, kind: str, seed: int, minutes: float, backbone: Backbone, objects: Objects) -> dict[str, Any]:
    """The scores of a backbone's features and, of a convolutional one, of its maps as a detector takes them."""
    tallies = {"balanced_accuracy": knn.judge(objects, embed(backbone, objects.crops_NSSC)).tally}
    found = tallies["balanced_accuracy"].intervals()
    figures = {name: vars(found[name]) for name in ("accuracy", "balanced_accuracy")}
    if OURS[method][0] is RESNET:
        tallies["maps"] = knn.judge(objects, embed(backbone, objects.crops_NSSC, of=pooled_maps)).tally
        figures["maps"] = vars(tallies["maps"].intervals()["balanced_accuracy"])
    return {"method": method, "kind": kind, "seed": seed, "minutes": minutes, "tallies": tallies, **figures}


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Of each seed: every side against every other one of its method, over the same images."""
    found = []
    for mine, other in itertools.permutations(rows, 2):
        order = [KINDS.index(each["kind"]) for each in (mine, other)]
        if (mine["method"], mine["seed"]) != (other["method"], other["seed"]) or order[0] <= order[1]:
            continue
        for figure, tally in mine["tallies"].items():
            apart = paired(tally, other["tallies"][figure])["balanced_accuracy"]
            what = "balanced accuracy" + (" of the maps" if figure == "maps" else "")
            sides = (f"{each['method']} {each['kind']}" for each in (mine, other))
            found.append(f"seed {mine['seed']}: {verdict(apart, *sides, what)}")
    return found


def fresh(method: str, seed: int) -> Backbone:
    """The architecture as both sides train it, with random weights."""
    torch.manual_seed(seed)
    vit = OURS[method][0] is VIT
    pool = {"pool": "avg" if method == "mae" else "token"}  # nothing in MAE's loss asks the class token
    options = {"patch_size": VIT["patch_size"], **pool} if vit else {}
    return create(str(OURS[method][0]["name"]), img_size=SIZE_PX, **options)


def table(rows: list[dict[str, Any]], given: argparse.Namespace) -> Table:
    title = f"{given.steps} steps of {given.batch}; k-NN on objects, k 20, T 0.07, leave one image out"
    columns = "balanced accuracy", "95 % over images", "over seeds", "maps P3-P5", "95 %", "accuracy", "minutes"
    found = Table("method", "", *columns, title=title)
    for method, kind in dict.fromkeys((each["method"], each["kind"]) for each in rows):
        mine = [each for each in rows if (each["method"], each["kind"]) == (method, kind)]
        value, interval = means(mine, "balanced_accuracy")
        balanced = [each["balanced_accuracy"]["value"] for each in mine]
        seeds = f"{min(balanced):.3f} to {max(balanced):.3f}" if len(balanced) > 1 else "–"
        maps = means(mine, "maps") if "maps" in mine[0] else ("", "")
        minutes = f"{np.mean([each['minutes'] for each in mine]):.1f}" if kind != "random" else ""
        found.add_row(method, kind, value, interval, seeds, *maps, means(mine, "accuracy")[0], minutes)
    return found


def means(rows: list[dict[str, Any]], figure: str) -> tuple[str, str]:
    """Over seeds: of the values, and of the ends of their intervals."""
    value, low, high = (np.mean([each[figure][end] for each in rows]) for end in ("value", "low", "high"))
    return f"{value:.3f}", f"{low:.3f} to {high:.3f}"


# Ours


def ours(method: str, kind: str, seed: int, given: argparse.Namespace) -> Backbone:
    """The artefact of a run with the paper's constants, or with those of `auto`."""
    backbone, sides = OURS[method]
    recipe = {
        "seed": seed, "backbone": backbone, "auto": kind == "auto", "method": {"name": method, **sides},
        "views": {"window_px": given.window_px, "preset": given.preset},
        "train": {"steps": given.steps, "batch_size": given.batch}, "probe": {"data": given.probed or given.labelled},
    }  # fmt: skip
    every = max(1, given.steps // (given.probes * (given.count // given.batch)))
    words = ("--probe.every_epochs", str(every), "--probe.size_px", str(SIZE_PX), "--probe.point_px", str(POINT_PX))
    head = QUICK_HEAD if given.quick and kind == "paper" and "global_size_px" in sides else ()
    window = f"_w{given.window_px}" if given.window_px else ""
    preset = f"_{given.preset}" if given.preset else ""
    own = given.auto_with if kind == "auto" else []
    named = "".join(f"_{each}" for each in own)
    out = given.out / f"{method}_{kind}_{given.steps}x{given.batch}{window}{preset}{named}_{seed}"
    own_words = (word for each in own for word in f"--{each}".split("=", 1))
    pretrain(recipe, data=given.images, out=out, words=(*words, *head, *own_words), console=Console(width=150))
    return resolve(str(out))


# lightly's


def load(folder: Path, transform: Callable[..., Any], given: argparse.Namespace) -> DataLoader[Any]:
    """lightly's way to a folder of images."""
    dataset = LightlyDataset(str(folder), transform=transform)
    return DataLoader(
        dataset, given.batch, shuffle=True, drop_last=True, num_workers=given.workers,
        persistent_workers=given.workers > 0,
    )  # fmt: skip


def batches(loader: DataLoader[Any], steps: int) -> Iterator[tuple[int, Any]]:
    """The views of so many steps, each with its epoch."""
    for epoch in range(math.ceil(steps / len(loader))):
        for step, (views, *_) in enumerate(loader, epoch * len(loader)):
            if step == steps:
                return
            yield epoch, views


def lightly(method: str, seed: int, folder: Path, given: argparse.Namespace) -> Backbone:
    """The backbone that lightly's example leaves behind; kept as a file, so that it is trained once."""
    kept = given.out / f"{method}_lightly_{given.steps}x{given.batch}_{seed}.pt"
    backbone = fresh(method, seed)
    if not kept.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations
            weights = LIGHTLY[method](backbone, folder, given)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, kept)
    backbone.load_weights(torch.load(kept, weights_only=True))
    return backbone


def spec(backbone: Backbone) -> dict[str, Any]:
    return {"mean": list(backbone.input.mean), "std": list(backbone.input.std)}


def lightly_simclr(backbone: Backbone, folder: Path, given: argparse.Namespace) -> dict[str, Tensor]:
    """examples/pytorch/simclr.py: head 512-512-128, temperature 0.5, SGD 0.06, no blur (it is for 32 px)."""
    model = nn.Sequential(backbone, SimCLRProjectionHead(backbone.dim, 512, 128))
    transform = SimCLRTransform(input_size=SIZE_PX, gaussian_blur=0.0, normalize=spec(backbone))
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)
    for _, (x0_BCHW, x1_BCHW) in batches(load(folder, transform, given), given.steps):
        criterion(model(x0_BCHW), model(x1_BCHW)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return backbone.weights()


def lightly_dino(backbone: Backbone, folder: Path, given: argparse.Namespace) -> dict[str, Tensor]:
    """examples/pytorch/dino.py: 2,048 prototypes, Adam 1e-3, momentum 0.996 to 1 by epoch, first epoch frozen."""
    size = backbone.dim, 512, 64, 2048
    student = nn.Sequential(backbone, DINOProjectionHead(*size, freeze_last_layer=1))
    teacher = nn.Sequential(copy.deepcopy(backbone), DINOProjectionHead(*size)).requires_grad_(False)
    teacher[1].load_state_dict(student[1].state_dict())
    transform = DINOTransform(
        global_crop_size=SIZE_PX, local_crop_size=LOCAL_PX, n_local_views=LOCALS, normalize=spec(backbone)
    )
    criterion = DINOLoss(output_dim=size[-1], warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    loader = load(folder, transform, given)
    epochs = math.ceil(given.steps / len(loader))
    for epoch, views in batches(loader, given.steps):
        utils.update_momentum(student, teacher, m=cosine_schedule(epoch, epochs, 0.996, 1))
        with torch.no_grad():
            teacher_out = [teacher(view) for view in views[:2]]
        criterion(teacher_out, [student(view) for view in views], epoch=epoch).backward()
        student[1].cancel_last_layer_gradients(current_epoch=epoch)
        optimizer.step()
        optimizer.zero_grad()
    kept = teacher[0]
    assert isinstance(kept, Backbone)
    return kept.weights()


def lightly_mae(backbone: Backbone, folder: Path, given: argparse.Namespace) -> dict[str, Tensor]:
    """examples/pytorch/mae.py: decoder of 512 x 8 x 16, mask 0.75, AdamW 1.5e-4, plain pixels."""
    patch_px = int(VIT["patch_size"])
    size = {"img_size": SIZE_PX, "patch_size": patch_px, "global_pool": "avg", "fc_norm": False}
    vit = timm.create_model(str(VIT["name"]), num_classes=0, **size)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches, patch_size=patch_px, embed_dim=vit.embed_dim, decoder_embed_dim=512,
        decoder_depth=8, decoder_num_heads=16,
    )  # fmt: skip
    transform = MAETransform(input_size=SIZE_PX, normalize=spec(backbone))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1.5e-4)
    tokens = encoder.sequence_length
    for _, (x_BCHW, *_) in batches(load(folder, transform, given), given.steps):
        keep_BK, masked_BM = utils.random_token_mask((len(x_BCHW), tokens), mask_ratio=0.75)
        embedded_BKD = decoder.embed(encoder.encode(images=x_BCHW, idx_keep=keep_BK))
        filled_BND = utils.repeat_token(decoder.mask_token, (len(x_BCHW), tokens))
        decoded_BND = decoder.decode(utils.set_at_index(filled_BND, keep_BK, embedded_BKD))
        prediction = decoder.predict(utils.get_at_index(decoded_BND, masked_BM))
        target = utils.get_at_index(utils.patchify(x_BCHW, patch_px), masked_BM - 1)  # without the class token
        nn.functional.mse_loss(prediction, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights: dict[str, Tensor] = vit.state_dict()
    return weights


LIGHTLY = {"simclr": lightly_simclr, "dino": lightly_dino, "mae": lightly_mae}
"""Those of which lightly has an example that this page follows."""


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
