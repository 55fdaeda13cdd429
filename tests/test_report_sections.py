"""The sections of the report: numbers by hand, scikit-learn as an oracle, and faults that a picture must not hide."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import shaken, small
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE, trustworthiness
from sklearn.manifold._t_sne import _joint_probabilities

from ssl_pretrain import artefact, backbones
from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.data.building import build
from ssl_pretrain.errors import DataError
from ssl_pretrain.named import named, names
from ssl_pretrain.report import tsne
from ssl_pretrain.report.folder import RunFolder, opened
from ssl_pretrain.report.network import given
from ssl_pretrain.report.pictures import KIND
from ssl_pretrain.report.sections import Section, attention, confusion, embedding, health, images, maps
from ssl_pretrain.report.sheet import WRONG, pixels
from ssl_pretrain.train import health as guards
from ssl_pretrain.train.recipe import load

QUIET = Console(quiet=True)
EVIL = "casts <b>&amp; $x$ of a very long name indeed"


def run_folder(folder: Path, method: str = "simclr", lines: list[dict[str, float]] | None = None) -> Path:
    """A run as if it had been trained: recipe, records and an artefact, and a cache for its images."""
    run = folder / "run"
    run.mkdir(parents=True)
    recipe = small(method, "test_resnet", batch_size=4, steps=40)
    recipe |= {"data": "synthetic:6", "probe": {"data": "synthetic:6:1"}}
    (run / "recipe.yaml").write_text(load(recipe).yaml())
    made = lines if lines is not None else [{"step": s, "train/loss": 5.0 - s / 20} for s in (10, 20, 30, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    origin = {"step": 40, "images": 6, "method": method, "pack": "", "seed": 0, "recipe": {}, "scores": {}}
    artefact.write(run / "artefact", shaken("test_resnet"), {**origin, "version": "0"})
    return run


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_section_keeps_the_contract() -> None:
    places = [named(KIND, name).PLACE for name in names(KIND)]
    assert len(set(places)) == len(places) >= 11
    assert all(callable(named(KIND, name).section) for name in names(KIND))


def test_what_draws_imports_nothing_of_a_run() -> None:
    drawing = "attention", "confusion", "embedding", "maps"
    code = f"import sys, {', '.join(f'ssl_pretrain.report.sections.{name}' for name in drawing)}"
    code += "; print([name for name in sys.modules if name.startswith('ssl_pretrain.train.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# t-SNE


def test_tsne_is_as_good_as_scikit_learns() -> None:
    z_ND, label_N = load_digits(return_X_y=True)
    z_ND, label_N = z_ND[:300], label_N[:300]
    mine = tsne.tsne(z_ND)
    theirs = TSNE(init="pca", perplexity=30, method="exact", random_state=0, max_iter=500).fit_transform(z_ND)
    p_NN = tsne.joint(tsne.squared_distances(z_ND), 30)
    assert tsne.divergence(p_NN, mine) < 1.05 * tsne.divergence(p_NN, theirs)
    assert trustworthiness(z_ND, mine) > 0.97
    again = tsne.tsne(z_ND)
    np.testing.assert_array_equal(mine, again)


def test_joint_probabilities_are_scikit_learns() -> None:
    z_ND = np.random.default_rng(0).normal(size=(60, 8))
    squared = tsne.squared_distances(z_ND)
    theirs = _joint_probabilities(squared.astype(np.float32), 12.0, 0)
    mine = tsne.joint(squared, 12.0)
    np.testing.assert_allclose(mine[np.triu_indices(60, 1)], theirs, atol=1e-6)
    np.testing.assert_allclose([mine.sum(), np.abs(np.diag(mine)).max()], [1, 0], atol=1e-12)


def test_points_that_are_all_the_same_stay_on_one_spot() -> None:
    y_N2 = tsne.tsne(np.ones((20, 5)))
    assert np.isfinite(y_N2).all() and np.ptp(y_N2) < 1e-6
    twice = tsne.tsne(np.repeat(np.eye(10), 2, axis=0))
    assert np.isfinite(twice).all() and np.ptp(twice) > 1


def test_the_map_marks_the_commonest_classes_and_greys_the_others() -> None:
    label_N = np.repeat(np.arange(39), np.arange(40, 1, -1))
    y_N2 = np.random.default_rng(0).normal(size=(len(label_N), 2))
    figure = embedding.figure("a run", y_N2, label_N, [f"{EVIL} {c}" for c in range(39)])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(words) == embedding.COLOURED + 1 and words[0].endswith("(40)")
    rest = int((label_N >= embedding.COLOURED).sum())
    assert words[-1] == f"27 other classes ({rest})"
    groups = [group for group in figure.axes[0].collections if isinstance(group, PathCollection)]
    marks = {(str(group.get_facecolor()), str(group.get_paths()[0].vertices)) for group in groups}
    assert len(marks) == embedding.COLOURED + 1, "two classes have one mark"
    drawn = sum(np.asarray(group.get_offsets()).shape[0] for group in groups)
    assert drawn == len(label_N)
    assert pixels(figure).std() > 10


# Confusion


def test_the_matrix_shows_counts_sorted_and_shares_of_rows() -> None:
    matrix = np.array([[1, 1, 0, 0], [0, 4, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figure = confusion.figure("a run", matrix, ["rare", "common", "predicted only", "never"])
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, np.array([[0.8, 0, 0.2], [0.5, 0.5, 0], [0, 0, 0]]))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["common (5)", "rare (2)", "predicted only (0)"]
    assert sorted(texts(figure)) == ["1", "1", "1", "4"]
    at = {text.get_position(): text.get_text() for text in axes.texts}
    assert at[(0, 0)] == "4" and at[(2, 0)] == "1" and (1, 0) not in at


@pytest.mark.parametrize("classes", [1, 39])
def test_one_class_and_many_with_hostile_names_are_drawn(classes: int) -> None:
    matrix = np.random.default_rng(0).integers(0, 3000, (classes, classes))
    figure = confusion.figure("a run", matrix, [f"{c} {EVIL}" for c in range(classes)])
    x = pixels(figure)
    edge = np.concatenate([x[:2].ravel(), x[-2:].ravel(), x[:, :2].ravel(), x[:, -2:].ravel()])
    assert (edge == 255).all(), "something is cut off"
    axes = figure.axes[0]
    box = axes.get_window_extent()
    widest = max(text.get_window_extent().width for text in axes.texts)
    assert widest <= box.width / classes, "numbers run into each other"


def test_classes_with_hostile_names_are_escaped_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(run_folder(tmp_path), QUIET)
    judged = folder.judged
    assert judged is not None
    vars(judged.objects)["classes"] = tuple(f"{EVIL} {i}" for i in range(len(judged.objects.classes)))
    found = confusion.section(folder)
    assert found is not None and "<b>" not in found.html and "&lt;b&gt;&amp;amp; $x$" in found.html
    rows = re.findall(r"<tr><td>.*?</tr>", found.html)
    assert len(rows) == len(judged.objects.classes)
    counts = [int(re.findall(r"<td>([\d,]+)</td>", row)[0]) for row in rows]
    assert counts == sorted(counts, reverse=True) and sum(counts) == int((~judged.objects.train_N).sum())


# Maps and attention


def test_maps_show_the_components_of_all_images_together() -> None:
    torch.manual_seed(0)
    axes_KD = torch.linalg.qr(torch.randn(6, 6))[0][:3]
    p_NK = torch.rand(2 * 12, 3) * torch.tensor([9.0, 3.0, 1.0])
    z_ND = p_NK @ axes_KD + 5
    both = [part.T.reshape(6, 3, 4) for part in z_ND.split(12)]
    pictures, share = maps.colours(both)
    assert share == pytest.approx(1) and [x.shape for x in pictures] == [(3, 4, 3)] * 2
    red = np.concatenate([x[..., 0].ravel() for x in pictures]).astype(float)
    assert abs(np.corrcoef(red, p_NK[:, 0].numpy())[0, 1]) > 0.97, "the first component is not red"
    alone = maps.colours(both[:1])[0][0]
    assert not np.array_equal(alone, pictures[0]), "each image has its own components"
    again = maps.colours([-b for b in both])[0][0].astype(int)
    assert set(np.unique(again + pictures[0])) <= {254, 255, 256} or np.array_equal(again, pictures[0])
    flat, none = maps.colours([torch.ones(5, 2, 2)])
    assert none == 0 and (flat[0] == 128).all()


def test_the_backbone_is_left_as_it_was() -> None:
    backbone = shaken("test_resnet").train()
    next(backbone.children()).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    field = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    figure = maps.figure("a run", backbone, [field, field[:, :50]])
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert any("stride 8" in text.get_text() for text in figure.texts)


def unfused(backbone: MaskableBackbone, x_BCHW: torch.Tensor) -> torch.Tensor:
    """The last block's attention (B, M, N, N) as timm computes it where nothing is fused."""
    module = attention.attention_of(backbone)
    module.fused_attn = False
    kept: list[torch.Tensor] = []
    module.attn_drop.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        backbone(x_BCHW)
    module.fused_attn = True
    return kept[0]


