"""The report: what it draws of a run, what it says when something is missing, and that the page stands alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import small
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from rich.console import Console

from ssl_pretrain import pretrain
from ssl_pretrain.cli import main
from ssl_pretrain.errors import DataError, UsageError, WriteError
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.report import page, sheet
from ssl_pretrain.report.folder import QUERIES, choose, opened, records, series, thinned
from ssl_pretrain.report.pictures import draw
from ssl_pretrain.report.sections import neighbours, views
from ssl_pretrain.report.sections import recipe as recipe_section
from ssl_pretrain.report.sections.neighbours import OTHER, SAME, frame_colour
from ssl_pretrain.report.sheet import DPI, INKS
from ssl_pretrain.views.plan import boxes, plan

QUIET = Console(quiet=True)
PICTURES = (
    "views", "curves", "health", "neighbours", "confusion", "embedding", "maps", "attention", "reconstructions",
)  # fmt: skip
"""In the order of the page."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of MAE on a plain ViT, which has every section."""
    folder = tmp_path_factory.mktemp("runs") / "a <b> run"
    recipe = small("mae", batch_size=4, steps=4, log_every_steps=1)
    recipe |= {"data": "synthetic:8", "probe": {"data": "synthetic:6:1", "every_epochs": 1}}
    return pretrain(recipe, out=folder, console=QUIET).folder


@pytest.fixture(scope="module")
def drawn(run: Path) -> list[Path]:
    return draw(run, QUIET)


def copy(run: Path, to: Path, *names: str) -> Path:
    """A run beside an empty cache, with these of its files."""
    (to / "run").mkdir()
    for name in names:
        source = run / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, to / "run" / name)
    return to / "run"


def said(run: Path) -> str:
    console = Console(file=io.StringIO(), width=1000)
    draw(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


# Pictures


def test_a_run_has_its_pictures_and_a_page(run: Path, drawn: list[Path]) -> None:
    assert drawn == [*(run / "pictures" / f"{name}.png" for name in PICTURES), run / "report.html"]
    for path in drawn[:-1]:
        with Image.open(path) as opened:
            assert opened.format == "PNG"
            pixels = np.asarray(opened.convert("RGB"))
        assert 5 * DPI < pixels.shape[1] < 12 * DPI and 2 * DPI < pixels.shape[0] < 14 * DPI
        assert pixels.std() > 10, "an empty sheet"
        edge = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        assert (edge == 255).all(), "something is cut off at the edge of the sheet"


def test_pictures_are_the_same_when_drawn_again(run: Path, drawn: list[Path]) -> None:
    before = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in draw(run, QUIET)] == before


def test_the_boxes_are_those_of_the_views_and_lie_in_the_window(run: Path) -> None:
    feed = opened(run, QUIET).feed
    ids = feed.ids(0)
    for window_px in (None, 100):
        feed.window_px = window_px
        found = list(sheet.sources(feed, ids))
        size_B2 = np.array([source.shape[:2] for source, _, _ in found])
        expected = boxes(plan(feed.specs, ids, size_B2, 0, feed.seed, window_px), 0)
        for (source, box_V4, window), mine in zip(found, expected, strict=True):
            if window_px is None:
                assert window is None
                np.testing.assert_array_equal(box_V4, mine)
                continue
            assert window is not None and (window[2:] <= np.array(source.shape[:2])).all()
            top, left, height, width = box_V4.T
            assert (top >= window[0]).all() and (top + height <= window[0] + window[2]).all()
            assert (left >= window[1]).all() and (left + width <= window[1] + window[3]).all()


def test_a_view_that_shows_nothing_is_marked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def words() -> list[str]:
        figure = views.section(opened(run, QUIET)).figure
        assert figure is not None
        return [text.get_text() for axes in figure.axes for text in axes.texts]

    assert words() == ["1"] * 8  # the number of the one view, on 4 sources and 4 views
    monkeypatch.setattr(views, "BLANK", 256.0)
    assert words().count("nothing left") == 4


