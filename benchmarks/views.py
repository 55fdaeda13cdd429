"""How fast views are made: this package's engine against stock Kornia, lightly's transforms and torchvision v2.

    python benchmarks/views.py [--quick] [--json FILE]

The same images (drawn fields of 683 x 512 px, uint8, in memory), the same kinds of views (SimCLR: 2 of 224 px; DINO:
2 of 224 px and 8 of 96 px), one thread. A round lets every contender make the views of one batch, in turn, and counts
CPU seconds of the process; what is reported are medians over rounds, and ratios taken within rounds. Not the same
work: Kornia resizes without antialias and draws one order of the colour ops for a whole batch, lightly blurs with
Pillow's box approximation; ours antialiases and draws the order for each view.

With a GPU the device's engine is measured too: views per second, kernels and host reads per step.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2 as tv
from kornia import augmentation as K
from lightly.transforms import DINOTransform, SimCLRTransform
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.data import synthetic
from ssl_pretrain.methods import Method, Views, create, dino, simclr
from ssl_pretrain.views import ViewSpec, engine, from_kornia, fused
from ssl_pretrain.views.colour import stages
from ssl_pretrain.views.plan import plan

SIZE_PX = (683, 512)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORK: dict[str, tuple[ViewSpec, ...]] = {
    "SimCLR 2x224": simclr.Config().views(),
    "DINO 2x224+8x96": dino.Config().views(),
}
Contender = Callable[[Sequence[np.ndarray], int], None]


def ours(specs: Sequence[ViewSpec], kernels: fused.Kernels = fused.EAGER) -> Contender:
    def make(images: Sequence[np.ndarray], step: int) -> None:
        drawn = plan(specs, np.arange(len(images)), np.array([image.shape[:2] for image in images]), step, 0)
        fused.render(drawn, [torch.from_numpy(image) for image in images], MEAN, STD, kernels=kernels)

    return make


def ours_compiled(specs: Sequence[ViewSpec]) -> Contender:
    return ours(specs, fused.compiled(specs))


def ours_yiq(specs: Sequence[ViewSpec]) -> Contender:
    return ours_compiled([replace(spec, hue_space="yiq") for spec in specs])


def from_stock_kornia(specs: Sequence[ViewSpec]) -> Contender:
    """The pipelines of `kornia` below, each compiled by `from_kornia`: colour before blur, a kernel of 23 px."""
    made = [from_kornia(pipeline) for pipeline in kornia_pipelines(specs)]
    kernels = fused.compiled([views.spec for views in made])

    def make(images: Sequence[np.ndarray], step: int) -> None:
        sizes = np.array([image.shape[:2] for image in images])
        for spec, views in zip(specs, made, strict=True):
            drawn = plan([replace(views.spec, count=spec.count)], np.arange(len(images)), sizes, step, 0)
            fused.render(drawn, [torch.from_numpy(i) for i in images], views.mean, views.std, kernels=kernels)

    return make


def kornia_pipelines(specs: Sequence[ViewSpec]) -> list[K.AugmentationSequential]:
    """One a spec, as stable-pretraining and Kornia's own pages write it."""
    return [
        K.AugmentationSequential(
            K.RandomResizedCrop((spec.size_px, spec.size_px), scale=spec.scale, ratio=spec.ratio),
            K.RandomHorizontalFlip(p=spec.hflip_p),
            K.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter_p),
            K.RandomGrayscale(p=spec.gray_p),
            K.RandomGaussianBlur((23, 23), spec.blur_sigma, p=spec.blur_p),
            *([K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=spec.solarize_p)] if spec.solarize_p else []),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        for spec in specs
    ]


def kornia(specs: Sequence[ViewSpec]) -> Contender:
    pipelines = kornia_pipelines(specs)

    def make(images: Sequence[np.ndarray], step: int) -> None:
        x_BCHW = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2).float() / 255
        for spec, pipeline in zip(specs, pipelines, strict=True):
            pipeline(torch.cat([x_BCHW] * spec.count))

    return make


