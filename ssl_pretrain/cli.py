"""The command line: `ssl-pretrain VERB ...`. What it prints is for people; what it returns is for shells (see errors).

Heavy modules are imported by the verb that needs them, so a typing error is answered at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.markup import escape

from ssl_pretrain.errors import SslPretrainError, UsageError
from ssl_pretrain.named import named, names, nearest

if TYPE_CHECKING:
    from ssl_pretrain.data.pack import Pack

PACK_SHORT_SIDE_PX = 704
"""`--short-side auto` of a pack made without a recipe: what the most demanding of the shipped methods wants (SimCLR,
views of 224 px that show 8 % of the image)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        if words[:1] == ["--version"]:
            console.print(f"ssl-pretrain {version('ssl-pretrain')}", highlight=False)
            return 0
        if not words or words[0] in ("-h", "--help"):
            console.print(_overview(), highlight=False)
            return 0 if words else UsageError.exit_code
        if words[0] not in VERBS:
            raise UsageError(f"there is no verb {words[0]!r}{nearest(words[0], list(VERBS))}; try ssl-pretrain --help")
        VERBS[words[0]](words[1:], console)
        return 0
    except SslPretrainError as error:
        errors.print(f"[bold red]ssl-pretrain:[/] {escape(str(error))}", highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("ssl-pretrain: interrupted", highlight=False)
        return 130


def pack(words: list[str], console: Console) -> None:
    """Decodes images once into a pack.

    ssl-pretrain pack SRC... --out PACK [--short-side auto|PX] [--group-regex RE]
    """
    from ssl_pretrain.data.building import build
    from ssl_pretrain.terminal import packing

    parser = _parser("pack", pack)
    parser.add_argument("sources", nargs="+", type=Path, help="folders (searched recursively) or image files")
    parser.add_argument("--out", type=Path, required=True, help="the pack's folder")
    parser.add_argument("--short-side", default="auto", help=f"pixels, or auto ({PACK_SHORT_SIDE_PX}); never enlarges")
    parser.add_argument(
        "--group-regex", type=str | None, default=None, help="its first group names the patient or slide"
    )
    parser.add_argument("--processes", type=int | None, default=None, help="default: one per core")
    given = _parsed(parser, words)
    short_side = _short_side(str(given.short_side))
    with packing(console) as progress:
        made = build(given.sources, given.out, short_side, given.group_regex, given.processes, progress)
    _print_pack(made, console)


def preview(words: list[str], console: Console) -> None:
    """Draws what a training would see and says what it contains, before it is started.

    ssl-pretrain preview RECIPE [--data D] [--out preview.png] [--images 4] [--section.key value ...]
    """
    parser = _parser("preview", preview)
    parser.add_argument("recipe", type=Path, help="the recipe; its keys are options too, as in pretrain RECIPE --help")
    parser.add_argument("--data", type=str | None, default=None, help="a pack, a folder of images, or synthetic:N")
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the picture, a PNG")
    parser.add_argument("--images", type=int, default=4, help="how many images the picture shows")
    if {"-h", "--help"} & set(words):
        console.print(parser.format_help(), highlight=False, markup=False)
        return
    if not words or words[0].startswith("-"):
        raise UsageError("preview needs a recipe: ssl-pretrain preview RECIPE.yaml --data FOLDER")
    own, of_recipe = _split(words[1:], ("--out", "--images"))
    short = ["--out", "--images", "--data", "--seed", "--method", "--backbone"]
    for option in (word.partition("=")[0] for word in of_recipe):
        if option.startswith("--") and "." not in option and option not in short:
            raise UsageError(f"unknown option {option}{nearest(option, short)}; see ssl-pretrain preview --help")
    given = _parsed(parser, [words[0], *own])
    if given.out.suffix.lower() != ".png":
        raise UsageError(f"--out is {given.out}: the picture is a PNG, so give it a name that ends in .png")
    if not 1 <= given.images <= 40:
        raise UsageError(f"--images is {given.images}: a picture holds 1 to 40")
    from ssl_pretrain.train.recipe import load

    recipe = load(given.recipe, of_recipe)
    from ssl_pretrain.report.preview import preview as run

    run(recipe, given.out, given.images, console)


def pretrain(words: list[str], console: Console) -> None:
    """Pretrains a backbone; the same command continues a run that was stopped.

    ssl-pretrain pretrain RECIPE [--data D] [--out RUN] [--section.key value ...]
    """
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return _pretrain_help("simclr", console)
        raise UsageError("pretrain needs a recipe: ssl-pretrain pretrain RECIPE.yaml --data FOLDER --out RUN")
    recipe, rest = Path(words[0]), words[1:]
    if {"-h", "--help"} & set(rest):
        from ssl_pretrain.train.recipe import load

        asked = [word for word in rest if word not in ("-h", "--help")]
        return _pretrain_help(load(recipe, asked).method_name, console)
    from ssl_pretrain.train.loop import pretrain as run

    result = run(recipe, words=tuple(rest), console=console)
    if not _first_process():
        return
    from ssl_pretrain.report.pictures import draw

    pictures = draw(result.folder, console)
    console.print(_finished(result.folder, result.artefact, pictures), highlight=False)


def probe(words: list[str], console: Console) -> None:
    """Says what a backbone's features are worth on labelled objects, beside what they have to beat.

    ssl-pretrain probe BACKBONE --data LABELLED [--protocol objects/v1] [--against BACKBONE ...] [--json F]
    BACKBONE is a run, an artefact, random:NAME, timm:NAME or pixels.
    """
    parser = _parser("probe", probe)
    parser.add_argument("backbone", type=str, help="a run, an artefact, random:NAME, timm:NAME or pixels")
    parser.add_argument("--data", type=str, required=True, help="class folders, Pascal VOC, points, or synthetic:N")
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
    given = _parsed(parser, words)
    from ssl_pretrain.data import readers, sources
    from ssl_pretrain.probe import baselines, protocols

    protocol = protocols.named_protocol(given.protocol)
    labelled = readers.read(sources.folder(given.data, Path("runs/cache")))
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


def compare(words: list[str], console: Console) -> None:
    """Says whether a backbone helps a detector: the same one, fine-tuned from it and from others.

    ssl-pretrain compare BACKBONE --data LABELLED --out DIR [--against random imagenet ARTEFACT...] [--json F]
    """
    from ssl_pretrain.compare import Settings

    usual = Settings()
    parser = _parser("compare", compare)
    parser.add_argument("backbone", type=Path, help="a run or an artefact")
    parser.add_argument("--data", type=str, required=True, help="Pascal VOC, points, or synthetic:N")
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
    given = _parsed(parser, words)
    from ssl_pretrain.compare import drawing
    from ssl_pretrain.compare.judging import installed
    from ssl_pretrain.compare.running import compare as run
    from ssl_pretrain.data import readers, sources

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
    labelled = readers.read(sources.folder(given.data, Path("runs/cache")))
    console.print(labelled.found, highlight=False)
    found = run(given.backbone, labelled, given.out, settings, console, against=given.against)
    console.print(drawing.table(found))
    console.print(str(drawing.draw(found, given.out / "comparison.png")), highlight=False, markup=False)
    if given.json is not None:
        from ssl_pretrain.files import write_durably

        write_durably(given.json, json.dumps(found.to_json(), indent=2).encode())


def embed(words: list[str], console: Console) -> None:
    """Writes features of images or objects, finds what is alike, and says what to label next.

    ssl-pretrain embed BACKBONE --data D --out F [--of images|objects] [--like IMAGE | --select N [--labelled D]]
    """
    parser = _parser("embed", embed)
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
    parser.add_argument("--labelled", type=str | None, default=None, help="what is labelled already, for --select")
    parser.add_argument("--list", type=Path | None, default=None, help="write the names of what was found here")
    parser.add_argument("--sheet", type=Path | None, default=None, help="and a PNG of it here")
    given = _parsed(parser, words)
    if given.like is not None and given.select is not None:
        raise UsageError("--like and --select are two questions: ask one at a time")
    if given.like is None and given.select is None and (given.list or given.sheet):
        raise UsageError("--list and --sheet show what --like or --select found: give one of these")
    if given.labelled is not None and given.select is None:
        raise UsageError("--labelled is for --select N")
    if given.nearest < 1 or (given.select is not None and given.select < 1):
        raise UsageError("--nearest and --select are 1 or more")
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
    else:
        return
    console.print(embedding_files.table(made, picked))
    if given.list is not None:
        write_durably(given.list, embedding_files.names(made, picked))
    if given.sheet is not None:
        write_durably(given.sheet, embedding_files.sheet(made, picked))


def export(words: list[str], console: Console) -> None:
    """Writes a backbone in the form that a consumer loads.

    ssl-pretrain export RUN --to timm|torchvision|ultralytics|... --out DIR [--verify]
    """
    parser = _parser("export", export)
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
    given = _parsed(parser, words)
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


def report(words: list[str], console: Console) -> None:
    """Draws the pictures of a run and its page.

    ssl-pretrain report RUN
    """
    from ssl_pretrain.report.pictures import draw

    parser = _parser("report", report)
    parser.add_argument("run", type=Path, help="the folder of a run")
    given = _parsed(parser, words)
    for path in draw(given.run, console):
        console.print(str(path), highlight=False)


VERBS: dict[str, Callable[[list[str], Console], None]] = {
    "pack": pack,
    "preview": preview,
    "pretrain": pretrain,
    "probe": probe,
    "compare": compare,
    "embed": embed,
    "export": export,
    "report": report,
}


def _overview() -> str:
    lines = ["usage: ssl-pretrain VERB ...   (ssl-pretrain VERB --help says more)", ""]
    return "\n".join(lines + [f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()])


def _parser(name: str, verb: Callable[[list[str], Console], None]) -> ArgumentParser:
    summary = (verb.__doc__ or "").splitlines()[0]
    return ArgumentParser(prog=f"ssl-pretrain {name}", description=summary, exit_on_error=False)


def _parsed(parser: ArgumentParser, words: list[str]) -> Namespace:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise UsageError(f"unknown option {option}{nearest(option, known)}; see {parser.prog} --help")
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        from ssl_pretrain.config import one_line

        raise UsageError(f"{one_line(str(error))}; see {parser.prog} --help") from error


def _split(words: list[str], options: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The words of these options, and all others.

    >>> _split(["--seed", "3", "--out", "a", "--b=1", "--out=c"], ("--out",))
    (['--out', 'a', '--out=c'], ['--seed', '3', '--b=1'])
    """
    mine: list[str] = []
    others: list[str] = []
    taken = False  # whether the last word was one of the options, whose value comes now
    for word in words:
        named_here = word.partition("=")[0] in options
        (mine if named_here or (taken and not word.startswith("--")) else others).append(word)
        taken = named_here and "=" not in word
    return mine, others


def _short_side(word: str) -> int:
    if word == "auto":
        return PACK_SHORT_SIDE_PX
    if not word.isdigit() or int(word) < 16:
        raise UsageError(f"--short-side is {word!r}: give pixels (16 or more) or auto")
    return int(word)


def _print_pack(made: Pack, console: Console) -> None:
    rejected = made.folder / "rejected.jsonl"
    reasons = Counter(json.loads(line)["reason"] for line in rejected.read_text(encoding="utf-8").splitlines())
    sides = made.size_N2.min(1)
    console.print(
        f"{made.folder}: {len(made)} images, short sides {sides.min()} to {sides.max()} px, "
        f"{made.pixels.nbytes / 1e6:.0f} MB, fingerprint {made.fingerprint[:12]}",
        highlight=False,
    )
    if reasons:
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        console.print(f"{reasons.total()} files rejected ({listed}); they are listed in {rejected}", highlight=False)


def _pretrain_help(method: str, console: Console) -> None:
    """Every key of a recipe with its words; the method's section is that of the recipe given."""
    from ssl_pretrain import config
    from ssl_pretrain.train.recipe import sections

    parser = ArgumentParser(prog="ssl-pretrain pretrain RECIPE", description=(pretrain.__doc__ or "").splitlines()[0])
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


if __name__ == "__main__":
    sys.exit(main())