@pytest.mark.parametrize("from_class", [True, False])
def test_attention_is_timms_own(from_class: bool) -> None:
    backbone = shaken("test_vit", patch_size=8)
    assert isinstance(backbone, MaskableBackbone)
    x_BCHW = torch.randn(2, 3, 32, 48)
    found = attention.weights(backbone, x_BCHW, from_class)
    whole = unfused(backbone, x_BCHW)
    prefix = backbone.prefix_tokens
    asked = whole[:, :, 0] if from_class else whole[:, :, prefix:].mean(2)
    assert found.shape == (2, whole.shape[1], 4, 6)
    torch.testing.assert_close(found.flatten(2), asked[..., prefix:], rtol=1e-4, atol=1e-6)
    assert 0 < found.sum((2, 3)).max() <= 1 + 1e-5
    assert not attention.attention_of(backbone)._forward_pre_hooks, "the hook stays"


def test_attention_is_for_plain_vits_only(tmp_path: Path) -> None:
    assert attention.section(opened(run_folder(tmp_path), QUIET)) is None


def test_a_field_keeps_its_aspect_and_is_normalised() -> None:
    backbone: Backbone = backbones.create("test_vit", patch_size=8)
    x_1Chw = given(np.full((30, 60, 3), 255, np.uint8), backbone.input, 8)
    assert x_1Chw.shape == (1, 3, 224, 448)
    expected = (1 - torch.tensor(backbone.input.mean)) / torch.tensor(backbone.input.std)
    torch.testing.assert_close(x_1Chw[0, :, 5, 5], expected)


