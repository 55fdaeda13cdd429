"""Where a step's time goes, and what each optimisation is worth: every one with its own A/B, in interleaved rounds.

    python benchmarks/step.py [--images FOLDER] [--work SimCLR] [--json FILE]    # small networks; on a GPU full ones
    python benchmarks/step.py --quick                                             # its figures say nothing

The parts are timed one by one, with the device waited for after each; so they add up to more than a step, in which they
overlap. An A/B is one call with the optimisation and one without; what is reported is the median over rounds of
without / with: above 1 it pays. "not in the package" stands beside what `ssl_pretrain` does not do today; it is tried
here, so that it can be judged before it is built.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import figures
import numpy as np
import peers
import torch
from lightly.models.utils import update_momentum
from lightly.utils.lars import LARS
from rich.console import Console
from rich.table import Table
from throughput import FULL, QUICK, SMALL, packed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import AdamW, Optimizer

from ssl_pretrain import rng
from ssl_pretrain.backbones import MaskableBackbone
from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.methods import Views
from ssl_pretrain.methods._distillation import clip_each, follow
from ssl_pretrain.methods.dino import DINO
from ssl_pretrain.methods.mae import MAE
from ssl_pretrain.train import loop, optim
from ssl_pretrain.train.guard import Buffers
from ssl_pretrain.train.lars import Lars
from ssl_pretrain.train.run import Run, over_ranks
from ssl_pretrain.train.signals import StopFlag

MISSING = "not in the package"
PARTS = (
    "rates and seed", "buffers' copy", "views", "forward", "backward", "gradient norm", "before_step", "optimizer",
    "after_step (EMA)", "zero_grad", "guard", "log",
)  # fmt: skip


class Pair(NamedTuple):
    """Two ways to do the same."""

    name: str
    with_: Callable[[], object]
    without: Callable[[], object]
    note: str = ""


# Parts of a step


class Parts:
    """Times the parts of steps; each `lap` ends one."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock, self.seconds = device, clock, dict.fromkeys(PARTS, 0.0)
        self.at = clock()

    def lap(self, name: str) -> None:
        """What was done since the last lap was this."""
        figures.finished(self.device)
        now = self.clock()
        self.seconds[name] += now - self.at
        self.at = now


def one_step(run: Run, parts: Parts) -> None:
    """`peers.our_step` in slow motion."""
    step, progress, method = run.step, run.step / run.steps, run.method
    parts.lap("log")  # what lies between two steps
    rate = optim.set_rates(run.optimizer, run.optim, progress)
    torch.manual_seed(rng.torch_seed(rng.fold_in(rng.key(run.recipe.top.seed, "torch"), step)))
    parts.lap("rates and seed")
    run.buffers.remember()
    parts.lap("buffers' copy")
    views = run.feed.part(step, 0)
    parts.lap("views")
    losses = run.wrapped.loss(views, progress)
    parts.lap("forward")
    run.fabric.backward(losses["loss"])
    parts.lap("backward")
    norm, _ = loop._read(run, StopFlag())
    parts.lap("gradient norm")
    method.before_step(progress)
    parts.lap("before_step")
    run.optimizer.step()
    parts.lap("optimizer")
    method.after_step(progress)
    parts.lap("after_step (EMA)")
    run.optimizer.zero_grad()
    parts.lap("zero_grad")
    run.guard.look(step, losses["loss"].detach(), norm, rate)
    parts.lap("guard")
    run.step = step + 1
    if run.step % run.recipe.train.log_every_steps == 0:
        assert all(np.isfinite(over_ranks(run.fabric, value)) for value in losses.values())
    parts.lap("log")


def shares(run: Run, steps: int) -> dict[str, Any]:
    """Milliseconds of each part, their sum, and a real step without waiting between its parts."""
    device = run.fabric.device
    one_step(run, Parts(device))
    parts = Parts(device)
    for _ in range(steps):
        one_step(run, parts)
    began = time.perf_counter()
    for _ in range(steps):
        peers.our_step(run)
    figures.finished(device)
    real = time.perf_counter() - began
    found = {name: 1000 * seconds / steps for name, seconds in parts.seconds.items()}
    return {"parts_ms": found, "sum_ms": sum(found.values()), "step_ms": 1000 * real / steps}


