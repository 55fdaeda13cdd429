"""Good files of every format, made in code in the true layout, and how each is read. One entry a format.

`Format.files` is a small data set as relative path to bytes, `targets` says which of its files are harmed, `attempt`
reads it and raises for anything but a good result or a refusal.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fuzz_files as good
import numpy as np

from ssl_pretrain.data import building, decode, files, readers, shapes
from ssl_pretrain.data.files import Rejected, read_bytes
from ssl_pretrain.data.pack import open_pack
from ssl_pretrain.data.readers import matlab
from ssl_pretrain.named import named, names

Attempt = Callable[[Path, Sequence[str]], None]
REASONS = frozenset(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", f"{decode.__doc__}{files.__doc__}"))
READINGS = (
    (None, decode.AS_STATED),
    (16, decode.Reading((0.0, 255.0), "middle")),
    (224, decode.Reading(None, "sharpest")),
)


@dataclass(frozen=True)
class Format:
    """A kind of files and what reads it."""

    name: str
    files: Callable[[], dict[str, bytes]]
    attempt: Attempt
    """Of the folder and the names of the changed files in it; raises for a bad result."""
    harmed: str
    """Regular expression of the files that mutations harm."""
    label: str = ""
    """Of the files that say what the images show; scenarios put pipes and the like in their place."""
    weight: float = 1.0
    """Share of the files tried: less where reading is slow."""
    prepare: Callable[[], None] = lambda: None
    """Imports what the attempt needs, before memory is bounded and opened files are noted."""

    def targets(self, files: Iterable[str]) -> list[str]:
        return sorted(name for name in files if re.search(self.harmed, name))

    def labels(self, files: Iterable[str]) -> list[str]:
        return sorted(name for name in files if re.search(self.label or self.harmed, name))


# --- what must hold of what was read ----------------------------------------------------------------------------------


def line(text: str, what: str) -> None:
    assert isinstance(text, str) and text.isprintable() and text, f"{what} is not one printable line: {text!r:.200}"


def check(labelled: readers.LabelledSet, root: Path, format: str) -> None:
    """The invariants of a labelled set."""
    assert labelled.format == format and labelled.kind in ("box", "point", "image")
    line(labelled.found, "found")
    for problem in labelled.problems:
        line(problem, "a problem")
        assert len(problem) < 1_000, f"a problem of {len(problem)} letters: {problem[:80]}"
    for label in labelled.classes:
        line(label, "a class")
    assert list(labelled.classes) == sorted(set(labelled.classes), key=readers.natural), "classes are not sorted"
    used: dict[str, int] = {}
    for image in labelled.images:
        check_image(image, root)
        for label in image.labels:
            used[label] = used.get(label, 0) + 1
    assert set(used) == set(labelled.classes), "classes are not those of the labels"
    for label, count in used.items():
        assert labelled.annotated.get(label, 0) >= count, f"{label!r:.50}: {count} used of fewer annotated"
    assert all(isinstance(count, int) and count > 0 for count in labelled.annotated.values())
    assert all(label.isprintable() for label in labelled.annotated), "an annotated label is not printable"
    paths = [str(image.path) for image in labelled.images]
    assert len(set(paths)) == len(paths), "an image is there twice"


def check_image(image: readers.LabelledImage, root: Path) -> None:
    width, height = image.size_px
    boxes_N4 = image.boxes_N4
    assert boxes_N4.dtype == np.float64 and boxes_N4.shape == (len(image.labels), 4)
    assert np.isfinite(boxes_N4).all(), "a box is not finite"
    assert (boxes_N4 >= 0).all() and (boxes_N4 <= [width, height, width, height]).all(), "a box is outside its image"
    assert (boxes_N4[:, :2] <= boxes_N4[:, 2:]).all(), "a box is swapped"
    for label in image.labels:
        line(label, "a label")
        assert label.strip() == label, f"a label with space around it: {label!r:.50}"
    line(image.group, "a group")
    assert image.split in (None, "train", "val", "test")
    absolute = Path(image.path).absolute()
    assert ".." not in absolute.parts and absolute.is_relative_to(root), f"{image.path!r} is outside"
    assert len(image.shapes) in (0, len(image.labels)), "shapes do not go with the labels"
    for shape in image.shapes[:8]:
        if shape is not None:
            check_shape(shape, (height, width))


def check_shape(shape: shapes.Shape, size_hw: tuple[int, int]) -> None:
    if isinstance(shape, shapes.Polygon):
        assert shape.rings and all(len(ring) >= 3 and np.isfinite(ring).all() for ring in shape.rings)
    else:
        assert shape.size_hw == size_hw, "a mask of another size than its image"
        assert shapes.compressed(size_hw, shapes.text_of(shape)).runs_R.tolist() == shape.runs_R.tolist()
    assert np.isfinite(shapes.box(shape)).all()
    if size_hw[0] * size_hw[1] < 1 << 20:
        assert shapes.pixels(shape, size_hw).shape == size_hw


# --- how each is read -------------------------------------------------------------------------------------------------


def decodes(root: Path, changed: Sequence[str]) -> None:
    for name in changed:
        for short_side_px, how in READINGS:
            try:
                data = read_bytes(root / name)
                found = decode.decode_bytes(data, short_side_px, how)
                decode.header_size(root / name)
            except Rejected as why:
                assert why.reason in REASONS, why.reason
                line(why.detail, "the detail")
                continue
            assert found.pixels.dtype == np.uint8 and found.pixels.ndim == 3 and found.pixels.shape[2] == 3
            height, width = found.original_hw
            assert min(height, width) >= decode.MIN_SIDE_PX and height * width <= decode.MAX_PIXELS


# --- labelled sets ---------------------------------------------------------------------------------------------------


def reading(name: str) -> Attempt:
    """What must hold of a folder that this reader is given, and of everybody's look at it."""

    def attempt(root: Path, changed: Sequence[str]) -> None:
        for other in names(readers.KIND):
            answer = named(readers.KIND, other).recognise(root)
            assert answer is True or answer is False, f"{other}.recognise gives {answer!r}"
        check(readers.read(root, name), root, name)

    return attempt


