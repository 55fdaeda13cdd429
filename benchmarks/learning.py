"""What minutes of pretraining on a CPU are worth: every method on real fields, judged by k-NN on the labelled objects.

    python benchmarks/learning.py --images chula_rbc12/images --labelled chula_rbc12 [--out runs/learning] [--json FILE]
    python benchmarks/learning.py --quick        # the same on a few drawn fields, to see that it runs

Runs that are finished under --out are not repeated. Each backbone stands beside its architecture with random weights
and beside 16 x 16 pixels, on the same crops; once with the probe's split by image and once leaving one image out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from ssl_pretrain import pretrain
from ssl_pretrain.artefact import resolve
from ssl_pretrain.backbones import Backbone, create
from ssl_pretrain.data import readers, sources
from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.probe.features import embed
from ssl_pretrain.probe.knn import KnnScore, score
from ssl_pretrain.probe.objects import Objects, cut, leave_one_out

RECIPES = ("chula_simclr_resnet18", "chula_dino_resnet18", "chula_mae_vit_tiny")
SIZE_PX, POINT_PX = 64, 80
QUICK = ("--train.steps", "4", "--train.batch_size", "8", "--probe.every_epochs", "1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="folder of fields")
    parser.add_argument("--labelled", help="the labelled set to judge on")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--linear", action="store_true", help="a logistic regression too, on the probe's split (slow)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.images, given.labelled, given.out = "synthetic:12", "synthetic:20:1", given.out / "quick"
    if not (given.images and given.labelled):
        raise SystemExit("give --images and --labelled, or --quick")
    console = Console(width=150)
    minutes = {name: train(name, given, console) for name in RECIPES}
    labelled = readers.read(sources.folder(given.labelled, given.out / "cache"))
    objects = cut(labelled, SIZE_PX, point_px=POINT_PX)
    features = {name: embed(net, objects.crops_NSSC) for name, net in backbones(given.out).items()}
    sides = {"split": objects, "leave one out": leave_one_out(objects)}
    rows = {name: {how: score(some, z_ND, name) for how, some in sides.items()} for name, z_ND in features.items()}
    console.print(table(rows, minutes))
    for name, z_ND in features.items() if given.linear else ():
        console.print(f"linear, balanced accuracy on the split: {name} {linear(objects, z_ND):.3f}")
    console.print(f"{labelled.found}; {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
                  f"torch {torch.__version__}")  # fmt: skip
    if given.json:
        found = {name: {how: each.to_json() for how, each in row.items()} for name, row in rows.items()}
        given.json.write_text(json.dumps({"minutes": minutes, "scores": found}, indent=2))


def train(name: str, given: argparse.Namespace, console: Console) -> float:
    """Minutes that the run took; 0 where it was finished before."""
    recipe = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
    began = time.monotonic()
    words = ("--probe.data", given.labelled, *(QUICK if given.quick else ()))
    pretrain(recipe, data=given.images, out=given.out / name, words=words, console=console)
    return (time.monotonic() - began) / 60


def backbones(out: Path) -> dict[str, Backbone]:
    """What is compared, by name."""
    torch.manual_seed(0)
    vit = create("vit_tiny_patch16_224", img_size=SIZE_PX, patch_size=8, pool="avg").eval()
    named = {"pixels 16x16": resolve("pixels"), "random resnet18": resolve("random:resnet18"), "random vit_tiny/8": vit}
    return named | {name.removeprefix("chula_"): resolve(str(out / name)) for name in RECIPES}


def linear(objects: Objects, z_ND: np.ndarray) -> float:
    """Balanced accuracy of a logistic regression on standardised features, classes weighted alike."""
    bank, label_N = objects.train_N, objects.label_N
    x_ND = StandardScaler().fit(z_ND[bank]).transform(z_ND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=0.1, max_iter=300, class_weight="balanced").fit(x_ND[bank], label_N[bank])
    return float(balanced_accuracy_score(label_N[~bank], fitted.predict(x_ND[~bank])))


def table(rows: dict[str, dict[str, KnnScore]], minutes: dict[str, float]) -> Table:
    columns = [f"{figure}, {how}" for how in ("split", "leave one out") for figure in ("accuracy", "balanced")]
    shown = Table("features", *columns, "minutes", title="k-NN on objects: k 20, T 0.07, 95 % intervals over images")
    for name, row in rows.items():
        cells = [
            f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
            for found in row.values()
            for figure in (found.accuracy, found.balanced_accuracy)
        ]
        took = round(minutes.get(f"chula_{name}", 0))  # 0 for a run that was finished before
        shown.add_row(name, *cells, str(took or ""))
    return shown


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
