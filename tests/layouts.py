"""Tiny data sets in the layouts of the 31 that the catalog knows, one builder each, and what a reader finds in them.

A key is the name of the entry; what follows a colon is another form in which the set comes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WIDTH, HEIGHT = 64, 48


@dataclass(frozen=True)
class Made:
    """What a builder made."""

    reader: str | None
    """None: nobody knows the layout, and no labels are to be found."""
    images: int
    """With labels, those without an object too."""
    objects: int
    classes: tuple[str, ...]
    """By the names of the entry, in the order of the reader."""
    groups: int
    """By the rule of the entry or the reader; the number of images where there is none."""


Builder = Callable[[Path], Made]
LAYOUTS: dict[str, Builder] = {}


def layout(key: str) -> Callable[[Builder], Builder]:
    def kept(builder: Builder) -> Builder:
        LAYOUTS[key] = builder
        return builder

    return kept


# --- what the builders share ------------------------------------------------------------------------------------------


def image(path: Path, width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> None:
    """No two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = sum(path.as_posix().encode()) % 256
    values = np.random.default_rng(shade).integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(values.squeeze(), mode="L" if mode == "L" else None).save(path)


def images(root: Path, *names: str) -> None:
    for name in names:
        image(root / name)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def mask(path: Path, value: int, x0: int, y0: int, x1: int, y1: int, *more: tuple[int, int, int, int, int]) -> None:
    """A grey PNG or BMP of rectangles on 0."""
    values_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
    for each, left, top, right, bottom in ((value, x0, y0, x1, y1), *more):
        values_HW[top:bottom, left:right] = each
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values_HW).save(path)


def coco(path: Path, names: Sequence[str], files: dict[str, list[tuple[int, Sequence[float]]]]) -> None:
    """`files`: name -> (category id from 1 on, [x, y, w, h])."""
    boxes = [(i, each) for i, objects in enumerate(files.values(), 1) for each in objects]
    content = {
        "images": [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(files, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for k, (i, (category, box)) in enumerate(boxes, 1)
        ],
    }
    text(path, json.dumps(content))


def voc(path: Path, *labels: str) -> None:
    things = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{3 + i}</xmin><ymin>4</ymin><xmax>{20 + i}</xmax><ymax>30</ymax>"
        "</bndbox></object>"
        for i, label in enumerate(labels)
    )
    text(path, f"<annotation><filename>{path.stem}.png</filename>{things}</annotation>")


# --- the two that have a workflow -------------------------------------------------------------------------------------


def unlabelled(root: Path) -> None:
    images(root / "unlabelled", "u1.jpg", "lab2/u2.JPG", "lab2/u3.png")


@layout("openurine")
def openurine(root: Path) -> Made:
    part = root / "labelled"
    text(part / "data.yaml", "train: images/train\nval: images/val\nnc: 3\nnames: [RBC, WBC, Uric Acid]\n")
    images(part / "images", "train/p1_a.jpg", "train/p1_b.jpg", "val/p2_a.jpg")
    text(part / "labels" / "train" / "p1_a.txt", "0 0.5 0.5 0.2 0.2\n1 0.25 0.25 0.1 0.1\n")
    text(part / "labels" / "train" / "p1_b.txt", "")
    text(part / "labels" / "val" / "p2_a.txt", "2 0.5 0.5 0.4 0.2\n")
    unlabelled(root)
    return Made("yolo", 3, 3, ("RBC", "Uric Acid", "WBC"), 3)


@layout("openurine:coco")
def openurine_coco(root: Path) -> Made:
    for split, name in (("train", "p1_a.jpg"), ("valid", "p2_a.jpg")):
        image(root / "labelled" / split / name)
        coco(
            root / "labelled" / split / "_annotations.coco.json",
            ["RBC", "WBC"],
            {name: [(1, (4, 4, 10, 10)), (2, (20, 8, 12, 12))]},
        )
    unlabelled(root)
    return Made("coco", 2, 4, ("RBC", "WBC"), 2)


@layout("openurine:voc")
def openurine_voc(root: Path) -> Made:
    images(root / "labelled" / "JPEGImages", "p1_a.png", "p2_a.png")
    voc(root / "labelled" / "Annotations" / "p1_a.xml", "RBC", "WBC")
    voc(root / "labelled" / "Annotations" / "p2_a.xml")
    unlabelled(root)
    return Made("voc", 2, 2, ("RBC", "WBC"), 2)


