"""Files of features: for numpy, for tables, for TensorBoard's projector; and sheets of pictures.

Shapes: N images or objects, D width, K of them, S side in pixels.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.table import Table
from rich.text import Text

from ssl_pretrain.data.files import escape
from ssl_pretrain.embedding import Embedding, Picked
from ssl_pretrain.errors import UsageError
from ssl_pretrain.files import write_durably

SPRITE_PX = 8192
"""Most that a browser draws for the projector."""
SHEET_PX, CAPTION_PX, GAP_PX = 160, 16, 8


def check(out: Path) -> None:
    """Raises `UsageError` for a file that `write` would refuse: before the features are made, not after."""
    if out.suffix.lower() not in (".npz", ".parquet", ""):
        raise UsageError(
            f"--out is {out}: a name that ends in .npz or .parquet, or a folder for TensorBoard's projector"
        )
    if out.suffix.lower() == ".parquet":
        _parquet_modules()


def write(made: Embedding, out: Path) -> str:
    """Writes `.npz`, `.parquet`, or a folder that TensorBoard's projector opens; returns what to do with it.

    npz         `z_ND`, `names`, for objects `labels`, `images`, `square_N3`, and `about`, a JSON string; no pickles
    parquet     one row each: name, z (a list), label, image, left, top, side; `about` in the schema's metadata
    projector   tensors.tsv, metadata.tsv, sprite.png, projector_config.pbtxt
    """
    check(out)
    if out.suffix.lower() == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **_arrays(made))
        write_durably(out, buffer.getbuffer())
        return f"{out}: numpy.load gives z_ND {made.z_ND.shape}, names, about"
    if out.suffix.lower() == ".parquet":
        write_durably(out, _parquet(made))
        return f"{out}: {len(made.names)} rows"
    _projector(made, out)
    return f"tensorboard --logdir {out}   (tab Projector)"


def table(made: Embedding, picked: Picked) -> Table:
    """What was picked, for the terminal."""
    shown = Table("", "object" if made.labels else "image")
    if made.labels:
        shown.add_column("class")
    shown.add_column(picked.by, justify="right")
    for place, (row, value) in enumerate(zip(picked.row_K.tolist(), picked.value_K.tolist(), strict=True)):
        label = [Text(made.labels[row])] if made.labels else []
        # Text, because rich would read a file called "[red].png" as markup.
        shown.add_row(str(place + 1), Text(made.names[row]), *label, _value(value))
    return shown


def names(made: Embedding, picked: Picked) -> bytes:
    """The names of what was picked, one a line."""
    return "".join(f"{made.names[row]}\n" for row in picked.row_K.tolist()).encode()


def sheet(made: Embedding, picked: Picked) -> bytes:
    """A PNG of what was picked, in reading order, each over its name and value."""
    columns = math.ceil(math.sqrt(len(picked.row_K)))
    step_x, step_y = SHEET_PX + GAP_PX, SHEET_PX + CAPTION_PX + GAP_PX
    canvas = Image.new(
        "RGB", (GAP_PX + columns * step_x, GAP_PX + math.ceil(len(picked.row_K) / columns) * step_y), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for place, (row, value) in enumerate(zip(picked.row_K.tolist(), picked.value_K.tolist(), strict=True)):
        caption = f"{made.names[row]} {made.labels[row] if made.labels else ''} {_value(value)}"
        x, y = GAP_PX + place % columns * step_x, GAP_PX + place // columns * step_y
        picture = Image.fromarray(made.picture_NSSC[row]).resize((SHEET_PX, SHEET_PX), Image.Resampling.BICUBIC)
        canvas.paste(picture, (x, y))
        draw.text((x, y + SHEET_PX + 2), _fitting(caption, draw), fill="black", font_size=11)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _arrays(made: Embedding) -> dict[str, np.ndarray]:
    arrays = {"z_ND": made.z_ND, "names": np.array(made.names), "about": np.array(json.dumps(made.about))}
    if made.square_N3 is None:
        return arrays
    return {**arrays, "labels": np.array(made.labels), "images": np.array(made.images), "square_N3": made.square_N3}


def _parquet_modules() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UsageError("a .parquet file needs pyarrow: pip install 'ssl-pretrain[data]', or choose .npz") from error
    return pyarrow, pyarrow.parquet


def _parquet(made: Embedding) -> bytes:
    arrow, parquet = _parquet_modules()
    flat = arrow.array(np.ascontiguousarray(made.z_ND, np.float32).ravel())
    columns = {
        "name": arrow.array(list(made.names)),
        "z": arrow.FixedSizeListArray.from_arrays(flat, made.z_ND.shape[1]),
    }
    if made.square_N3 is not None:
        columns |= {"label": arrow.array(list(made.labels)), "image": arrow.array(list(made.images))}
        columns |= {side: arrow.array(made.square_N3[:, i]) for i, side in enumerate(("left", "top", "side"))}
    table = arrow.table(columns).replace_schema_metadata({"about": json.dumps(made.about)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _projector(made: Embedding, folder: Path) -> None:
    """Written here and not by `SummaryWriter.add_embedding`, which adds to what an earlier call left in the folder."""
    columns = math.ceil(math.sqrt(len(made.names)))
    side = min(made.picture_NSSC.shape[1], SPRITE_PX // columns)
    lines = list(made.names)
    if made.labels:  # one column has no heading, several have
        lines = [
            "name\tlabel",
            *(f"{name}\t{escape(label)}" for name, label in zip(made.names, made.labels, strict=True)),
        ]
    sprite = Image.new("RGB", (columns * side, columns * side))
    for i, picture_SSC in enumerate(made.picture_NSSC):
        small = Image.fromarray(picture_SSC).resize((side, side), Image.Resampling.BOX)
        sprite.paste(small, (i % columns * side, i // columns * side))
    image, tensors = io.BytesIO(), io.BytesIO()
    sprite.save(image, "PNG")
    np.savetxt(tensors, made.z_ND, fmt="%.6g", delimiter="\t")
    config = f"""embeddings {{
  tensor_name: "{made.about["of"]}"
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{ image_path: "sprite.png" single_image_dim: {side} single_image_dim: {side} }}
}}
"""
    write_durably(folder / "tensors.tsv", tensors.getbuffer())
    write_durably(folder / "metadata.tsv", ("\n".join(lines) + "\n").encode())
    write_durably(folder / "sprite.png", image.getbuffer())
    write_durably(folder / "projector_config.pbtxt", config.encode())


def _fitting(caption: str, draw: ImageDraw.ImageDraw) -> str:
    """The end of a caption that is too long: names differ there."""
    while len(caption) > 1 and draw.textlength(caption, font_size=11) > SHEET_PX:
        caption = "…" + caption[2:]
    return caption


def _value(value: float) -> str:
    """The first of a selection is infinitely far from nothing."""
    return f"{value:.3f}" if math.isfinite(value) else "first"
