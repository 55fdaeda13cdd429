"""Draws what a training would see and says what it contains, before it is started.

ssl-pretrain preview RECIPE [--data D] [--out preview.png] [--images 4] [--section.key value ...]
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ssl_pretrain.cli._words import new_parser, parsed, split
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    parser = new_parser("preview", __doc__)
    parser.add_argument("recipe", type=Path, help="the recipe; its keys are options too, as in pretrain RECIPE --help")
    parser.add_argument("--data", type=str | None, default=None, help="a pack, a folder of images, or synthetic:N")
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the picture, a PNG")
    parser.add_argument("--images", type=int, default=4, help="how many images the picture shows")
    if {"-h", "--help"} & set(words):
        console.print(parser.format_help(), highlight=False, markup=False)
        return
    if not words or words[0].startswith("-"):
        raise UsageError("preview needs a recipe: ssl-pretrain preview RECIPE.yaml --data FOLDER")
    own, of_recipe = split(words[1:], ("--out", "--images"))
    short = ["--out", "--images", "--data", "--seed", "--method", "--backbone"]
    for option in (word.partition("=")[0] for word in of_recipe):
        if option.startswith("--") and "." not in option and option not in short:
            raise UsageError(f"unknown option {option}{nearest(option, short)}; see ssl-pretrain preview --help")
    given = parsed(parser, [words[0], *own])
    if given.out.suffix.lower() != ".png":
        raise UsageError(f"--out is {given.out}: the picture is a PNG, so give it a name that ends in .png")
    if not 1 <= given.images <= 40:
        raise UsageError(f"--images is {given.images}: a picture holds 1 to 40")
    from ssl_pretrain.train.recipe import load

    recipe = load(given.recipe, of_recipe)
    from ssl_pretrain.report.preview import preview

    preview(recipe, given.out, given.images, console)
