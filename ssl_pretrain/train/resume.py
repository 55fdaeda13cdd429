"""What a checkpoint holds, and how a run continues from one."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import artefact
from ssl_pretrain.errors import UsageError
from ssl_pretrain.train.checkpoint import Checkpoints, sweep
from ssl_pretrain.train.recipe import defaults
from ssl_pretrain.train.run import Run, over_ranks
from ssl_pretrain.train.watch import origin

MAY_CHANGE = (
    "data", "out", "probe.", "train.devices", "train.accelerator", "train.residency", "train.save_", "train.log_",
    "train.max_", "train.on_", "train.requeue", "views.engine", "auto",
)  # fmt: skip
"""Beginnings of the keys that a continued run may change; of the data, the pack's fingerprint must stay."""
JUDGES = "probe.data", "probe.format", "probe.group_regex", "probe.size_px", "probe.point_px", "probe.score"
"""Where these change, earlier scores are no measure of later ones."""


def state(run: Run) -> dict[str, Any]:
    """Plain values and tensors, all that a checkpoint is; no position of any random number."""
    return {
        "step": run.step,
        "best": run.best,
        "stale": run.stale,
        "scores": dict(run.scores),
        "detour": run.feed.detour,
        "in_a_row": run.guard.in_a_row,
        "skipped": list(run.guard.skipped),
        "changes": json.dumps(run.changes),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "recipe": json.dumps(run.recipe.flat()),
        "pack": run.pack.fingerprint,
        "images": len(run.pack),
    }


def restore(run: Run) -> None:
    """Continues from the newest checkpoint, which rank 0 chooses.

    One of another recipe or other images is refused with the difference, or, where `train.on_change` says so, continued
    and recorded.
    """
    checkpoints, found = Checkpoints(run.folder / "checkpoints"), None
    if run.fabric.is_global_zero:
        sweep(run.folder)
        found = checkpoints.newest()
    step: int = run.fabric.broadcast(found["step"] if found else 0)
    if step == 0:
        return
    _agree(run, found := found or checkpoints.at(step))
    assert found is not None
    now = json.loads(json.dumps(run.recipe.flat()))
    # A key that is younger than the checkpoint had no other value than its default.
    before = json.loads(json.dumps(defaults(run.recipe.method_name))) | json.loads(found["recipe"])
    run.changes = json.loads(found.get("changes", "[]"))
    if different := _differences(run, found, before, now):
        if run.recipe.train.on_change == "refuse":
            raise UsageError(
                f"{run.folder} holds a run {'; '.join(different[:3])}; choose another --out, undo the change, or go on "
                "with it on purpose by --train.on_change continue"
            )
        run.changes.append({"step": step, "what": different})
    _load(run, found)
    if any(now[key] != before.get(key) for key in JUDGES):
        run.best, run.stale = -1.0, 0
    if run.fabric.is_global_zero:  # a crash may have come between the checkpoint and the artefact
        artefact.write(run.folder / "artefact", run.method.backbone, origin(run))


def roll_back(run: Run) -> bool:
    """Goes back to the newest checkpoint and from there another way: other images in each step, so that those that
    broke the run do not break it again. Once in a run; False where that was done, or there is no checkpoint.
    """
    run.fabric.barrier()  # rank 0 has written what it was writing
    checkpoints = Checkpoints(run.folder / "checkpoints")
    newest = checkpoints.newest() if run.fabric.is_global_zero else None
    step: int = run.fabric.broadcast(newest["step"] if newest else 0)
    if step == 0 or run.feed.detour:
        return False
    _agree(run, found := newest or checkpoints.at(step))
    assert found is not None
    _load(run, found)
    run.feed.detour += 1
    return True


def _agree(run: Run, found: dict[str, Any] | None) -> None:
    """Every rank has read the checkpoint that rank 0 chose."""
    if over_ranks(run.fabric, torch.tensor(float(found is None), device=run.fabric.device)) > 0:
        raise UsageError(f"not all processes can read the checkpoint: all nodes must share the folder {run.folder}")


def _differences(run: Run, found: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changed = [key for key in now if now[key] != before.get(key) and not key.startswith(MAY_CHANGE)]
    said = [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed]
    different = [f"of another recipe ({', '.join(said[:5])})"] if said else []
    if found["pack"] != run.pack.fingerprint:
        count = f"{found['images']} of them, " if "images" in found else ""
        different.append(
            f"of other images ({count}pack {found['pack'][:12]}; {run.recipe.top.data} has {len(run.pack)}, pack "
            f"{run.pack.fingerprint[:12]})"
        )
    return different


def _load(run: Run, found: dict[str, Any]) -> None:
    try:
        run.method.load_state_dict(found["method"])
        run.optimizer.load_state_dict(found["optimizer"])
    except (RuntimeError, ValueError) as error:  # of other names, shapes or parameter groups
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"the checkpoint in {run.folder} does not fit this network: {why}") from error
    for parameter, moments in run.optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Fused kernels walk weights and moments side by side, however each lies in memory.
                moments[name] = torch.empty_like(parameter).copy_(value)
    run.step, run.best, run.scores = found["step"], found["best"], found["scores"]
    run.stale, run.feed.detour = found.get("stale", 0), found.get("detour", 0)
    run.guard.in_a_row, run.guard.skipped = found.get("in_a_row", 0), list(found.get("skipped", ()))
