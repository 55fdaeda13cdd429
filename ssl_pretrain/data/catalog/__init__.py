"""What is known of published data sets: one file a data set, each with an `ENTRY`. No images, no downloads.

Marks say how sure a statement is: A read in the files or in a public reader of them, B told by third-party code, a page
or the publication, C background knowledge that nobody checked, D not to be found out. Unknown is None. Class names are
those of the files; where nobody can know them, `classes` is None.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named, names, nearest

__path__ = pkgutil.extend_path(__path__, __name__)

KIND = "data.catalog"
Mark = Literal["A", "B", "C", "D"]
MARKS: Mapping[Mark, str] = {
    "A": "read in the files or in a public reader of them",
    "B": "told by third-party code, a page or the publication",
    "C": "background knowledge, unchecked",
    "D": "not to be found out",
}


@dataclass(frozen=True)
class Count:
    """A published number and how sure it is."""

    number: int
    mark: Mark

    @property
    def words(self) -> str:
        """Of a number that nobody checked, the mark too.

        >>> Count(31285, "A").words, Count(686, "C").words
        ('31,285', '686 (C)')
        """
        return f"{self.number:,}" + (" (C)" if self.mark == "C" else "")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set."""

    name: str
    """What it is called on the command line: the name of its file."""
    title: str
    what: str
    """A few words: of what the images are."""
    organ: str | None = None
    stain: str | None = None
    optics: str | None = None
    """Magnification, microscope, size of the images."""
    images: Count | None = None
    """With labels."""
    unlabelled: Count | None = None
    """Images without labels."""
    objects: Count | None = None
    """Boxes, points, masks; None where the label is the image's."""
    class_count: Count | None = None
    classes: tuple[str, ...] | None = None
    """As they are spelled in the files or their documentation."""
    hints: tuple[str, ...] = ()
    """Class names that are told somewhere, not all of them or not surely as in the files: for reading only."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Numbers and other spellings of the files -> the name in `classes`. Case, spaces and hyphens need none."""
    per_class: Mapping[str, int] = field(default_factory=dict)
    """Objects of each class (images, where the label is the image's)."""
    per_class_mark: Mark = "C"
    splits: Mapping[str, int] = field(default_factory=dict)
    """Images of `train`, `val` and `test`."""
    labels: str
    """The kind of labels, in a few words."""
    readers: tuple[str, ...] = ()
    """The formats it comes in, the wanted one first; empty: nobody knows, so it is recognised."""
    extracted: bool = False
    """The images lie inside the label files, so that `read` has to write them first."""
    layout: str
    """The folder in a few lines."""
    traps: tuple[str, ...] = ()
    group_regex: str | None = None
    """Its first `(...)` in an image's path under the root names the patient, slide or field."""
    groups: Count | None = None
    """How many patients, slides or fields."""
    group_rule: str
    """What belongs together, in words."""
    licence: str | None = None
    commercial: bool | None = None
    redistribution: bool | None = None
    terms: str | None = None
    """What its terms forbid or ask for, in words."""
    access: Literal["open", "request", "client"]
    """`client`: an account, a plug-in or a client program is needed."""
    where: str
    """DOI or address."""
    citation: str
    confidence: Mark
    """Of the layout."""
    checked: str
    """What was checked, in words."""


ANY = Entry(
    name="any",
    title="a data set of your own",
    what="anything",
    labels="unknown",
    layout="what is recognised",
    group_rule="each image is its own group unless --group-regex says more",
    access="open",
    where="here",
    citation="none",
    confidence="D",
    checked="nothing",
)
"""Stands for a data set that is not in the catalog."""


def entry(name: str) -> Entry:
    """The entry of a data set by its name (case and `-` or `_` make no difference), or `ANY`.

    Raises `UsageError` for an unknown name, with the nearest.
    """
    known, wanted = names(KIND), name.lower().replace("-", "_")
    if wanted == ANY.name:
        return ANY
    if wanted not in known:
        by_title = {each.title.lower(): each.name for each in entries()}
        near = f" (did you mean {by_title[name.lower()]!r}?)" if name.lower() in by_title else nearest(wanted, known)
        raise UsageError(f"no data set is called {name!r}{near}; ssl-pretrain datasets list shows all {len(known)}")
    found = named(KIND, wanted).ENTRY
    if not isinstance(found, Entry):
        raise UsageError(f"the catalog's file {wanted}.py has no ENTRY that is an Entry")
    return found


def entries() -> tuple[Entry, ...]:
    """All, by name."""
    return tuple(entry(name) for name in names(KIND))


def folded(name: str) -> str:
    """What is left of a class name without case, spaces and punctuation.

    >>> folded("High squamous intra-epithelial lesion") == folded("high_squamous intraepithelial Lesion")
    True
    """
    return "".join(c for c in name.casefold() if c.isalnum())