# A/B


def pairs(run: Run, make: Callable[[tuple[str, ...]], Run], quick: bool) -> list[Pair]:
    """What can be compared for this method and device; `make` gives the same run with other words."""
    method, device, views = run.method, run.fabric.device, run.feed.part(run.step, 0)
    found = [
        Pair("bf16 autocast", *(step_of(make(("--train.precision", kind))) for kind in ("bf16-mixed", "32-true"))),
        *optimizers(run, views),
        Pair(
            "finite test on the device", lambda: norm_of(method, run, views), lambda: bool(norm_of(method, run, views)),
            f"{MISSING}: a step whose gradient is not finite moves nothing, so its norm is read",
        ),
    ]  # fmt: skip
    if len(list(method.buffers())) > 1:
        found.append(Pair("buffers: copied together", *buffers(method)))
    if device.type == "cuda":
        ahead, at_once = make(()), make(())
        at_once.feed.looks_ahead = False
        found.append(Pair("views on a side stream", step_of(ahead), step_of(at_once)))
    if not isinstance(run.method.backbone, MaskableBackbone):
        rows = make(())
        rows.method.to(memory_format=torch.contiguous_format)
        found.append(Pair("channels-last", bare_of(make(()), views), bare_of(rows, views)))
    if not quick:
        found.append(Pair("compile of the backbone", compiled(make(()), views), bare_of(make(()), views), MISSING))
    if not quick and device.type == "cuda":
        graphs = compiled(make(()), views, mode="reduce-overhead")
        found.append(Pair("compile with CUDA graphs", graphs, bare_of(make(()), views), MISSING))
    if isinstance(method, DINO):
        found += of_dino(method, views)
        if isinstance(method.student, MaskableBackbone):
            found.append(packed_crops(method, views))
    if isinstance(method, MAE):
        found.append(visible_only(method, views))
    return found


def step_of(run: Run) -> Callable[[], object]:
    return lambda: peers.our_step(run)


def bare_of(run: Run, views: Views) -> Callable[[], object]:
    """The step on these views."""
    return lambda: peers.bare_step(run, views)


def compiled(run: Run, views: Views, **words: str) -> Callable[[], object]:
    """The step on these views, its backbone compiled."""
    for name, child in list(run.method.named_children()):
        if name in ("backbone", "student", "encoder"):
            child.compile(**words)
    return bare_of(run, views)


def graded(run: Run, views: Views) -> None:
    """Gradients, where there are none."""
    if all(p.grad is None for p in run.method.parameters()):
        run.fabric.backward(run.wrapped.loss(views, 0.5)["loss"])


def norm_of(method: nn.Module, run: Run, views: Views) -> Tensor:
    graded(run, views)
    return nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None]).isfinite()


def optimizers(run: Run, views: Views) -> list[Pair]:
    """A step of each kind, on weights and gradients of the method's shapes."""
    graded(run, views)

    def stepping(kind: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[], object]:
        weights = [nn.Parameter(p.detach().clone()) for p in run.method.parameters() if p.grad is not None]
        for weight, p in zip(weights, (p for p in run.method.parameters() if p.grad is not None), strict=True):
            weight.grad = p.grad.clone() if p.grad is not None else None
        return kind(weights).step

    found = [
        Pair("AdamW: fused", stepping(lambda w: AdamW(w, fused=True)), stepping(lambda w: AdamW(w, foreach=False))),
        Pair(
            "AdamW: fused and not foreach", stepping(lambda w: AdamW(w, fused=True)),
            stepping(lambda w: AdamW(w, foreach=True)),
        ),
    ]  # fmt: skip
    if run.optim.optimizer == "lars":
        words: dict[str, float] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6}
        mine, theirs = stepping(lambda w: Lars(w, **words)), stepping(lambda w: LARS(w, **words))
        found.append(Pair("LARS: together, without reads", mine, theirs, "lightly's reads two norms a tensor"))
    return found