def lightly(specs: Sequence[ViewSpec]) -> Contender:
    """Its transforms with its defaults, on Pillow images; the number of local crops is ours."""
    transform = SimCLRTransform() if len(specs) == 1 else DINOTransform(n_local_views=specs[-1].count)

    def make(images: Sequence[np.ndarray], step: int) -> None:
        for image in images:
            transform(Image.fromarray(image))

    return make


def torchvision(specs: Sequence[ViewSpec]) -> Contender:
    """v2, on uint8 tensors."""
    pipelines = [
        tv.Compose(
            [
                tv.RandomResizedCrop(spec.size_px, scale=spec.scale, antialias=True),
                tv.RandomHorizontalFlip(spec.hflip_p),
                tv.RandomApply(
                    [tv.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)], spec.jitter_p
                ),
                tv.RandomGrayscale(spec.gray_p),
                tv.RandomApply([tv.GaussianBlur(23, spec.blur_sigma)], spec.blur_p),
                tv.RandomSolarize(128, spec.solarize_p),
                tv.ToDtype(torch.float32, scale=True),
                tv.Normalize(MEAN, STD),
            ]
        )
        for spec in specs
    ]

    def make(images: Sequence[np.ndarray], step: int) -> None:
        for image in images:
            x_CHW = torch.from_numpy(image).permute(2, 0, 1)
            for spec, pipeline in zip(specs, pipelines, strict=True):
                for _ in range(spec.count):
                    pipeline(x_CHW)

    return make


CONTENDERS = {
    "lightly": lightly,
    "kornia": kornia,
    "torchvision v2": torchvision,
    "ours, plain torch": ours,
    "ours, compiled": ours_compiled,
    "ours, compiled, yiq": ours_yiq,
    "the kornia pipeline, from_kornia": from_stock_kornia,
}