# Health


def spoken(tmp_path: Path, lines: list[dict[str, float]]) -> Section:
    return health.section(opened(run_folder(tmp_path, lines=lines), QUIET))


def test_levels_are_the_guards_own_and_marks_stand_where_they_spoke(tmp_path: Path) -> None:
    lines = [{"step": s, "train/loss": 2.7} for s in (10, 20, 30, 40)]
    lines += [{"step": 20, "health/feature_std": 0.5, "health/feature_rank": 20.0}]
    lines += [{"step": 40, "health/feature_std": 0.02, "health/feature_rank": 19.0, "health/features_collapsed": 1}]
    found = spoken(tmp_path, lines)
    assert found.figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in found.figure.axes}
    std, rank = panels["Spread of the features"], panels["Rank of the features"]
    level = next(line for line in std.lines if line.get_label() == "level")
    np.testing.assert_allclose(level.get_ydata(), [guards.FEATURE_STD_SHARE * 0.5] * 2)
    level = next(line for line in rank.lines if line.get_label() == "level")
    np.testing.assert_allclose(level.get_ydata(), [guards.RANK_SHARE * 20] * 2)
    marks = [line for line in std.lines if line.get_marker() == "|"]
    assert [list(mark.get_xdata()) for mark in marks] == [[40]] and marks[0].get_color() == WRONG
    assert not [line for line in rank.lines if line.get_marker() == "|"]
    assert "features collapsed at step 40, still so at the end: every image gets nearly" in found.html
    assert "Lower train.lr" in found.html and found.html.count("<li>") == 1