def buffers(method: nn.Module) -> tuple[Callable[[], object], Callable[[], object]]:
    """Copies into memory that is kept, those of one kind together; and a clone of each."""
    mine = list(method.buffers())
    return Buffers(method).remember, lambda: [buffer.clone() for buffer in mine]


def clip_singly(parameters: list[nn.Parameter], largest: float) -> None:
    """Each tensor by itself, as torch has it."""
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, largest)


def of_dino(method: DINO, views: Views) -> list[Pair]:
    """Crops together, the moving average, the clipping."""
    local_VBCHW = views.crops["local"]
    student = method.student
    mine, other = copy.deepcopy(student), copy.deepcopy(student)
    for module in (mine, other):
        module.requires_grad_(False)

    def backward(outputs: list[Tensor]) -> None:
        torch.stack([z.float().sum() for z in outputs]).sum().backward()
        student.zero_grad()

    trained = [p for p in [*method.student.parameters(), *method.student_head.parameters()] if p.grad is not None]
    together = Pair(
        "multi-crop: one forward a size", lambda: backward([student(local_VBCHW.flatten(0, 1))]),
        lambda: backward([student(x_BCHW) for x_BCHW in local_VBCHW]),
    )  # fmt: skip
    clip = Pair(
        "clipping: tensors together", lambda: clip_each(trained, 3.0), lambda: clip_singly(trained, 3.0),
    )  # fmt: skip
    ema = Pair(
        "EMA: foreach", lambda: follow([mine], [student], 0.996, 0.5), lambda: update_momentum(student, other, 0.998)
    )
    return [clip, ema, together]  # the clipping first: it needs the gradients that `together` throws away


