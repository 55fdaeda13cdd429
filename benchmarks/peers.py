"""The contenders of `throughput.py`: loops that train the same network on the same files, each in its own way.

`Ours`      this package's loop: feed, method, guard, optimizer, log, as `train/loop.py` runs them
`Lightly`   the loop of lightly's examples: LightlyDataset, its transforms, its heads and losses, a forward each view
`Stacked`   the way of stable-pretraining's recipes: workers decode and reduce, stock Kornia on the device
`Ready`     the limit: the same step on views that are there already, without guard and log

`lightly_train` runs as a program of its own, where it is installed (AGPL-3.0; this package does not ask for it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as tv
from examples import EXAMPLES
from kornia import augmentation as K
from lightly.data import LightlyDataset
from PIL import Image, ImageChops, ImageOps
from rich.console import Console
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ssl_pretrain import rng
from ssl_pretrain.data import sources
from ssl_pretrain.errors import DataError, SslPretrainError
from ssl_pretrain.methods import Views
from ssl_pretrain.train import loop, optim, setup
from ssl_pretrain.train.recipe import Recipe, load
from ssl_pretrain.train.run import Run, over_ranks
from ssl_pretrain.train.signals import StopFlag
from ssl_pretrain.views import ViewSpec

JPEG_PX, QUALITY = (1600, 1200), 90
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
REDUCED_PX = 256
"""Side to which the workers of the stacked loop reduce an image."""
BATCHES = 4
"""That the limit takes in turn. On one alone a network soon has gradients of almost zero, and denormals are slow."""
STEPS = 100_000
"""Of the run that is played: its middle is measured, where warm-ups are over and no prototype stands still."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained: a recipe and how much of it makes a round."""

    recipe: Mapping[str, Any]
    batch: int
    epoch: int
    """Images of an epoch; the files are repeated until there are so many."""

    def resolved(self, data: Path | None = None, words: Sequence[str] = ()) -> Recipe:
        """The recipe with the settings of a long run."""
        train = {"batch_size": self.batch, "steps": STEPS, **self.recipe.get("train", {})}
        given = {**self.recipe, "train": train, **({} if data is None else {"data": str(data)})}
        return load(given, tuple(words))


# Files


