"""The training loop. Everything that happens at a step is a function of recipe, pack, seed and step."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from ssl_pretrain import artefact, rng
from ssl_pretrain.backbones import MaskableBackbone
from ssl_pretrain.errors import SslPretrainError, Stopped
from ssl_pretrain.files import write_durably
from ssl_pretrain.train import drift, optim, setup, slurm, source
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.checkup import Checkup
from ssl_pretrain.train.guard import Buffers, Guard
from ssl_pretrain.train.health import LOOK_EVERY, Diagnosis, Health
from ssl_pretrain.train.journal import Journal
from ssl_pretrain.train.keeper import Keeper
from ssl_pretrain.train.lock import locked
from ssl_pretrain.train.memory import too_large
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.pace import Pace
from ssl_pretrain.train.planning import planned
from ssl_pretrain.train.recipe import Recipe, load
from ssl_pretrain.train.resume import restore, roll_back, state
from ssl_pretrain.train.run import Result, Run, over_ranks
from ssl_pretrain.train.signals import StopFlag
from ssl_pretrain.train.sync import synchronised
from ssl_pretrain.train.watch import enough, first_views, look, origin
from ssl_pretrain.views.engine import choose


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
        lock = stack.enter_context(locked(folder)) if fabric.is_global_zero else None
        run = _prepare(resolved, folder, fabric, console)
        stack.callback(os.umask, os.umask(0o077))  # TensorBoard's files too are for their owner only
        stop = stack.enter_context(StopFlag())  # not before: packing may just end, it is resumable
        journal = Journal(folder, run.step, run.steps, resolved.train.batch_size, console, fabric.is_global_zero)
        with journal, Keeper(folder, resolved.train, journal.say, lock) as keeper:
            if run.step < run.steps and not enough(run):
                _train(run, journal, keeper, stop)
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
    if not isinstance(
        method.backbone, MaskableBackbone
    ):  # as convolutions like it: benchmarks/step.py says by how much
        method.to(memory_format=torch.channels_last)
    optimizer = optim.create(method, spec)
    wrapped, optimizer = fabric.setup(method, optimizer)
    wrapped.mark_forward_method("loss")
    probe = OnlineProbe(recipe, method.backbone.input, cache) if recipe.probe.data and fabric.is_global_zero else None
    crops = 2 * recipe.train.batch_size // (fabric.world_size * recipe.train.accumulate)
    settings = recipe.flat() | {"train.lr": spec.lr, "train.warmup": spec.warmup}
    health = Health(steps, method.chance(recipe.train.batch_size // recipe.train.accumulate), settings, crops)
    checkup, guard = Checkup(feed, method), Guard(recipe.train.max_skipped)
    run = Run(
        recipe, folder, fabric, pack, method, wrapped, optimizer, spec, feed, checkup, health, probe, steps, guard,
        Buffers(method),
    )  # fmt: skip
    restore(run)
    if source.asked(recipe.backbone.init) and fabric.is_global_zero:
        run.drift = drift.opened(folder, method.backbone, pack, recipe.views.window_px, run.step)
    if fabric.is_global_zero:
        _write_recipe(run)
        known = f"from step {run.step} of" if run.step else "for"
        console.print(f"{recipe.method_name} on {method.backbone.name}, {len(pack)} images, {known} {steps} steps")
        console.print(f"{kept}\n{feed.engine.reason}", highlight=False)
    return run


def _train(run: Run, journal: Journal, keeper: Keeper, stop: StopFlag) -> None:
    """The loop."""
    train = run.recipe.train
    pace = Pace(run.recipe.probe, run.feed.steps_per_epoch, run.steps, at_end=run.probe is not None)
    if run.step == 0:
        first_views(run, journal)
        seen = run.checkup.often()  # what later features are compared with
        run.health.look(0, seen)
        journal.record(0, seen, "health")
    while run.step < run.steps:
        step, progress = run.step, run.step / run.steps
        rate = optim.set_rates(run.optimizer, run.optim, progress)
        torch.manual_seed(
            rng.torch_seed(rng.fold_in(rng.key(run.recipe.top.seed, "torch"), step)) + run.feed.share.rank
        )
        try:
            losses, norm, stops = _step(run, step, progress, stop)
        except torch.OutOfMemoryError as error:
            raise too_large(run, error, progress, partial(forward_backward, run)) from error
        if broken := run.guard.look(step, losses["loss"], norm, rate):
            journal.say(f"step {step}: {broken}")
            journal.record(step + 1, {broken.name: 1}, "health")
            if run.guard.exceeded:
                _roll_back(run, journal, keeper, broken)
                run.guard = Guard(train.max_skipped)
                continue
        run.step = step + 1
        ill = None
        if run.step % train.log_every_steps == 0 or run.step == run.steps:
            means = {name: over_ranks(run.fabric, value) for name, value in losses.items()}
            journal.metrics(run.step, {**means, "lr": rate, "gradient_norm": norm})
            ill = _examine(run, journal, means)
        look(run, journal, pace)
        done = run.step == run.steps or enough(run)
        asked = stops if run.fabric.world_size > 1 else bool(stop.name)
        if run.fabric.is_global_zero:
            with journal.aside():
                if asked or ill or done:
                    keeper.save_last(run.step, state(run), partial(_write_artefact, run))
                elif keeper.due(run.step) or run.step == 1:  # the first shows early whether it can be read back
                    keeper.save(run.step, state(run), partial(_write_artefact, run))
        if ill:
            run.fabric.barrier()
            raise SslPretrainError(f"step {run.step}: {ill} (train.on_collapse is stop; the checkpoint is saved)")
        if asked:
            run.fabric.barrier()  # launchers end the others when one leaves, and rank 0 may still be saving
            _stopped(run, journal, stop)
        if done:
            break


def _step(run: Run, step: int, progress: float, stop: StopFlag) -> tuple[dict[str, Tensor], float, bool]:
    """One step of the optimizer, if the gradient is finite; returns the losses, its norm, and what `_read` says."""
    run.buffers.remember()
    with optim.held(run.method, progress < run.recipe.train.freeze_backbone):
        losses = forward_backward(run, step, progress)
    norm, stops = _read(run, stop)
    if math.isfinite(norm):
        run.method.before_step(progress)
        run.optimizer.step()
        run.method.after_step(progress)
    else:
        run.buffers.put_back()
    run.optimizer.zero_grad()
    return losses, norm, stops


def forward_backward(run: Run, step: int, progress: float) -> dict[str, Tensor]:
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


def _read(run: Run, stop: StopFlag) -> tuple[float, bool]:
    """The norm of the gradient of all trained parameters, and whether any rank was asked to stop.

    A step waits for the device here and nowhere else. After DDP has averaged the gradients their norm is the same on
    every rank, and so is the verdict; and all ranks have to leave at the same step.
    """
    norm = nn.utils.get_total_norm([p.grad for p in run.method.parameters() if p.grad is not None])
    stops = torch.full_like(norm, float(bool(stop.name)))
    if run.fabric.world_size > 1:
        dist.all_reduce(stops)
    read: list[float] = torch.stack([norm, stops]).tolist()
    return read[0], read[1] > 0


def _write_recipe(run: Run) -> None:
    changed = [f"# changed at step {each['step']}: {'; '.join(each['what'])}\n" for each in run.changes]
    write_durably(run.folder / "recipe.yaml", "".join([*changed, run.recipe.yaml()]).encode())


def _write_artefact(run: Run) -> None:
    if not (run.folder / "recipe.yaml").exists():  # the folder was removed
        _write_recipe(run)
    artefact.write(run.folder / "artefact", run.method.backbone, origin(run))


def _roll_back(run: Run, journal: Journal, keeper: Keeper, broken: Diagnosis) -> None:
    """Goes back to the newest checkpoint, or ends the run where that was done before or there is none."""
    keeper.wait()
    at = run.step
    if not roll_back(run):
        why = "again, after it had gone back once" if run.feed.detour else "and there is no checkpoint to go back to"
        raise SslPretrainError(f"too many steps with a non-finite gradient, {why}: {broken}")
    journal.rewind(run.step)
    journal.say(f"step {at}: back to the checkpoint of step {run.step}, and from there through the images another way")


def _stopped(run: Run, journal: Journal, stop: StopFlag) -> None:
    if run.recipe.train.requeue and run.fabric.is_global_zero and stop.name == "SIGUSR1":
        journal.say(slurm.requeue())
    raise Stopped(
        f"stopped by {stop.name or 'another rank'} at step {run.step} of {run.steps}; the same command continues"
    )


def _examine(run: Run, journal: Journal, losses: Mapping[str, float]) -> Diagnosis | None:
    """Tells what is newly wrong with the run; returns what should end it.

    Every rank sees the same numbers, and so comes to the same verdict.
    """
    looked: dict[str, float] = {}
    if run.step % (LOOK_EVERY * run.recipe.train.log_every_steps) == 0:
        with journal.aside():
            seen = run.checkup.often()
        looked = {k: over_ranks(run.fabric, torch.tensor(v, device=run.fabric.device)) for k, v in seen.items()}
    found = run.health.look(run.step, {**losses, **looked})
    for diagnosis in run.health.news(found):
        journal.say(f"step {run.step}: {diagnosis}")
    if looked or found:
        journal.record(run.step, {**looked, **{diagnosis.name: 1 for diagnosis in found}}, "health")
    return run.health.fatal(found) if run.recipe.train.on_collapse == "stop" else None
