"""What lies on disk, beside what a data set's publication says.

A published number that nobody checked (mark C) is compared and said, but it makes no difference: it may be ours that is
wrong.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ssl_pretrain.data import readers
from ssl_pretrain.data.catalog import ANY, Count, Entry, folded
from ssl_pretrain.data.files import Listing, escape, scan
from ssl_pretrain.data.gathering import OBJECT
from ssl_pretrain.data.groups import with_groups
from ssl_pretrain.data.readers import LabelledSet, classes_of
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import named, names

DEPTH = 2
"""How many levels of folders under the given one are searched for labels: zips put one or two around their content."""
MAX_FOLDERS = 100
"""Of one level; a folder of more is no packaging."""
_LABEL_FILES = frozenset({".json", ".xml", ".csv", ".tsv"})
_INNER = frozenset({"images", "labels", "annotations", "train", "val", "valid", "validation", "test"})
"""Names of what is within a data set, so that they are no parts of one."""


@dataclass(frozen=True)
class Figure:
    """A number on disk, beside the published one."""

    what: str
    found: int
    published: Count | None

    @property
    def verdict(self) -> str:
        """`equal`, or by how much it differs; empty without a published number.

        >>> Figure("boxes", 31280, Count(31285, "A")).verdict, Figure("images", 687, Count(686, "C")).verdict
        ('5 missing', '1 too many, but the published number is unchecked')
        """
        if self.published is None:
            return ""
        more = self.found - self.published.number
        words = f"{more:,} too many" if more > 0 else f"{-more:,} missing" if more else "equal"
        return words + (", but the published number is unchecked" if more and self.published.mark == "C" else "")

    @property
    def differs(self) -> bool:
        """Whether it differs from a number that somebody checked."""
        return self.published is not None and self.published.mark != "C" and self.found != self.published.number


@dataclass(frozen=True)
class Problems:
    """Problems of one kind that a reader had."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, eq=False)
class Reading:
    """A data set as its entry names classes and groups."""

    labelled: LabelledSet
    folder: Path
    """Where the labels were found: the root or a folder in it."""
    notes: tuple[str, ...]
    """What was renamed and grouped, one line each."""
    extracted: bool
    """The images were written by the reading, and are not those of the data set."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What `check` found."""

    labelled: LabelledSet | None
    found: str
    """A sentence on the labels, or why there are none."""
    figures: tuple[Figure, ...]
    differences: tuple[str, ...]
    """From the publication, one line each; empty when all is equal."""
    notes: tuple[str, ...]
    problems: tuple[Problems, ...]
    """The most frequent first."""


def check(entry: Entry, root: Path, group_regex: str | None = None) -> Findings:
    """Counts what lies under `root` and compares it with the entry.

    Raises `DataError` when `root` cannot be looked at, `UsageError` for a wrong `group_regex`. Labels that are missing
    or cannot be read are a difference, except in a data set of which nobody knows whether it has any.
    """
    _look(root)
    with TemporaryDirectory() as scratch:
        try:
            reading = read(entry, root, group_regex, Path(scratch) / "extracted")
        except DataError as error:
            if entry is ANY:
                raise
            return _without_labels(entry, root, str(error))
    labelled = reading.labelled
    listing = scan([root]) if root.is_dir() else None
    figures = _figures(entry, reading, listing, group_regex)
    differences = [f"{each.what}: {each.verdict}" for each in figures if each.differs]
    differences += _class_differences(entry, labelled)
    place = "" if reading.folder == root else f" in {escape(os.path.relpath(reading.folder, root))}/"
    return Findings(
        labelled,
        f"{labelled.format}{place}: {labelled.found}",
        tuple(figures),
        tuple(differences),
        reading.notes + _not_listed(listing),
        summary(labelled.problems),
    )


def read(entry: Entry, root: Path, group_regex: str | None = None, extract_to: Path | None = None) -> Reading:
    """The labelled images under `root`, with classes and groups as the entry has them.

    `group_regex` replaces the entry's rule. Images that lie inside label files are written into the new folder
    `extract_to`; without one they are an error. Raises `DataError` where no labels are found, naming what was looked
    for, and `UsageError` for a wrong `group_regex`.
    """
    _look(root)
    folder, format = _place(entry, root)
    extracted = entry.extracted and format == entry.readers[0]
    top = root if root.is_dir() else root.parent
    if extracted and format is not None and extract_to is not None:
        found, top = named(readers.KIND, format).extract(folder, extract_to), extract_to
    else:
        found = readers.read(folder, format)
    labelled, notes = with_names(found, entry)
    if group_regex is not None:
        labelled = with_groups(labelled, top, group_regex)
    elif entry.group_regex is not None:
        try:
            labelled = with_groups(labelled, top, entry.group_regex)
        except UsageError:
            notes.append("the rule for groups fits no path here: give --group-regex")
    return Reading(labelled, folder, tuple(notes), extracted)