SEVEN = (
    "Specific",
    "Non-specific primary",
    "Non-specific tertiary",
    "Non-specific secondary",
    "Empty vesicles",
    "Emptying vesicles",
    "Vacuoles",
)


@layout("tem_neutrostruct")
def tem_neutrostruct(root: Path) -> Made:
    part = root / "7classes_version" / "train"
    for name in ("n1.png", "n2.png"):
        image(part / "images" / name, mode="L")
    boxes = [(i, (4 * i, 5, 6, 7)) for i in range(1, 8)]
    coco(part / "annotations" / "annotations_7classes.json", SEVEN, {"n1.png": boxes, "n2.png": boxes[:2]})
    (root / "metadata").mkdir()
    (root / "metadata" / "train_images_statistics.xlsx").write_bytes(b"PK no table")
    return Made("coco", 2, 9, tuple(sorted(SEVEN)), 2)


@layout("tem_neutrostruct:cvat")
def tem_neutrostruct_cvat(root: Path) -> Made:
    image(root / "images" / "n1.png", mode="L")
    shapes = "".join(
        f'<ellipse label="{name}" source="manual" occluded="0" cx="{6 + 7 * i}" cy="20" rx="3" ry="5" z_order="0"/>'
        for i, name in enumerate(SEVEN)
    )
    text(
        root / "annotations.xml",
        f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>'
        f'<image id="0" name="n1.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image></annotations>',
    )
    return Made("cvat", 1, 7, tuple(sorted(SEVEN)), 1)


# --- open -------------------------------------------------------------------------------------------------------------


@layout("ccagt")
def ccagt(root: Path) -> Made:
    names = [f"{slide}/{slide}_{i}.jpg" for slide in "AB" for i in (1, 2)]
    images(root / "images", *names)
    for name in names:
        mask(root / "masks" / name.replace(".jpg", ".png"), 1, 4, 4, 20, 20, (3, 30, 30, 34, 34))
    boxes = [(1, (4, 4, 16, 16)), (3, (30, 30, 4, 4))]
    classes = ["nucleus", "cluster", "satellite"]
    coco(root / "CCAgT_COCO_OD.json", classes, {name.partition("/")[2]: list(boxes) for name in names})
    (root / "CCAgT.parquet.gzip").write_bytes(b"PAR1")
    return Made("coco", 4, 8, ("nucleus", "satellite"), 2)


@layout("ccagt:masks")
def ccagt_masks(root: Path) -> Made:
    for name in ("A/A_1", "A/A_2", "B/B_1"):
        image(root / "images" / f"{name}.jpg")
        mask(root / "masks" / f"{name}.png", 1, 4, 4, 20, 20, (3, 30, 30, 34, 34))
    return Made("semantic_masks", 3, 6, ("nucleus", "satellite"), 2)


@layout("cervix93")
def cervix93(root: Path) -> Made:
    for i, points in enumerate(("10,20\n12,30\n", "40,60\n", "7,7\n")):
        image(root / "dataset" / "EDF" / f"frame{i:03}.png")
        text(root / "dataset" / "EDF" / f"frame{i:03}.csv", points)
    text(root / "dataset" / "labels.csv", "frame,label,set\nframe000,N,0\nframe001,L,0\nframe002,H,1\n")
    return Made("point_table", 3, 4, ("point",), 3)


@layout("mendeley_lbc")
def mendeley_lbc(root: Path) -> Made:
    folders = (
        "high squamous intra-epithelial lesion",
        "Low squamous intraepithelial lesion",
        "Negative for Intraepithelial malignancy",
        "Squamous cell carcinoma",
    )
    for i, folder in enumerate(folders):
        images(root / "pap smears" / folder, f"{i}_1.jpg", f"{i}_2.jpg")
    classes = (
        "High squamous intra-epithelial lesion",
        "Low squamous intra-epithelial lesion",
        "Negative for Intraepithelial malignancy",
        "Squamous cell carcinoma",
    )
    return Made("class_folder", 8, 8, classes, 8)


