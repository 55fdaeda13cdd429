"""The command line: `ssl-pretrain VERB ...`. What it prints is for people; what it returns is for shells (see errors).

A verb is a file of this folder: its docstring (the first line is its summary) and `run(words, console)`. Heavy modules
are imported where they are needed, so a typing error is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape

from ssl_pretrain.errors import SslPretrainError, UsageError
from ssl_pretrain.named import named, names, nearest

KIND = "cli"
ORDER = "datasets", "pack", "preview", "pretrain", "probe", "compare", "embed", "export", "report"
"""As they are met in a project; a verb that is not among them comes last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = sorted(names(KIND), key=lambda name: (*ORDER, name).index(name))
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        if words[:1] == ["--version"]:
            console.print(f"ssl-pretrain {version('ssl-pretrain')}", highlight=False)
            return 0
        if not words or words[0] in ("-h", "--help"):
            console.print(_overview(verbs), highlight=False)
            return 0 if words else UsageError.exit_code
        if words[0] not in verbs:
            raise UsageError(f"there is no verb {words[0]!r}{nearest(words[0], verbs)}; try ssl-pretrain --help")
        named(KIND, words[0]).run(words[1:], console)
        return 0
    except SslPretrainError as error:
        errors.print(f"[bold red]ssl-pretrain:[/] {escape(str(error))}", highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("ssl-pretrain: interrupted", highlight=False)
        return 130


def _overview(verbs: list[str]) -> str:
    lines = ["usage: ssl-pretrain VERB ...   (ssl-pretrain VERB --help says more)", ""]
    summaries = ((named(KIND, name).__doc__ or "").splitlines()[0] for name in verbs)
    return "\n".join([*lines, *(f"  {name:10} {summary}" for name, summary in zip(verbs, summaries, strict=True))])