def objects(label_N: list[int], train_N: list[bool], classes: int) -> Objects:
    count = len(label_N)
    return Objects(
        crops_NSSC=np.zeros((count, 4, 4, 3), np.uint8), label_N=np.array(label_N), image_N=np.arange(count),
        unit_N=np.arange(count), train_N=np.array(train_N), square_N3=np.zeros((count, 3)),
        classes=tuple(f"c{i}" for i in range(classes)), source="", rule="", split="", seed=0, fingerprint="",
        unreadable_images=0, degenerate_objects=0, problems=(),
    )  # fmt: skip


def test_frames_tell_the_same_class_from_another() -> None:
    assert frame_colour(2, 2) == SAME and frame_colour(2, 0) == OTHER
    (red, green, _), (other_red, other_green, _) = to_rgb(SAME), to_rgb(OTHER)
    assert green > red and other_red > other_green
    assert len(set(INKS)) == len(INKS)


def test_every_neighbour_has_the_frame_and_the_name_of_its_class() -> None:
    some = objects([0, 1, 0, 1, 1], [False, False, True, True, True], 2)
    near_QK = np.array([[2, 3, 4], [3, 2, -1]])
    figure = neighbours.sheet("a run", some, np.array([0, 1]), near_QK)
    frames = [to_hex(axes.patches[0].get_edgecolor()) for axes in figure.axes]
    assert frames == ["#000000", SAME, OTHER, OTHER, "#000000", SAME, OTHER]
    words = [text.get_text() for text in figure.texts]
    assert "2 of 5 nearest neighbours" in words[0] and words[-7:] == ["c0", "c0", "c1", "c1", "c1", "c1", "c0"]


def test_queries_are_of_different_classes_that_the_bank_has() -> None:
    label = [c for c in range(12) for _ in range(2 + c)]
    train = [i == 0 for c in range(12) for i in range(2 + c)]
    train[0] = False  # class 0 is not in the bank
    some = objects(label, train, 12)
    chosen = choose(some, QUERIES)
    assert len(chosen) == QUERIES and not some.train_N[chosen].any()
    assert len(set(some.label_N[chosen])) == QUERIES and 0 not in some.label_N[chosen]
    assert some.label_N[chosen][0] == 11 and some.label_N[chosen][-1] == 1  # from the commonest to the rarest
    few = choose(objects([0, 1] * 20, [i < 10 for i in range(40)], 2), QUERIES)
    assert len(few) == len(set(few)) == QUERIES and min(few) >= 10
    assert len(choose(objects([0, 0], [True, False], 1), QUERIES)) == 1
    with pytest.raises(DataError, match="no class has objects both in the bank"):
        choose(objects([0, 1], [True, False], 2), QUERIES)


def test_thinned_objects_keep_the_chosen_and_their_sides() -> None:
    some = objects(list(range(10)), [i % 2 == 0 for i in range(10)], 10)
    few = thinned(some, np.array([3, 7]), bank=2, queries=1)
    assert few.label_N.tolist() == [3, 7, 1, 0, 8] and few.train_N.tolist() == [False, False, False, True, True]
    assert sorted(thinned(some, np.array([3, 7]), bank=9, queries=9).label_N) == list(range(10))


# The page