@layout("apc")
def apc(root: Path) -> Made:
    part = root / "APCData_YOLO"
    for i, ids in enumerate(((0, 1), (2, 3), (4, 5))):
        image(part / "images" / f"{i}.jpg")
        text(part / "labels" / f"{i}.txt", "".join(f"{k} 0.5 0.5 0.2 0.2\n" for k in ids))
        text(part / "labels" / f"{i}.txt:Zone.Identifier", "[ZoneTransfer]\nZoneId=3\n")
    return Made("yolo", 3, 6, ("ASCH", "ASCUS", "HSIL", "LSIL", "NILM", "SCC"), 3)


@layout("body_cavity_fluid")
def body_cavity_fluid(root: Path) -> Made:
    images(root, "benign/b1.png", "benign/b2.png", "malignant/m1.png")
    return Made("class_folder", 3, 3, ("benign", "malignant"), 3)


@layout("bone_marrow_cell")
def bone_marrow_cell(root: Path) -> Made:
    part = root / "bone_marrow_cell_dataset"
    for name in ("ABE", "BLA", "NGS"):
        images(part / name, f"0001-1000/{name}_00001.jpg", f"0001-1000/{name}_00002.jpg")
    images(part / "NGS", "1001-2000/NGS_01001.jpg")
    text(part / "abbreviations.csv", "Abbreviation;Meaning\nABE;Abnormal eosinophil\n")
    return Made("class_folder", 7, 7, ("ABE", "BLA", "NGS"), 7)


@layout("aml_lmu")
def aml_lmu(root: Path) -> Made:
    for name in ("BAS", "LYT", "NGS"):
        image(root / "AML-Cytomorphology_LMU" / name / f"{name}_0001.tiff", mode="RGBA")
        image(root / "AML-Cytomorphology_LMU" / name / f"{name}_0002.tiff", mode="RGBA")
    text(root / "annotations.dat", "BAS/BAS_0001.tiff BAS BAS\nLYT/LYT_0001.tiff LYT nan\n")
    text(root / "abbreviations.txt", "BAS Basophil\nLYT Lymphocyte (typical)\n")
    return Made("class_folder", 6, 6, ("BAS", "LYT", "NGS"), 6)


def plain(root: Path) -> Made:
    """Nobody knows the layout: images, without a label."""
    images(root, "1.jpg", "2.JPG")
    return Made(None, 2, 0, (), 2)


for _name in ("tf_cytology", "breast_cyto", "urine_cyto", "agmc_tu"):
    LAYOUTS[_name] = plain


@layout("aiccs")
def aiccs(root: Path) -> Made:
    images(root / "JPEGImages", "w1_1.png", "w1_2.png")
    voc(root / "Annotations" / "w1_1.xml", "hsil", "candida")
    voc(root / "Annotations" / "w1_2.xml", "asc_h")
    text(root / "ImageSets" / "Main" / "train.txt", "w1_1\n")
    text(root / "ImageSets" / "Main" / "val.txt", "w1_2\n")
    (root / "normal").mkdir()
    (root / "normal" / "wsi.pkl").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    return Made("voc", 2, 3, ("asc_h", "candida", "hsil"), 2)