def with_names(labelled: LabelledSet, entry: Entry) -> tuple[LabelledSet, list[str]]:
    """The labels as the entry spells its classes, and a line on each that was spelled otherwise.

    What the entry does not know stays as it is. Case, spaces and punctuation are no difference between names.
    """
    by_folded = {folded(name): name for name in entry.classes or ()}
    by_folded |= {folded(spelling): name for spelling, name in entry.spellings.items()}
    by_folded.pop("", None)  # of `+` and `-` nothing is left, so they are told apart as they are
    kept = {name: name for name in entry.classes or ()}
    labels = sorted({*labelled.annotated, *labelled.classes}, key=readers.natural)
    new = {label: kept.get(label, by_folded.get(folded(label), label)) for label in labels}
    renamed = [f"class {label} is called {name}" for label, name in new.items() if label != name]
    images = tuple(replace(image, labels=tuple(new[label] for label in image.labels)) for image in labelled.images)
    annotated: Counter[str] = Counter()
    for label, count in labelled.annotated.items():
        annotated[new[label]] += count
    return replace(labelled, images=images, classes=classes_of(images), annotated=dict(annotated)), renamed


def summary(problems: Sequence[str]) -> tuple[Problems, ...]:
    """Problems by kind, the most frequent first, each with its first example."""
    examples: dict[str, str] = {}
    for problem in problems:
        examples.setdefault(kind(problem), problem)
    counts = Counter(kind(problem) for problem in problems)
    return tuple(Problems(each, count, examples[each]) for each, count in counts.most_common())


def kind(problem: str) -> str:
    """A problem without the names and numbers in it.

    >>> kind("a.xml: object 3 (RBC) left out, zero-size box at (5, 5)")
    'object left out, zero-size box at'
    """
    words = problem.partition(": ")[2] or problem
    words = re.sub(r"\([^()]*\)|\S*[0-9]\S*|\S+\.[A-Za-z]{2,5}\b", " ", words)
    return " ".join(words.replace(" ,", ",").split())


def _look(root: Path) -> None:
    """Raises `DataError` for what is neither a folder with something in it that can be listed nor a label file."""
    said = escape(str(root))
    if not os.path.lexists(root):
        raise DataError(f"there is no folder {said}: check the path of the data set")
    if root.is_file() and root.suffix.lower() in _LABEL_FILES:
        return
    if not root.is_dir():
        raise DataError(f"{said} is not a folder: give the folder of the data set (unpack an archive first)")
    try:
        with os.scandir(root) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        raise DataError(f"{said} cannot be listed: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{said} is an empty folder: give the folder of the data set")


def _place(entry: Entry, root: Path) -> tuple[Path, str | None]:
    """The folder that the first fitting one of the entry's formats recognises, nearest to `root`, and that format."""
    formats = [name for name in entry.readers if name in names(readers.KIND)]
    if not formats:
        return root, None
    levels = _levels(root)
    if entry.unlabelled is not None:  # the labelled images are a part beside the unlabelled ones
        parts = [(part, name) for part, name in _fitting(levels[1], formats) if part.name.lower() not in _INNER]
        if len(parts) == 1:
            return parts[0]
    for fitting in (_fitting(level, [name]) for name in formats for level in levels):
        if len(fitting) > 1:
            found = ", ".join(escape(os.path.relpath(folder, root)) for folder, _ in fitting[:4])
            raise DataError(f"{escape(str(root))} has labels in more than one folder ({found}): give the one meant")
        if fitting:
            return fitting[0]
    looked_for = "; ".join(f"{name}: {named(readers.KIND, name).LAYOUT}" for name in formats)
    raise DataError(
        f"no labels of {entry.title} found in {escape(str(root))}, which holds {_count(root)}; looked, there and "
        f"{DEPTH} levels below, for {looked_for}"
    )


