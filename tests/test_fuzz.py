"""Harmed files of every format, in bounded child processes; `fuzz.py` says how, `fuzz_corpus.py` what must hold."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest
from fuzz_corpus import FORMATS
from fuzz_faults import FAULTS
from fuzz_files import PNG
from fuzz_mutations import Draw, Special, mutated

from ssl_pretrain.data import readers
from ssl_pretrain.data.readers import read
from ssl_pretrain.named import named, names

DEFAULT_TOTAL = 2_000
OTHERS = ("images", "runs", "pack", "recipe", "artefact", "isbi2014", "isbi2014_v73", "cx22")
READERS = [name for name in FORMATS if name not in OTHERS]
SPECIAL = ("fifo", "socket", "zero", "loop", "dangling", "folder", "up")
TRAVERSALS = len(fuzz.HOSTILE) + len(fuzz.UPWARDS)


def scenarios(name: str) -> list[str]:
    """A pipe, a device and so on in the place of each label file; names that lead out; what must not be opened."""
    places = range(min(4, len(FORMATS[name].labels(FORMATS[name].files()))))
    special = [f"{kind}/{place}" for kind in SPECIAL for place in places]
    return ["good", "archives", "pickles", *special, *(f"traversal/{place}" for place in range(TRAVERSALS))]


def nothing_found(report: fuzz.Report) -> None:
    causes = fuzz.by_cause(report.crashes) | fuzz.by_cause(report.hangs)
    lines = [
        f"{len(words)}x, such as fuzz.py {report.name} --case {words[0]}: {what}" for what, words in causes.items()
    ]
    assert not lines, "\n".join(lines)


# --- every format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_harmed_files(name: str) -> None:
    count = fuzz.share(name, list(FORMATS), DEFAULT_TOTAL)
    words = [*range(count), *(scenarios(name) if name in READERS else ["good"])]
    report = fuzz.fuzz(name, words)
    assert report.tried == len(words) and report.peak_bytes < fuzz.MEMORY_BYTES
    nothing_found(report)
    assert report.outcomes["read"] > 0, "not one was read: the good files are not good, and nothing was tested"


def test_the_default_count() -> None:
    assert sum(fuzz.share(name, list(FORMATS), DEFAULT_TOTAL) for name in FORMATS) >= DEFAULT_TOTAL - len(FORMATS)


def test_faults_and_formats_have_different_names() -> None:
    assert not FAULTS.keys() & FORMATS.keys()


def test_every_reader_has_an_entry(tmp_path: Path) -> None:
    """And reads the good files of it, with some objects."""
    read_by = set()
    for name in READERS:
        root = tmp_path / name / "data"
        fuzz.Tree(root, FORMATS[name])
        fitting = [other for other in names(readers.KIND) if named(readers.KIND, other).recognise(root)]
        # Cervix93 has classes of images and points in them: which is meant is the user's to say
        found = read(root, format="point_table" if name == "cervix93" else None)
        assert any(image.labels for image in found.images)
        both = {"csv_labels"} if name == "cervix93" else set()
        assert set(fitting) - {readers.FALLBACK, found.format} == both, name
        read_by.add(found.format)
    assert read_by | {"matlab"} == set(names(readers.KIND))  # matlab extracts, and has entries of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_harmed_files_at_length(name: str) -> None:
    report = fuzz.fuzz(name, range(fuzz.share(name, list(FORMATS), fuzz.TOTAL)))
    print(report.line())
    nothing_found(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_large_and_deep(name: str) -> None:
    """100 MB of garbage, 60 MB of lines or in one line as a label file; a label file 1,200 folders down."""
    report = fuzz.fuzz(name, ["garbage/0", "text/0", "oneline/0", "far_down/0"], cpu_s=120)
    print(report.line())
    nothing_found(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc", "points", "yolo", "labelme", "sipakmed"])
def test_a_folder_of_100_000_label_files(name: str) -> None:
    report = fuzz.fuzz(name, ["many/0"], cpu_s=120)
    print(report.line())
    assert report.peak_bytes < 1 << 30
    nothing_found(report)


# --- what holds of links ----------------------------------------------------------------------------------------------


def test_links_of_the_user_are_followed(tmp_path: Path) -> None:
    """A folder of links to images and labels elsewhere is a data set; only names in label files cannot lead out."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(PNG)
    (tmp_path / "elsewhere" / "x.txt").write_text("3 4 cell\n")
    for folder, name in (("images", "x.png"), ("labels", "x.txt")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "data" / "images" / "again").symlink_to("..")
    assert [image.labels for image in read(tmp_path / "data").images] == [("cell",)]


