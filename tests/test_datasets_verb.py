"""`ssl-pretrain datasets` as somebody meets it who never saw it before."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import LAYOUTS, image, images, openurine
from rich.console import Console
from test_catalog import THE_31

from ssl_pretrain.cli import datasets, main
from ssl_pretrain.data import readers
from ssl_pretrain.data.catalog import entries, entry
from ssl_pretrain.data.pack import open_pack


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def said(capsys: pytest.CaptureFixture[str], *words: object) -> Said:
    code = main(["datasets", *map(str, words)])
    captured = capsys.readouterr()
    assert captured.err.count("\n") <= 1  # an error is one line
    return Said(code, captured.out, captured.err)


def on_a_terminal(*words: str, width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, soft_wrap=True)
    datasets.run(list(words), console)
    return file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_verb_says_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    helped = said(capsys, "--help")
    assert helped.code == 0 and "datasets check NAME ROOT" in helped.out and not helped.err
    bare = said(capsys)
    assert bare.code == 64 and "datasets needs one of list, show, check, read, neutrostruct" in bare.err
    wrong = said(capsys, "chek", "openurine", "x")
    assert wrong.code == 64 and "datasets cannot 'chek' (did you mean 'check'?)" in wrong.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["show", "opnurine"], r"no data set is called 'opnurine' \(did you mean 'openurine'\?\)"),
        (["show", "any"], "any stands for a data set of your own"),
        (["check", "nothing", "here"], "no data set is called 'nothing'"),
        (["check", "openurine"], "root"),
        (["check", "openurine", ".", "--group-rex", "x"], r"unknown option --group-rex \(did you mean '--group-regex'"),
        (["read", "openurine", "."], "--"),
        (["read", "openurine", ".", "--as", "yola", "--out", "x"], r"'yola' \(did you mean 'yolo'\?\)"),
        (["read", "openurine", ".", "--as", "yolo", "--out", "x", "--images", "move"], "give link or copy or none"),
        (["list", "--jsno"], r"did you mean '--json'"),
    ],
)
def test_wrong_words_are_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    refused = said(capsys, *words)
    assert refused.code == 64 and re.search(why, refused.err) and not refused.out


@pytest.mark.parametrize("step", ["list", "show", "check", "read"])
def test_each_step_has_its_help(capsys: pytest.CaptureFixture[str], step: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["datasets", step, "--help"])
    assert ended.value.code == 0
    assert f"ssl-pretrain datasets {step}" in capsys.readouterr().out


def test_neutrostruct_gets_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "neutrostruct", "--help").code == 0
    wrong = said(capsys, "neutrostruct", "convrt")
    assert wrong.code == 64 and "did you mean 'convert'" in wrong.err


def test_datasets_is_the_first_verb_and_loads_no_torch() -> None:
    code = (
        "import sys; from ssl_pretrain.cli import main\n"
        "main(['datasets', 'list']); main(['datasets', 'show', 'cric'])\n"
        "print([name for name in ('torch', 'kornia', 'lightning', 'faiss', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- list and show ----------------------------------------------------------------------------------------------------


def test_the_list_has_a_row_a_data_set_and_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "list").out.splitlines()
    table = lines[: lines.index("")]
    assert all(len(line) <= 100 for line in table) and "…" not in "".join(table)
    rows = {line.split()[0]: line.split() for line in table if not line.startswith(" ")}
    assert list(rows)[1:] == THE_31
    assert rows["openurine"][-8:] == ["790", "31,285", "39", "boxes", "own", "terms", "request", "D"]
    assert rows["cellpose"][-8:] == ["608", "(C)", "unknown", "unknown", "masks", "unknown", "request", "A"]
    assert rows["tf_cytology"][-6:] == ["unknown", "unknown", "unknown", "unknown", "open", "D"]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_list_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = plain(on_a_terminal("list", width=width))
    table = text[: text.index("\nThe last column")].splitlines()
    assert max(map(len, table)) <= width and "…" not in text
    for name in THE_31:
        assert sum(line.split(" ")[0] == name for line in table) == 1
    assert ("licence" in table[0]) == (width >= 100) == ("need 100 columns" not in text)
    mark = {line.split()[0]: line.split()[-1] for line in table[1:] if not line.startswith(" ")}
    assert mark == {each.name: each.confidence for each in entries()}


def test_the_list_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", on_a_terminal("list", width=100))


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {each["name"]: each for each in json.loads(said(capsys, "list", "--json").out)}
    assert list(found) == THE_31
    assert found["openurine"]["objects"] == {"number": 31285, "mark": "A"} and found["openurine"]["classes"] is None
    assert found["cric"]["per_class"]["HSIL"] == 1703 and found["csd"]["images"] is None


@pytest.mark.parametrize("name", THE_31)
def test_show_says_everything_that_an_entry_has(capsys: pytest.CaptureFixture[str], name: str) -> None:
    each, text = entry(name), said(capsys, "show", name).out
    words = " ".join(text.split())
    for part in (each.title, each.what, each.group_rule, each.citation, each.checked, each.where, *each.traps):
        assert " ".join(part.split()) in words
    for classname in each.classes or each.hints:
        assert " ".join(classname.split()) in words
    for count in (each.images, each.unlabelled, each.objects, each.class_count, each.groups):
        assert count is None or f"{count.number:,}" in words
    assert f"datasets check {name} ROOT" in text and "pack ROOT --out PACK" in text
    assert ("redistribution NOT allowed" in words) == (each.redistribution is False)
    table = text[: text.index("\nNext")]
    assert max(map(len, table.splitlines())) <= 100


def test_the_commands_that_show_gives_can_be_run_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LAYOUTS["ccagt"](tmp_path / "root")
    (line,) = (line for line in said(capsys, "show", "ccagt").out.splitlines() if "pack ROOT" in line)
    words = [
        {"ROOT": str(tmp_path / "root" / "images"), "PACK": str(tmp_path / "pack")}.get(w, w) for w in shlex.split(line)
    ]
    assert main([*words[1:], "--processes", "0"]) == 0
    assert open_pack(tmp_path / "pack").group_N.tolist() == [0, 0, 1, 1]


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_prints_both_counts_and_ends_with_65(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    openurine(tmp_path)
    checked = said(capsys, "check", "openurine", tmp_path)
    words = " ".join(checked.out.split())
    assert checked.code == 65 and ": 4 differences from OpenUrine as it is published" in checked.err
    assert "OpenUrine: yolo in labelled/: 3 boxes of 3 classes in 3 images (train 2, val 1)" in words
    assert "labelled images 790 3 787 missing" in words and "boxes 31,285 3 31,282 missing" in words
    assert "images without a label 5,640 3 5,637 missing" in words
    assert "differs: labelled images: 787 missing" in checked.out
    assert "empty label file" in words and "Give --group-regex" in words


def test_check_of_what_is_as_published_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "benign/1.png", "benign/2.png", "malignant/3.png")
    checked = said(capsys, "check", "body-cavity-fluid", tmp_path)
    assert checked.code == 0 and checked.out.rstrip().endswith("equal to what is published") and not checked.err
    (tmp_path / "plain").mkdir()
    image(tmp_path / "plain" / "1.jpg")
    checked = said(capsys, "check", "tf_cytology", tmp_path / "plain")
    assert checked.code == 0 and "looked for" in checked.out
    assert checked.out.rstrip().endswith("nothing is published that could be compared")


def test_check_any_reads_the_real_set(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = said(capsys, "check", "any", real_data / "bccd", "--group-regex", r"BloodImage_00(\d)")
    words = " ".join(checked.out.split())
    assert checked.code == 0 and "boxes 4,888" in words and "groups 5" in words
    assert "problem, 2 x: object left out, zero-size box at (such as BloodImage_00338.xml: object 13" in words


@pytest.mark.parametrize("step", ["check", "read"])
def test_roots_that_a_newcomer_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str) -> None:
    more = ["--as", "coco", "--out", str(tmp_path / "out")] if step == "read" else []
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    for root, why in [
        ("nowhere", "there is no folder"),
        ("empty", "is an empty folder"),
        ("a.zip", "unpack an archive"),
    ]:
        refused = said(capsys, step, "openurine", tmp_path / root, *more)
        assert refused.code == 65 and why in refused.err
    assert not (tmp_path / "out").exists()


def test_names_of_classes_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "[red]a/1.png", ":smile:/2.png")
    checked = said(capsys, "check", "body_cavity_fluid", tmp_path)
    assert "class [red]a: not published" in checked.out and "class :smile:: not published" in checked.out


def test_many_kinds_of_problems_are_cut_short_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "JPEGImages/1.png")
    things = "".join(f"<object><name>n{'x' * i} </name><bndbox><xmin>{i}</xmin></bndbox></object>" for i in range(1, 4))
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    good = f"<object><name>good</name>{box}</object>"
    (tmp_path / "Annotations" / "1.xml").write_text(f"<annotation>{things}{good}</annotation>")
    for i in range(20):
        word = "abcdefghijklmnopqrst"[i] * 6
        (tmp_path / "Annotations" / f"z{i}.xml").write_text(f"<{word}/>")
    out = said(capsys, "check", "any", tmp_path).out
    assert "problem, 3 x: object left out, malformed box" in out
    assert out.count("\nproblem, ") == 12 and "and 9 problems of 9 more kinds" in out


# --- read -------------------------------------------------------------------------------------------------------------


def test_read_shows_the_terms_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    openurine(tmp_path / "root")
    shown: list[str] = []
    from ssl_pretrain.data import writers

    write = writers.write
    monkeypatch.setattr(writers, "write", lambda *a, **k: (shown.append(capsys.readouterr().out), write(*a, **k))[1])
    done = said(capsys, "read", "openurine", tmp_path / "root", "--as", "coco", "--out", tmp_path / "out")
    assert (
        done.code == 0 and "redistribution NOT allowed" in shown[0] and "not to be given to third parties" in shown[0]
    )
    again = readers.read(tmp_path / "out")
    assert again.classes == ("RBC", "Uric Acid", "WBC") and len(again.images) == 3


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_read_writes_the_names_and_groups_of_the_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    LAYOUTS["ccagt:masks"](tmp_path / "root")
    done = said(capsys, "read", "ccagt", tmp_path / "root", "--as", form, "--out", tmp_path / "out", "--images", "copy")
    assert done.code == 0, done.err
    assert "commercial use NOT allowed" in done.out and "class 1 is called nucleus" in done.out
    again = readers.read(tmp_path / "out", form)
    assert again.classes == ("nucleus", "satellite") and again.annotated == {"nucleus": 3, "satellite": 3}
    for item in again.images:
        np.testing.assert_allclose(item.boxes_N4, [[4, 4, 20, 20], [30, 30, 34, 34]], atol=1e-4)
    if form == "coco":
        assert len({item.group for item in again.images}) == 2
    exists = said(capsys, "read", "ccagt", tmp_path / "root", "--as", form, "--out", tmp_path / "out")
    assert exists.code == 74 and "exists" in exists.err


def test_read_of_points_asks_for_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS["cric"](tmp_path / "root")
    words = ["read", "cric", tmp_path / "root", "--as", "coco", "--out", tmp_path / "out"]
    asked = said(capsys, *words)
    assert asked.code == 64 and "--point-px 80" in asked.err and not (tmp_path / "out").exists()
    assert said(capsys, *words, "--point-px", "10").code == 0
    assert readers.read(tmp_path / "out").annotated == {"ASC-US": 1, "HSIL": 1, "NILM": 1}


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_images_inside_label_files_are_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    LAYOUTS["isbi2014"](tmp_path / "root")
    words = ["--as", form, "--out", tmp_path / "out", "--images", "none", "--group-regex", "^(images/train)/"]
    done = said(capsys, "read", "isbi2014", tmp_path / "root", *words)
    assert done.code == 0 and "the images are written too" in done.out
    again = readers.read(tmp_path / "out", form)
    assert again.annotated == {"Cytoplasm": 3, "Nuclei": 2}
    assert all(item.path.is_file() and not item.path.is_symlink() for item in again.images)
    if form == "coco":
        assert {item.group for item in again.images} == {"images/train"}
        assert said(capsys, "check", "isbi2014", tmp_path / "out").out.startswith("ISBI 2014: coco: 5 boxes")


def test_read_any_with_groups(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["read", "any", real_data / "bccd", "--as", "coco", "--out", tmp_path / "out", "--images", "link"]
    done = said(capsys, *words, "--group-regex", r"BloodImage_00(\d)")
    assert done.code == 0 and "licence" not in done.out
    again = readers.read(tmp_path / "out")
    assert again.annotated == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    assert len({item.group for item in again.images}) == 5
