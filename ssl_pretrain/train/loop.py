"""The training loop. Everything that happens at a step is a function of recipe, pack, seed and step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_pretrain import artefact, rng
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import SslPretrainError, Stopped, UsageError
from ssl_pretrain.files import write_durably
from ssl_pretrain.methods import Method, OptimSpec
from ssl_pretrain.train import drift, optim, setup, source
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.checkup import Checkup
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.health import LOOK_EVERY, Diagnosis, Health, not_finite
from ssl_pretrain.train.journal import Journal
from ssl_pretrain.train.lock import locked
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.pace import Pace
from ssl_pretrain.train.planning import planned
from ssl_pretrain.train.recipe import Recipe, defaults, load
from ssl_pretrain.train.signals import StopFlag
from ssl_pretrain.train.sync import synchronised
from ssl_pretrain.train.watch import enough, first_views, look, origin
from ssl_pretrain.views.engine import choose

MAY_CHANGE = (
    "data", "out", "probe.", "train.devices", "train.accelerator", "train.residency", "train.save_", "train.log_",
    "train.max_", "train.on_collapse", "views.engine", "auto",
)  # fmt: skip
"""Beginnings of the keys that a continued run may change; of the data, the pack's fingerprint must stay."""


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    artefact: Path
    step: int
    scores: Mapping[str, float]
    """The last k-NN scores; empty without a probe."""


@dataclass
class Run:
    """A run in progress."""

    recipe: Recipe
    folder: Path
    fabric: Fabric
    pack: Pack
    method: Method
    wrapped: Any
    """The method as Fabric runs it (precision, DDP)."""
    optimizer: Optimizer
    optim: OptimSpec
    feed: Feed
    checkup: Checkup
    health: Health
    probe: OnlineProbe | None
    steps: int
    drift: drift.Drift | None = None
    """Of a run that starts from given weights, on rank 0."""
    step: int = 0
    best: float = -1.0
    stale: int = 0
    """Probes since the best one."""
    scores: Mapping[str, float] = field(default_factory=dict)


def pretrain(
    recipe: str | Path | Mapping[str, Any],
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    words: tuple[str, ...] = (),
    console: Console | None = None,
) -> Result:
    """Pretrains a backbone; started again with the same `out`, it continues.

    recipe   a YAML file, or the mapping that would stand in one
    data     a pack, a folder of images, or `synthetic:N`
    out      the folder of the run
    words    what the command line would say: `("--train.epochs", "5")`

    Raises the errors of `ssl_pretrain.errors`, each one line.
    """
    given = tuple(part for name, v in (("--data", data), ("--out", out)) if v is not None for part in (name, str(v)))
    resolved = load(Path(recipe) if isinstance(recipe, str) else recipe, (*words, *given))
    name = Path(recipe).stem if isinstance(recipe, str | Path) else resolved.method_name
    folder = Path(resolved.top.out or f"runs/{name}")
    fabric = setup.fabric(resolved)
    fabric.launch()
    console = (console or Console()) if fabric.is_global_zero else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            stack.enter_context(locked(folder))
        run = _prepare(resolved, folder, fabric, console)
        stop = stack.enter_context(StopFlag())  # not before: packing may just end, it is resumable
        journal = Journal(folder, run.step, run.steps, resolved.train.batch_size, console, fabric.is_global_zero)
        with journal:
            if run.step < run.steps and not enough(run):
                _train(run, journal, stop)
            if run.step < run.steps:
                journal.say(f"ended at step {run.step} of {run.steps}: {run.stale} probes in a row were no better")
        fabric.barrier()
        return Result(folder, folder / "artefact", run.step, run.scores)


