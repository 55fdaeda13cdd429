"""Named protocols: what is asked of features, frozen and numbered, so that figures of one name can be compared.

A protocol never changes; a better one gets another name or number. Backbones are asked side by side on the same
objects, and their differences have intervals of their own: two scores whose intervals overlap may still differ, as
both go up and down with the same images.

Shapes: N objects, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ssl_pretrain.artefact import weights_sha256
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest
from ssl_pretrain.probe import few_shot, knn, linear, retrieval
from ssl_pretrain.probe.baselines import settled
from ssl_pretrain.probe.features import embed, rois
from ssl_pretrain.probe.objects import Objects, cut, leave_one_out
from ssl_pretrain.probe.statistics import Interval, Judged, paired, verdict

ROUNDS = 1000
Features = Literal["crop", "roi"]
MEANING: Mapping[Features, str] = {
    "crop": "the backbone's feature of the object's square, resized to its input",
    "roi": "its maps P3 to P5 of the whole field, RoI-pooled over the square: what a detector sees",
}


class Judge(Protocol):
    """A probe with its settings: asks features (N, D) of length 1 of these objects."""

    def __call__(self, objects: Objects, z_ND: np.ndarray, *, seed: int) -> Judged:
        """Must draw nothing but by `seed`."""


@dataclass(frozen=True)
class Question:
    """One probe on one kind of features."""

    name: str
    features: Features
    figures: tuple[str, ...]
    """Those that are shown."""
    compared: str
    """The one that is compared between backbones."""
    judge: Judge


@dataclass(frozen=True)
class NamedProtocol:
    """A list of questions, and how bank and queries are parted."""

    name: str
    words: str
    questions: tuple[Question, ...]
    everything: bool
    """Each unit against all others, where the data set has no split of its own; else 65 % of the units are the bank."""


def _both(name: str, figures: tuple[str, ...], compared: str, judge: Judge) -> tuple[Question, ...]:
    return tuple(Question(name, features, figures, compared, judge) for features in MEANING)


SHOTS = tuple(f"balanced_accuracy_{shots}" for shots in (1, 5, 10))
RECALLS = "balanced_accuracy", "accuracy", "macro_f1"
BALANCED = RECALLS[0]
PROTOCOLS = {
    each.name: each
    for each in (
        NamedProtocol(
            "objects/v1",
            "k-NN (k 20, T 0.07), ridge, class means of 1, 5 and 10 examples, and retrieval, on crops and on maps",
            (
                *_both("k-NN", RECALLS, BALANCED, partial(knn.judge, k=20, temperature=0.07)),
                *_both("linear", RECALLS, BALANCED, linear.judge),
                *_both("few-shot", SHOTS, SHOTS[1], partial(few_shot.judge, shots=(1, 5, 10), draws=20)),
                *_both("retrieval", ("map_balanced", "map"), "map_balanced", retrieval.judge),
            ),
            everything=True,
        ),
        NamedProtocol(
            "objects-knn/v0",
            "k-NN (k 20, T 0.07) on crops: what a training shows while it runs",
            (Question("k-NN", "crop", RECALLS, BALANCED, partial(knn.judge, k=20, temperature=0.07)),),
            everything=False,
        ),
        NamedProtocol(
            "dino-knn",
            "k 10, 20, 100, 200, T 0.07 (Caron et al., ICCV 2021, eval_knn.py), on crops",
            tuple(
                Question(f"k-NN {k}", "crop", RECALLS[1::-1], "accuracy", partial(knn.judge, k=k, temperature=0.07))
                for k in (10, 20, 100, 200)
            ),
            everything=False,
        ),
        NamedProtocol(
            "lightly-knn",
            "k 200, T 0.1 (the default of lightly's knn_predict; Wu et al., CVPR 2018), on crops",
            (Question("k-NN 200", "crop", RECALLS[1::-1], "accuracy", partial(knn.judge, k=200, temperature=0.1)),),
            everything=False,
        ),
    )
}
"""By name."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What one backbone answered to one question."""

    backbone: str
    weights: str
    """The first 16 digits of the SHA-256 of its weights."""
    question: Question
    judged: Judged
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Difference:
    """The first backbone less another one, in a question's first figure."""

    question: Question
    other: str
    interval: Interval
    """Of the difference, over the same resampled units."""
    sentence: str


