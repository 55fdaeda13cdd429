"""Says what a backbone's features are worth on labelled objects, beside what they have to beat.

ssl-pretrain probe BACKBONE --data LABELLED [--protocol objects/v1] [--against BACKBONE ...] [--json F]
BACKBONE is a run, an artefact, random:NAME, timm:NAME or pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    parser = new_parser("probe", __doc__)
    parser.add_argument("backbone", type=str, help="a run, an artefact, random:NAME, timm:NAME or pixels")
    parser.add_argument("--data", type=str, required=True, help="a labelled folder or label file, or synthetic:N")
    parser.add_argument("--format", type=str | None, default=None, help="of the labels, where two would fit")
    parser.add_argument("--group-regex", type=str | None, default=None, help="its first (...) names patient or slide")
    parser.add_argument("--protocol", type=str, default="objects/v1", help="objects/v1, objects-knn/v0, dino-knn, ...")
    parser.add_argument(
        "--against",
        type=str,
        nargs="+",
        default=["baselines"],
        help="what it is compared with: backbones, none, or baselines: pixels, the same network untrained, and "
        "ImageNet's weights where they are on this machine",
    )
    parser.add_argument(
        "--size-px", type=int | None, default=None, help="side of an object's crop; default: the input's"
    )
    parser.add_argument("--point-px", type=int, default=80, help="side of the square around a labelled point")
    parser.add_argument("--short-side-px", type=int, default=640, help="larger fields are shrunk to it for the maps")
    parser.add_argument("--seed", type=int, default=0, help="of split, folds, draws and bootstrap")
    parser.add_argument("--json", type=Path | None, default=None, help="write all numbers here")
    given = parsed(parser, words)
    from ssl_pretrain.data import sources
    from ssl_pretrain.probe import baselines, protocols

    protocol = protocols.named_protocol(given.protocol)
    labelled = sources.labelled(given.data, Path("runs/cache"), given.format, given.group_regex)
    backbones = baselines.chosen(given.backbone, given.against, given.size_px)
    size_px = next(iter(backbones.values())).input.size_px if given.size_px is None else given.size_px
    with console.status("cutting the objects") as status:
        found = protocols.ask(
            protocol, backbones, labelled, size_px=size_px, point_px=given.point_px, short_side_px=given.short_side_px,
            seed=given.seed, say=status.update,
        )  # fmt: skip
    console.print(protocols.table(found))
    if given.json is not None:
        from ssl_pretrain.files import write_durably

        write_durably(given.json, json.dumps(found.to_json(), indent=2).encode())
