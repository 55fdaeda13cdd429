"""Formats with a bug put in on purpose: what the fuzzing must find. Each is set up in its own child process."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_corpus import FORMATS, Format

from ssl_pretrain.data import decode, gathering, pack, text_labels
from ssl_pretrain.data.gathering import Objects
from ssl_pretrain.data.readers import voc
from ssl_pretrain.errors import DataError

# --- readers with a bug -----------------------------------------------------------------------------------------------


def _broken(name: str, bug: Callable[[], None]) -> Format:
    good = FORMATS[name]

    def prepare() -> None:
        good.prepare()
        bug()

    return dataclasses.replace(good, prepare=prepare)


def _trusts_names() -> None:
    """The image's name out of the XML is opened as it is."""

    def taken(tree: Any, path: Path, *rest: object) -> str:
        return str(tree.findtext("filename") or "").strip()

    voc._image_name = taken


def _waits_on_pipes() -> None:
    text_labels.read_bytes = lambda path, max_bytes: path.read_bytes()


def _does_not_clip() -> None:
    def box(self: Objects, where: str, label: str, *rest: Any) -> None:
        self.gathering.annotated[label.strip()] += 1
        self._add(rest[:4], label.strip(), None)

    Objects.box = box


def _does_not_escape() -> None:
    voc.escape = str


def _does_not_sort() -> None:
    gathering.classes_of = lambda images: tuple({label: 0 for image in images for label in image.labels})


def _does_not_count() -> None:
    Objects.point = lambda self, where, label, x, y: self._add((x, y, x, y), label, None)


def _takes_any_size() -> None:
    decode._check_size = lambda image: None


def _unpickles() -> None:
    load = np.load
    pack.np.load = lambda file, allow_pickle: load(file, allow_pickle=True)


def _catches_less() -> None:
    voc.ParseError = KeyError


# --- ways to end ------------------------------------------------------------------------------------------------------


def _ends(what: Callable[[Path], object]) -> Format:
    def attempt(root: Path, changed: Sequence[str]) -> None:
        if changed:
            what(root)

    return Format("ends", lambda: {"a.txt": b"1", "b.txt": b"2"}, attempt, "a.txt")


def _loop(root: Path) -> None:
    while True:
        pass


def _two_lines(root: Path) -> None:
    raise DataError("one\ntwo")


def _recurse(root: Path) -> None:
    _recurse(root)


FAULTS: dict[str, Format] = {
    "loops": _ends(_loop),
    "waits": _ends(lambda root: signal.pause()),
    "dies": _ends(lambda root: os.kill(os.getpid(), signal.SIGSEGV)),
    "eats": _ends(lambda root: bytearray(8 << 30)),
    "recurses": _ends(_recurse),
    "outside": _ends(lambda root: open("/etc/passwd").close()),
    "upwards": _ends(lambda root: (root / ".." / ".." / "words.json").read_bytes()),
    "lists": _ends(lambda root: os.listdir(root / "..")),
    "writes": _ends(lambda root: (root / "b.txt").write_bytes(b"3")),
    "unpickles": _ends(lambda root: pickle.loads(b"cos\ngetpid\n.")),
    "shells": _ends(lambda root: os.system("true")),
    "archives": _ends(lambda root: (root / "a.zip").exists() or open(root / "a.zip")),
    "two_lines": _ends(_two_lines),
    "warns": _ends(lambda root: np.float64(1) / np.float64(0)),
    "voc trusts names": _broken("voc", _trusts_names),
    "points waits on pipes": _broken("points", _waits_on_pipes),
    "voc does not clip": _broken("voc", _does_not_clip),
    "voc does not escape": _broken("voc", _does_not_escape),
    "points does not sort": _broken("points", _does_not_sort),
    "points does not count": _broken("points", _does_not_count),
    "images takes any size": _broken("images", _takes_any_size),
    "pack unpickles": _broken("pack", _unpickles),
    "voc catches less": _broken("voc", _catches_less),
}
