"""Writes a backbone in the form that a consumer loads.

ssl-pretrain export RUN --to timm|torchvision|ultralytics|... --out DIR [--verify]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named, names


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    parser = new_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="a run or an artefact")
    parser.add_argument("--to", type=str, default="timm", help=f"the consumer: {', '.join(names('export'))}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, an artefact itself")
    parser.add_argument(
        "--verify", action="store_true", help="build the real consumer and compare; exit 1 if they differ"
    )
    parser.add_argument(
        "--python", type=str, default=sys.executable, help="of the consumer's environment, for --verify"
    )
    parser.add_argument(
        "--images",
        type=str | None,
        default=None,
        help="BatchNorm is re-estimated on these, or none; default: the run's",
    )
    parser.add_argument(
        "--size-px", type=int, default=640, help="longer side of these, as the detector will see images"
    )
    given = parsed(parser, words)
    if given.size_px < 32:
        raise UsageError(f"--size-px is {given.size_px}: a detector's images have 32 px or more")
    target = named("export", given.to)
    from ssl_pretrain.artefact import find
    from ssl_pretrain.export._folder import prepare
    from ssl_pretrain.export._verify import verify

    with console.status("checking the artefact, and BatchNorm on whole images"):
        said = prepare(find(given.run), given.out, given.images, given.size_px)
    if said:
        console.print(said, highlight=False, markup=False)
    console.print(target.write(given.out), highlight=False, markup=False)
    if given.verify:
        verify(given.to, given.out, console, given.python)
