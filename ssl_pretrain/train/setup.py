"""From a recipe to what the loop needs: processes, pack, backbone, method, optimizer."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from rich.console import Console
from torch.distributed.rendezvous import rendezvous

from ssl_pretrain import backbones, methods
from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.data import sources
from ssl_pretrain.data.building import pack_or_folder
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method
from ssl_pretrain.terminal import packing
from ssl_pretrain.train import init, source
from ssl_pretrain.train.feed import Feed, Share
from ssl_pretrain.train.recipe import Recipe
from ssl_pretrain.train.residency import Choice, Where, choose, ram_free_bytes
from ssl_pretrain.views import ViewSpec

HALF_AN_HOUR = timedelta(minutes=30)
ASPECT = 4 / 3
"""Long side of an image over its short side, as cameras have it; for the short side of the pack only."""


def fabric(recipe: Recipe) -> Fabric:
    """Processes and precision. torchrun and SLURM say how many there are; else one per GPU, or one on the CPU."""
    train = recipe.train
    if train.accelerator == "gpu" and not torch.cuda.is_available():
        raise UsageError("train.accelerator is gpu, but torch sees no GPU here; use auto or cpu")
    cpu = train.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if train.residency == "gpu" and (cpu or not torch.cuda.is_available()):  # said here, before images are packed
        raise UsageError("train.residency is gpu, but torch sees no CUDA GPU here: use auto, pinned or mapped")
    local, nodes = _launched()
    devices: int | str = local or train.devices or (1 if cpu else "auto")
    many = nodes > 1 or (devices != 1 if isinstance(devices, int) else torch.cuda.device_count() > 1)
    bf16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = train.precision if train.precision != "auto" else ("bf16-mixed" if bf16 else "32-true")
    return Fabric(
        accelerator="cpu" if cpu else "auto", devices=devices, num_nodes=nodes, precision=precision,
        strategy=_strategy(local, nodes) if many else "auto",
    )  # fmt: skip


def _strategy(local: int, nodes: int) -> DDPStrategy:
    """By who started the processes: Fabric itself, torchrun on this machine, or another launcher or several nodes."""
    if not local:
        return OnThisMachine()
    return Restarted() if nodes == 1 and "TORCHELASTIC_RESTART_COUNT" in os.environ else DDPStrategy()


class Restarted(DDPStrategy):
    """torchrun's processes, each attempt under names of its own in the store.

    torch 2.15 keeps the addresses of the killed ones there; the next ones may read them, and wait for nobody.
    """

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        assert self.cluster_environment is not None
        rank, ranks, timeout = self.global_rank, self.cluster_environment.world_size(), self._timeout or HALF_AN_HOUR
        store = next(rendezvous("env://", rank, ranks, timeout=timeout))[0]
        attempt = f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        _join(self, dist.PrefixStore(attempt, store), rank, ranks)  # type: ignore[attr-defined]
        super()._setup_distributed()


def _join(strategy: DDPStrategy, store: Any, rank: int, ranks: int) -> None:
    device = strategy.root_device
    dist.init_process_group(
        strategy._get_process_group_backend(), store=store, rank=rank, world_size=ranks,
        device_id=None if device.type == "cpu" else device,
    )  # fmt: skip


class OnThisMachine(DDPStrategy):
    """Processes that Fabric started here: they meet on the loopback interface, where no other machine can come in.

    By itself torch's store listens on all interfaces, and whoever reaches it is believed.
    """

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        assert self.cluster_environment is not None
        host, port = "127.0.0.1", self.cluster_environment.main_port
        ranks, first = self.num_processes, self.global_rank == 0
        listener = socket.create_server((host, port)).detach() if first else None
        if sys.platform == "linux":  # where the interface is called so
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        timeout = self._timeout or HALF_AN_HOUR
        store = dist.TCPStore(host, port, ranks, first, timeout, master_listen_fd=listener)  # type: ignore[attr-defined]
        _join(self, store, self.global_rank, ranks)
        super()._setup_distributed()


def _launched() -> tuple[int, int]:
    """Processes on this node and number of nodes that torchrun or SLURM started; (0, 1) where neither did."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    # Lightning takes no notice of SLURM in interactive jobs, where the variables describe what could be started.
    if "SLURM_NTASKS_PER_NODE" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env["SLURM_NTASKS_PER_NODE"]), int(env.get("SLURM_NNODES", "1"))
    return 0, 1


