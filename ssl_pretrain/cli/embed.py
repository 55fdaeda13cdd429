"""Writes features of images or objects, finds what is alike, and says what to label next.

ssl-pretrain embed BACKBONE --data D --out F [--of objects] [--like IMAGE | --alike N | --select N [--labelled D]]
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed
from ssl_pretrain.errors import UsageError


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    parser = new_parser("embed", __doc__)
    parser.add_argument("backbone", type=str, help="a run, an artefact, random:NAME, timm:NAME or pixels")
    parser.add_argument("--data", type=str, required=True, help="a pack, a folder of images, or synthetic:N")
    parser.add_argument("--out", type=Path, required=True, help="a .npz or .parquet, or a folder for the projector")
    parser.add_argument("--of", type=Literal["images", "objects"], default="images", help="objects: data has labels")
    parser.add_argument("--size-px", type=int | None, default=None, help="what the backbone is fed; default: its input")
    parser.add_argument("--window-px", type=int | None, default=None, help="of images; default: their short side")
    parser.add_argument("--point-px", type=int, default=80, help="side of the square around a labelled point")
    parser.add_argument("--like", type=Path | None, default=None, help="an image: prints what is most like it")
    parser.add_argument("--nearest", type=int, default=9, help="how many of these")
    parser.add_argument("--select", type=int | None, default=None, help="how many to label next, farthest first")
    parser.add_argument("--alike", type=int | None, default=None, help="how many pairs that are most like each other")
    parser.add_argument("--labelled", type=str | None, default=None, help="what is labelled already, for --select")
    parser.add_argument("--list", type=Path | None, default=None, help="write the names of what was found here")
    parser.add_argument("--sheet", type=Path | None, default=None, help="and a PNG of it here")
    given = parsed(parser, words)
    asked = [given.like, given.select, given.alike]
    if sum(each is not None for each in asked) > 1:
        raise UsageError("--like, --select and --alike are different questions: ask one at a time")
    if all(each is None for each in asked) and (given.list or given.sheet):
        raise UsageError("--list and --sheet show what --like, --select or --alike found: give one of these")
    if given.labelled is not None and given.select is None:
        raise UsageError("--labelled is for --select N")
    if given.nearest < 1 or any(count is not None and count < 1 for count in (given.select, given.alike)):
        raise UsageError("--nearest, --select and --alike are 1 or more")
    import torch

    from ssl_pretrain import embedding, embedding_files
    from ssl_pretrain.artefact import resolve
    from ssl_pretrain.data import sources
    from ssl_pretrain.files import write_durably

    embedding_files.check(given.out)
    backbone = resolve(given.backbone, given.size_px).to("cuda" if torch.cuda.is_available() else "cpu")

    def made_of(data: str) -> embedding.Embedding:
        where = sources.folder(data, Path("runs/cache"))
        if given.of == "objects":
            return embedding.embed_objects(backbone, where, size_px=given.size_px, point_px=given.point_px)
        return embedding.embed_images(backbone, where, size_px=given.size_px, window_px=given.window_px)

    made = made_of(given.data)
    for line in made.problems:
        console.print(f"note: {line}", highlight=False, markup=False)
    console.print(embedding_files.write(made, given.out), highlight=False, markup=False)
    if given.like is not None:
        picked = embedding.like(backbone, made, given.like, given.nearest, window_px=given.window_px)
    elif given.select is not None:
        picked = embedding.select(made, given.select, made_of(given.labelled) if given.labelled else None)
    elif given.alike is not None:
        picked = embedding.alike(made, given.alike)
    else:
        return
    console.print(embedding_files.table(made, picked))
    if given.list is not None:
        write_durably(given.list, embedding_files.names(made, picked))
    if given.sheet is not None:
        write_durably(given.sheet, embedding_files.sheet(made, picked))