def _prepare(recipe: Recipe, folder: Path, fabric: Fabric, console: Console) -> Run:
    """Everything up to the first step: pack, networks, the newest checkpoint."""
    cache = folder.parent / "cache"
    starts = source.asked(recipe.backbone.init) and Checkpoints(folder / "checkpoints").newest() is None
    if starts:
        source.check(str(recipe.backbone.init))  # before images are packed
    with fabric.rank_zero_first():
        pack = setup.pack(recipe, cache, console)
    if recipe.auto:
        mine = planned(recipe, pack, folder, fabric.world_size, cache, console) if fabric.is_global_zero else recipe
        recipe = fabric.broadcast(mine)
    method = setup.method(recipe, partial(console.print, highlight=False, markup=False) if starts else None)
    spec = recipe.optim(method.backbone.family)
    where, kept = setup.residence(recipe, pack, fabric.world_size, fabric.device)
    feed = setup.feed(recipe, pack, method, fabric.world_size, fabric.global_rank, fabric.device, where)
    steps = feed.steps = recipe.train.steps or recipe.train.epochs * feed.steps_per_epoch
    shown = steps * recipe.train.batch_size // fabric.world_size
    feed.engine = choose(feed.specs, fabric.device, shown, recipe.views.engine)
    if fabric.world_size > 1:
        synchronised(method, fabric.device)
    optimizer = optim.create(method, spec)
    wrapped, optimizer = fabric.setup(method, optimizer)
    wrapped.mark_forward_method("loss")
    probe = OnlineProbe(recipe, method.backbone.input, cache) if recipe.probe.data and fabric.is_global_zero else None
    crops = 2 * recipe.train.batch_size // (fabric.world_size * recipe.train.accumulate)
    settings = recipe.flat() | {"train.lr": spec.lr, "train.warmup": spec.warmup}
    health = Health(steps, method.chance(recipe.train.batch_size // recipe.train.accumulate), settings, crops)
    checkup = Checkup(feed, method)
    run = Run(recipe, folder, fabric, pack, method, wrapped, optimizer, spec, feed, checkup, health, probe, steps)
    _restore(run)
    if source.asked(recipe.backbone.init) and fabric.is_global_zero:
        run.drift = drift.opened(folder, method.backbone, pack, recipe.views.window_px, run.step)
    if fabric.is_global_zero:
        write_durably(folder / "recipe.yaml", recipe.yaml().encode())
        known = f"from step {run.step} of" if run.step else "for"
        console.print(f"{recipe.method_name} on {method.backbone.name}, {len(pack)} images, {known} {steps} steps")
        console.print(f"{kept}\n{feed.engine.reason}", highlight=False)
    return run


def _train(run: Run, journal: Journal, stop: StopFlag) -> None:
    """The loop."""
    train, saved_at, skipped = run.recipe.train, time.monotonic(), 0
    checkpoints = Checkpoints(run.folder / "checkpoints")
    pace = Pace(run.recipe.probe, run.feed.steps_per_epoch, run.steps, at_end=run.probe is not None)
    if run.step == 0:
        first_views(run, journal)
        seen = run.checkup.often()  # what later features are compared with
        run.health.look(0, seen)
        journal.record(0, seen, "health")
    for step in range(run.step, run.steps):
        progress = step / run.steps
        rate = optim.set_rates(run.optimizer, run.optim, progress)
        torch.manual_seed(
            rng.torch_seed(rng.fold_in(rng.key(run.recipe.top.seed, "torch"), step)) + run.feed.share.rank
        )
        buffers = [buffer.clone() for buffer in run.method.buffers()]
        with optim.held(run.method, progress < train.freeze_backbone):
            losses = _forward_backward(run, step, progress)
        norm = _gradient_norm(run.method)
        if norm.isfinite():
            run.method.before_step(progress)
            run.optimizer.step()
            run.method.after_step(progress)
            skipped = 0
        else:
            skipped += 1
            for buffer, before in zip(run.method.buffers(), buffers, strict=True):
                buffer.copy_(before)  # BatchNorm moved its statistics in the forward
            broken = not_finite(float(losses["loss"]), float(norm), skipped, rate)
            journal.say(f"step {step}: {broken}")
            journal.record(step + 1, {broken.name: 1}, "health")
            if skipped > train.max_skipped:
                raise SslPretrainError(f"{skipped} steps in a row had a non-finite gradient: {broken}")
        run.optimizer.zero_grad()
        run.step = step + 1
        ill = None
        if run.step % train.log_every_steps == 0 or run.step == run.steps:
            means = {name: _over_ranks(run.fabric, value) for name, value in losses.items()}
            journal.metrics(run.step, {**means, "lr": rate, "gradient_norm": float(norm)})
            ill = _examine(run, journal, means)
        look(run, journal, pace)
        done = run.step == run.steps or enough(run)
        asked = _any_rank(run.fabric, stop)
        due = train.save_every_steps is not None and run.step % train.save_every_steps == 0
        late = time.monotonic() - saved_at > 60 * train.save_every_minutes
        if run.fabric.is_global_zero and (asked or due or late or ill or done):
            with journal.aside():
                checkpoints.save(run.step, _state(run))
                artefact.write(run.folder / "artefact", run.method.backbone, origin(run))
            saved_at = time.monotonic()
        if ill:
            run.fabric.barrier()
            raise SslPretrainError(f"step {run.step}: {ill} (train.on_collapse is stop; the checkpoint is saved)")
        if asked:
            run.fabric.barrier()  # launchers end the others when one leaves, and rank 0 may still be saving
            raise Stopped(f"stopped by {stop.name or 'another rank'} at step {run.step} of {run.steps}; "
                          "the same command continues")  # fmt: skip
        if done:
            break


def _forward_backward(run: Run, step: int, progress: float) -> dict[str, Tensor]:
    """Gradients of the step's global batch; returns the losses, averaged over the parts of the accumulation."""
    parts = run.feed.share.parts
    sums: dict[str, Tensor] = {}
    for part, views in enumerate(run.feed.views(step)):
        with run.fabric.no_backward_sync(run.wrapped, enabled=part + 1 < parts and run.fabric.world_size > 1):
            losses = run.wrapped.loss(views, progress)
            run.fabric.backward(losses["loss"] / parts)
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / parts
    return sums


def _gradient_norm(method: Method) -> Tensor:
    """Over all trained parameters; after DDP has averaged them it is the same on every rank, and so is the verdict."""
    return nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])


