"""The probe during training: the same k-NN as `ssl-pretrain probe`, on objects that are cut once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.data import sources
from ssl_pretrain.named import named
from ssl_pretrain.train.recipe import Recipe


class OnlineProbe:
    """Holds the labelled objects of a recipe's `probe.data`; call it with a backbone for its scores."""

    def __init__(self, recipe: Recipe, fed: InputSpec, cache: Path) -> None:
        assert recipe.probe.data is not None
        section = recipe.probe
        labelled = sources.labelled(recipe.probe.data, cache, section.format, section.group_regex)
        size_px = recipe.probe.size_px or fed.size_px
        self.objects = named("probe", "objects").cut(labelled, size_px, point_px=recipe.probe.point_px)
        self.knn = named("probe", "knn")
        self.last: Any = None
        """The last whole score (`probe.knn.KnnScore`)."""

    def __call__(self, backbone: Backbone) -> Mapping[str, float]:
        """Accuracy, balanced accuracy and macro-F1 with the ends of their 95 % intervals, as flat numbers."""
        score = self.last = self.knn.knn_probe(backbone, self.objects)
        figures = {name: vars(score)[name] for name in ("accuracy", "balanced_accuracy", "macro_f1")}
        scores = {name: figure.value for name, figure in figures.items()}
        scores |= {f"{name}_low": figure.low for name, figure in figures.items()}
        return scores | {f"{name}_high": figure.high for name, figure in figures.items()}