# --- the fuzzing itself -----------------------------------------------------------------------------------------------


def test_a_case_is_the_same_every_time() -> None:
    files = FORMATS["voc"].files()
    targets = FORMATS["voc"].targets(files)
    first = [mutated(files, targets, Draw("voc", i)) for i in range(200)]
    assert first == [mutated(files, targets, Draw("voc", i)) for i in range(200)]
    assert first != [mutated(files, targets, Draw("points", i)) for i in range(200)]
    changed = [change != {name: files.get(name) for name in change} for change in first]
    assert sum(changed) > 170
    assert any(isinstance(item, Special) for change in first for item in change.values())


def test_a_tree_is_made_good_again(tmp_path: Path) -> None:
    format = FORMATS["points"]
    tree = fuzz.Tree(tmp_path / "data", format)

    def content() -> dict[str, bytes]:
        found = (tmp_path / "data").rglob("*")
        return {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in found if path.is_file()}

    assert content() == tree.files
    for word in [*map(str, range(150)), *scenarios("points")]:
        tree.apply(fuzz.changes_of(format, word, tree.files))
        tree.restore()
        assert content() == tree.files, word
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("dies", "ended with -11"), ("eats", "MemoryError"), ("recurses", "RecursionError"), ("outside", "passwd"),
        ("upwards", "words.json"), ("lists", "lists"), ("writes", "writes"), ("unpickles", "pickle.find_class"),
        ("shells", "os.system"), ("archives", "a.zip"), ("two_lines", "not one printable line"), ("warns",
        "RuntimeWarning"),
    ],
)  # fmt: skip
def test_what_ends_badly_is_a_crash_and_the_next_case_is_tried(name: str, what: str) -> None:
    report = fuzz.fuzz(name, ["good", "text/0", "good"])
    assert (report.tried, len(report.crashes), report.hangs, report.outcomes["read"]) == (3, 1, [], 2)
    assert report.crashes[0][0] == "text/0" and what in report.crashes[0][1]


@pytest.mark.parametrize(("name", "what"), [("loops", "more than 0.2 s"), ("waits", "waits")])
def test_hangs_are_ended_and_the_next_case_is_tried(name: str, what: str) -> None:
    report = fuzz.fuzz(name, ["good", "text/0", "good"], cpu_s=0.2, silent_s=1)
    assert (report.tried, report.crashes, len(report.hangs), report.outcomes["read"]) == (3, [], 1, 2)
    assert report.hangs[0][0] == "text/0" and what in report.hangs[0][1]


@pytest.mark.parametrize(
    ("name", "words", "what"),
    [
        ("voc trusts names", ["traversal/1"], "outside"),
        ("points waits on pipes", ["fifo/0"], "waits"),
        ("voc does not clip", range(100), "a box is"),
        ("voc does not escape", range(120), "not one printable line"),
        ("points does not sort", ["good"], "not sorted"),
        ("points does not count", ["good"], "used of fewer annotated"),
        ("images takes any size", range(60), "AssertionError"),
        ("pack unpickles", range(60), "pickle.find_class"),
        ("voc catches less", range(20), "ParseError"),
    ],
)
def test_bugs_put_in_on_purpose_are_found(name: str, words: list[str], what: str) -> None:
    report = fuzz.fuzz(name, words)
    assert any(what in cause for _, cause in report.crashes + report.hangs)
