"""Says what is known of published data sets, compares yours with it, and writes their labels as COCO or YOLO.

ssl-pretrain datasets list [--json]
ssl-pretrain datasets show NAME
ssl-pretrain datasets check NAME ROOT [--group-regex RE]
ssl-pretrain datasets read NAME ROOT --as coco|yolo --out DIR [--images link|copy|none] [--group-regex RE]
ssl-pretrain datasets neutrostruct STEP ...
NAME is one of the list, or any: a data set of your own, whose format is recognised.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssl_pretrain.cli._words import new_parser, parsed
from ssl_pretrain.data.catalog import ANY, MARKS, Count, Entry, entries, entry
from ssl_pretrain.data.files import escape
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import named, nearest

if TYPE_CHECKING:
    from ssl_pretrain.data.checking import Findings, Problems

WIDTH = 100
"""Columns that the table needs; what a file or a pipe gets."""
PROBLEMS = 12
"""Kinds of problems that are shown."""
IMAGES = ("link", "copy", "none")
IMAGE_LABELS = ("image labels", "slide labels")
"""Of data sets without objects."""


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    steps: Mapping[str, Callable[[list[str], Console], None]] = {
        "list": _list,
        "show": _show,
        "check": _check,
        "read": _read,
        "neutrostruct": _neutrostruct,
    }
    if not words or words[0] in ("-h", "--help"):
        _say(console, "usage:\n" + "\n".join(f"  {line}" for line in (__doc__ or "").splitlines()[2:]))
        if not words:
            raise UsageError(f"datasets needs one of {', '.join(steps)}")
        return
    if words[0] not in steps:
        raise UsageError(f"datasets cannot {words[0]!r}{nearest(words[0], list(steps))}; it can {', '.join(steps)}")
    steps[words[0]](words[1:], console)


def _say(console: Console, text: str) -> None:
    """As it is: no markup, no colours, no emoji in names of files and classes."""
    console.print(text, markup=False, highlight=False, emoji=False)


def _width(console: Console) -> int:
    return console.width if console.is_terminal else max(console.width, WIDTH)


def _lay_out(table: Table, console: Console, width: int) -> None:
    """A table as wide as `width`, also where rich takes a pipe for 80 columns; cells wrap, nothing is cut."""
    lines = Console(file=console.file, width=width, force_terminal=console.is_terminal, no_color=console.no_color)
    lines.print(table, highlight=False)


# --- list and show ----------------------------------------------------------------------------------------------------


def _list(words: list[str], console: Console) -> None:
    """All data sets in one table."""
    parser = new_parser("datasets list", _list.__doc__)
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    given = parsed(parser, words)
    if given.json:
        console.out(json.dumps([dataclasses.asdict(each) for each in entries()], indent=2), highlight=False)
        return
    wide = _width(console) >= WIDTH
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what", ratio=1)
    for heading in ("images", "objects", "classes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("labels", max_width=9)
    if wide:
        table.add_column("licence", max_width=11)
        table.add_column("access", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=1)
    for each in entries():
        name, what, images, objects, classes, labels, licence, access, mark = map(Text, _row(each))
        table.add_row(name, what, images, objects, classes, labels, *([licence, access] if wide else []), mark)
    _lay_out(table, console, _width(console))
    marks = "; ".join(f"{mark} {words}" for mark, words in MARKS.items())
    _say(console, f"\nThe last column says how the layout is known: {marks}. Numbers marked (C) are unchecked.")
    if not wide:
        _say(console, f"Licence and access are left out: they need {WIDTH} columns.")
    _say(console, "ssl-pretrain datasets show NAME says more of one of them.")


def _row(each: Entry) -> list[str]:
    number = [count.words if count else "unknown" for count in (each.images, each.objects, each.class_count)]
    if each.objects is None and each.labels in IMAGE_LABELS:
        number[1] = "–"
    return [
        each.name, each.what, *number, each.labels, _or_unknown(each.licence), each.access, each.confidence,
    ]  # fmt: skip


def _or_unknown(words: str | None) -> str:
    return words or "unknown"


def _show(words: list[str], console: Console) -> None:
    """Everything that is known of one data set."""
    parser = new_parser("datasets show", _show.__doc__)
    parser.add_argument("name", type=str, help="as in datasets list")
    each = entry(parsed(parser, words).name)
    if each is ANY:
        raise UsageError("any stands for a data set of your own; ssl-pretrain datasets check any ROOT looks at it")
    _say(console, f"{each.title} ({each.name}): {each.what}\n")
    table = Table.grid(padding=(0, 2, 0, 0))
    for heading, said in _facts(each):
        table.add_row(Text(heading), Text(said, overflow="fold"))
    _lay_out(table, console, min(_width(console), WIDTH))
    _say(console, "\n".join(["", *_next(each)]))


def _facts(each: Entry) -> list[tuple[str, str]]:
    classes = _or_unknown(", ".join(each.classes) if each.classes else None)
    if each.classes is None and each.hints:
        classes = "not known as they are in the files; told are\n" + "\n".join(each.hints)
    counts = "" if each.class_count is None else f"{each.class_count.words}: "
    facts = [
        ("organ", _or_unknown(each.organ)),
        ("stain", _or_unknown(each.stain)),
        ("optics", _or_unknown(each.optics)),
        ("images", _count(each.images)),
        ("unlabelled", _count(each.unlabelled) if each.unlabelled else ""),
        ("split", ", ".join(f"{split} {size:,}" for split, size in each.splits.items())),
        ("objects", "the label is the image's" if each.labels in IMAGE_LABELS else _count(each.objects)),
        ("classes", counts + classes),
        ("of each class", _per_class(each)),
        ("labels", each.labels),
        ("layout", each.layout),
        ("read as", ", ".join(each.readers) if each.readers else "what is recognised"),
        ("groups", (f"{each.groups.words} groups; " if each.groups else "") + each.group_rule),
        ("group regex", each.group_regex or ""),
        ("mind", "\n".join(f"- {trap}" for trap in each.traps)),
        *_terms(each),
        ("where", f"{each.where} ({_ACCESS[each.access]})"),
        ("cite", each.citation),
        ("known by", f"{each.checked} (layout {each.confidence}: {MARKS[each.confidence]})"),
    ]
    return [(heading, said) for heading, said in facts if said]


_ACCESS = {"open": "open", "request": "on request", "client": "an account or a client program is needed"}


def _count(count: Count | None) -> str:
    return "unknown" if count is None else f"{count.number:,} ({count.mark}: {MARKS[count.mark]})"


def _per_class(each: Entry) -> str:
    numbers = ", ".join(f"{name} {number:,}" for name, number in each.per_class.items())
    return f"{numbers} ({each.per_class_mark}: {MARKS[each.per_class_mark]})" if numbers else ""


def _terms(each: Entry) -> list[tuple[str, str]]:
    allowed = {True: "allowed", False: "NOT allowed", None: "unknown"}
    may = f"commercial use {allowed[each.commercial]}, redistribution {allowed[each.redistribution]}"
    return [("licence", f"{_or_unknown(each.licence)}: {may}"), ("terms", each.terms or "")]


def _next(each: Entry) -> list[str]:
    regex = f" --group-regex '{each.group_regex}'" if each.group_regex else ""
    lines = [
        "Next, with the folder of the unpacked data set as ROOT (for probe, the folder in it that check names):",
        f"  ssl-pretrain datasets check {each.name} ROOT",
        f"  ssl-pretrain pack ROOT --out PACK{regex}",
    ]
    if each.labels == "unknown":
        return lines
    if each.labels in IMAGE_LABELS or "points" in each.labels:
        return [*lines, "  ssl-pretrain probe BACKBONE --data ROOT"]
    read = f"  ssl-pretrain datasets read {each.name} ROOT --as coco --out DIR"
    return [*lines, read, "  ssl-pretrain probe BACKBONE --data DIR"]


# --- check and read ---------------------------------------------------------------------------------------------------


def _check(words: list[str], console: Console) -> None:
    """Compares what lies on disk with the published counts, and names each difference."""
    parser = new_parser("datasets check", _check.__doc__)
    parser.add_argument("name", type=str, help="as in datasets list, or any")
    parser.add_argument("root", type=Path, help="the folder of the unpacked data set")
    parser.add_argument("--group-regex", type=str | None, default=None, help="its first (...) names patient or slide")
    given = parsed(parser, words)
    from ssl_pretrain.data.checking import check

    each = entry(given.name)
    findings = check(each, given.root, given.group_regex)
    _say(console, f"{each.title}: {findings.found}")
    _figures(findings, console)
    _say(console, f"groups: {each.group_rule}")
    _notes(findings.notes, findings.problems, console)
    for difference in findings.differences:
        _say(console, f"differs: {difference}")
    if findings.differences:
        count = len(findings.differences)
        many = f"{count} differences" if count > 1 else "1 difference"
        raise DataError(f"{escape(str(given.root))}: {many} from {each.title} as it is published")
    compared = any(figure.published for figure in findings.figures)
    _say(console, "equal to what is published" if compared else "nothing is published that could be compared")


def _figures(findings: Findings, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("published", justify="right")
    table.add_column("on disk", justify="right")
    table.add_column("")
    for figure in findings.figures:
        published = figure.published.words if figure.published else ""
        table.add_row(Text(figure.what), published, f"{figure.found:,}", figure.verdict)
    _lay_out(table, console, _width(console))


def _notes(notes: Sequence[str], problems: Sequence[Problems], console: Console) -> None:
    for note in notes:
        _say(console, f"note: {note}")
    for problem in problems[:PROBLEMS]:
        _say(console, f"problem, {problem.count:,} x: {problem.kind} (such as {problem.example})")
    if len(problems) > PROBLEMS:
        rest = problems[PROBLEMS:]
        _say(console, f"and {sum(problem.count for problem in rest):,} problems of {len(rest)} more kinds")


def _read(words: list[str], console: Console) -> None:
    """Writes a data set's labels as COCO or YOLO, with the entry's class names and groups."""
    parser = new_parser("datasets read", _read.__doc__)
    parser.add_argument("name", type=str, help="as in datasets list, or any")
    parser.add_argument("root", type=Path, help="the folder of the unpacked data set")
    parser.add_argument("--as", dest="form", type=str, required=True, help="coco or yolo")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--images", type=str, default="link", help="link, copy or none")
    parser.add_argument("--point-px", type=int | None, default=None, help="side of the square that a point becomes")
    parser.add_argument("--group-regex", type=str | None, default=None, help="its first (...) names patient or slide")
    given = parsed(parser, words)
    each, form = entry(given.name), given.form
    from ssl_pretrain.data import writers
    from ssl_pretrain.data.checking import read, summary

    named(writers.KIND, form)  # a wrong word is told before anything is read
    if given.images not in IMAGES:
        raise UsageError(f"--images is {given.images!r}: give {' or '.join(IMAGES)}")
    for heading, said in _terms(each) if each is not ANY else []:
        if said:
            _say(console, f"{heading}: {said}")
    with TemporaryDirectory() as scratch:
        reading = read(each, given.root, given.group_regex, Path(scratch) / "extracted")
        _say(console, f"{each.title}: {reading.labelled.found}")
        _notes(reading.notes, summary(reading.labelled.problems), console)
        images: Literal["link", "copy", "none"] = given.images
        if reading.extracted:
            images = "copy"  # links would lead into the scratch folder
            _say(console, "note: the images are written too, as they are no files of their own")
        written = writers.write(reading.labelled, given.out, format=form, images=images, point_px=given.point_px)
        _say(console, written)


def _neutrostruct(words: list[str], console: Console) -> None:
    from ssl_pretrain.cli import _neutrostruct as steps

    steps.run(words, console)