def photographs(source: str, count: int, cache: Path) -> Path:
    """A folder of `count` JPEGs of 1600 x 1200 px at quality 90, made once from the images of a folder or drawn ones.

    More than there are images are made by shifting them: other bytes, as much work. Enlarged images are smoother than
    real ones of that size, and so take less to decode: that is in favour of whoever decodes in every epoch.
    """
    folder = sources.folder(source, cache)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"no images in {source}: looked at any depth for {', '.join(SUFFIXES)}")
    key = hashlib.sha256(f"{JPEG_PX} {QUALITY} {[(f.name, f.stat().st_size) for f in files]}".encode()).hexdigest()[:12]
    out = cache / f"jpegs-{count}-{key}"
    if out.is_dir():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="jpegs-", dir=cache))

    def make(i: int) -> None:
        with Image.open(files[i % len(files)]) as opened:
            image = ImageOps.fit(opened.convert("RGB"), JPEG_PX, Image.Resampling.BICUBIC)
        shifted = ImageChops.offset(image, 37 * (i // len(files)), 0)
        shifted.save(partial / f"{i:06d}.jpg", quality=QUALITY, subsampling="4:2:0")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(make, range(count)))
    os.replace(partial, out)
    return out


def mean_bytes(folder: Path) -> float:
    """Of a file."""
    return float(np.mean([path.stat().st_size for path in folder.iterdir()]))


# Contenders


class Contender(ABC):
    """A loop that can be asked for an epoch at a time."""

    steps: int
    """Of an epoch."""
    batch: int
    device: torch.device

    @abstractmethod
    def epoch(self, steps: int | None = None) -> None:
        """Trains for an epoch, or for its first steps."""

    def close(self) -> None:  # noqa: B027  most have nothing to let go
        """Ends what else runs."""

    def seconds_per_image(self, least_s: float = 0.0, steps: int | None = None) -> float:
        """Of whole epochs, or of so many steps at a time: as many as take `least_s` or more."""
        self.finish()
        began, images = time.perf_counter(), 0
        while True:
            self.epoch(steps)
            self.finish()
            images += (steps or self.steps) * self.batch
            taken = time.perf_counter() - began
            if taken >= least_s:
                return taken / images

    def finish(self) -> None:
        """Returns when the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def prepared(work: Work, data: Path, folder: Path, words: Sequence[str] = ()) -> Run:
    """A run of this package up to its first step, in the middle of its schedule."""
    recipe = work.resolved(data, words)
    fabric = setup.fabric(recipe)
    fabric.launch()
    run = loop._prepare(recipe, folder, fabric, Console(quiet=True))
    run.step = STEPS // 2
    optim.set_rates(run.optimizer, run.optim, 0.5)
    return run


class Ours(Contender):
    """The loop of this package."""

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.batch, self.device = run, run.recipe.train.batch_size, run.fabric.device
        self.steps = max(1, epoch // self.batch)

    def epoch(self, steps: int | None = None) -> None:
        for _ in range(steps or self.steps):
            our_step(self.run)


def our_step(run: Run) -> None:
    """One turn of `loop._train`, without what happens at minutes' intervals (probe, save, checkup)."""
    step, progress = run.step, run.step / run.steps
    rate = optim.set_rates(run.optimizer, run.optim, progress)
    torch.manual_seed(rng.torch_seed(rng.fold_in(rng.key(run.recipe.top.seed, "torch"), step)) + run.feed.share.rank)
    losses, norm, _ = loop._step(run, step, progress, StopFlag())
    if broken := run.guard.look(step, losses["loss"], norm, rate):
        raise SslPretrainError(f"the step that is measured went wrong: {broken}")
    run.step = step + 1
    if run.step % run.recipe.train.log_every_steps == 0:
        means = {name: over_ranks(run.fabric, value) for name, value in losses.items()}
        assert means and norm > 0


def bare_step(run: Run, views: Views, progress: float = 0.5) -> None:
    """Forward, backward, optimizer, moving average: what nobody can leave out."""
    run.fabric.backward(run.wrapped.loss(views, progress)["loss"])
    run.method.before_step(progress)
    run.optimizer.step()
    run.method.after_step(progress)
    run.optimizer.zero_grad()


class Ready(Contender):
    """The limit: a few batches of views in turn, made before the clock runs."""

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.batch, self.device = run, run.recipe.train.batch_size, run.fabric.device
        self.steps = max(1, epoch // self.batch)
        self.views = [run.feed.part(run.step + i, 0) for i in range(BATCHES)]

    def epoch(self, steps: int | None = None) -> None:
        for i in range(steps or self.steps):
            bare_step(self.run, self.views[i % BATCHES])


class _Loading(Contender):
    """Reads files by worker processes, which live until `close`."""

    def __init__(self, dataset: Dataset[Any], files: int, work: Work, workers: int, device: torch.device) -> None:
        self.batch, self.device = work.batch, device
        self.steps = max(1, work.epoch // work.batch)
        repeated = ConcatDataset([dataset] * -(-work.epoch // files))
        self.loader: DataLoader[Any] | None = DataLoader(
            repeated, work.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )  # fmt: skip

    def batches(self, steps: int | None) -> Iterator[Any]:
        """Of an epoch."""
        assert self.loader is not None
        return itertools.islice(self.loader, steps or self.steps)

    def close(self) -> None:
        self.loader = None
        gc.collect()  # the iterator ends its workers when nobody holds it any more

    def amp(self) -> contextlib.AbstractContextManager[Any]:
        """Bf16 on a GPU, as ours."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()


class Stacked(_Loading):
    """Workers decode and reduce; stock Kornia makes all views of a batch at once, on the device; our step."""

    def __init__(self, run: Run, folder: Path, work: Work, workers: int) -> None:
        files = Files(folder)
        super().__init__(files, len(files), work, workers, run.fabric.device)
        self.run, self.pipelines = run, [(spec, stock_kornia(spec, run.feed)) for spec in run.feed.specs]
        self.seen = 0

    def epoch(self, steps: int | None = None) -> None:
        for x_BCHW in self.batches(steps):
            bare_step(self.run, self.views(x_BCHW))

    def views(self, x_BCHW: Tensor) -> Views:
        """Uint8 images (B, 3, 256, 256) -> views, made in float32: Kornia draws its parameters on the CPU."""
        x_BCHW = x_BCHW.to(self.device, non_blocking=True).float() / 255
        with torch.no_grad():
            crops = {
                spec.name: pipeline(torch.cat([x_BCHW] * spec.count)).unflatten(0, (spec.count, -1))
                for spec, pipeline in self.pipelines
            }
        self.seen += len(x_BCHW)
        return Views(crops, rng.fold_in(rng.key(0, "method"), np.arange(len(x_BCHW)) + self.seen))


class Files(Dataset[Tensor]):
    """Uint8 images (3, 256, 256): decoded by Pillow, reduced, cut at the middle."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())
        self.reduce = tv.Compose([tv.Resize(REDUCED_PX), tv.CenterCrop(REDUCED_PX), tv.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.files[i]) as image:
            made: Tensor = self.reduce(image.convert("RGB"))
        return made


def stock_kornia(spec: ViewSpec, feed: Any) -> K.AugmentationSequential:
    """The ops of a view, those left out that would never act: Kornia runs an op on all images whatever its p."""
    fed = feed.fed
    jitter = spec.brightness, spec.contrast, spec.saturation, spec.hue
    ops = (
        (True, lambda: K.RandomResizedCrop((spec.size_px, spec.size_px), scale=spec.scale, ratio=spec.ratio)),
        (spec.hflip_p, lambda: K.RandomHorizontalFlip(p=spec.hflip_p)),
        (spec.jitter_p, lambda: K.ColorJitter(*jitter, p=spec.jitter_p)),
        (spec.gray_p, lambda: K.RandomGrayscale(p=spec.gray_p)),
        (spec.blur_p, lambda: K.RandomGaussianBlur((23, 23), spec.blur_sigma, p=spec.blur_p)),
        (spec.solarize_p, lambda: K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=spec.solarize_p)),
        (True, lambda: K.Normalize(torch.tensor(fed.mean), torch.tensor(fed.std))),
    )
    return K.AugmentationSequential(*(make() for wanted, make in ops if wanted))


# lightly's examples


class Lightly(_Loading):
    """lightly's way from a folder to a step."""

    def __init__(self, recipe: Recipe, folder: Path, work: Work, workers: int, device: torch.device) -> None:
        backbone = setup.backbone(recipe)
        self.example = EXAMPLES[recipe.method_name](backbone, recipe.method)
        self.example.module.to(device).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = LightlyDataset(str(folder), transform=self.example.transform)
        super().__init__(dataset, len(dataset), work, workers, device)

    def epoch(self, steps: int | None = None) -> None:
        example = self.example
        for views, *_ in self.batches(steps):
            with self.amp():
                loss = example.loss([view.to(self.device, non_blocking=True) for view in views])
            loss.backward()
            example.before_step()
            example.optimizer.step()
            example.optimizer.zero_grad()


# lightly-train

TRAIN = """
import json, sys, lightly_train
train = vars(lightly_train).get("pretrain") or lightly_train.train
train(**json.loads(sys.argv[1]), overwrite=True)
"""


def lightly_train(recipe: Recipe, folder: Path, work: Work, workers: int, epochs: int) -> tuple[float | None, str]:
    """Seconds an image of lightly-train, and why there are none.

    The difference of a run of twice the epochs and one of `epochs`: what it takes to start and to export is left out.
    Its own augmentations and heads; backbone, method, batch, the views' sides and number, and prototypes are ours.
    """
    if importlib.util.find_spec("lightly_train") is None:
        return None, "not installed (pip install lightly-train; AGPL-3.0)"
    if recipe.method_name not in ("simclr", "dino"):
        return None, f"it has no {recipe.method_name}"
    taken = []
    with tempfile.TemporaryDirectory() as out:
        asked = {
            "out": out, "data": str(folder), "model": f"timm/{recipe.backbone.name}", "method": recipe.method_name,
            "batch_size": work.batch, "num_workers": workers, **same_views(recipe),
        }  # fmt: skip
        for each in (epochs, 2 * epochs):
            given = json.dumps({**asked, "epochs": each})
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", TRAIN, given], capture_output=True, text=True, check=False)
            taken.append(time.perf_counter() - began)
            if done.returncode:
                return None, f"it failed: {' '.join(done.stderr.split())[-200:]}"
    images = epochs * (len(list(folder.iterdir())) // work.batch) * work.batch
    return max(taken[1] - taken[0], 1e-9) / images, ""


def same_views(recipe: Recipe) -> dict[str, Any]:
    """What tells lightly-train to make as many views, as large, and to compare them with as many prototypes."""
    first, *others = recipe.specs()
    views: dict[str, Any] = {"image_size": [first.size_px] * 2}
    if recipe.method_name != "dino":
        return {"transform_args": views}
    local = others[-1]
    views["local_view"] = {"num_views": local.count, "view_size": [local.size_px] * 2}
    return {"transform_args": views, "method_args": {"output_dim": recipe.method.prototypes}}


@contextlib.contextmanager
def scratch(cache: Path | None) -> Iterator[Path]:
    """The folder for files and packs: the given one, which is kept, or one that is removed."""
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
        return
    made = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
