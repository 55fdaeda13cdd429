"""Decodes images once into a pack, and says what is odd in them.

ssl-pretrain pack SRC... --out PACK [--short-side auto|PX] [--group-regex RE] [--against LABELLED] [--leave-out FILE]
[--range LOW HIGH] [--plane first|middle|sharpest]

The report is printed and kept: counts in `pack.json`, a line for each odd image in `findings.jsonl`, the oddest images
in `oddest.png`. Nothing is dropped unless `--leave-out` names it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed
from ssl_pretrain.data.files import escape
from ssl_pretrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from ssl_pretrain.data.pack import Pack


SHORT_SIDE_PX = 704
"""`--short-side auto` of a pack made without a recipe: what the most demanding of the shipped methods wants (SimCLR,
views of 224 px that show 8 % of the image)."""


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    from ssl_pretrain.data import intake
    from ssl_pretrain.data.building import build
    from ssl_pretrain.data.decode import PLANES, Reading
    from ssl_pretrain.terminal import packing

    parser = new_parser("pack", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="folders (searched recursively) or image files")
    parser.add_argument("--out", type=Path, required=True, help="the pack's folder")
    parser.add_argument("--short-side", default="auto", help=f"pixels, or auto ({SHORT_SIDE_PX}); never enlarges")
    parser.add_argument(
        "--group-regex", type=str | None, default=None, help="its first group names the patient or slide"
    )
    parser.add_argument("--processes", type=int | None, default=None, help="default: one per core")
    parser.add_argument("--against", type=Path, help="a labelled set, or any folder: say which images overlap with it")
    parser.add_argument(
        "--leave-out", type=Path, help="a findings.jsonl, or relative paths one a line, not to be packed"
    )
    parser.add_argument("--range", type=float, nargs=2, help="which values of 16- or 32-bit grey are black and white")
    parser.add_argument("--plane", default="first", help=f"of a TIFF with several pages: {', '.join(PLANES)}")
    given = parsed(parser, words)
    short_side = _short_side(str(given.short_side))
    reading = Reading(None if given.range is None else (given.range[0], given.range[1]), str(given.plane))
    left_out = [] if given.leave_out is None else intake.names_in(given.leave_out)
    if given.against is not None and not given.against.is_dir():  # before hours of packing
        raise DataError(f"there is no folder {escape(str(given.against))}: --against wants a labelled set")
    with packing(console) as progress:
        made = build(
            given.sources, given.out, short_side, given.group_regex, given.processes, progress, reading, left_out
        )
    _print_pack(made, console)
    found = intake.inspect(made, given.against, given.processes)
    intake.write(made, found)
    for line in intake.words(found, reading):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    from ssl_pretrain.report import oddities  # loads torch, which all of the above does without

    console.print(f"the oddest images: {oddities.draw(made, found)}", highlight=False, markup=False, soft_wrap=True)


def _short_side(word: str) -> int:
    if word == "auto":
        return SHORT_SIDE_PX
    if not word.isdigit() or int(word) < 16:
        raise UsageError(f"--short-side is {word!r}: give pixels (16 or more) or auto")
    return int(word)


def _print_pack(made: Pack, console: Console) -> None:
    rejected = made.folder / "rejected.jsonl"
    reasons = Counter(json.loads(line)["reason"] for line in rejected.read_text(encoding="utf-8").splitlines())
    sides = made.size_N2.min(1)
    console.print(
        f"{made.folder}: {len(made)} images, short sides {sides.min()} to {sides.max()} px, "
        f"{made.pixels.nbytes / 1e6:.0f} MB, fingerprint {made.fingerprint[:12]}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if reasons:
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        line = f"{reasons.total()} files rejected ({listed}); they are listed in {rejected}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