def test_a_sound_run_says_nothing_and_a_skipped_step_is_told(tmp_path: Path) -> None:
    lines = [{"step": s, "train/loss": 2.0} for s in (10, 20)]
    assert "Nothing was diagnosed" in spoken(tmp_path / "a", lines).html
    found = spoken(tmp_path / "b", [{"step": 7, "health/not_finite": 1}, *lines])
    assert "not finite at step 7:" in found.html and "at the end" not in found.html


def test_every_guard_has_a_panel_and_words() -> None:
    watched = [name for _, of in health.PANELS.values() for name in of]
    assert sorted(watched) == sorted([*(guard.name for guard in guards.GUARDS), health.NOT_FINITE])
    for guard in guards.GUARDS:
        told = health.words(guard.name, [1, 2], [1, 1], 9, {"train.lr": 0.1})
        assert told.startswith(f"{guard.name.replace('_', ' ')} at 2 steps from 1 to 2: ") and len(told) > 60


# The images


def test_rejected_files_are_counted_by_reason(tmp_path: Path) -> None:
    source = tmp_path / "fields"
    source.mkdir()
    torch.manual_seed(0)
    from PIL import Image

    for i in range(4):
        x = np.random.default_rng(i).integers(0, 255, (40, 50 + 10 * (i == 3), 3), dtype=np.uint8)
        Image.fromarray(x).save(source / f"{i}.png")
    (source / "a <b>.png").write_bytes((source / "0.png").read_bytes()[:60])
    (source / "c.jpg").write_bytes(b"nothing")
    pack = build([source], tmp_path / "pack", processes=0)
    run = run_folder(tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"data": str(pack.folder)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = images.section(opened(run, QUIET))
    assert "<dt>Images</dt><dd>4</dd>" in found.html and "<dt>Rejected</dt><dd>2</dd>" in found.html
    assert "50 x 40 to 60 x 40 px, 3 of 4 have 50 x 40" in found.html and pack.fingerprint in found.html
    assert "a &lt;b&gt;.png" in found.html and "<b>" not in found.html
    (pack.folder / "rejected.jsonl").write_text("{")
    with pytest.raises(DataError, match="pack the images again"):
        images.section(opened(run, QUIET))


# The recipe


def test_auto_values_keep_their_reasons_when_the_run_goes_on(tmp_path: Path, pack: object) -> None:
    from ssl_pretrain.data.pack import Pack
    from ssl_pretrain.train.planning import planned
    from ssl_pretrain.train.recipe import written

    assert isinstance(pack, Pack)
    recipe = load({**small("dino"), "auto": True})
    first = planned(recipe, pack, tmp_path, 1, tmp_path, QUIET)
    (tmp_path / "recipe.yaml").write_text(first.yaml())
    said = {key: origin for key, _, origin in written(first.yaml())}
    for key in recipe.auto:
        assert said[key].startswith("auto: ") and len(said[key]) > 12, key
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.json").write_text("{}")
    again = planned(recipe, pack, tmp_path, 1, tmp_path, QUIET)
    assert again.yaml() == first.yaml() and load(tmp_path / "recipe.yaml").flat() == first.flat()


def test_a_run_of_before_the_reasons_goes_on(tmp_path: Path, pack: object) -> None:
    from ssl_pretrain.data.pack import Pack
    from ssl_pretrain.train.planning import planned

    assert isinstance(pack, Pack)
    recipe = load({**small("dino"), "auto": True})
    first = planned(recipe, pack, tmp_path, 1, tmp_path, QUIET)
    (tmp_path / "recipe.yaml").write_text(re.sub(r"# auto: .*", "# auto", first.yaml()))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.json").write_text("{}")
    again = planned(recipe, pack, tmp_path, 1, tmp_path, QUIET)
    assert again.flat() == first.flat() and {again.origin[key] for key in recipe.auto} == {"auto"}


def test_a_run_without_labels_has_no_section_of_objects(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    text = (run / "recipe.yaml").read_text().replace("data: synthetic:6:1", "data: null")
    (run / "recipe.yaml").write_text(text)
    folder: RunFolder = opened(run, QUIET)
    assert [named(KIND, name).section(folder) for name in ("neighbours", "confusion", "embedding")] == [None] * 3