def prepared() -> None:
    for name in names(readers.KIND):
        named(readers.KIND, name)


# --- what is not a labelled set ---------------------------------------------------------------------------------------


def prepare_images() -> None:
    for name in ("a.jpg", "a.png"):
        decode.decode_bytes(good.images()[name], decode.MIN_SIDE_PX)


def decodes_runs(root: Path, changed: Sequence[str]) -> None:
    """`ValueError` is the only refusal of `shapes`; integers of any size are given to it, as readers do."""
    for name in changed:
        data = (root / name).read_bytes()
        try:
            if name.endswith(".txt"):
                check_shape(shapes.compressed((24, 32), data.decode("utf-8", "surrogateescape")), (24, 32))
                continue
            given = json.loads(data)
            size, counts = given["size"], given["counts"]
            whole = [type(value) is int for value in (*size, *counts)]
            if len(size) == 2 and all(whole):
                check_shape(shapes.mask((size[0], size[1]), counts), (size[0], size[1]))
                check_shape(shapes.row_major((size[0], size[1]), counts), (size[0], size[1]))
        except (KeyError, TypeError, RecursionError) as error:
            if "shapes.py" in str(error.__traceback__ and error.__traceback__.tb_next):
                raise
        except ValueError:
            continue


def pack() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "images"), Path(folder, "pack")
        source.mkdir()
        for i, (mode, width) in enumerate((("RGB", 32), ("L", 40), ("RGB", 50))):
            good.picture(mode, width).save(source / f"{i}.png")
        (source / "bad.png").write_bytes(b"no image")
        building.build([source], out, processes=0)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def opens_pack(root: Path, changed: Sequence[str]) -> None:
    opened = open_pack(root)
    assert len(opened.paths) == len(opened)
    for path in opened.paths:
        line(path, "a path")
    for i in range(len(opened)):
        pixels = opened.image(i)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert np.isfinite(opened.scale_N).all() and (opened.scale_N > 0).all()
    assert sorted(opened.by_content_N.tolist()) == list(range(len(opened)))
    opened.read_ahead(np.arange(len(opened)))


RECIPES = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, bytes]:
    return {name: (RECIPES / name).read_bytes() for name in ("quickstart.yaml", "chula_dino_resnet18.yaml")}


def loads_recipe(root: Path, changed: Sequence[str]) -> None:
    from ssl_pretrain.train import recipe

    for name in changed:
        assert recipe.load(root / name).yaml()


def prepare_recipe() -> None:
    from ssl_pretrain.train import recipe

    recipe.load(RECIPES / "quickstart.yaml").yaml()


def an_artefact() -> dict[str, bytes]:
    from ssl_pretrain import artefact, backbones

    with tempfile.TemporaryDirectory() as folder:
        artefact.write(Path(folder), backbones.create("test_resnet").eval(), {"method": "simclr", "step": 3})
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def opens_artefact(root: Path, changed: Sequence[str]) -> None:
    from ssl_pretrain import artefact

    artefact.load_backbone(root)
    artefact.resolve(str(root))


