"""Which images belong together (one patient, slide or field), told by a regular expression on their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.errors import UsageError


def groups_of(names: Sequence[str], regex: str) -> list[str | None]:
    """What the regex's first `(...)` finds in each relative path; None where it does not match.

    Raises `UsageError` for what is no regular expression, has no `(...)`, or matches no path at all.

    >>> groups_of(["slides/A/A_1.jpg", "slides/B/B_1.jpg", "top.jpg"], "([A-Z])/")
    ['A', 'B', None]
    """
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError(f"the group regex {regex!r} is not a regular expression: {error}") from error
    if pattern.groups == 0:
        raise UsageError(f"the group regex {regex!r} needs a (...) around what names the group")
    found = [match[1] if (match := pattern.search(name)) else None for name in names]
    if names and all(group is None for group in found):
        raise UsageError(f"the group regex {regex!r} matches no path, for example not {escape(names[0])!r}")
    return found


def with_groups(labelled: LabelledSet, root: Path, regex: str) -> LabelledSet:
    """The same images with the groups that the regex finds in their paths under `root`.

    An image that it does not match is a group of its own, and a problem says how many those are. Raises `UsageError`
    as `groups_of` does.
    """
    names = [Path(os.path.relpath(image.path, root)).as_posix() for image in labelled.images]
    found = groups_of(names, regex)
    # "alone" keeps the name of an image without a group apart from a group that is called the same
    images = tuple(
        replace(image, group=f"alone: {escape(name)}" if group is None else escape(group))
        for image, name, group in zip(labelled.images, names, found, strict=True)
    )
    alone = [name for name, group in zip(names, found, strict=True) if group is None]
    said = [f"{len(alone)} images match no group and are each their own, such as {escape(alone[0])}"] if alone else []
    return replace(labelled, images=images, problems=(*labelled.problems, *said))