@layout("cisd")
def cisd(root: Path) -> Made:
    def runs(x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
        inside_HW = np.zeros((HEIGHT, WIDTH), bool)
        inside_HW[y0:y1, x0:x1] = True
        flat = inside_HW.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
        counts = counts[:-1] if counts[-1] == 0 else counts
        return {"size": [HEIGHT, WIDTH], "counts": counts.tolist()}

    assets = []
    files = (("0241_BB_01471.jpg", "UROTHELIAL"), ("0241_BB_01472.jpg", "NEUTROPHIL"), ("0300_BB_1.jpg", "NEUTROPHIL"))
    for i, (name, label) in enumerate(files):
        images(root / "CISD", f"center_slice/{name}", f"edf/{name}", f"stack/{Path(name).stem}/plane_0.jpg")
        data = [{"mask": runs(5, 6, 20, 30), "class_name": label, "label": label, "category": label, "name": label}]
        assets.append({"asset_id": i, "file_name": name, "annotations": [{"data": data}]})
    text(root / "CISD" / "CISD.json", json.dumps({"assets": assets}))
    return Made("rle_json", 3, 3, ("NEUTROPHIL", "UROTHELIAL"), 2)


@layout("isbi2014")
def isbi2014(root: Path) -> Made:
    io = pytest.importorskip("scipy.io")

    def cells(*items: Any) -> Any:
        made = np.empty((len(items), 1), object)
        for i, item in enumerate(items):
            made[i, 0] = item
        return made

    grey_HW = np.full((HEIGHT, WIDTH), 200, np.uint8)
    cell_HW, nucleus_HW = np.zeros((2, HEIGHT, WIDTH), bool)
    cell_HW[5:30, 5:40] = True
    nucleus_HW[10:15, 10:16] = True
    root.mkdir(exist_ok=True)
    io.savemat(root / "isbi_train.mat", {"ISBI_Train": cells(grey_HW, grey_HW)})
    truth = {
        "train_Cytoplasm": cells(cells(cell_HW, cell_HW[::-1]), cells(cell_HW)),
        "train_Nuclei": cells(nucleus_HW, nucleus_HW),
    }
    io.savemat(root / "isbi_train_GT.mat", truth)
    images(root / "Dataset" / "EDF", "EDF000.png", "EDF001.png")
    return Made("matlab", 2, 5, ("Cytoplasm", "Nuclei"), 2)


@layout("sipakmed")
def sipakmed(root: Path) -> Made:
    outline = "5,5\n40,5\n40,30\n5,30\n"
    for name, cells in (("Dyskeratotic", 2), ("Parabasal", 1)):
        folder = root / f"im_{name}" / f"im_{name}"
        images(folder, "001.bmp")
        for i in range(1, cells + 1):
            text(folder / f"001_cyt{i:02}.dat", outline)
            text(folder / f"001_nuc{i:02}.dat", "10,10\n15,10\n15,15\n")
            images(folder / "CROPPED", f"001_{i:02}.bmp")
            text(folder / "CROPPED" / f"001_{i:02}_cyt.dat", outline)
            text(folder / "CROPPED" / f"001_{i:02}_nuc.dat", "10,10\n15,10\n15,15\n")
    return Made("sipakmed", 2, 3, ("Dyskeratotic", "Parabasal"), 2)


@layout("bttfa")
def bttfa(root: Path) -> Made:
    part = root / "dataset_forsubmit"
    for name in ("1.bmp", "2.bmp"):
        image(part / "imgbmp" / name)
        mask(part / "groundtruth_mask" / name, 255, 4, 4, 20, 20, (255, 30, 30, 40, 40))
        image(part / "GroundTruth" / name)
    return Made("semantic_masks", 2, 4, ("nucleus",), 2)


@layout("cric")
def cric(root: Path) -> Made:
    found = []
    for i, labels in enumerate((("NILM", "ASC-US"), ("HSIL",)), 1):
        name = f"img{i}.png"
        image(root / name)
        cells = [
            {"cell_id": k, "bethesda_system": label, "nucleus_x": 10 + k, "nucleus_y": 12}
            for k, label in enumerate(labels)
        ]
        found.append({"image_id": i, "image_name": name, "image_doi": f"10.1/{i}", "classifications": cells})
    text(root / "classifications.json", json.dumps(found))
    header = "image_id,image_filename,image_doi,cell_id,description_id,x,y,is_nucleus"
    text(root / "segmentations.csv", f"{header}\n1,img1.png,10.1/1,0,1,10,12,1\n")
    return Made("point_table", 2, 3, ("ASC-US", "HSIL", "NILM"), 2)


@layout("cric:csv")
def cric_csv(root: Path) -> Made:
    images(root, "img1.png", "img2.png")
    with (root / "classifications.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow("image_id,image_filename,image_doi,cell_id,bethesda_system,nucleus_x,nucleus_y".split(","))
        rows.writerow([1, "img1.png", "10.1/1", 0, "NILM", 10, 12])
        rows.writerow([2, "img2.png", "10.1/2", 1, "SCC", 20, 12])
    return Made("point_table", 2, 2, ("NILM", "SCC"), 2)


@layout("ccedd")
def ccedd(root: Path) -> Made:
    for name in ("00001", "00002"):
        image(root / "CCEDD" / "png" / f"{name}.png")
        mask(root / "CCEDD" / "edge" / f"{name}_edge.png", 255, 5, 5, 40, 6)
        shape = {"points": [[5, 5], [40, 5], [40, 30]]}
        content = {"imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": [shape, shape]}
        text(root / "CCEDD" / "json" / f"{name}.json", json.dumps(content))
    return Made("labelme", 2, 4, ("unnamed",), 2)


def mat73(path: Path, name: str, *cells: Any, strings: Sequence[str] = ()) -> None:
    """A cell array in a file of version 7.3: a cell is an array as h5py shows it (turned), or a list of them."""
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        kept = file.create_group("#refs#")

        def stored(value: Any) -> Any:
            inner = f"r{len(kept)}"
            if not isinstance(value, list):
                return kept.create_dataset(inner, data=value).ref
            made = kept.create_dataset(inner, (1, len(value)), h5py.ref_dtype)
            for k, each in enumerate(value):
                made[0, k] = stored(each)
            return made.ref

        if strings:  # a string object: a number in its place, and the texts where the objects are
            text = "".join(strings).encode("utf-16-le")
            words = np.frombuffer(text + bytes(-len(text) % 8), np.uint64)
            head = [1, 2, len(strings), 1, *map(len, strings)]
            kept.create_dataset("mcos", data=np.concatenate([np.array(head, np.uint64), words])[None])
            file.create_dataset(name, data=np.array([[3707764736, 2, 1, 1, 1, 1]], np.uint32))
        elif len(cells) == 1 and not isinstance(cells[0], list):
            file.create_dataset(name, data=cells[0])
        else:
            array = file.create_dataset(name, (1, len(cells)), h5py.ref_dtype)
            for k, cell in enumerate(cells):
                array[0, k] = stored(cell)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, made for a test".ljust(124) + b"\x00\x02IM")


@layout("cx22")
def cx22(root: Path) -> Made:
    """Two fields that are cut from one image, with two cells and one nucleus each."""
    image(root / "CCEDD" / "png" / "00477.png", 120, 90)
    part = root / "Cx22-Multi-Train"
    corners = [(5, 6, 30, 40), (20, 10, 60, 50), (8, 9, 14, 16)]

    def turned(x0: int, y0: int, x1: int, y1: int) -> Any:
        inside_WH = np.zeros((512, 512), np.uint8)
        inside_WH[x0:x1, y0:y1] = 1
        return inside_WH

    for kind, mine in (("cyto", corners[:2]), ("nuc", corners[2:])):
        masks = [turned(*each) for each in mine]
        boxes_4N = np.array([(y0, x0, y1, x1) for x0, y0, x1, y1 in mine], np.int64).T
        mat73(part / kind / f"{kind}_ins.mat", f"{kind}_ins", list(masks), list(masks))
        mat73(part / kind / f"{kind}_ins_bbox.mat", f"{kind}_ins_bbox", [boxes_4N], [boxes_4N])
    mat73(part / "generator" / "ImageDataNames.mat", "ImageDataNames", strings=["00477", "00477"])
    mat73(part / "generator" / "ROIs_x_y.mat", "ROIs_x_y", np.array([[0, 20], [0, 10]], np.int64))
    mat73(part / "generator" / "ROIs_W_H.mat", "ROIs_W_H", np.array([[80, 100], [70, 80]], np.int64))
    return Made("matlab", 2, 6, ("cyto", "nuc"), 1)


@layout("ocpap")
def ocpap(root: Path) -> Made:
    images(root / "images", "s1_1.png", "s2_1.png")
    files = {"s1_1.png": [(1, (4, 4, 10, 10))], "s2_1.png": [(2, (4, 4, 10, 10))]}
    coco(root / "annotations" / "instances.json", ["first", "second"], files)
    return Made("coco", 2, 2, ("first", "second"), 2)


@layout("bmcd_fgcd")
def bmcd_fgcd(root: Path) -> Made:
    images(root, "train/0/a.jpg", "train/12/b.png", "train/12/c.jpg", "test/0/d.jpg")
    text(root / "class_indices.json", '{"0": "0", "1": "12"}')
    return Made("class_folder", 4, 4, ("0", "12"), 4)


# --- on request, or with a client -------------------------------------------------------------------------------------


@layout("hicervix")
def hicervix(root: Path) -> Made:
    rows = {
        "train": ["a1.jpg,Normal,0,negative,,", "a2.jpg,AGC,20,AGC,,"],
        "val": ["b1.jpg,Normal,0,negative,,"],
        "test": ["c1.jpg,CC,25,microbe,CC,"],
    }
    for split, lines in rows.items():
        images(root / split, *(line.partition(",")[0] for line in lines))
        text(root / f"{split}.csv", "\n".join(["image_name,class_name,class_id,level_1,level_2,level_3", *lines]))
    (root / "hierarchy_names.csv").write_bytes(b"\xef\xbb\xbflevel_1,level_2,level_3\nnegative,,\n")
    return Made("csv_labels", 4, 4, ("AGC", "CC", "Normal"), 4)


@layout("repomedunm")
def repomedunm(root: Path) -> Made:
    images(
        root, "ThinPrep/Normal/1.jpg", "ThinPrep/L-Sil/2.jpg", "non-ThinPrep/Normal/3.jpg", "ThinPrep/Koilocyt/4.jpg"
    )
    return Made("class_folder", 4, 4, ("Koilocyt", "L-Sil", "Normal"), 4)


@layout("csd")
def csd(root: Path) -> Made:
    for label, slide in (("NILM", "s001"), ("NILM", "s002"), ("POS", "s003")):
        images(root / label / slide, "0_0.jpg", "0_1.jpg")
    text(root / "train.csv", "s001,0\ns003,1\n")
    return Made("tiles", 6, 6, ("NILM", "POS"), 3)


@layout("fnac2019")
def fnac2019(root: Path) -> Made:
    images(root / "images", "B_1.jpg", "B_2.jpg", "M_1.jpg", "M_2.jpg", "M_3.jpg")
    return Made("class_folder", 5, 5, ("benign", "malignant"), 5)


@layout("fnac2019:folders")
def fnac2019_folders(root: Path) -> Made:
    images(root, "benign/B_1.jpg", "benign/B_2.jpg", "malignant/M_1.jpg")
    return Made("class_folder", 3, 3, ("benign", "malignant"), 3)


@layout("cellpose")
def cellpose(root: Path) -> Made:
    for split, count in (("train", 2), ("test", 1)):
        for i in range(count):
            image(root / split / f"{i:03}_img.png")
            labels_HW = np.zeros((HEIGHT, WIDTH), np.uint16)
            labels_HW[2:9, 3:9], labels_HW[20:30, 20:33] = 1, 300
            Image.fromarray(labels_HW).save(root / split / f"{i:03}_masks.png")
    return Made("instance_masks", 3, 6, ("object",), 3)


@layout("comparison_detector")
def comparison_detector(root: Path) -> Made:
    for split, boxes in (("train", [(1, (4, 4, 9, 9)), (2, (5, 5, 1, 30))]), ("test", [(2, (4, 4, 9, 9))])):
        images(root / split, f"{split}_1.jpg")
        coco(root / f"{split}.json", ["ascus", "herps"], {f"{split}_1.jpg": boxes})
    return Made("coco", 2, 3, ("ascus", "herps"), 2)


@layout("bmt")
def bmt(root: Path) -> Made:
    names = "nilm1_1.JPG nilm1_2.JPG nil2_1.JPG nil2_2.JPG lsil3_1.JPG lsil3_2.JPG hsil4_1.JPG hsil4_2.JPG".split()
    images(root / "Brown Multicellular ThinPrep Database - images", *names)
    return Made("class_folder", 8, 8, ("hsil", "lsil", "nilm"), 8)


@layout("bmt:folders")
def bmt_folders(root: Path) -> Made:
    images(root, "NILM/1.JPG", "NILM/2.JPG", "LSIL/3.JPG", "HSIL/4.JPG")
    return Made("class_folder", 4, 4, ("hsil", "lsil", "nilm"), 4)


@layout("dsb2018")
def dsb2018(root: Path) -> Made:
    for name, nuclei in (("0a1b", 2), ("2c3d", 1)):
        folder = root / "stage1_train" / name
        image(folder / "images" / f"{name}.png", mode="RGBA")
        for i in range(nuclei):
            mask(folder / "masks" / f"{i}.png", 255, 5 + 20 * i, 5, 20 + 20 * i, 25)
    text(root / "stage1_train_labels.csv", "ImageId,EncodedPixels\n0a1b,246 20 294 20\n")
    return Made("object_masks", 2, 3, ("object",), 2)