@dataclass(frozen=True, eq=False)
class Report:
    """All answers of all backbones to a protocol; the first backbone is the one that was asked about."""

    protocol: NamedProtocol
    objects: Objects
    answers: tuple[Answer, ...]
    differences: tuple[Difference, ...]
    seed: int
    short_side_px: int
    """Of the fields that maps are computed of."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; each number says its protocol, backbone, data and seed."""
        tags = {"protocol": self.protocol.name, "data": self.objects.fingerprint, "seed": self.seed}
        numbers = [
            {**tags, "backbone": a.backbone, "weights": a.weights, "probe": a.question.name,
             "features": a.question.features, "figure": figure, **vars(interval)}
            for a in self.answers for figure, interval in a.intervals.items()
        ]  # fmt: skip
        differences = [
            {**tags, "backbone": self.answers[0].backbone, "than": d.other, "probe": d.question.name,
             "features": d.question.features, "figure": d.question.compared, **vars(d.interval),
             "sentence": d.sentence}
            for d in self.differences
        ]  # fmt: skip
        o = self.objects
        return {
            "protocol": self.protocol.name, "what": self.protocol.words, "seed": self.seed,
            "data": {"source": o.source, "fingerprint": o.fingerprint, "objects": len(o.label_N),
                     "classes": list(o.classes), "split": o.split, "crops": o.rule, "crop_px": o.size_px,
                     "field_short_side_px": self.short_side_px},
            "numbers": numbers, "differences": differences, "notes": list(self.notes),
            "settings": [
                {"backbone": a.backbone, "probe": a.question.name, "features": a.question.features,
                 **a.judged.settings}
                for a in self.answers
            ],
        }  # fmt: skip


