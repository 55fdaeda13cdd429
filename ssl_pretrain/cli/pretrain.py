"""Pretrains a backbone; the same command continues a run that was stopped.

ssl-pretrain pretrain RECIPE [--data D] [--out RUN] [--section.key value ...]
"""

from __future__ import annotations

import os
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from ssl_pretrain.errors import UsageError


def run(words: list[str], console: Console) -> None:
    """Runs the verb."""
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return _pretrain_help("simclr", console)
        raise UsageError("pretrain needs a recipe: ssl-pretrain pretrain RECIPE.yaml --data FOLDER --out RUN")
    recipe, rest = Path(words[0]), words[1:]
    if {"-h", "--help"} & set(rest):
        from ssl_pretrain.train.recipe import load

        asked = [word for word in rest if word not in ("-h", "--help")]
        return _pretrain_help(load(recipe, asked).method_name, console)
    from ssl_pretrain.train import loop

    result = loop.pretrain(recipe, words=tuple(rest), console=console)
    if not _first_process():
        return
    from ssl_pretrain.report.pictures import draw

    pictures = draw(result.folder, console)
    console.print(_finished(result.folder, result.artefact, pictures), highlight=False)


def _pretrain_help(method: str, console: Console) -> None:
    """Every key of a recipe with its words; the method's section is that of the recipe given."""
    from ssl_pretrain import config
    from ssl_pretrain.train.recipe import sections

    parser = ArgumentParser(prog="ssl-pretrain pretrain RECIPE", description=(__doc__ or "").splitlines()[0])
    config.add_arguments(parser, sections(method))
    console.print(parser.format_help(), highlight=False, markup=False)


def _first_process() -> bool:
    """Of several that torchrun, SLURM or Fabric started, only the first prints and draws."""
    return not any(int(os.environ.get(name, 0)) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def _finished(folder: Path, artefact: Path, pictures: list[Path]) -> str:
    return f"""
backbone     {artefact}
pictures     {", ".join(str(path) for path in pictures)}
TensorBoard  tensorboard --logdir {folder / "tensorboard"}

from ssl_pretrain import load_backbone
backbone = load_backbone("{artefact}")
maps = backbone(images)   # RGB in 0..1, less backbone.input.mean, divided by backbone.input.std"""
