"""The verb preview: what it draws, what it says, and each newcomer's mistake in one line with its exit code."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import small
from PIL import Image

from ssl_pretrain import named
from ssl_pretrain.cli import main
from ssl_pretrain.data.building import build
from ssl_pretrain.errors import DataError, UsageError, WriteError
from ssl_pretrain.report import sheet
from ssl_pretrain.report.preview import Objects, find_objects, warnings_of
from ssl_pretrain.report.sheet import DPI
from ssl_pretrain.train.recipe import Recipe, load
from ssl_pretrain.views.audit import Sight

METHODS = named.names("methods")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with a recipe of each method."""
    folder = tmp_path_factory.mktemp("preview")
    for method in ("simclr", "dino", "mae"):
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(small(method) | {"data": "synthetic:6"}))
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["preview", *(str(word) for word in words)])
    output = capsys.readouterr()
    return code, output.out, output.err


# What it draws and says


@pytest.mark.parametrize(("method", "rows"), [("simclr", 1), ("dino", 3), ("mae", 1)])
def test_a_picture_and_a_table(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, rows: int
) -> None:
    monkeypatch.chdir(place)
    out = place / "made" / "for it" / f"{method}.png"
    code, text, errors = said(capsys, f"{method}.yaml", "--out", out, "--images=2", "--views.window_px", "100")
    assert code == 0 and not errors
    shares = [int(found) for found in re.findall(r"│ +([0-9]+) % │", text)]
    assert len(shares) == rows and all(20 < share <= 100 for share in shares)
    assert re.search(r"objects: [0-9]+ labelled boxes in 6 images", text)
    assert "train.batch_size is 8, but there are only 6 images" in text
    with Image.open(out) as opened:
        assert opened.format == "PNG"
        pixels = np.asarray(opened.convert("RGB"))
    assert 5 * DPI < pixels.shape[1] < 13 * DPI and 6 * DPI < pixels.shape[0] < 10 * DPI and pixels.std() > 10
    edge = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert (edge == 255).all(), "something is cut off at the edge of the sheet"


