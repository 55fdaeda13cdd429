"""The intake report: what is odd in a pack, image by image, before anything is trained on it. Nothing is dropped.

    blank           no spot of the thumbnail (64 x 64) stands out from its surroundings by more than 5 levels of 255
    blurred         edges less steep than the set's own by far: `Look.sharpness` below the median of the images that are
                    not blank by 0.7 and by 4 robust standard deviations (1.4826 times the median deviation); where more
                    than half of a set is blurred, or noise was added after the blur, none is found
    over_exposed    more than half of the pixels are clipped (254 or more)
    under_exposed   not one pixel in a thousand is brighter than 32
    duplicate       the file has the bytes of an earlier one
    near_duplicate  shows the field of an earlier image again (`duplicates`)
    overlap_bytes, overlap_near     the same, for an image of a labelled test set

`findings.jsonl` has a line for each, `pack.json` the counts ("intake"). Thumbnails stay on disk until they are compared
(`overlap`), so what grows with the number of images is their names, numbers and hashes.

Shapes: N images, M or K or G of something, P pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data import duplicates, looks, overlap
from ssl_pretrain.data.decode import Reading
from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.looks import Looks
from ssl_pretrain.data.pack import DUPLICATE, Pack, manifest
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.files import write_durably

FILE = "findings.jsonl"
BLANK = 5.0
"""Levels. 200 bare fields with noise of 6 levels had 3.9 at most, of 8 levels 5.0; a faint 20-px particle has 5.6."""
BLURRED, ROBUST_SIGMAS = 0.7, 4.0
LEAST = 8
"""Images that are not blank, from which on a median says what is usual."""
CLIPPED_SHARE = 0.5
DARK = 32.0
"""Level."""
MAX_LIST_BYTES = 1 << 30


class Finding(NamedTuple):
    """One thing about one image; names are relative, in one printable line."""

    path: str
    finding: str
    detail: str
    other: str = ""
    """The image that it repeats: of the pack, or of the labelled set."""


@dataclass(frozen=True)
class Intake:
    """What was found."""

    findings: tuple[Finding, ...]
    """By kind, then in the order of the pack."""
    summary: dict[str, Any]
    """What `pack.json` keeps."""


def inspect(pack: Pack, against: Path | None = None, processes: int | None = None) -> Intake:
    """Looks at all images of a pack, and for those of a labelled folder among them.

    `against`: its test split if it has one, else all of it. `processes` decode it; one per CPU unless given, and 0
    decodes here. Raises `DataError` when that folder has no images, or the pack's looks are damaged.
    """
    seen = looks.of_pack(pack)
    blank_N = seen.number("detail") <= BLANK
    findings = [*_blank(pack, seen, blank_N), *_blurred(pack, seen, blank_N), *_exposed(pack, seen), *_repeats(pack)]
    near, summary = _near(pack, seen)
    findings += near
    held = None
    if against is not None:
        held = overlap.read(against, pack, processes)
        findings += _overlaps(pack, seen, held)
    counts = Counter(finding.finding for finding in findings)
    made = {"findings": dict(counts), **summary, **_sizes(pack), "groups": _groups(pack), "files": _files(seen)}
    made["not_judged"] = int((~seen.shown_N).sum())
    if held is not None:
        made["against"] = {"folder": held.folder, "how": held.how, "images": len(held.names)}
        made["against"]["not_compared"] = len(held.unusable)
    return Intake(tuple(findings), made)


def write(pack: Pack, intake: Intake) -> None:
    """Writes `findings.jsonl` and the block of `pack.json`, each whole or not at all; raises `WriteError`."""
    lines = "".join(json.dumps(finding._asdict()) + "\n" for finding in intake.findings)
    write_durably(pack.folder / FILE, lines.encode())
    made = manifest(pack.folder) | {"intake": intake.summary}
    write_durably(pack.folder / "pack.json", json.dumps(made, indent=2).encode() + b"\n")


def read(pack: Pack) -> Intake | None:
    """What `write` wrote; None for a pack that was not looked at. Raises `DataError` where it is damaged."""
    made = manifest(pack.folder)
    path = pack.folder / FILE
    if "intake" not in made or not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        findings = tuple(Finding(*(str(line[name]) for name in Finding._fields)) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: run ssl-pretrain pack again") from error
    return Intake(findings, dict(made["intake"]))


def names_in(path: Path) -> list[str]:
    """Images that a file names, as in `Pack.paths`: the paths of a `.jsonl` of findings, or else one a line.

    Raises `UsageError` for what cannot be read. A name is not looked for here.
    """
    try:
        text = read_bytes(path, MAX_LIST_BYTES).decode()
        lines = [line for line in text.split("\n") if line.strip()]
        if path.suffix != ".jsonl":
            return list(dict.fromkeys(line.removesuffix("\r") for line in lines))
        return list(dict.fromkeys(_path_of(line) for line in lines))
    except Rejected as why:
        raise UsageError(f"cannot read the list {escape(str(path))}: {why.reason}, {why.detail}") from why
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{escape(str(path))} is not a list of images: give a findings.jsonl, or relative paths, one a line"
        ) from error


def _path_of(line: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise ValueError("no path")
    return str(record["path"])


# --- one image --------------------------------------------------------------------------------------------------------


def _blank(pack: Pack, seen: Looks, blank_N: NDArray[np.bool_]) -> Iterator[Finding]:
    detail_N = seen.number("detail")
    for i in np.flatnonzero(blank_N):
        yield Finding(pack.paths[i], "blank", f"no spot stands out by more than {detail_N[i]:.1f} levels")


def _blurred(pack: Pack, seen: Looks, blank_N: NDArray[np.bool_]) -> Iterator[Finding]:
    sharpness_N = seen.number("sharpness")
    judged_N = ~blank_N & np.isfinite(sharpness_N)
    limit = sharpness_limit(sharpness_N[judged_N])
    for i in np.flatnonzero(judged_N & (sharpness_N < limit)):
        yield Finding(pack.paths[i], "blurred", f"sharpness {sharpness_N[i]:.2f}, blurred below {limit:.2f}")


def sharpness_limit(sharpness_N: NDArray[np.float64]) -> float:
    """The sharpness below which an image of the set is blurred; minus infinity for fewer than 8 images.

    The median is 0, the median deviation 1/2: 4 x 1.4826 x 1/2 below 0.

    >>> round(sharpness_limit(np.array([-1, -0.5, -0.5, 0, 0, 0, 0.5, 0.5, 1])), 4)
    -2.9652
    """
    if len(sharpness_N) < LEAST:
        return float("-inf")
    median = float(np.median(sharpness_N))
    spread = 1.4826 * float(np.median(np.abs(sharpness_N - median)))
    return median - max(BLURRED, ROBUST_SIGMAS * spread)


def _exposed(pack: Pack, seen: Looks) -> Iterator[Finding]:
    white_N, bright_N = seen.number("white"), seen.number("bright")
    for i in np.flatnonzero(white_N > CLIPPED_SHARE):
        yield Finding(pack.paths[i], "over_exposed", f"{100 * white_N[i]:.0f} % of the pixels are clipped")
    for i in np.flatnonzero(bright_N <= DARK):
        yield Finding(pack.paths[i], "under_exposed", f"99.9 % of the pixels are at level {bright_N[i]:.0f} or below")


# --- one image and another --------------------------------------------------------------------------------------------


def _repeats(pack: Pack) -> Iterator[Finding]:
    copies = np.flatnonzero(pack.flags_N & DUPLICATE > 0)
    first = {pack.sha256_N32[i].tobytes(): -1 for i in copies}
    for i, row in enumerate(pack.sha256_N32):
        j = first.get(row.tobytes(), i)
        if j < 0:
            first[row.tobytes()] = i
        elif j != i:
            yield Finding(pack.paths[i], "duplicate", "the same bytes", pack.paths[j])


def _near(pack: Pack, seen: Looks) -> tuple[list[Finding], dict[str, Any]]:
    """Each near-duplicate but the first of its family, and how many families and look-alikes there are."""
    place_M = np.flatnonzero(seen.shown_N & (pack.flags_N & DUPLICATE == 0))
    pair_P2 = duplicates.near_pairs(seen.thumbnail_NHW, place_M)
    joined, alike = duplicates.families(pair_P2)
    found = [
        Finding(pack.paths[i], "near_duplicate", f"one of {len(family)} that show the same", pack.paths[family[0]])
        for family in joined
        for i in family[1:]
    ]
    found.sort()
    return found, {"families": len(joined), "look_alikes": alike}


def _overlaps(pack: Pack, seen: Looks, held: overlap.HeldOut) -> Iterator[Finding]:
    said = {"overlap_bytes": "the same bytes", "overlap_near": "shows the same"}
    for i, t, kind in overlap.overlaps(pack, seen, held):
        yield Finding(pack.paths[i], kind, f"{said[kind]} as an image of {held.folder}", held.names[t])


# --- the set ----------------------------------------------------------------------------------------------------------


def _sizes(pack: Pack) -> dict[str, Any]:
    """Width and height in the files: the smallest and largest by area, and the commonest five."""
    size_K2, count_K = np.unique(pack.original_N2[:, ::-1], axis=0, return_counts=True)
    order_K = np.argsort(size_K2.prod(1), kind="stable")
    common = [[*size_K2[k].tolist(), int(count_K[k])] for k in np.argsort(-count_K, kind="stable")[:5]]
    smallest, largest = size_K2[order_K[0]].tolist(), size_K2[order_K[-1]].tolist()
    return {"sizes": {"smallest": smallest, "largest": largest, "different": len(size_K2), "commonest": common}}


def _groups(pack: Pack) -> dict[str, int]:
    size_G = np.unique(pack.group_N, return_counts=True)[1]
    ungrouped = int(manifest(pack.folder).get("ungrouped", 0))
    return {
        "count": len(size_G), "largest": int(size_G.max()), "median": int(np.median(size_G)), "ungrouped": ungrouped,
    }  # fmt: skip


def _files(seen: Looks) -> dict[str, Any] | None:
    """Formats, modes, bits and pages of the files, by frequency, and the largest value of 16-bit grey."""
    if seen.sources is None:
        return None
    count_K = np.bincount(seen.source_N, minlength=len(seen.sources)).tolist()
    made: dict[str, Any] = {}
    for name in ("format", "mode", "bits"):
        kinds = Counter[str]()
        for source, count in zip(seen.sources, count_K, strict=True):
            kinds[str(source._asdict()[name])] += count
        made[name] = dict(kinds.most_common())
    deep_K = np.array([source.mode.startswith("I;16") for source in seen.sources])
    deep_N = deep_K[seen.source_N]
    made["deep_grey"], made["peak"] = int(deep_N.sum()), float(seen.peak_N[deep_N].max(initial=0))
    made["pages"] = {"files": int((seen.pages_N > 1).sum()), "most": int(seen.pages_N.max())}
    colour = [count for source, count in zip(seen.sources, count_K, strict=True) if source.bits == 16]
    made["deep_colour"] = sum(colour) - made["deep_grey"]
    return made


# --- in words ---------------------------------------------------------------------------------------------------------


def words(intake: Intake, reading: Reading, most: int = 5) -> list[str]:
    """The report in lines, with `most` of the overlapping pairs; the rest stands in `findings.jsonl`."""
    summary = intake.summary
    sizes, groups = summary["sizes"], summary["groups"]
    (width, height, count), *_ = sizes["commonest"]
    small, large = ("{} x {}".format(*sizes[name]) for name in ("smallest", "largest"))
    kinds = f"{sizes['different']} sizes from {small} to {large} px, most often" if sizes["different"] > 1 else "all"
    lines = [f"sizes: {kinds} {width} x {height} px ({count})", *_file_words(summary["files"], reading)]
    alone = f", {groups['ungrouped']} images without a match on their own" if groups["ungrouped"] else ""
    lines.append(
        f"groups: {groups['count']}, of {groups['median']} images in the middle, {groups['largest']} at most{alone}"
    )
    found = ", ".join(f"{name} {count}" for name, count in summary["findings"].items())
    lines.append(f"findings: {found or 'none'}" + (f"; each is listed in {FILE}" if found else ""))
    if summary["families"] or summary["look_alikes"]:
        alike = f"; {summary['look_alikes']} more look much alike but are no copies" if summary["look_alikes"] else ""
        lines.append(f"near-duplicates: {summary['families']} families{alike}")
    if summary["not_judged"]:
        small_ones = f"{summary['not_judged']} images have a side below {looks.SIDE_PX} px"
        lines.append(f"{small_ones}: not compared, and not judged for blur")
    return [*lines, *_against_words(intake, most)]


def _file_words(files: dict[str, Any] | None, reading: Reading) -> list[str]:
    if files is None:
        return ["files: this pack of an older release does not say what its files were; pack them again to know"]
    kinds = (", ".join(f"{name} {count}" for name, count in files[kind].items()) for kind in ("format", "mode", "bits"))
    lines = ["files: {}; modes {}; bits a channel {}".format(*kinds)]
    if files["deep_grey"]:
        lines.append(_depth_words(files["deep_grey"], int(files["peak"]), reading))
    if files["deep_colour"]:
        lines.append(f"16-bit colour: {files['deep_colour']} files, of which the upper 8 bits are taken")
    if files["pages"]["files"]:
        stacks = f"{files['pages']['files']} files have several pages or frames, up to {files['pages']['most']}"
        lines.append(f"stacks: {stacks}; of a TIFF the {reading.plane} is taken (--plane), of others the first")
    return lines


def _depth_words(count: int, peak: int, reading: Reading) -> str:
    """What 16-bit grey uses of its range.

    >>> print(_depth_words(3, 4000, Reading()))
    16-bit grey: 3 files, largest value 4000, so 12 bits are in use; divided by 257 they are nearly black: pack again \
