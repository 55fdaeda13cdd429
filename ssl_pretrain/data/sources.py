"""What `--data` may be: a pack, a folder (or label file), or fields that the package draws."""

from __future__ import annotations

from pathlib import Path

from ssl_pretrain.data import readers, synthetic
from ssl_pretrain.data.groups import with_groups
from ssl_pretrain.errors import DataError, UsageError

PREFIX = "synthetic:"


def folder(data: str, cache: Path) -> Path:
    """The folder behind `data`; `synthetic:N` or `synthetic:N:SEED` is drawn into `cache` once.

    Raises `DataError` for a folder that does not exist, `UsageError` for numbers that are none.
    """
    if not data.startswith(PREFIX):
        path = Path(data).expanduser()
        if not path.exists():
            raise DataError(f"there is no folder or pack {data}")
        return path
    count, _, seed = data.removeprefix(PREFIX).partition(":")
    if not count.isdigit() or not (seed or "0").isdigit() or int(count) < 1:
        raise UsageError(f"{data!r} is not synthetic:N or synthetic:N:SEED, such as synthetic:240")
    return synthetic.write(cache / f"synthetic-{count}-{seed or 0}", int(count), int(seed or 0))


def labelled(data: str, cache: Path, format: str | None = None, group_regex: str | None = None) -> readers.LabelledSet:
    """The labelled images behind `data`.

    `format` names the reader where two would fit; the first `(...)` of `group_regex` in an image's path is its patient
    or slide. Raises the errors of `folder`, `readers.read` and `groups.with_groups`.
    """
    root = folder(data, cache)
    found = readers.read(root, format)
    return found if group_regex is None else with_groups(found, root if root.is_dir() else root.parent, group_regex)
