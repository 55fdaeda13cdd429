"""What the intake found in the images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data import intake
from ssl_pretrain.data.overlap import reading_of
from ssl_pretrain.data.pack import manifest
from ssl_pretrain.errors import DataError
from ssl_pretrain.report import html, oddities
from ssl_pretrain.report.sections import Section

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 120
EXAMPLES = 3
"""Files named for each reason of rejection."""
ALT = "The images of the pack that show least, are most blurred, brightest and darkest, and pairs that show the same."
UNSEEN = "Blank, blurred and repeated images were not looked for: `ssl-pretrain pack` makes a pack and looks for them."
WORDS = "What the intake found. Nothing is repaired in silence: a file that could not be used is counted here."


def section(run: RunFolder) -> Section:
    """Counts, sizes and rejected files of the run's pack."""
    pack = run.pack
    made, refused = manifest(pack.folder), rejected(pack.folder)
    groups = f"{made['groups']:,}"
    named = {
        "Images": f"{len(pack):,}",
        "Size in the files": sizes(pack.original_N2),
        "Size in the pack": sizes(pack.size_N2),
        "Pixels": f"{made['pixel_bytes'] / 1e6:,.1f} MB",
        "Groups": groups if made["group_regex"] else f"{groups} (no group_regex: each image is its own)",
        "Duplicates": f"{made['duplicates']:,} with the bytes of another image",
        "Rejected": f"{sum(len(paths) for paths in refused.values()):,}",
        "Fingerprint": pack.fingerprint,
    }
    rows = [(reason, f"{len(paths):,}", ", ".join(paths[:EXAMPLES])) for reason, paths in refused.items()]
    table = html.table(["rejected because", "files", "such as"], rows, numbers=False) if rows else ""
    found = intake.read(pack)
    if found is None:
        return Section("The images", WORDS, html=html.facts(named) + table + html.items([UNSEEN]))
    lines = html.items(intake.words(found, reading_of(pack)))
    return Section("The images", WORDS, oddities.figure(pack, found), ALT, html.facts(named) + table + lines)


def rejected(pack: Path) -> dict[str, list[str]]:
    """Paths by reason, the commonest reason first; none where the file is gone. `DataError` where it is damaged."""
    path = pack / "rejected.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise DataError(f"{path} cannot be read: pack the images again") from error
    return {
        reason: [str(line["path"]) for line in lines if line["reason"] == reason]
        for reason, _ in Counter(str(line["reason"]) for line in lines).most_common()
    }


def sizes(size_N2: NDArray[np.int64]) -> str:
    """Heights and widths in words.

    >>> sizes(np.array([[480, 640], [480, 640]]))
    '640 x 480 px'
    >>> sizes(np.array([[480, 640], [100, 50], [480, 640]]))
    '50 x 100 to 640 x 480 px, 2 of 3 have 640 x 480'
    """
    count = Counter((int(width), int(height)) for height, width in size_N2)
    by_area = sorted(count, key=lambda size: size[0] * size[1])
    small, large = (f"{width} x {height}" for width, height in (by_area[0], by_area[-1]))
    (width, height), most = count.most_common(1)[0]
    if len(count) == 1:
        return f"{small} px"
    return f"{small} to {large} px, {most:,} of {len(size_N2):,} have {width} x {height}"