with --range 0 4095
    """
    bits = max(1, peak.bit_length())
    line = f"16-bit grey: {count} files, largest value {peak}, so {bits} bits are in use"
    if reading.value_range is not None:
        low, high = reading.value_range
        clipped = "; what is above is white" if peak > high else ""
        return f"{line}; {low:g} is black and {high:g} white{clipped}"
    if bits == 16:
        return f"{line}; divided by 257"
    dark = "nearly black" if bits <= 13 else "dark"
    return f"{line}; divided by 257 they are {dark}: pack again with --range 0 {2**bits - 1}"


def _against_words(intake: Intake, most: int) -> list[str]:
    if "against" not in intake.summary:
        return []
    test = intake.summary["against"]
    pairs = [finding for finding in intake.findings if finding.finding.startswith("overlap_")]
    images = len({finding.path for finding in pairs})
    lines = [f"against {test['folder']}: {test['images']} images, {test['how']}"]
    lines.append(
        f"overlap: {images} images of the pack are or show one of these ({len(pairs)} pairs)"
        if pairs
        else "overlap: none of the pack's images is or shows one of these"
    )
    lines += [f"  {pair.path} = {pair.other} ({pair.detail.partition(' as ')[0]})" for pair in pairs[:most]]
    if len(pairs) > most:
        lines.append(f"  and {len(pairs) - most} more pairs, in {FILE}")
    if test["not_compared"]:
        lines.append(f"{test['not_compared']} images of {test['folder']} cannot be decoded: compared by bytes alone")
    return lines