def named_protocol(name: str) -> NamedProtocol:
    """Raises `UsageError` for a name that is none."""
    if name not in PROTOCOLS:
        raise UsageError(
            f"there is no protocol {name!r}{nearest(name, list(PROTOCOLS))}; there are {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def ask(
    protocol: NamedProtocol,
    backbones: Mapping[str, Backbone],
    labelled: LabelledSet,
    *,
    size_px: int,
    point_px: int = 80,
    short_side_px: int = 640,
    seed: int = 0,
    device: str | torch.device | None = None,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Asks backbones (by the names that they are shown with), the first of which is compared with each other one.

    size_px        side of the objects' crops, the same for all backbones
    point_px       side of the square around a labelled point, in pixels of the image
    short_side_px  fields with a larger short side are shrunk to it for the maps
    seed           of split, folds, draws and bootstrap

    Raises the errors of `cut`, and `SslPretrainError` for features that are not finite.
    """
    objects = cut(labelled, size_px, point_px=point_px, seed=seed)
    if protocol.everything and not objects.own_split:
        objects = leave_one_out(objects)
    answers: list[Answer] = []
    notes = list(objects.problems)
    for name, backbone in backbones.items():
        features: dict[Features, np.ndarray] = {}
        network = settled(backbone, objects.crops_NSSC)
        for question in protocol.questions:
            if question.features == "roi" and backbone.name.startswith("pixels"):
                continue  # it has no maps
            say(f"{name}: {question.name}, {question.features}")
            if question.features not in features:
                features[question.features] = _features(
                    question.features, network, labelled, objects, short_side_px, device
                )
            judged = question.judge(objects, features[question.features], seed=seed)
            intervals = judged.tally.intervals(rounds, seed)
            answers.append(Answer(name, weights_sha256(network)[:16], question, judged, intervals))
            notes += [f"{question.name}: {note}" for note in judged.notes]
    differences = _differences(answers, rounds, seed)
    return Report(
        protocol, objects, tuple(answers), tuple(differences), seed, short_side_px, tuple(dict.fromkeys(notes))
    )


def _features(
    kind: Features,
    backbone: Backbone,
    labelled: LabelledSet,
    objects: Objects,
    short_side_px: int,
    device: str | torch.device | None,
) -> np.ndarray:
    if kind == "roi":
        return rois(backbone, labelled, objects, short_side_px, device)
    return embed(backbone, objects.crops_NSSC, device=device)


def _differences(answers: Sequence[Answer], rounds: int, seed: int) -> list[Difference]:
    """Of the first backbone and each other one, question by question."""
    found = []
    for mine in (a for a in answers if a.backbone == answers[0].backbone):
        for other in (a for a in answers if a.question is mine.question and a is not mine):
            figure = mine.question.compared
            interval = paired(mine.judged.tally, other.judged.tally, rounds, seed)[figure]
            what = f"{_words(figure)} ({mine.question.name}, {mine.question.features})"
            sentence = verdict(interval, mine.backbone, other.backbone, what)
            found.append(Difference(mine.question, other.backbone, interval, sentence))
    return found


# The terminal


def table(report: Report) -> Group:
    """Answers side by side, verdicts, one row a class of the first question, and the notes."""
    names = list(dict.fromkeys(a.backbone for a in report.answers))
    side_by_side = Table("probe", "of", "figure", title=report.protocol.name)
    for name in names:
        side_by_side.add_column(Text(name))
    for question in report.protocol.questions:
        cells = {a.backbone: a.intervals for a in report.answers if a.question is question}
        for figure in question.figures:
            row = [_cell(cells[name][figure]) if name in cells else "–" for name in names]
            side_by_side.add_row(question.name, question.features, _words(figure), *row)
        side_by_side.add_section()
    o = report.objects
    units = len(np.unique(o.unit_N[o.query_N]))
    head = [
        f"{o.source}; fingerprint {o.fingerprint}",
        f"{int(o.query_N.sum()):,} queries in {units:,} independent units; {o.split}; {o.rule}, at {o.size_px} px",
    ]
    used = dict.fromkeys(question.features for question in report.protocol.questions)
    head += [f"{kind}: {MEANING[kind]}" for kind in used]
    lines = [d.sentence for d in report.differences]
    lines += [f"note: {note}" for note in report.notes]
    # Text, because rich would read a class called "[red]" as markup.
    return Group(Text("\n".join(head)), side_by_side, _per_class(report), Text("\n".join(lines)))


def _words(figure: str) -> str:
    """For people.

    >>> _words("map_balanced"), _words("balanced_accuracy_5")
    ('map balanced', 'balanced accuracy of 5 shots')
    """
    name, _, shots = figure.rpartition("_")
    if not shots.isdigit():
        return figure.replace("_", " ")
    return f"{name.replace('_', ' ')} of {shots} shot{'s' if shots != '1' else ''}"


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _per_class(report: Report) -> Table:
    """Recall and precision of the first backbone's first question, and with what the most frequent confusion is."""
    answer = report.answers[0]
    question = answer.question
    found = Table("class", title=f"{answer.backbone}: {question.name}, {question.features}")
    for heading in ("objects", "queries", "recall", "precision"):
        found.add_column(heading, justify="right")
    found.add_column("most often taken for")
    confusion_CC = answer.judged.confusion_CC
    assert confusion_CC is not None
    count_C = np.bincount(report.objects.label_N, minlength=len(report.objects.classes))
    for c, name in enumerate(report.objects.classes):
        true, predicted, hit = confusion_CC[c].sum(), confusion_CC[:, c].sum(), confusion_CC[c, c]
        shares = [f"{hit / n:.3f}" if n else "–" for n in (true, predicted)]
        wrong_C = confusion_CC[c].copy()
        wrong_C[c] = 0
        most = int(wrong_C.argmax())
        taken = f"{report.objects.classes[most]} ({wrong_C[most] / true:.0%})" if wrong_C[most] else ""
        found.add_row(Text(name), f"{count_C[c]:,}", f"{int(true):,}", *shares, Text(taken))
    return found