def _any_rank(fabric: Fabric, stop: StopFlag) -> bool:
    """Whether any rank was asked to stop: all have to leave at the same step."""
    if fabric.world_size == 1:
        return bool(stop.name)
    return _over_ranks(fabric, torch.tensor(float(bool(stop.name)), device=fabric.device)) > 0


def _over_ranks(fabric: Fabric, value: Tensor) -> float:
    """The mean."""
    value = value.detach().clone()
    if fabric.world_size > 1:
        dist.all_reduce(value)
    return value.item() / fabric.world_size


def _examine(run: Run, journal: Journal, losses: Mapping[str, float]) -> Diagnosis | None:
    """Tells what is newly wrong with the run; returns what should end it.

    Every rank sees the same numbers, and so comes to the same verdict.
    """
    looked: dict[str, float] = {}
    if run.step % (LOOK_EVERY * run.recipe.train.log_every_steps) == 0:
        with journal.aside():
            seen = run.checkup.often()
        looked = {k: _over_ranks(run.fabric, torch.tensor(v, device=run.fabric.device)) for k, v in seen.items()}
    found = run.health.look(run.step, {**losses, **looked})
    for diagnosis in run.health.news(found):
        journal.say(f"step {run.step}: {diagnosis}")
    if looked or found:
        journal.record(run.step, {**looked, **{diagnosis.name: 1 for diagnosis in found}}, "health")
    return run.health.fatal(found) if run.recipe.train.on_collapse == "stop" else None


def _state(run: Run) -> dict[str, Any]:
    return {
        "step": run.step,
        "best": run.best,
        "stale": run.stale,
        "scores": dict(run.scores),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "recipe": json.dumps(run.recipe.flat()),
        "pack": run.pack.fingerprint,
    }


def _restore(run: Run) -> None:
    """Continues from the newest checkpoint; refuses one of another recipe or other images, naming the difference."""
    checkpoints = Checkpoints(run.folder / "checkpoints")
    if run.fabric.is_global_zero:
        checkpoints.sweep()
    run.fabric.barrier()
    state = checkpoints.newest()
    mine = state["step"] if state else 0
    apart = torch.tensor(float(run.fabric.broadcast(mine) != mine), device=run.fabric.device)
    if _over_ranks(run.fabric, apart) > 0:
        raise UsageError(f"the processes see different checkpoints: all nodes must share the folder {run.folder}")
    if state is None:
        return
    # A key that is younger than the checkpoint had no other value than its default.
    before = json.loads(json.dumps(defaults(run.recipe.method_name))) | json.loads(state["recipe"])
    now = json.loads(json.dumps(run.recipe.flat()))
    changed = [k for k in now if now[k] != before.get(k) and not k.startswith(MAY_CHANGE)]
    if changed:
        what = ", ".join(f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in changed[:3])
        raise UsageError(
            f"{run.folder} holds a run of another recipe ({what}); choose another --out or undo the change"
        )
    if state["pack"] != run.pack.fingerprint:
        raise UsageError(f"{run.folder} was trained on other images than {run.recipe.top.data}; choose another --out")
    run.method.load_state_dict(state["method"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.best, run.scores = state["step"], state["best"], state["scores"]
    run.stale = state.get("stale", 0)
    if any(now[k] != before.get(k) for k in ("probe.data", "probe.size_px", "probe.point_px", "probe.score")):
        run.best, run.stale = -1.0, 0  # scores of another probe are no measure
    if run.fabric.is_global_zero:  # a crash may have come between the checkpoint and the artefact
        artefact.write(run.folder / "artefact", run.method.backbone, origin(run))
