"""Weighted k-NN on labelled objects: what features are worth before any head is trained on them.

The vote is the one of DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021,
`eval_knn.py`; after Wu et al., 2018): cosine similarity, the k nearest each add exp(similarity / T) to their class.
The search is exact. Protocol `objects-knn/v0`: k 20, T 0.07, the crops and the split of `objects.cut`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ssl_pretrain.artefact import resolve
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.readers import LabelledSet, read
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.probe.features import device_of, embed
from ssl_pretrain.probe.objects import Objects, cut
from ssl_pretrain.probe.statistics import FIGURES, Interval, Judged, bootstrap, confusion, counts, figures, tally

PROTOCOL = "objects-knn/v0"
HEADLINE_K = 20
TEMPERATURE = 0.07
KS = (1, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class ClassScore:
    """How one class fared; recall is None without a query of it, precision None when it was never predicted."""

    name: str
    bank: int
    queries: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True, eq=False)
class KnnScore:
    """The score of one backbone on one set of objects."""

    accuracy: Interval
    balanced_accuracy: Interval
    """Mean recall of the classes that occur among the queries (scikit-learn's `balanced_accuracy_score`)."""
    macro_f1: Interval
    """Mean F1 of the classes that occur among the queries or the predictions (scikit-learn's `f1_score`, macro)."""
    classes: tuple[ClassScore, ...]
    by_k: dict[int, dict[str, float]]
    """`accuracy` and `balanced_accuracy` of each k, the headline's among them."""
    confusion_CC: np.ndarray
    """Query objects by true (row) and predicted class, at the headline k."""
    k: int
    temperature: float
    rounds: int
    backbone: str
    size_px: int
    crops: str
    split: str
    seed: int
    data: dict[str, Any]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it but the confusion matrix, as plain values; never a NaN, which JSON does not know."""
        plain = {name: value for name, value in asdict(self).items() if name != "confusion_CC"}
        by_k = {str(k): figures for k, figures in self.by_k.items()}
        return {"protocol": PROTOCOL, **plain, "by_k": by_k, "problems": list(self.problems)}


def knn_probe(
    backbone: str | Path | Backbone,
    data: str | Path | LabelledSet | Objects,
    *,
    size_px: int | None = None,
    point_px: int = 80,
    k: int = HEADLINE_K,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    rounds: int = 1000,
) -> KnnScore:
    """Scores a backbone by the k nearest labelled objects of other images.

    backbone    a `Backbone`, or what `artefact.resolve` takes: a run or artefact folder, `random:NAME`, `pixels`
    data        a labelled folder, what a reader gave, or objects already cut: then `size_px` and `point_px` are theirs,
                and so is the seed of the split; `seed` draws the bootstrap only
    size_px     side of the crops; the side that the backbone was made for unless given
    k, ks       of the headline, and of the further figures
    device      where to embed and search; None is the GPU if there is one, or where a given `Backbone` is
    rounds      of the bootstrap over units (images, or groups of images that belong together)

    To score again and again while training, `cut` once and give the objects. Raises `UsageError` for a k or
    temperature below zero, `DataError` for data without objects on both sides, `SslPretrainError` for features that
    are not finite.
    """
    if min(k, *ks, rounds) < 1 or not 0 < temperature < math.inf or seed < 0:
        raise UsageError("knn_probe: k, ks, rounds are 1 or more, temperature is finite and above 0, seed 0 or more")
    if isinstance(data, Objects):
        size_px = data.size_px
    if isinstance(backbone, Backbone):
        network, device = backbone, device or device_of(backbone)
    else:
        network = resolve(str(backbone), size_px)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(data, str | Path):
        data = read(Path(data))
    if isinstance(data, LabelledSet):
        data = cut(data, size_px or network.input.size_px, point_px=point_px, seed=seed)
    z_ND = embed(network, data.crops_NSSC, batch_size, device)
    return score(data, z_ND, network.name, k=k, ks=ks, temperature=temperature, seed=seed, device=device, rounds=rounds)


def score(
    objects: Objects,
    z_ND: np.ndarray,
    name: str,
    *,
    k: int = HEADLINE_K,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    device: str | torch.device | None = None,
    rounds: int = 1000,
) -> KnnScore:
    """`knn_probe` from features (N, D) of length 1 that are there already; `name` says whose they are."""
    bank, query, label_N = objects.train_N, objects.query_N, objects.label_N
    true_Q, unit_Q, classes = label_N[query], objects.unit_N[query], len(objects.classes)
    votes = vote(
        z_ND[bank], label_N[bank], objects.unit_N[bank], z_ND[query], unit_Q, [k, *ks], temperature, classes, device
    )
    by_k: dict[int, dict[str, float]] = {}
    for each in sorted(set(ks) | {k}):
        figures_3 = figures(counts(true_Q, votes[each].argmax(axis=1), np.zeros_like(unit_Q), classes)[0])
        by_k[each] = dict(zip(FIGURES[:2], (float(figure) for figure in figures_3[:2]), strict=True))
    predicted_Q = votes[k].argmax(axis=1)
    confusion_CC = confusion(true_Q, predicted_Q, classes)
    intervals = bootstrap(counts(true_Q, predicted_Q, unit_Q, classes), rounds, seed)
    problems = _clipped(list(by_k), int(bank.sum()))
    return KnnScore(
        *intervals,
        classes=_class_scores(objects, confusion_CC),
        by_k=by_k,
        confusion_CC=confusion_CC,
        k=k,
        temperature=temperature,
        rounds=rounds,
        backbone=name,
        size_px=objects.size_px,
        crops=objects.rule,
        split=objects.split,
        seed=seed,
        data={
            "source": objects.source,
            "split_seed": objects.seed,
            "fingerprint": objects.fingerprint,
            "bank": int(bank.sum()),
            "queries": len(true_Q),
            "query_units": len(np.unique(unit_Q)),
            "unreadable_images": objects.unreadable_images,
            "degenerate_objects": objects.degenerate_objects,
        },
        problems=(*objects.problems, *problems),
    )


def judge(
    objects: Objects,
    z_ND: np.ndarray,
    *,
    k: int = HEADLINE_K,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> Judged:
    """The weighted k-NN of `score`, to be compared with other probes and other features.

    Features (N, D) are float32 of length 1. Nothing is drawn, so `seed` makes no difference. Raises `UsageError` for
    settings that make no sense, `DataError` where a query has no bank object of another unit.
    """
    del seed
    if k < 1 or not 0 < temperature < math.inf:
        raise UsageError("knn: k is 1 or more, temperature is finite and above 0")
    bank, query, label_N, unit_N = objects.train_N, objects.query_N, objects.label_N, objects.unit_N
    classes = len(objects.classes)
    shares = vote(
        z_ND[bank], label_N[bank], unit_N[bank], z_ND[query], unit_N[query], [k], temperature, classes, device=None
    )
    true_Q, predicted_Q = label_N[query], shares[k].argmax(axis=1)
    return Judged(
        tally(true_Q, predicted_Q, unit_N[query], classes),
        confusion(true_Q, predicted_Q, classes),
        {"k": k, "temperature": temperature},
        tuple(_clipped([k], int(bank.sum()))),
    )


def vote(
    bank_z: np.ndarray,
    bank_label: np.ndarray,
    bank_image: np.ndarray,
    query_z: np.ndarray,
    query_image: np.ndarray,
    ks: Sequence[int],
    temperature: float,
    classes: int,
    device: str | torch.device | None = None,
) -> dict[int, np.ndarray]:
    """Scores (Q, C), each row summing to 1, for every k of `ks`, from one search.

    Features are float32 of length 1: (N, D) and (Q, D); labels and images int64 (N) and (Q). A neighbour from the
    query's own image never votes. A k beyond the bank means all of it. A temperature of infinity is the plain majority
    vote. Raises `DataError` when the whole bank is from one query's own image.

    By hand, at T = 1: neighbours with similarity 1 (class 0) and 0 (class 1) vote e : 1, so e / (e + 1) = 0.731.

    >>> bank, own = np.array([[1, 0], [0, 1]], np.float32), np.array([0, 1])
    >>> vote(bank, own, own, bank[:1], np.array([7]), ks=[1, 2], temperature=1.0, classes=2)[2].round(3)
    array([[0.731, 0.269]])
    """
    near_QK, similarity_QK = _nearest(bank_z, bank_image, query_z, query_image, max(ks), device)
    if len(near_QK) and (near_QK[:, 0] < 0).any():
        raise DataError("a query has nobody to vote for it: the whole bank is from its own image")
    # Relative to the nearest neighbour: the same shares, and no overflow at a small temperature.
    gap_QK = np.minimum(similarity_QK - similarity_QK[:, :1], 0).astype(np.float64)
    weight_QK = np.exp(gap_QK / temperature)
    weight_QK[near_QK < 0] = 0
    cell_QK = np.arange(len(near_QK))[:, None] * classes + bank_label[near_QK]
    sums_QC = np.zeros((len(near_QK), classes))
    scores, done = {}, 0
    for k in sorted(set(ks)):
        cells, weights = cell_QK[:, done:k].ravel(), weight_QK[:, done:k].ravel()
        sums_QC = sums_QC + np.bincount(cells, weights, minlength=sums_QC.size).reshape(sums_QC.shape)
        scores[k], done = sums_QC / sums_QC.sum(axis=1, keepdims=True), k
    return scores


def neighbours(objects: Objects, z_ND: np.ndarray, queries: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
    """For each query (index of an object) its k nearest in the bank, as indices of objects (Q, k), nearest first.

    None is from the query's own unit, so a query may be of the bank itself; -1 where there are no more.
    """
    query_Q, bank_N = np.asarray(queries, np.int64), np.flatnonzero(objects.train_N)
    unit_N = objects.unit_N
    near_QK, _ = _nearest(z_ND[bank_N], unit_N[bank_N], z_ND[query_Q], unit_N[query_Q], k, None)
    found_QK = np.full((len(query_Q), k), -1, np.int64)
    found_QK[:, : near_QK.shape[1]] = np.where(near_QK < 0, -1, bank_N[near_QK])
    return found_QK


def _nearest(
    bank_z: np.ndarray,
    bank_image: np.ndarray,
    query_z: np.ndarray,
    query_image: np.ndarray,
    k: int,
    device: str | torch.device | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the bank and similarities (Q, K), nearest first, none from the query's image; -1 where none is left.

    K is k, or less when the bank is smaller.
    """
    if len(bank_z) == 0:
        raise DataError("the bank of the k-NN probe is empty")
    shared, sizes = np.unique(bank_image[np.isin(bank_image, query_image)], return_counts=True)
    # Enough to have k left when all objects of the fullest shared image are among the nearest.
    wide = min(k + int(sizes.max(initial=0)), len(bank_z))
    similarity_QW, near_QW = search(bank_z, query_z, wide, device)
    if len(shared) == 0:
        return near_QW, similarity_QW
    own_QW = bank_image[near_QW] == query_image[:, None]
    near_QW[own_QW] = -1
    keep_QK = np.argsort(own_QW, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(near_QW, keep_QK, 1), np.take_along_axis(similarity_QW, keep_QK, 1)


def search(
    bank_z: np.ndarray, query_z: np.ndarray, k: int, device: str | torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and rows of the bank (Q, k), nearest first, of features (N, D) and (Q, D) of length 1.

    Exact, by FAISS: an approximate index would put its error into the score.
    """
    if device is not None and torch.device(device).type == "cuda":
        return _search_torch(bank_z, query_z, k, torch.device(device))
    index = faiss.IndexFlatIP(bank_z.shape[1])
    index.add(np.ascontiguousarray(bank_z, np.float32))
    similarity_QK, near_QK = index.search(np.ascontiguousarray(query_z, np.float32), k)
    return similarity_QK, near_QK


def _search_torch(
    bank_z: np.ndarray, query_z: np.ndarray, k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The same on a GPU; in float64, which no TF32 setting of the training reaches, in blocks of queries."""
    bank_ND = torch.from_numpy(bank_z).to(device, torch.float64)
    blocks = [torch.from_numpy(query_z[i : i + 2048]) for i in range(0, len(query_z), 2048)]
    found = [torch.topk(block.to(device, torch.float64) @ bank_ND.T, k, dim=1) for block in blocks]
    similarity_QK = torch.cat([block.values for block in found]).float().cpu().numpy()
    return similarity_QK, torch.cat([block.indices for block in found]).cpu().numpy()


def _clipped(ks: list[int], bank: int) -> list[str]:
    """A line on the k that a bank of so many objects cannot give."""
    beyond = [k for k in ks if k > bank]
    return [f"k {beyond} is more than the bank has: all its {bank} objects voted"] if beyond else []


def _class_scores(objects: Objects, confusion_CC: np.ndarray) -> tuple[ClassScore, ...]:
    """One row a class, in the data set's order."""
    bank_C = np.bincount(objects.label_N[objects.train_N], minlength=len(objects.classes))
    rows = []
    for c, name in enumerate(objects.classes):
        hit, true, predicted = int(confusion_CC[c, c]), int(confusion_CC[c].sum()), int(confusion_CC[:, c].sum())
        recall, precision = (hit / n if n else None for n in (true, predicted))
        rows.append(ClassScore(name, int(bank_C[c]), true, recall, precision))
    return tuple(rows)
