"""What the catalog says, and what `check` finds in tiny data sets of the 31 layouts."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, coco, image, images, openurine, text, unlabelled, voc

from ssl_pretrain.data import catalog, readers
from ssl_pretrain.data.building import _groups
from ssl_pretrain.data.catalog import ANY, Count, entries, entry, folded
from ssl_pretrain.data.checking import Figure, check, kind, read, summary, with_names
from ssl_pretrain.data.groups import groups_of, with_groups
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import names

THE_31 = (
    "agmc_tu aiccs aml_lmu apc bmcd_fgcd bmt body_cavity_fluid bone_marrow_cell breast_cyto bttfa ccagt ccedd cellpose "
    "cervix93 cisd comparison_detector cric csd cx22 dsb2018 fnac2019 hicervix isbi2014 mendeley_lbc ocpap openurine "
    "repomedunm sipakmed tem_neutrostruct tf_cytology urine_cyto"
).split()


def labelled_set(**counts: int) -> LabelledSet:
    labels = tuple(label for label, count in counts.items() for _ in range(count))
    one = LabelledImage(Path("a.png"), (64, 48), np.zeros((len(labels), 4)), labels, "a.png", None)
    return LabelledSet("voc", "found", "box", tuple(sorted(counts)), (one,), (), counts)


# --- the entries ------------------------------------------------------------------------------------------------------


def test_the_31_data_sets_have_an_entry_and_a_layout() -> None:
    assert names(catalog.KIND) == THE_31 and len(THE_31) == 31
    assert {key.partition(":")[0] for key in LAYOUTS} == set(THE_31)


@pytest.mark.parametrize("name", THE_31)
def test_an_entry_is_consistent(name: str) -> None:
    each = entry(name)
    assert each.name == name
    assert each.classes is None or each.class_count is None or len(each.classes) == each.class_count.number
    classes = each.classes or ()
    assert len({folded(label) for label in classes}) == len(classes)
    assert set(each.spellings.values()) <= set(classes) and not set(each.spellings) & set(classes)
    assert not each.per_class or set(each.per_class) == set(classes)
    total = each.objects or each.images
    assert not each.per_class or (total is not None and sum(each.per_class.values()) == total.number)
    assert set(each.splits) <= set(readers.SPLITS)
    assert not each.splits or (each.images is not None and sum(each.splits.values()) == each.images.number)
    assert set(each.readers) <= set(names(readers.KIND))
    assert each.group_regex is None or re.compile(each.group_regex).groups >= 1
    assert each.redistribution is not False or each.terms
    assert each.commercial is not False or each.terms
    assert bool(each.readers) == (each.labels != "unknown")
    if each.licence is not None and each.licence.startswith("CC BY") and "(C)" not in each.licence:
        assert each.redistribution and each.commercial is not ("NC" in each.licence)
    said = [value for value in dataclasses.asdict(each).values() if isinstance(value, str)]
    assert all(value and value == value.strip() for value in said)


def test_openurine_is_as_published_and_its_39_names_are_not_made_up() -> None:
    each = entry("OpenUrine")
    counts = (each.images, each.objects, each.class_count, each.unlabelled)
    assert [count and (count.number, count.mark) for count in counts] == [
        (790, "A"), (31285, "A"), (39, "A"), (5640, "A"),
    ]  # fmt: skip
    assert each.classes is None and len(each.hints) == 5
    assert each.redistribution is False and each.commercial is False


def test_two_data_sets_that_the_sources_name_with_their_parts() -> None:
    tem, cx22 = entry("tem-neutrostruct"), entry("cx22")
    assert tem.objects == Count(21143 + 3150, "A") and tem.splits == {"train": 83, "test": 10}
    assert cx22.objects == Count(12010 + 1296 + 1640, "C") and cx22.images == Count(400 + 100 + 820, "A")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("openurin", "'openurine'"), ("sipakmd", "'sipakmed'"), ("2018 data science bowl", "'dsb2018'")],
)
def test_an_unknown_name_is_told_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"no data set is called '{wrong}' \(did you mean {near}\?\).* all 31"):
        entry(wrong)


@pytest.mark.parametrize("wrong", ["", "../openurine", "open urine!", "__init__", "x" * 10_000, "a\nb"])
def test_what_is_no_name(wrong: str) -> None:
    with pytest.raises(UsageError) as caught:
        entry(wrong)
    assert "\n" not in str(caught.value)


def test_names_in_other_cases_and_any() -> None:
    assert entry("Mendeley-LBC") is entry("mendeley_lbc") and entry("any") is ANY
    assert ANY not in entries() and len(entries()) == 31


def test_an_entry_of_ones_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Path(catalog.__file__).parent / "bttfa.py"
    (tmp_path / "mine.py").write_text(ours.read_text(encoding="utf-8").replace('"bttfa"', '"mine"'), encoding="utf-8")
    (tmp_path / "broken.py").write_text("ENTRY = 3\n")
    monkeypatch.setattr(catalog, "__path__", [*catalog.__path__, str(tmp_path)])
    assert entry("mine").name == "mine"
    with pytest.raises(UsageError, match=r"broken\.py has no ENTRY"):
        entry("broken")


# --- the 31 layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", LAYOUTS)
def test_a_layout_is_read_as_its_entry_says(key: str, tmp_path: Path) -> None:
    made, each = LAYOUTS[key](tmp_path), entry(key.partition(":")[0])
    if made.reader is None:
        with pytest.raises(DataError, match=r"which holds 2 images; looked for .*coco: .*voc: .*yolo: "):
            read(each, tmp_path)
        return
    labelled = read(each, tmp_path, extract_to=tmp_path / "extracted").labelled
    assert labelled.format == made.reader
    assert len(labelled.images) == made.images
    assert sum(labelled.annotated.values()) == sum(len(item.labels) for item in labelled.images) == made.objects
    assert labelled.classes == made.classes
    assert len({item.group for item in labelled.images}) == made.groups
    assert all(item.path.is_file() and item.path.is_relative_to(tmp_path) for item in labelled.images)


@pytest.mark.parametrize("key", LAYOUTS)
def test_check_finds_no_difference_where_the_counts_are_the_published_ones(key: str, tmp_path: Path) -> None:
    made, each = LAYOUTS[key](tmp_path), entry(key.partition(":")[0])
    published = dataclasses.replace(
        each,
        images=Count(made.images, "A"),
        unlabelled=each.unlabelled and Count(2 if each.name == "isbi2014" else 3, "A"),
        objects=each.objects and Count(made.objects, "A"),
        class_count=Count(len(made.classes), "A"),
        classes=each.classes and made.classes,
        per_class={},
        splits={},
        groups=each.groups and Count(made.groups, "A"),
    )
    if made.reader is None:
        findings = check(each, tmp_path)
        assert findings.differences == () and findings.labelled is None and "looked for" in findings.found
        assert findings.figures[1].found == 2
        return
    findings = check(published, tmp_path)
    assert findings.differences == ()
    assert findings.found.startswith(made.reader)
    more = dataclasses.replace(published, images=Count(made.images + 1, "B"), class_count=Count(99, "C"))
    assert check(more, tmp_path).differences == ("labelled images: 1 missing",)


TWO_SORTS = {"ccagt", "cervix93"}
"""With two sorts of labels, of which the entry prefers one."""


@pytest.mark.parametrize("key", LAYOUTS)
def test_a_layout_is_recognised_without_its_entry_or_the_choice_is_named(key: str, tmp_path: Path) -> None:
    made = LAYOUTS[key](tmp_path)
    if made.reader is None:
        return
    each = entry(key.partition(":")[0])
    if each.extracted:  # the reader itself writes nothing
        with pytest.raises(DataError, match=f"'ssl-pretrain datasets read {each.name} ROOT --as coco --out DIR'"):
            readers.read(tmp_path)
        return
    reading = read(each, tmp_path)
    if key in TWO_SORTS:
        with pytest.raises(DataError, match=rf"looks like .*\b{made.reader}\b.*: name the format"):
            readers.read(reading.folder)
        inner = {"ccagt": "CCAgT_COCO_OD.json", "cervix93": "EDF"}[key]
        assert readers.read(reading.folder / inner).format == made.reader
    else:
        assert readers.read(reading.folder).format == made.reader


# --- OpenUrine at its published size ----------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """790 fields with 31,285 boxes of 39 classes and 5,640 fields without, all links to one image."""
    image(tmp_path / "one.png")
    part, other = tmp_path / "root" / "part", tmp_path / "root" / "unlabelled"
    for folder in (part / "images", part / "labels", other):
        folder.mkdir(parents=True)
    text(part / "data.yaml", "names: [" + ", ".join(f"class {k}" for k in range(39)) + "]\n")
    for i in range(790):
        lines = 40 if i < 475 else 39
        os.link(tmp_path / "one.png", part / "images" / f"{i:04}.png")
        label = "".join(f"{(i + k) % 39} 0.5 0.5 0.{k + 10} 0.5\n" for k in range(lines))
        (part / "labels" / f"{i:04}.txt").write_text(label)
    for i in range(5640):
        os.link(tmp_path / "one.png", other / f"{i:04}.png")
    return tmp_path / "root"


def test_openurine_as_published_and_with_a_label_file_lost(full: Path) -> None:
    findings = check(entry("openurine"), full)
    figures = {figure.what: (figure.found, figure.verdict) for figure in findings.figures}
    assert findings.differences == ()
    assert figures == {
        "labelled images": (790, "equal"),
        "boxes": (31285, "equal"),
        "classes": (39, "equal"),
        "images without a label": (5640, "equal"),
        "groups": (790, ""),
    }
    (full / "part" / "labels" / "0000.txt").unlink()
    (full / "unlabelled" / "0001.png").unlink()
    (full / "unlabelled" / "0002.png").unlink()
    (full / "part" / "images" / "0789.png").unlink()
    (full / "part" / "images" / "0789.png").write_bytes(b"no image")
    findings = check(entry("openurine"), full)
    assert findings.differences == (
        "labelled images: 2 missing",
        "boxes: 79 missing",
        "images without a label: 1 missing",
    )
    said = [problem.example for problem in findings.problems]
    assert any("0789.png: image left out" in each for each in said)
    assert any("0000.png: left out" in each and "unlabelled" in each for each in said)


# --- check ------------------------------------------------------------------------------------------------------------


def test_class_names_that_are_missing_or_new_are_differences(tmp_path: Path) -> None:
    images(tmp_path, "benign/1.png", "Malig-nant/2.png", "odd/3.png")
    each = dataclasses.replace(entry("body_cavity_fluid"), class_count=None)
    findings = check(each, tmp_path)
    assert findings.differences == ("class odd: not published",)
    assert findings.notes == ("class Malig-nant is called malignant",)
    (tmp_path / "Malig-nant" / "2.png").unlink()
    assert check(each, tmp_path).differences == ("class malignant: not on disk", "class odd: not published")


def test_objects_that_cannot_be_used_are_counted_as_published_and_said(tmp_path: Path) -> None:
    images(tmp_path, "JPEGImages/1.png")
    voc(tmp_path / "Annotations" / "1.xml", "hsil", "scc")
    path = tmp_path / "Annotations" / "1.xml"
    path.write_text(path.read_text().replace("<xmax>21</xmax>", "<xmax>4</xmax>"))  # now without any width
    findings = check(dataclasses.replace(entry("aiccs"), objects=Count(2, "A"), class_count=None), tmp_path)
    assert {each.what: each.verdict for each in findings.figures}["boxes"] == "equal"
    assert [each.example for each in findings.problems] == ["1.xml: object 2 (scc) left out, zero-size box at (4, 4)"]
    assert "class scc: not on disk" not in findings.differences


def test_counts_of_classes_and_splits_are_compared(tmp_path: Path) -> None:
    images(tmp_path, "train/0/a.png", "train/1/b.png", "test/1/c.png")
    each = dataclasses.replace(
        ANY, name="x", readers=("class_folder",), images=Count(3, "A"), classes=("no", "yes"),
        spellings={"0": "no", "1": "yes"}, per_class={"no": 2, "yes": 1}, per_class_mark="B",
        splits={"train": 1, "val": 1, "test": 1},
    )  # fmt: skip
    assert check(each, tmp_path).differences == (
        "train images: 1 too many",
        "val images: 1 missing",
        "of class no: 1 missing",
        "of class yes: 1 too many",
    )


def test_an_unchecked_number_makes_no_difference() -> None:
    assert not Figure("images", 5, Count(6, "C")).differs and Figure("images", 5, Count(6, "B")).differs
    assert not Figure("images", 5, None).differs and Figure("images", 5, None).verdict == ""


def test_groups_are_counted_only_where_a_rule_tells_them(tmp_path: Path) -> None:
    LAYOUTS["ccagt"](tmp_path)
    each = entry("ccagt")
    groups = {figure.what: figure for figure in check(each, tmp_path).figures}["groups"]
    assert (groups.found, groups.published) == (2, Count(15, "A"))
    alone = dataclasses.replace(each, group_regex="(no such thing)", readers=("coco",))
    assert "the rule for groups fits no path here: give --group-regex" in check(alone, tmp_path).notes
    told = {figure.what: figure for figure in check(each, tmp_path, r"(_\d)\.").figures}["groups"]
    assert told.found == 2
    with pytest.raises(UsageError, match="matches no path"):
        check(each, tmp_path, "(nothing)")


def test_slides_that_no_rule_tells_apart_are_not_compared(tmp_path: Path) -> None:
    LAYOUTS["ocpap"](tmp_path)
    each = dataclasses.replace(entry("ocpap"), images=None, groups=Count(1, "B"))
    assert each.group_regex is None and check(each, tmp_path).differences == ()
    assert check(each, tmp_path, r"(s\d)_").differences == ("groups: 1 too many",)
    assert check(each, tmp_path, r"(s)\d_").differences == ()


def test_labels_in_two_places_are_not_guessed_between(tmp_path: Path) -> None:
    openurine(tmp_path / "a")
    openurine(tmp_path / "b")
    findings = check(entry("openurine"), tmp_path)
    assert findings.labelled is None or findings.differences
    for name in ("one", "two"):
        images(tmp_path / "v" / name / "JPEGImages", "1.png")
        voc(tmp_path / "v" / name / "Annotations" / "1.xml", "hsil")
    with pytest.raises(DataError, match=r"more than one folder \(one, two\): give the one meant"):
        read(entry("aiccs"), tmp_path / "v")


def test_four_and_seven_classes_side_by_side_are_not_guessed_between(tmp_path: Path) -> None:
    LAYOUTS["tem_neutrostruct"](tmp_path)
    folder = tmp_path / "7classes_version" / "train" / "annotations"
    coco(folder / "annotations_4classes.json", ["one", "two", "three", "four"], {"n1.png": [(1, (4, 5, 6, 7))]})
    findings = check(entry("tem_neutrostruct"), tmp_path)
    assert findings.labelled is None
    assert findings.differences == ("labels: none that can be read", "labelled images: 93 missing")
    assert "annotations_4classes.json" in findings.found and "annotations_7classes.json" in findings.found
    assert len(read(entry("tem_neutrostruct"), folder / "annotations_7classes.json").labelled.images) == 2
    four = check(entry("tem_neutrostruct"), folder / "annotations_4classes.json").differences
    assert "class Vacuoles: not on disk" in four and "class one: not published" in four


def test_labels_deeper_than_zips_put_them_are_not_searched(tmp_path: Path) -> None:
    LAYOUTS["aiccs"](tmp_path / "a" / "b")
    assert check(entry("aiccs"), tmp_path).found.startswith("voc in a/b/: ")
    LAYOUTS["aiccs"](tmp_path / "deep" / "c" / "d" / "e")
    with pytest.raises(DataError, match=r"no labels of AICCS found in .* 2 levels below, for voc: Annotations"):
        read(entry("aiccs"), tmp_path / "deep")


def test_missing_labels_are_a_difference_only_where_labels_are_known(tmp_path: Path) -> None:
    images(tmp_path, "1.png", "2.png")
    findings = check(entry("apc"), tmp_path)
    assert findings.differences == ("labels: none that can be read", "labelled images: 425 missing")
    assert "no labels of APCData" in findings.found
    assert check(entry("tf_cytology"), tmp_path).differences == ()
    for name in ("1.png", "2.png"):
        (tmp_path / name).unlink()
    text(tmp_path / "README", "nothing")
    assert check(entry("tf_cytology"), tmp_path).differences == ("images: none",)
    with pytest.raises(DataError, match="no labels found"):
        check(ANY, tmp_path)


def test_only_the_unlabelled_part_of_openurine(tmp_path: Path) -> None:
    unlabelled(tmp_path)
    findings = check(dataclasses.replace(entry("openurine"), unlabelled=Count(3, "A")), tmp_path)
    assert [(each.what, each.found, each.verdict) for each in findings.figures] == [
        ("labelled images", 0, "790 missing"),
        ("images without a label", 3, "equal"),
    ]
    assert findings.differences == ("labels: none that can be read", "labelled images: 790 missing")


def test_folders_that_cannot_be_listed_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "benign/1.png", "malignant/2.png", "other/3.png")
    scandir = os.scandir

    def partly(path: object) -> object:
        if str(path).endswith("other"):
            raise PermissionError(13, "Permission denied")
        return scandir(str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", partly)
        findings = check(entry("body_cavity_fluid"), tmp_path)
    assert findings.notes == (
        "1 folders cannot be listed, such as other (Permission denied): what is in there is not counted",
    )


def test_roots_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = entry("openurine")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere: check the path"):
        check(each, tmp_path / "nowhere")
    with pytest.raises(DataError, match="is an empty folder"):
        check(each, tmp_path)
    text(tmp_path / "x.zip", "PK")
    with pytest.raises(DataError, match=r"x\.zip is not a folder: .*unpack"):
        check(each, tmp_path / "x.zip")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="is not a folder"):
        check(each, tmp_path / "loop")

    def refused(path: object) -> object:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)
        with pytest.raises(DataError, match="cannot be listed: Permission denied"):
            check(each, tmp_path)


def test_names_with_line_breaks_stay_in_their_line(tmp_path: Path) -> None:
    bad = tmp_path / "a\nb\x1b[31m"
    with pytest.raises(DataError) as caught:
        check(ANY, bad)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    images(bad, "x\n1/1.png", "y\n2/2.png")
    findings = check(dataclasses.replace(ANY, name="x", readers=("class_folder",)), tmp_path)
    assert not any(c in findings.found + str(findings.notes) for c in "\n\x1b")


def test_the_real_sets_by_check(real_data: Path) -> None:
    findings = check(ANY, real_data / "bccd")
    figures = {figure.what: figure.found for figure in findings.figures}
    assert figures["labelled images"] == 364 and figures["boxes"] == 4888 and figures["classes"] == 3
    assert [(problem.kind, problem.count) for problem in findings.problems] == [
        ("object left out, zero-size box at", 2)
    ]
    findings = check(ANY, real_data / "chula_rbc12")
    figures = {figure.what: figure.found for figure in findings.figures}
    assert (figures["labelled images"], figures["points"], figures["other image files"]) == (350, 11905, 20)
    assert sorted(problem.count for problem in findings.problems) == [2, 20]


def test_a_set_of_ones_own_is_compared_with_its_own_entry(real_data: Path) -> None:
    bccd = dataclasses.replace(
        ANY, name="bccd", readers=("voc",), images=Count(364, "A"), objects=Count(4888, "A"),
        class_count=Count(3, "A"), classes=("RBC", "WBC", "Platelets"), per_class_mark="A",
        per_class={"RBC": 4155, "WBC": 372, "Platelets": 361}, splits={"train": 205, "val": 87, "test": 72},
    )  # fmt: skip
    assert check(bccd, real_data / "bccd").differences == ()
    off = dataclasses.replace(bccd, per_class={"RBC": 4153, "WBC": 372, "Platelets": 361})
    assert check(off, real_data / "bccd").differences == ("of class RBC: 2 too many",)


# --- names, kinds, groups ---------------------------------------------------------------------------------------------


def test_spellings_are_merged_and_unknown_names_stay() -> None:
    each = dataclasses.replace(entry("bmt"), classes=("nilm", "lsil", "hsil"))
    named, notes = with_names(labelled_set(NIL=2, nilm=1, LSIL=1, other=1), each)
    assert named.annotated == {"nilm": 3, "lsil": 1, "other": 1} and named.classes == ("lsil", "nilm", "other")
    assert named.images[0].labels == ("nilm", "nilm", "nilm", "lsil", "other")
    assert notes == ["class LSIL is called lsil", "class NIL is called nilm"]


def test_numbers_become_names_only_where_the_entry_says_so() -> None:
    assert with_names(labelled_set(**{"1": 1, "10": 1}), entry("ccagt"))[0].classes == ("10", "nucleus")
    assert with_names(labelled_set(**{"1": 1}), entry("openurine"))[0].classes == ("1",)
    signs = dataclasses.replace(entry("openurine"), classes=("+", "-"), spellings={"?": "+"})
    assert with_names(labelled_set(**{"+": 1, "-": 2, "!": 3}), signs)[0].annotated == {"+": 1, "-": 2, "!": 3}


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), st.integers(1, 3), min_size=1, max_size=6))
def test_naming_loses_no_object(counts: dict[str, int]) -> None:
    for name in ("ccagt", "fnac2019", "openurine"):
        named, _ = with_names(labelled_set(**counts), entry(name))
        assert sum(named.annotated.values()) == sum(counts.values()) == len(named.images[0].labels)
        assert set(named.classes) == set(named.annotated)


def test_kinds_of_problems() -> None:
    lines = [
        "a/b 1.xml: object 13 (RBC) left out, zero-size box at (504, 337)",
        "c.xml: object 4 (uric acid) left out, zero-size box at (181, 329)",
        "x.png: left out, missing label file (unlabelled)",
        "3 boxes reached over the edge of their image and were clipped",
    ]
    assert [(each.kind, each.count, each.example) for each in summary(lines)] == [
        ("object left out, zero-size box at", 2, lines[0]),
        ("left out, missing label file", 1, lines[2]),
        ("boxes reached over the edge of their image and were clipped", 1, lines[3]),
    ]
    assert summary([]) == () and kind("???") == "???"


def test_groups_by_regex(tmp_path: Path) -> None:
    images(tmp_path, "a/p1_1.png", "a/p1_2.png", "b/p2_1.png", "b/other.png")
    labelled = readers.read(tmp_path)
    grouped = with_groups(labelled, tmp_path, r"(p\d)_")
    assert sorted(item.group for item in grouped.images) == ["alone: b/other.png", "p1", "p1", "p2"]
    assert grouped.problems[-1] == "1 images match no group and are each their own, such as b/other.png"
    assert with_groups(labelled, tmp_path, r"^(\w)/").problems == labelled.problems
    assert [item.path for item in grouped.images] == [item.path for item in labelled.images]
    for wrong, why in [
        ("(", "is not a regular expression"),
        ("p1", r"needs a \(\.\.\.\)"),
        ("(zz)", "matches no path"),
    ]:
        with pytest.raises(UsageError, match=why):
            with_groups(labelled, tmp_path, wrong)


@settings(deadline=None)
@given(st.lists(st.from_regex(r"\A[ab]{1,2}/[0-9]{1,2}\.png\Z"), min_size=1, max_size=12, unique=True))
def test_groups_are_those_of_a_pack(paths: list[str]) -> None:
    for regex in (r"^(a+)/", r"(\d)\.", r"(?:a(b)|b)/"):
        try:
            number_N, alone = _groups(paths, regex)
        except UsageError:
            with pytest.raises(UsageError):
                groups_of(paths, regex)
            continue
        found = groups_of(paths, regex)
        assert found.count(None) == alone
        same = [
            [i for i, each in enumerate(found) if each == group] for group in dict.fromkeys(found) if group is not None
        ]
        assert all(len(set(number_N[indices].tolist())) == 1 for indices in same)
        assert len(set(number_N.tolist())) == len(same) + alone