def prepare_artefact() -> None:
    from ssl_pretrain import artefact

    with tempfile.TemporaryDirectory() as folder:
        for name, data in an_artefact().items():
            Path(folder, name).write_bytes(data)
        artefact.load_backbone(folder)


def layout(name: str) -> Callable[[], dict[str, bytes]]:
    """Of `reader_layouts`, which writes a small data set into a folder."""

    def made() -> dict[str, bytes]:
        import reader_layouts

        with tempfile.TemporaryDirectory() as folder:
            vars(reader_layouts)[name](Path(folder))
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            made = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        head = b"MATLAB 5.0 MAT-file"  # SciPy writes the time behind it, and a case must be the same tomorrow
        return {name: head.ljust(116) + data[116:] if data.startswith(head) else data for name, data in made.items()}

    return made


def extracting(name: str) -> Attempt:
    """All fields of a data set in MATLAB files, without writing them as `matlab.extract` does."""

    def attempt(root: Path, changed: Sequence[str]) -> None:
        for other in names(readers.KIND):
            assert isinstance(named(readers.KIND, other).recognise(root), bool)
        problems: list[str] = []
        for field in vars(matlab)[name].fields(root, problems):
            line(field.name, "a field's name")
            assert field.pixels.dtype == np.uint8 and field.pixels.shape[2:] in ((), (3,))
            for label, mask in field.objects:
                line(label, "a label")
                check_shape(mask, field.pixels.shape[:2]) if not isinstance(mask, str) else line(mask, "a reason")
        for problem in problems:
            line(problem, "a problem")

    return attempt


def _mat(name: str, module: str) -> Format:
    return Format(name, layout(name), extracting(module), r"\.mat$", weight=0.25, prepare=prepared)


def _reader(
    name: str, good: Callable[[], dict[str, bytes]], harmed: str, label: str = "", weight: float = 1.0, reader: str = ""
) -> Format:
    return Format(name, good, reading(reader or name), harmed, label, weight, prepared)


_ENTRIES = (
    Format("images", good.images, decodes, ".", weight=3, prepare=prepare_images),
    Format("runs", good.runs, decodes_runs, "."),
    Format("pack", pack, opens_pack, "json|npz", weight=1),
    Format("recipe", recipes, loads_recipe, ".", weight=0.25, prepare=prepare_recipe),
    Format("artefact", an_artefact, opens_artefact, "config|safetensors", weight=0.25, prepare=prepare_artefact),
    _reader("class_folder", good.class_folder, "train/a/", weight=0.5),
    _reader("voc", good.voc, r"\.xml$|Main/", r"\.xml$|Main/"),
    _reader("points", good.points, "labels/"),
    _reader("coco", good.coco, "json$", weight=3),
    _reader("yolo", good.yolo, "labels/|yaml$", weight=2),
    _reader("darknet", good.darknet, "txt$|names$", reader="yolo"),
    _reader("cvat", good.cvat, "xml$", weight=2),
    _reader("csv_boxes", good.csv_boxes, "csv$"),
    _reader("csv_labels", good.csv_labels, "csv$"),
    _reader("bare_labels", good.bare_labels, "csv$", weight=0.5, reader="csv_labels"),
    _reader("point_table", good.point_table, "csv$"),
    _reader("cric", good.cric, "json$", reader="point_table"),
    _reader("cervix93", good.cervix93, "csv$", reader="point_table", weight=0.5),
    _reader("labelme", good.labelme, "json$", weight=2),
    _reader("semantic_masks", good.semantic_masks, "masks/", "masks/"),
    _reader("colour_masks", good.colour_masks, "Class/|txt$", reader="semantic_masks"),
    _reader("instance_masks", good.instance_masks, "_masks"),
    _reader("object_masks", good.object_masks, "masks/|csv$"),
    _reader("rle_json", good.rle_json, "json$"),
    _reader("sipakmed", good.sipakmed, "dat$"),
    _reader("tiles", good.tiles, "0_2.jpg$", weight=0.5),
    _reader("z_stack", good.z_stack, "csv$|02.png$", "csv$", weight=0.5),
    _reader("stacked_tiffs", good.stacked_tiffs, "tif$", reader="z_stack", weight=0.5),
    _mat("isbi2014", "isbi2014"),
    _mat("isbi2014_v73", "isbi2014"),
    _mat("cx22", "cx22"),
)  # fmt: skip
FORMATS = {entry.name: entry for entry in _ENTRIES}