def test_the_default_picture_lies_here_and_a_pack_will_do(
    place: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, _ = said(capsys, place / "simclr.yaml", "--data", build([images], tmp_path / "a", processes=0).folder)
    assert code == 0 and (tmp_path / "preview.png").is_file()
    assert "a guess" in text and "no labels: " in text and "guessed from contrast" in text


def test_rotated_crops_are_drawn_where_they_lie(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_report import QUIET

    from ssl_pretrain.report.folder import RunFolder

    monkeypatch.chdir(place)
    recipe = load(place / "simclr.yaml", ["--train.batch_size", "4"])
    feed = RunFolder(place / "run", recipe, QUIET).feed
    ids = feed.ids(0)[:2]
    tiles = sheet.tiles(feed, ids)
    for rotate_p in (0.0, 1.0):
        feed.specs = tuple(dataclasses.replace(spec, rotate_p=rotate_p) for spec in feed.specs)
        figure = sheet.views_picture(feed, ids, tiles, [("black", "title")], [])
        sources = [axes for axes in figure.axes if len(axes.patches) == 2]
        assert len(sources) == 2
        quads = sheet.corners(feed.plan(ids, 0), 0)
        for axes, quad_V42 in zip(sources, quads, strict=True):
            for patch, quad_42 in zip(axes.patches, quad_V42, strict=True):
                drawn = patch.get_patch_transform().transform(patch.get_path().vertices)
                for corner in quad_42 - 0.5:
                    assert np.abs(drawn - corner).max(1).min() < 1e-3
                    assert axes.get_xlim()[0] - 1e-6 <= corner[0] <= axes.get_xlim()[1] + 1e-6
                    assert axes.get_ylim()[1] - 1e-6 <= corner[1] <= axes.get_ylim()[0] + 1e-6


# Where the objects are


def voc(folder: Path, scale: int = 1) -> Path:
    """One image of 120 x 80 px, an object at x 30 to 60 and y 10 to 20."""
    for part in ("JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "JPEGImages" / "a.png")
    (folder / "Annotations" / "a.xml").write_text(
        "<annotation><filename>a.png</filename><size><width>120</width><height>80</height></size><object>"
        "<name>cell</name><bndbox><xmin>30</xmin><ymin>10</ymin><xmax>60</xmax><ymax>20</ymax></bndbox></object>"
        "</annotation>"
    )
    return folder


def found(recipe: Recipe, pack_folder: Path, short_side_px: int | None, source: Path, cache: Path) -> Objects:
    pack = build([source], pack_folder, short_side_px, processes=0)
    return find_objects(recipe, pack, np.arange(len(pack)), cache)


def test_boxes_are_in_stored_pixels_and_go_by_content(place: Path, tmp_path: Path) -> None:
    labelled = voc(tmp_path / "labelled")
    own = load(small("simclr") | {"data": str(labelled)})
    for short_side_px, factor in ((None, 1.0), (40, 0.5)):
        objects = found(own, tmp_path / f"pack-{factor}", short_side_px, labelled, tmp_path)
        assert not objects.guessed and objects.problems == () and objects.words == "1 labelled boxes in 1 images"
        assert objects.boxes[0] == pytest.approx(np.array([[30, 10, 60, 20]]) * factor)
    # The same file elsewhere, with labels named for the probe; and another file of the same name.
    (tmp_path / "bare").mkdir()
    shutil.copy(labelled / "JPEGImages" / "a.png", tmp_path / "bare")
    probe = {"probe": {"data": str(labelled)}}
    bare = load(small("simclr") | {"data": str(tmp_path / "bare")} | probe)
    assert not found(bare, tmp_path / "pack-bare", None, tmp_path / "bare", tmp_path).guessed
    Image.new("RGB", (120, 80)).save(tmp_path / "bare" / "a.png")
    other = found(bare, tmp_path / "pack-other", None, tmp_path / "bare", tmp_path)
    assert other.guessed and "its labels are not used" in other.problems[0]


def test_a_point_is_a_square_of_original_pixels(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "labels").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "set" / "images" / "a.png")
    (tmp_path / "set" / "labels" / "a.txt").write_text("60 40 1\n5 40 2\n")
    recipe = load(small("simclr") | {"data": str(tmp_path / "set"), "probe": {"point_px": 20}})
    objects = found(recipe, tmp_path / "pack", 40, tmp_path / "set", tmp_path)
    assert objects.boxes[0] == pytest.approx(np.array([[25, 15, 35, 25], [0, 15, 7.5, 25]]))
    assert "taken as squares of 20 px (probe.point_px)" in objects.words


def test_broken_labels_are_said_and_the_rest_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    labelled = voc(tmp_path / "labelled")
    (labelled / "Annotations" / "a.xml").write_text("<annotation>")
    code, text, _ = said(capsys, place / "simclr.yaml", "--data", labelled, "--probe.data", tmp_path / "no")
    assert code == 0
    assert "no labels are used from" in text and "probe.data: there is no folder or pack" in text


# Warnings


def test_warnings_name_the_view_and_the_key() -> None:
    dino = load(small("dino") | {"views": {"window_px": 100, "brightness": 0.4}})
    first, _, local = dino.specs()
    assert warnings_of(dino, local, Sight(100, 0.5, 1.0, (8.0, 8.0, 9.0))) == ()
    assert warnings_of(dino, local, None) == ()
    (few,) = warnings_of(dino, local, Sight(100, 0.31, 1.0, (9.0, 20.0, 30.0)))
    assert few.startswith("local: 69 % of the crops hold no object; raise the lower bound of method.local_scale (0.05)")
    assert few.endswith("or views.window_px (100)")
    (tiny,) = warnings_of(dino, first, Sight(100, 1.0, 1.0, (2.0, 7.5, 30.0)))
    assert tiny == "global_0: objects are 7.5 px wide in the view (median); lower views.window_px (100) or raise " \
        "method.global_size_px (48)"  # fmt: skip
    (white,) = warnings_of(dino, first, None, (255.0, 252.0), 16)
    assert "2 of 16 views show nothing" in white and "lower views.brightness (0.4)" in white
    (gray,) = warnings_of(dino, first, None, (128.0,), 16)
    assert "empty ground; raise the lower bound of method.global_scale" in gray
    simclr = load(small("simclr"))
    (few,) = warnings_of(simclr, simclr.specs()[0], Sight(100, 0.0, 0.0, None), guessed=True)
    assert few == "view: 100 % of the crops seem to hold no object; raise the lower bound of method.scale (0.08)"


# Mistakes


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], UsageError, "preview needs a recipe"),
        (["--data", "x"], UsageError, "preview needs a recipe"),
        (["simclr.yml"], UsageError, "there is no recipe simclr.yml (did you mean 'simclr.yaml'?)"),
        (["simclr.yaml", "--data", "gone"], DataError, "there is no folder or pack gone"),
        (["simclr.yaml", "--data", "empty"], DataError, "no images in empty"),
        (["simclr.yaml", "--data", "words"], DataError, "no images in words"),
        (["simclr.yaml", "--imgaes", "3"], UsageError, "unknown option --imgaes (did you mean '--images'?)"),
        (["simclr.yaml", "--train.epocks", "3"], UsageError, "did you mean '--train.epochs'"),
        (["simclr.yaml", "--images", "many"], UsageError, "images: Expected a int. Got value: many"),
        (["simclr.yaml", "--images", "0"], UsageError, "--images is 0"),
        (["simclr.yaml", "--out"], UsageError, "--out: expected one argument"),
        (["simclr.yaml", "--out", "a.jpg"], UsageError, "--out is a.jpg: the picture is a PNG"),
        (["nodata.yaml"], UsageError, "no images are named: give --data FOLDER"),
        (["simclr.yaml", "--out", "words/a.txt/b.png"], WriteError, "cannot write the picture words/a.txt/b.png"),
    ],
)
def test_a_mistake_is_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: type[UsageError],
    says: str,
) -> None:
    monkeypatch.chdir(place)
    for name in ("empty", "words"):
        (place / name).mkdir(exist_ok=True)
    (place / "words" / "a.txt").write_text("no image")
    (place / "nodata.yaml").write_text(yaml.safe_dump(small("simclr")))
    given, _, errors = said(capsys, *words)
    assert given == code.exit_code
    assert says in errors and len(errors.splitlines()) == 1


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = said(capsys, "--help")
    assert code == 0 and all(word in text for word in ("recipe", "--data", "--out", "--images"))
    main(["--help"])
    assert "preview" in capsys.readouterr().out