def packed_forward(vit: Any, groups: Sequence[Tensor]) -> list[Tensor]:
    """Tokens (B, N, D) of a timm ViT for images of several sizes: all go through the linear layers together, and attend
    within their own image (Krell et al., Efficient Sequence Packing, 2021; NaViT, Dehghani et al. 2023).
    """
    tokens = [vit.norm_pre(vit._pos_embed(vit.patch_embed(x_BCHW))) for x_BCHW in groups]
    counts = [t_BND.shape[0] * t_BND.shape[1] for t_BND in tokens]
    t_TD = torch.cat([t_BND.flatten(0, 1) for t_BND in tokens])
    for block in vit.blocks:
        attention, seen = block.attn, []
        for qkv_TD, t_BND in zip(attention.qkv(block.norm1(t_TD)).split(counts), tokens, strict=True):
            qkv = qkv_TD.view(*t_BND.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            seen.append(scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(len(qkv_TD), -1))
        t_TD = t_TD + block.ls1(attention.proj(torch.cat(seen)))
        t_TD = t_TD + block.ls2(block.mlp(block.norm2(t_TD)))
    parts = vit.norm(t_TD).split(counts)
    return [part.view(t_BND.shape) for part, t_BND in zip(parts, tokens, strict=True)]


def packed_crops(method: DINO, views: Views) -> Pair:
    """Global and local crops in one forward, or one for each size; without drop path."""
    vit: Any = copy.deepcopy(method.student)._modules["network"]
    vit.eval()
    crops = views.crops
    groups = [torch.cat([crops["global_0"], crops["global_1"]]).flatten(0, 1), crops["local"].flatten(0, 1)]

    def backward(tokens: list[Tensor]) -> None:
        torch.stack([t_BND.float().square().mean() for t_BND in tokens]).sum().backward()
        vit.zero_grad()

    return Pair(
        "multi-crop: both sizes packed", lambda: backward(packed_forward(vit, groups)),
        lambda: backward([vit.forward_features(x_BCHW) for x_BCHW in groups]), MISSING,
    )  # fmt: skip


def visible_only(method: MAE, views: Views) -> Pair:
    """The encoder on the kept patches, or on all."""
    x_BCHW, (keep_BK, masked_BM) = views.crops["view"][0], method.mask(views)
    all_BN = torch.cat([keep_BK, masked_BM], dim=1)

    def encode(patches_BK: Tensor) -> Callable[[], object]:
        def call() -> None:
            method.encoder.tokens(x_BCHW, patches_BK).float().sum().backward()
            method.zero_grad()

        return call

    return Pair("MAE: visible patches only", encode(keep_BK), encode(all_BN))


def compared(pair: Pair, device: torch.device, count: int) -> dict[str, Any]:
    """Milliseconds of both sides and their ratio within rounds."""

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            figures.finished(device)
            began = time.perf_counter()
            call()
            figures.finished(device)
            return time.perf_counter() - began

        return run

    taken = figures.rounds({"with": timed(pair.with_), "without": timed(pair.without)}, count)
    ratio = figures.median_ratio(taken["without"], taken["with"])
    medians = {f"{side}_ms": 1000 * float(np.median(seconds_R)) for side, seconds_R in taken.items()}
    return {**medians, "ratio": ratio, "note": pair.note}


# Showing


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore")
    console, found = Console(width=150), {}
    with peers.scratch(given.cache) as cache:
        files = peers.photographs(given.images, given.count, cache)
        for i, (name, work) in enumerate(given.works.items()):
            packed(work, files, cache / "cache", given.words)
            made = [0]

            def make(words: tuple[str, ...], i: int = i, work: peers.Work = work, made: list[int] = made) -> Run:
                made[0] += 1
                torch.manual_seed(0)
                return peers.prepared(work, files, cache / f"step-{i}-{made[0]}", (*given.words, *words))

            run = make(())
            where = shares(run, given.steps)
            device = run.fabric.device
            tried = {p.name: compared(p, device, given.rounds) for p in pairs(run, make, given.quick)}
            found[name] = {**where, "batch": work.batch, "views": run.feed.engine.reason, "pairs": tried}
            console.print(table(name, found[name]))
    where = figures.machine()
    console.print(figures.in_words(where), highlight=False)
    figures.write(given.json, {"machine": where, "quick": given.quick, "works": found})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", default="synthetic:16", help="folder of images, or synthetic:N")
    parser.add_argument("--count", type=int, help="JPEGs to make of them (64; 256 with a GPU)")
    parser.add_argument("--work", nargs="+", default=[], metavar="PART", help="only works with this in their name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch (one a core, as torch has it)")
    parser.add_argument("--cache", type=Path, help="folder for JPEGs and packs, kept; without, they are removed")
    parser.add_argument("--quick", action="store_true", help="tiny networks: to see that it runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    if given.quick:
        given.images, given.count, given.steps, given.rounds = "synthetic:4", 8, 1, 1
    given.count = given.count or (256 if cuda else 64)
    given.threads = given.threads or figures.machine()["cores"]
    given.words = () if cuda else ("--views.engine", "torch" if given.quick else "compiled")
    works = QUICK if given.quick else FULL if cuda else SMALL
    given.works = {n: w for n, w in works.items() if not given.work or any(part in n for part in given.work)}
    if not given.works:
        raise SystemExit(f"--work {' '.join(given.work)} names none of: {'; '.join(works)}")
    return given


def table(name: str, one: dict[str, Any]) -> Table:
    said = f"{name}; a step takes {one['step_ms']:.1f} ms, its parts one by one {one['sum_ms']:.1f} ms"
    shown = Table("", "ms", "share of the parts, or ratio", "", title=said)
    for part, ms in one["parts_ms"].items():
        shown.add_row(part, f"{ms:.2f}", f"{100 * ms / one['sum_ms']:.1f} %")
    shown.add_section()
    for what, pair in one["pairs"].items():
        both = f"{pair['with_ms']:.2f}, without {pair['without_ms']:.2f}"
        shown.add_row(what, both, f"x {pair['ratio']:.2f}", pair["note"])
    return shown


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
