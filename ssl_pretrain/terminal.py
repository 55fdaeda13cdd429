"""What a person sees while images are packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def packing(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar for `pack.build`; yields what it calls with (done, total, rejected)."""
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("packing", total=None, text="")

    def show(done: int, total: int, rejected: int) -> None:
        bar.update(task, completed=done, total=total, text=f"{rejected} rejected" if rejected else "")

    with bar:
        yield show
