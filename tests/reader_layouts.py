"""Small folders in the true layout of each data set (facts/datasets.md), for the tests of the readers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image


def image(path: Path, width: int = 64, height: int = 48, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path, **options)


def labels(path: Path, values: NDArray[Any], palette: Sequence[int] | None = None) -> None:
    """A label image: uint8, uint16 or (H, W, 3) colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(values)
    if palette is not None:
        made = made.convert("L")
        made.putpalette(palette)
    made.save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def field(**regions: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """48 x 64 px of 0 with rectangles (x0, y0, x1, y1) of the number that follows the `v` of their name."""
    values = np.zeros((48, 64), np.uint8)
    for name, (x0, y0, x1, y1) in regions.items():
        values[y0:y1, x0:x1] = int(name.lstrip("v").partition("_")[0])
    return values


def ccagt(root: Path) -> None:
    for slide in "AB":
        image(root / "images" / slide / f"{slide}_1.jpg")
        labels(root / "masks" / slide / f"{slide}_1.png", field(v1=(1, 2, 9, 8), v7=(20, 20, 30, 25)))


def bttfa(root: Path) -> None:
    image(root / "dataset_forsubmit" / "imgbmp" / "1.bmp")
    image(root / "dataset_forsubmit" / "GroundTruth" / "1.bmp")
    labels(root / "dataset_forsubmit" / "groundtruth_mask" / "1.bmp", field(v255=(1, 2, 9, 8)))


def rodare(root: Path) -> None:
    for split in ("train", "validation", "test"):
        image(root / "ds1" / split / "img" / "cls" / "a.tif")
        labels(root / "ds1" / split / "mult_mask" / "cls" / "a.tif", field(v3=(1, 2, 9, 8)))
        labels(root / "ds1" / split / "bin_mask" / "cls" / "a.tif", field(v1=(1, 2, 9, 8)))


def cvat_masks(root: Path) -> None:
    image(root / "JPEGImages" / "a.jpg")
    colours = np.zeros((48, 64, 3), np.uint8)
    colours[2:8, 1:9] = (250, 50, 83)
    labels(root / "SegmentationClass" / "a.png", colours)
    text(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nmy cell: b:250,50,83::\n")


def cellpose(root: Path) -> None:
    for folder in ("train", "test"):
        image(root / folder / "000_img.png")
        labels(root / folder / "000_masks.png", field(v1=(1, 2, 9, 8), v2=(9, 2, 12, 8)).astype(np.uint16) * 300)


def dsb2018(root: Path) -> None:
    for name in ("ab12", "cd34"):
        image(root / "stage1_train" / name / "images" / f"{name}.png", mode="RGBA")
        labels(root / "stage1_train" / name / "masks" / "0f.png", field(v255=(1, 2, 9, 8)))
        labels(root / "stage1_train" / name / "masks" / "1f.png", field(v255=(9, 2, 12, 8)))
    text(root / "stage1_train_labels.csv", "ImageId,EncodedPixels\nab12,3 6 51 6\n")


def dsb2018_table(root: Path) -> None:
    image(root / "stage1_train" / "ab12" / "images" / "ab12.png", mode="RGBA")
    text(root / "stage1_train_labels.csv", "ImageId,EncodedPixels\nab12,3 6 51 6\n")


def cisd(root: Path) -> None:
    mask = {"size": [48, 64], "counts": [64 * 2 + 1, 8, 56, 8, 64 * 45 - 9]}
    assets = [
        {"asset_id": i, "file_name": f"024{i}_BB_0147{i}.jpg", "set": word, "annotations": [{"data": [{"mask": mask}]}]}
        for i, word in enumerate(("train", "test"))
    ]
    text(root / "CISD.json", json.dumps({"info": {"img_folder": "edf"}, "assets": assets}))
    for asset in assets:
        image(root / "center_slice" / str(asset["file_name"]))
        image(root / "edf" / str(asset["file_name"]))


def sipakmed(root: Path) -> None:
    for name in ("Dyskeratotic", "Parabasal"):
        folder = root / f"im_{name}" / f"im_{name}"
        image(folder / "001.bmp")
        text(folder / "001_cyt01.dat", "1,2\n11,2\n11.5,9\n")
        text(folder / "001_nuc01.dat", "3,3\n5,3\n5,5\n")
        image(folder / "CROPPED" / "001_01.bmp")
        text(folder / "CROPPED" / "001_01_cyt.dat", "0,0\n9,0\n9,9\n")


def sipakmed_crops(root: Path) -> None:
    for name in ("Dyskeratotic", "Parabasal"):
        for k in (1, 2):
            image(root / f"im_{name}" / f"im_{name}" / "CROPPED" / f"001_0{k}.bmp")
            text(root / f"im_{name}" / f"im_{name}" / "CROPPED" / f"001_0{k}_cyt.dat", "0,0\n9,0\n9,9\n")


def csd(root: Path) -> None:
    for name in ("NILM", "POS"):
        for slide in (f"{name}1", f"{name}2"):
            for place in ("0_0", "0_1", "12_3"):
                image(root / name / slide / f"{place}.jpg")


def stack_folders(root: Path) -> None:
    for name in ("high", "low"):
        for z in range(10):
            image(root / name / f"{name}1" / f"z{z}.png")


def stack_tiffs(root: Path) -> None:
    for name in ("high", "low"):
        pages = [Image.new("L", (64, 48), shade) for shade in (10, 20, 30)]
        (root / name).mkdir(parents=True)
        pages[0].save(root / name / f"{name}1.tif", save_all=True, append_images=pages[1:])


def stack_table(root: Path) -> None:
    for name in ("frame000", "frame001"):
        for z in (0, 1, 2, 10):
            image(root / name / f"{z}.png")
    text(root / "labels.csv", "stack,label,set\nframe000,H,train\nframe001,N,test\n")


def bone_marrow(root: Path) -> None:
    for name in ("ART", "BAS"):
        for block in ("0001-1000", "1001-2000"):
            image(root / "bone_marrow_cell_dataset" / name / block / f"{name}_{block[:4]}1.jpg")
    text(root / "abbreviations.csv", "abb;full\nART;Artefacts\n")


def fnac(root: Path) -> None:
    for name in ("B_1", "B_12", "M_1", "M_113"):
        image(root / f"{name}.jpg")


def aml(root: Path) -> None:
    for name in ("BAS", "EBO"):
        image(root / "AML" / name / f"{name}_0001.tiff", mode="RGBA")
    text(root / "annotations.dat", "BAS/BAS_0001.tiff BAS\n")


def cvat(root: Path) -> None:
    image(root / "images" / "a.png")
    text(
        root / "annotations.xml",
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version><image id="0" name="a.png" '
        'width="64" height="48"><ellipse label="cell" cx="20" cy="20" rx="10" ry="5"/></image></annotations>',
    )


# --- MATLAB -----------------------------------------------------------------------------------------------------------


def cell(values: Sequence[Any]) -> NDArray[np.object_]:
    """A column of cells."""
    made = np.empty((len(values), 1), object)
    for i, value in enumerate(values):
        made[i, 0] = value
    return made


def mask512(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
    inside = np.zeros((512, 512), np.uint8)
    inside[y0:y1, x0:x1] = 1
    return inside


def v73(path: Path, **variables: Any) -> None:
    """As MATLAB writes it: columns first, cells as references into `#refs#`; a list is a cell array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        refs, counter = file.create_group("#refs#"), itertools.count()

        def put(group: Any, name: str, value: Any) -> Any:
            if isinstance(value, list):
                inner = [put(refs, f"r{next(counter)}", item) for item in value]
                made = group.create_dataset(name, (1, len(inner)), dtype=h5py.ref_dtype)
                for i, item in enumerate(inner):
                    made[0, i] = item.ref
                made.attrs["MATLAB_class"] = np.bytes_("cell")
            else:
                made = group.create_dataset(name, data=np.asarray(value).T, compression="gzip")
                made.attrs["MATLAB_class"] = np.bytes_(np.asarray(value).dtype.name)
            return made

        for name, value in variables.items():
            put(file, name, value)
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    with path.open("r+b") as raw:
        raw.write(header)


def string_words(names: Sequence[str]) -> NDArray[np.uint64]:
    text16 = "".join(names).encode("utf-16-le")
    text16 += b"\0" * (-len(text16) % 8)
    head = [1, 2, len(names), 1, *map(len, names)]
    return np.concatenate([np.array(head, np.uint64), np.frombuffer(text16, np.uint64)])


def isbi2014(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part, word, count in (("isbi_train", "train", 3), ("isbi_test90", "test", 2)):
        variable = {"isbi_train": "ISBI_Train", "isbi_test90": "ISBI_Test90"}[part]
        images = [np.full((512, 512), 100 + i, np.uint8) for i in range(count)]
        cyto = [cell([mask512(10, 20, 110, 80), mask512(60, 20, 200, 90)]) for _ in images]
        nuclei = [mask512(20, 30, 30, 40) | mask512(100, 30, 120, 40) for _ in images]
        scipy.io.savemat(root / f"{part}.mat", {variable: cell(images)}, do_compression=True)
        masks = {f"{word}_Cytoplasm": cell(cyto), f"{word}_Nuclei": cell(nuclei)}
        scipy.io.savemat(root / f"{part}_GT.mat", masks, do_compression=True)


def isbi2014_v73(root: Path) -> None:
    folder = root / "Dataset" / "Synthetic"
    shade = np.zeros((512, 512), np.uint8)
    shade[:, 300:] = 200
    v73(folder / "testset.mat", testset=[shade, shade])
    cyto = [[mask512(10, 20, 110, 80), mask512(60, 20, 200, 90)], [mask512(1, 2, 4, 3)]]
    v73(folder / "testset_GT.mat", test_Cytoplasm=cyto, test_Nuclei=[mask512(20, 30, 30, 40)] * 2)
    image(root / "Dataset" / "EDF" / "EDF000.png")


def cx22(root: Path, part: str = "Cx22-Multi-Test") -> None:
    folder = root / part
    names = ["00477", "00012", "00477"]
    boxes = [(10, 20, 110, 80), (5, 6, 7, 9)]
    stated = np.array([[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes], np.int64)
    for kind in ("cyto", "nuc"):
        instances = [[mask512(*edges) for edges in boxes] for _ in names]
        v73(folder / kind / f"{kind}_ins.mat", **{f"{kind}_ins": instances})
        v73(folder / kind / f"{kind}_ins_bbox.mat", **{f"{kind}_ins_bbox": [stated] * 3})
    v73(folder / "generator" / "ROIs_x_y.mat", ROIs_x_y=np.array([[10, 20], [0, 0], [30, 40]], np.float64))
    v73(folder / "generator" / "ROIs_W_H.mat", ROIs_W_H=np.array([[300, 200], [600, 400], [512, 512]], np.float64))
    path = folder / "generator" / "ImageDataNames.mat"
    v73(path, ImageDataNames=np.array([[3707764736, 2, 1, 1, 1, 1]], np.uint32))
    with h5py.File(path, "r+") as file:
        file["#refs#"].create_dataset("b", data=string_words(names)[None])
        file["#refs#"].create_dataset("c", data=np.zeros((1, 2), np.uint64))
    for name in ("00477", "00012"):
        y, x = np.mgrid[:700, :900]
        pixels = np.stack([x % 256, y % 256, np.full_like(x, int(name) % 256)], axis=2).astype(np.uint8)
        labels(root / "CCEDD" / "png" / f"{name}.png", pixels)


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ccagt": ("semantic_masks", ccagt),
    "bttfa": ("semantic_masks", bttfa),
    "rodare": ("semantic_masks", rodare),
    "cvat_masks": ("semantic_masks", cvat_masks),
    "cellpose": ("instance_masks", cellpose),
    "dsb2018": ("object_masks", dsb2018),
    "dsb2018_table": ("object_masks", dsb2018_table),
    "cisd": ("rle_json", cisd),
    "sipakmed": ("sipakmed", sipakmed),
    "sipakmed_crops": ("sipakmed", sipakmed_crops),
    "csd": ("tiles", csd),
    "stack_folders": ("z_stack", stack_folders),
    "stack_tiffs": ("z_stack", stack_tiffs),
    "stack_table": ("z_stack", stack_table),
    "bone_marrow": ("class_folder", bone_marrow),
    "fnac": ("class_folder", fnac),
    "aml": ("class_folder", aml),
    "cvat": ("cvat", cvat),
    "isbi2014": ("matlab", isbi2014),
    "isbi2014_v73": ("matlab", isbi2014_v73),
    "cx22": ("matlab", cx22),
}
"""By name: the format that answers, and what makes the folder."""
