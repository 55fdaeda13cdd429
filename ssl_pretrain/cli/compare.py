"""Says whether a backbone helps a detector: the same one, fine-tuned from it and from others.

ssl-pretrain compare BACKBONE --data LABELLED --out DIR [--against random imagenet ARTEFACT...] [--json F]
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    from ssl_pretrain.compare import Settings

    usual = Settings()
    parser = new_parser("compare", __doc__)
    parser.add_argument("backbone", type=Path, help="a run or an artefact")
    parser.add_argument(
        "--data", type=str, required=True, help="a folder with boxes or points, a label file, or synthetic:N"
    )
    parser.add_argument("--format", type=str | None, default=None, help="of the labels, where two would fit")
    parser.add_argument("--group-regex", type=str | None, default=None, help="its first (...) names patient or slide")
    parser.add_argument("--out", type=Path, required=True, help="results, one a run; the same command goes on there")
    parser.add_argument(
        "--against", type=str, nargs="+", default=["random", "imagenet"], help="and folders of other artefacts or runs"
    )
    parser.add_argument("--detector", type=str, default=usual.detector, help="fasterrcnn or retinanet")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(usual.fractions), help="of the labels")
    parser.add_argument("--seeds", type=int, default=usual.seeds, help="2 or more give an honest interval")
    parser.add_argument("--steps", type=int, default=usual.steps, help="of each run")
    parser.add_argument("--batch-size", type=int, default=usual.batch_size, help="4 or more, for BatchNorm")
    parser.add_argument("--short-side-px", type=int, default=usual.short_side_px, help="to which images are shrunk")
    parser.add_argument("--lr", type=float, default=usual.lr, help="peak rate of AdamW")
    parser.add_argument("--channels", type=int, default=usual.channels, help="of the pyramid; published ones have 256")
    parser.add_argument("--point-px", type=int, default=usual.point_px, help="side of the square around a point")
    parser.add_argument("--evaluations", type=int, default=usual.evaluations, help="points of the learning curve")
    parser.add_argument("--seed", type=int, default=usual.seed, help="the first seed, and of the split by image")
    parser.add_argument("--json", type=Path | None, default=None, help="write the comparison here too")
    given = parsed(parser, words)
    from ssl_pretrain.compare import drawing
    from ssl_pretrain.compare.judging import installed
    from ssl_pretrain.compare.running import compare
    from ssl_pretrain.data import sources

    settings = Settings(
        detector=given.detector,
        fractions=tuple(given.fractions),
        seeds=given.seeds,
        steps=given.steps,
        batch_size=given.batch_size,
        short_side_px=given.short_side_px,
        lr=given.lr,
        channels=given.channels,
        point_px=given.point_px,
        evaluations=given.evaluations,
        seed=given.seed,
    )
    installed()
    labelled = sources.labelled(given.data, Path("runs/cache"), given.format, given.group_regex)
    console.print(labelled.found, highlight=False)
    found = compare(given.backbone, labelled, given.out, settings, console, against=given.against)
    console.print(drawing.table(found))
    console.print(str(drawing.draw(found, given.out / "comparison.png")), highlight=False, markup=False)
    if given.json is not None:
        from ssl_pretrain.files import write_durably

        write_durably(given.json, json.dumps(found.to_json(), indent=2).encode())
