"""Images that go by slightly different names in several files, and outputs that never replace anything.

A COCO file may say `a.tif` where CVAT says `train/a.tif` and a table `a`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.errors import UsageError, WriteError
from ssl_pretrain.files import write_durably


def _same(name: str) -> str:
    return name


def _last(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _stem(name: str) -> str:
    return PurePosixPath(_last(name)).stem


def link(wanted: Sequence[str], offered: Iterable[str]) -> dict[str, str]:
    """Which of the `offered` names each wanted one means: itself, or else by its last part, or else without suffix.

    Only a name that means one thing on both sides is linked; an exact name is never given to another.

    >>> link(["a.tif", "b.tif", "c.tif"], ["train/a.tif", "b", "x/c.tif", "y/c.tif"])
    {'a.tif': 'train/a.tif', 'b.tif': 'b'}
    """
    free, found = set(offered), dict[str, str]()
    rules: tuple[Callable[[str], str], ...] = (_same, _last, _stem)
    for key in rules:
        left = [name for name in wanted if name not in found]
        times = Counter(key(name) for name in free), Counter(key(name) for name in left)
        by_key = {key(name): name for name in free}
        for name in left:
            if times[0][key(name)] == times[1][key(name)] == 1:
                found[name] = by_key[key(name)]
        free -= set(found.values())
    return found


def shown(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for a message.

    >>> shown(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = [escape(name) for name in names]
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def write_new(path: Path, content: bytes, inputs: Sequence[Path] = ()) -> None:
    """Writes a file that is not there yet; one with the same content may stand.

    Raises `UsageError` when it is one of the inputs (nothing is done in place), `WriteError` when it is another file.
    """
    for given in inputs:
        if path.exists() and given.exists() and path.samefile(given):
            raise UsageError(f"{escape(str(path))} is read here: name another file to write")
    if path.is_symlink() or path.exists():
        try:
            if read_bytes(path) == content:
                return
        except Rejected:
            pass
        raise WriteError(f"{escape(str(path))} is there already with other content: remove it or name another place")
    write_durably(path, content)