def measure(specs: Sequence[ViewSpec], images: Sequence[np.ndarray], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of each contender in each round, the first (warming up) left out."""
    makers = {name: contender(specs) for name, contender in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for step in range(rounds + 1):
        for name, make in makers.items():
            began = time.process_time()
            make(images, step)
            seconds[name].append(time.process_time() - began)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


# With a GPU


def on_gpu(count: int, rounds: int) -> dict[str, dict[str, float | str]]:
    """The engine that a run would take on this device: speed, launches, host reads, bytes, and its share of a step."""
    device = torch.device("cuda")
    images = [synthetic.field(0, i, SIZE_PX).pixels_HWC for i in range(8)] * (count // 8)
    flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).to(device)
    size_B2 = np.array([image.shape[:2] for image in images])
    offset_B = np.arange(count) * images[0].size
    found: dict[str, dict[str, float | str]] = {}
    for work, specs in WORK.items():
        chosen = engine.choose(specs, device, images=10**9)
        make = partial(step_of_views, chosen, specs, (flat, offset_B), size_B2)
        per_step = gpu_seconds(make, rounds)
        row: dict[str, float | str] = {"engine": chosen.reason, "views_per_s": count * len_of(specs) / per_step}
        row |= launches_and_reads(make)
        drawn = plan(specs, np.arange(count), size_B2, 0, 0)
        row["bytes_per_view"] = float(np.mean([moved_bytes(spec, drawn.of(i)) for i, spec in enumerate(specs)]))
        if "DINO" in work:
            network = create(dino.Config(), backbones.create("vit_small_patch16_224", img_size=224)).to(device)
            step = gpu_seconds(partial(training_step, network, make(0)), max(3, rounds // 5))
            row |= {"step_s": step, "share_of_a_step": per_step / (per_step + step)}
        found[work] = row
    return found


def step_of_views(
    chosen: engine.Engine, specs: Sequence[ViewSpec], flat: engine.Flat, size_B2: np.ndarray, step: int
) -> dict[str, Tensor]:
    """As a run makes them, plan and all."""
    drawn = plan(specs, np.arange(len(size_B2)), size_B2, step, 0)
    spans = zip(size_B2, flat[1], size_B2.prod(1) * 3, strict=True)
    images = [flat[0][start : start + length].view(*size, 3) for size, start, length in spans]
    device = flat[0].device
    return chosen.render(drawn, lambda: images, lambda: flat, size_B2, MEAN, STD, device, torch.bfloat16)


def len_of(specs: Sequence[ViewSpec]) -> int:
    return sum(spec.count for spec in specs)


def gpu_seconds(call: Callable[[int], object], rounds: int) -> float:
    """Median seconds of a call on the device."""
    seconds = []
    for step in range(rounds + 3):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call(step)
        last.record()
        torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) / 1000)
    return float(np.median(seconds[3:]))


def launches_and_reads(make: Callable[[int], object]) -> dict[str, float]:
    """Kernels that a step launches, and how often it waits for the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        make(0)
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sum("mem" not in event.name.lower() for event in on_device)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as reads:
        warnings.simplefilter("always")
        make(1)
    torch.cuda.set_sync_debug_mode("default")
    return {
        "kernels_per_step": kernels,
        "host_reads_per_step": len([w for w in reads if "synchroniz" in str(w.message)]),
    }


def moved_bytes(spec: ViewSpec, rows_BVC: np.ndarray) -> float:
    """Bytes that a view has to move in the Triton engine: its crop once, and every pass over the float32 view."""
    view = 12 * spec.size_px**2
    crop = 3 * (rows_BVC[..., 2] * rows_BVC[..., 3]).mean()
    found = stages(spec, rows_BVC.reshape(-1, rows_BVC.shape[-1]))
    hued, mixed = (found.hue_NK != 0), found.linear_NK
    passes = 1 + 4 * spec.blur_p + 2 * hued.sum(1).mean() + (mixed & ~hued).sum(1).mean() + 2 * mixed.sum(1).mean()
    return float(crop + view * (passes + 1.5))  # the last pass reads float32 and writes bf16


def training_step(network: Method, crops: dict[str, Tensor], step: int) -> None:
    keys = np.zeros((next(iter(crops.values())).shape[1], 2), np.uint32)
    with torch.autocast("cuda", torch.bfloat16):
        loss = network.loss(Views({name: x.float() for name, x in crops.items()}, keys), 0.5)["loss"]
    loss.backward()
    network.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and rounds, to see that it runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    count, rounds = (4, 3) if given.quick else (16, 15)
    images = [synthetic.field(0, i, SIZE_PX).pixels_HWC for i in range(count)]
    found = {}
    for work, specs in WORK.items():
        views = count * sum(spec.count for spec in specs)
        taken = measure(specs, images, rounds)
        found[work] = {
            name: {
                "views_per_cpu_s": views / float(np.median(s)),
                **{f"vs_{peer}": float(np.median(taken[peer] / s)) for peer in ("lightly", "kornia")},
            }
            for name, s in taken.items()
        }
    console = Console(width=120)
    for work, rows in found.items():
        table = Table("", "views per CPU second", "times lightly", "times kornia", title=work)
        for name, row in rows.items():
            table.add_row(name, f"{row['views_per_cpu_s']:.0f}", f"{row['vs_lightly']:.2f}", f"{row['vs_kornia']:.2f}")
        console.print(table)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, batches of {count}, {rounds} rounds"
    console.print(machine)
    gpu = on_gpu(32 if given.quick else 128, 5 if given.quick else 50) if torch.cuda.is_available() else {}
    if gpu:
        machine += f", {torch.cuda.get_device_name()}"
        console.print(gpu)
    else:
        console.print("no GPU: views per second, launches, host reads and share of a step were not measured")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "cpu": found, "gpu": gpu}, indent=2))


if __name__ == "__main__":
    main()