def test_the_page_holds_every_picture_and_fetches_nothing(run: Path, drawn: list[Path]) -> None:
    html = drawn[-1].read_text(encoding="utf-8")
    inside = [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert inside == [path.read_bytes() for path in drawn[:-1]]
    words = re.sub(r"base64,[^\"]+", "", html)
    assert "http" not in words and "<script" not in words and "@import" not in words and "url(" not in words
    assert re.findall(r'(?:src|href)="(?!data:|#)', words) == []


class Reader(HTMLParser):
    """What a page has, and whether each tag is closed by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "hr", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_and_every_link_leads_somewhere(drawn: list[Path]) -> None:
    seen = read(drawn[-1].read_text(encoding="utf-8")).seen
    places = [of["id"] for _, of in seen if "id" in of]
    assert places == [*PICTURES, "recipe", "images"], "a section is missing or stands twice"
    assert [of["href"] for tag, of in seen if tag == "a"] == [f"#{place}" for place in places]
    said = [of["alt"] for tag, of in seen if tag == "img"]
    assert len(set(said)) == len(PICTURES) and all(len(words or "") > 20 for words in said)
    assert not {tag for tag, _ in seen} & {"script", "link", "iframe", "object", "embed", "base", "form"}


def test_the_page_tells_what_came_of_the_run(run: Path, drawn: list[Path]) -> None:
    html = drawn[-1].read_text(encoding="utf-8")
    knn = series(records(run), "knn/balanced_accuracy")[1]
    assert len(knn) == 2 and f"balanced accuracy {knn[-1]:.3f} (95 % interval" in html
    for fact in ("<h1>mae on test_vit</h1>", "<dd>8</dd>", "<dd>4 of 4</dd>"):
        assert fact in html
    assert "a &lt;b&gt; run/artefact" in html and "<b>" not in html


def test_the_recipe_is_escaped_and_says_where_values_come_from(run: Path, tmp_path: Path) -> None:
    mine = copy(run, tmp_path, "metrics.jsonl")
    evil = "<script>alert('&')</script>"
    recipe = small("simclr") | {"data": evil}
    (mine / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = opened(mine, QUIET)
    part = page.Part("recipe", recipe_section.section(folder), None)
    html = page.write(folder, [part], [f"no picture of {evil}"]).read_text(encoding="utf-8")
    assert "<script" not in html and html.count("&lt;script&gt;alert(") == 3
    read(html)
    rows = recipe_section.rows("train:\n  lr: 0.5   # command line\n  epochs: 3\n  warmup: 0.1 # auto: few <b>\n")
    assert "<td>lr</td><td>0.5</td><td>command line</td>" in rows and '<th colspan="3">train</th>' in rows
    assert "<td>epochs</td><td>3</td><td></td>" in rows
    assert '<tr class="auto"><td>warmup</td><td>0.1</td><td>auto: few &lt;b&gt;</td></tr>' in rows


# What is missing


def test_a_wrong_folder_is_told_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="there is no run folder"):
        draw(tmp_path / "nowhere", QUIET)
    with pytest.raises(UsageError, match=r"not the folder of a run: it has no recipe\.yaml$"):
        draw(tmp_path, QUIET)
    with pytest.raises(UsageError, match="runs in it: a <b> run"):
        draw(run.parent, QUIET)
    assert main(["report", str(tmp_path)]) == UsageError.exit_code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_has_measured_nothing_yet_shows_its_views(run: Path, tmp_path: Path) -> None:
    mine = copy(run, tmp_path, "recipe.yaml")
    (tmp_path / "cache").symlink_to(run.parent / "cache")
    text = said(mine)
    assert [path.name for path in (mine / "pictures").iterdir()] == ["views.png"]
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "no curves or health",
        "no neighbours, confusion, embedding, maps or attention",
        "no reconstructions",
    ]
    html = (mine / "report.html").read_text(encoding="utf-8")
    assert html.count('class="missing"') == 3 and "none yet" in html and "not probed" in html


def test_images_that_are_gone_leave_the_curves(run: Path, tmp_path: Path) -> None:
    mine = copy(run, tmp_path, "metrics.jsonl")
    text = (run / "recipe.yaml").read_text().replace("data: synthetic:8", f"data: {tmp_path / 'gone'}")
    (mine / "recipe.yaml").write_text(text.replace("data: synthetic:6:1", "data: null"))
    lines = said(mine).splitlines()
    assert lines[0].startswith("no views, maps, reconstructions or images: there is no folder or pack")
    assert lines[1].startswith("no attention: ") and len(lines) == 2
    assert sorted(path.name for path in (mine / "pictures").iterdir()) == ["curves.png", "health.png"]
    read((mine / "report.html").read_text(encoding="utf-8"))


def test_a_cut_off_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    assert records(tmp_path) == []
    lines = [
        json.dumps({"step": 1, "train/loss": 2.0}),
        json.dumps({"step": 2, "knn/accuracy": 0.5}),
        '{"step": 3, "tr',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert series(records(tmp_path), "train/loss") == ([1], [2.0])
    assert len(records(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_said(run: Path, tmp_path: Path) -> None:
    mine = copy(run, tmp_path, "recipe.yaml", "metrics.jsonl")
    (tmp_path / "cache").symlink_to(run.parent / "cache")
    (mine / "pictures").write_text("a file where a folder should be")
    with pytest.raises(WriteError, match="cannot write the picture"):
        draw(mine, QUIET)