def _fitting(folders: Sequence[Path], formats: Sequence[str]) -> list[tuple[Path, str]]:
    """The folders that one of the formats recognises, each with the first one that does."""
    found = []
    for folder in folders:
        fits = (name for name in formats if named(readers.KIND, name).recognise(folder))
        found += [(folder, name) for name in [next(fits, None)] if name is not None]
    return found


def _levels(root: Path) -> list[list[Path]]:
    """The root, its folders, and theirs; links and hidden folders are not entered."""
    levels = [[root]]
    for _ in range(DEPTH):
        inner: list[Path] = []
        for folder in levels[-1]:
            try:
                with os.scandir(folder) as entries:
                    inner += [Path(e) for e in entries if e.is_dir(follow_symlinks=False) and e.name[:1] not in "._"]
            except OSError:  # a file, or not to be listed
                continue
        levels.append(sorted(inner) if len(inner) <= MAX_FOLDERS else [])
    return levels


def _count(root: Path) -> str:
    if not root.is_dir():
        return "no images"
    listing = scan([root])
    unreadable = f" and {len(listing.unreadable)} folders that cannot be listed" if listing.unreadable else ""
    return f"{len(listing.names):,} images{unreadable}"


def _without_labels(entry: Entry, root: Path, why: str) -> Findings:
    listing = scan([root]) if root.is_dir() else None
    images = len(listing.names) if listing else 0
    figures = [Figure("labelled images", 0, entry.images), _without(entry, images)]
    differences = ["labels: none that can be read"] if entry.readers else []
    differences += [f"{each.what}: {each.verdict}" for each in figures if each.differs]
    if not images:
        differences.append("images: none")
    return Findings(None, why, tuple(figures), tuple(differences), _not_listed(listing), ())


def _without(entry: Entry, images: int) -> Figure:
    """Where nothing is published of images without labels, masks may be among them."""
    what = "other image files" if entry.unlabelled is None else "images without a label"
    return Figure(what, images, entry.unlabelled)


def _not_listed(listing: Listing | None) -> tuple[str, ...]:
    if listing is None or not listing.unreadable:
        return ()
    folder, why = listing.unreadable[0]
    count = len(listing.unreadable)
    return (f"{count} folders cannot be listed, such as {escape(folder)} ({why}): what is in there is not counted",)


def _figures(entry: Entry, reading: Reading, listing: Listing | None, group_regex: str | None) -> list[Figure]:
    labelled = reading.labelled
    counts = {label: count for label, count in labelled.annotated.items() if label}
    figures = [Figure("labelled images", len(labelled.images), entry.images)]
    splits = Counter(image.split for image in labelled.images if image.split)
    published = entry.splits if splits else {}
    mark = entry.images.mark if entry.images is not None else "C"
    for split in readers.SPLITS:
        if split in splits or split in published:
            count = Count(published[split], mark) if split in published else None
            figures.append(Figure(f"{split} images", splits[split], count))
    if labelled.kind != "image":
        total = sum(labelled.annotated.values())
        figures.append(Figure(OBJECT[labelled.kind], total, entry.objects))
    figures.append(Figure("classes", len(counts), entry.class_count))
    for label, number in entry.per_class.items():
        figures.append(Figure(f"of class {label}", counts.get(label, 0), Count(number, entry.per_class_mark)))
    if listing is not None:
        figures.append(_without(entry, _others(labelled, listing)))
    groups = len({image.group for image in labelled.images})
    told = group_regex is not None or groups < len(labelled.images)
    return [*figures, Figure("groups", groups, entry.groups if told else None)]


def _others(labelled: LabelledSet, listing: Listing) -> int:
    """How many image files are neither labelled nor reported as unusable."""
    used = {os.path.abspath(image.path) for image in labelled.images}
    # a reader names an image from its own folder of images on, so the end of the path decides
    unusable = tuple(
        "/" + problem.partition(": image left out")[0] for problem in labelled.problems if ": image left out" in problem
    )
    others = (name for name in listing.names if os.path.abspath(listing.root / name) not in used)
    return sum(not f"/{escape(name)}".endswith(unusable) for name in others)


def _class_differences(entry: Entry, labelled: LabelledSet) -> list[str]:
    """Names that are missing and names that the publication does not have."""
    if entry.classes is None:
        return []
    found = {label for label in labelled.annotated if label}
    missing = [name for name in entry.classes if name not in found]
    extra = sorted(found - set(entry.classes), key=readers.natural)
    return [f"class {name}: not on disk" for name in missing] + [f"class {name}: not published" for name in extra]