def short_side_px(specs: tuple[ViewSpec, ...], window_px: int | None) -> int | None:
    """The shortest side of a pack from which no crop has to be enlarged, or None to keep images as they are.

    A view of S pixels that shows a share `a` of an image asks for S / sqrt(a * aspect): SimCLR's 224 px at 0.08 for
    686, which becomes 704 (the next multiple of 32).

    >>> short_side_px((ViewSpec("view", 224, (0.08, 1.0)),), None)
    704
    """
    if window_px is not None:
        return None
    return max(32 * math.ceil(spec.size_px / math.sqrt(spec.scale[0] * ASPECT) / 32) for spec in specs)


def pack(recipe: Recipe, cache: Path, console: Console) -> Pack:
    """The pack of the recipe's data, built into `cache` where it is not one yet."""
    if recipe.top.data is None:
        raise UsageError("no images are named: give --data FOLDER (or `data:` in the recipe)")
    wanted = recipe.views.short_side_px or short_side_px(recipe.specs(), recipe.views.window_px)
    source = sources.folder(recipe.top.data, cache)
    with packing(console) as progress:
        found = pack_or_folder(source, cache, wanted, progress)
    return found


def backbone(recipe: Recipe) -> Backbone:
    """The backbone with random weights drawn from the seed."""
    torch.manual_seed(recipe.top.seed)
    name = recipe.backbone.name
    built = backbones.create(name, **recipe.backbone_options(backbones.maskable(name)))
    if not any(parameter.requires_grad for parameter in built.parameters()):
        raise UsageError(f"the backbone {name} has nothing to train")
    if isinstance(built, MaskableBackbone):
        uneven = [spec for spec in recipe.specs() if spec.size_px % built.patch_px]
        if uneven:
            raise UsageError(
                f"the view {uneven[0].name} has {uneven[0].size_px} px, which {built.name}'s patches of "
                f"{built.patch_px} px do not divide"
            )
    return built


def method(recipe: Recipe, say: Callable[[str], None] | None = None) -> Method:
    """The method around a new backbone; with `say`, which is told what arrived, it starts from `backbone.init`."""
    if recipe.auto:
        raise UsageError(f"{', '.join(sorted(recipe.auto))}: auto is not known before the images are: plan first")
    trunk, chosen = backbone(recipe), recipe.backbone
    if say is None or chosen.init is None or not source.asked(chosen.init):
        return methods.create(recipe.method, trunk)
    filled = init.fill(trunk, chosen.init, chosen.init_partial)
    say(str(filled))
    built = methods.create(recipe.method, trunk)  # copies it for a teacher, and may draw it anew
    init.restore(trunk, [module for module in built.modules() if isinstance(module, Backbone)], filled)
    return built


def dtype(recipe: Recipe) -> torch.dtype:
    """Of views and weights; float64 is for comparing runs."""
    return torch.float64 if recipe.train.precision == "64-true" else torch.float32


def residence(recipe: Recipe, images: Pack, ranks: int, device: torch.device) -> Choice:
    """Where this process keeps the images, by what memory is free now."""
    gpu_free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    ranks_here = max(1, ranks // _launched()[1])
    pack_bytes, wanted = images.pixels.nbytes, recipe.train.residency
    return choose(pack_bytes, device.type, wanted, gpu_free_bytes, ram_free_bytes(), ranks_here)


def feed(
    recipe: Recipe, images: Pack, built: Method, ranks: int, rank: int, device: torch.device, where: Where = "mapped"
) -> Feed:
    """The views of every step; `UsageError` where the batch does not fit the images or the processes."""
    batch, parts = recipe.train.batch_size, recipe.train.accumulate
    if batch > len(images):
        raise UsageError(
            f"train.batch_size is {batch}, but there are only {len(images)} images: "
            f"use --train.batch_size {len(images)} or less"
        )
    if batch % (ranks * parts):
        raise UsageError(
            f"train.batch_size {batch} cannot be shared by {ranks} processes x {parts} parts: "
            f"use a multiple of {ranks * parts}"
        )
    share = Share(rank, ranks, parts)
    top, window_px, fed = recipe.top, recipe.views.window_px, built.backbone.input
    return Feed(images, recipe.specs(), batch, top.seed, window_px, fed, share, device, dtype(recipe), where)
