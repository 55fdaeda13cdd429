"""Good data sets, small, in the true layouts (facts: `datasets.md` of the project), as relative path to bytes."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
from PIL import Image

from ssl_pretrain.data import shapes

WIDTH, HEIGHT = 32, 24


def picture(mode: str = "RGB", width: int = 32, height: int = 24) -> Image.Image:
    """A gradient in both directions, so that compressors have something to do."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 7 % 256, y * 9 % 256, (x * y) % 256], -1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((x * 1000 + y).astype(np.uint16))
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


PNG = encoded(picture(), "PNG")
JPEG = encoded(picture(), "JPEG")


def images() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    pages = [picture(), picture("L").convert("RGB")]
    return {
        "a.jpg": encoded(picture(), "JPEG", exif=turned), "progressive.jpg": encoded(picture(), "JPEG",
        progressive=True),
        "cmyk.jpg": encoded(picture("CMYK"), "JPEG"), "grey.jpg": encoded(picture("L"), "JPEG"),
        "big.jpg": encoded(picture("RGB", 320, 200), "JPEG"),
        "a.png": PNG, "palette.png": encoded(picture("P"), "PNG", transparency=3),
        "alpha.png": encoded(picture("RGBA"), "PNG"),
        "grey16.png": encoded(picture("I;16"), "PNG"), "one.png": encoded(picture("1"), "PNG"),
        "la.png": encoded(picture("LA"), "PNG"),
        "a.tif": encoded(picture(), "TIFF"), "lzw.tif": encoded(picture(), "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(picture(), "TIFF", compression="tiff_adobe_deflate"), "jpeg.tif": encoded(picture(),
        "TIFF", compression="jpeg"),
        "g4.tif": encoded(picture("1"), "TIFF", compression="group4"), "float.tif": encoded(picture("F"), "TIFF"),
        "grey16.tif": encoded(picture("I;16"), "TIFF"), "pages.tif": encoded(pages[0], "TIFF",
        save_all=True, append_images=pages[1:]),
        "a.webp": encoded(picture(), "WEBP"), "lossless.webp": encoded(picture("RGBA"), "WEBP", lossless=True),
        "moving.webp": encoded(pages[0], "WEBP", save_all=True, append_images=pages[1:]),
        "a.gif": encoded(picture("P"), "GIF"), "moving.gif": encoded(pages[0], "GIF",
        save_all=True, append_images=pages[1:]),
        "a.bmp": encoded(picture(), "BMP"), "palette.bmp": encoded(picture("P"), "BMP"),
    }  # fmt: skip


def voc() -> dict[str, bytes]:
    def annotation(name: str, label: str) -> bytes:
        box = "<bndbox><xmin>3</xmin><ymin>4.5</ymin><xmax>20</xmax><ymax>21</ymax></bndbox>"
        thing = f"<object><name>{label}</name><pose>Left</pose><difficult>0</difficult>{box}</object>"
        size = "<size><width>32</width><height>24</height><depth>3</depth></size>"
        names = f"<folder>x</folder><filename>{name}</filename>"
        return f'<?xml version="1.0"?>\n<annotation>{names}{size}{thing * 2}</annotation>'.encode()

    return {
        "JPEGImages/im1.png": PNG, "JPEGImages/im2.jpg": JPEG, "JPEGImages/im3.png": PNG,
        "Annotations/im1.xml": annotation("im1.png", "cell"), "Annotations/im2.xml": annotation("im2.jpg",
        "10 &amp; more"),
        "ImageSets/Main/train.txt": b"im1\n", "ImageSets/Main/val.txt": b"im2\n",
    }  # fmt: skip


def points() -> dict[str, bytes]:
    return {
        "images/im1.png": PNG, "images/im2.jpg": JPEG, "images/im3.png": PNG,
        "labels/im1.txt": b"3 4 0\n10.5 20 12\n31 23 burr cell\n", "labels/im2.txt": b"1,2,3\n4,5,a\n",
        "labels/im3.txt": b"",
    }  # fmt: skip


def class_folder() -> dict[str, bytes]:
    return {f"{split}/{label}/{i}.png": PNG for split in ("train", "val") for label in ("a", "9", "10") for i in (1, 2)}


def _json(tree: object) -> bytes:
    return json.dumps(tree).encode()


def _inside() -> np.ndarray:
    inside_HW = np.zeros((HEIGHT, WIDTH), np.bool_)
    inside_HW[3:20, 5:9] = inside_HW[7, 11:30] = True
    return inside_HW


def _row_runs(inside_HW: np.ndarray) -> list[int]:
    """Background first, row by row."""
    turned = shapes.of_pixels(inside_HW.T)
    return turned.runs_R.tolist()


def coco() -> dict[str, bytes]:
    made = shapes.of_pixels(_inside())
    outlines = ([[1, 1, 9, 1, 9, 9]], {"size": [HEIGHT, WIDTH], "counts": made.runs_R.tolist()},
                {"size": [HEIGHT, WIDTH], "counts": shapes.text_of(made)}, [])  # fmt: skip
    things = [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1 + 2 * (i % 2), "bbox": [2, 3.5, 10, 8],
        "area": 80, "iscrowd": 0,
         "segmentation": outline}
        for i, outline in enumerate(outlines)
    ]  # fmt: skip
    tree = {
        "info": {"year": 2024}, "licenses": [],
        "images": [{"id": 1, "file_name": "im1.png", "width": WIDTH, "height": HEIGHT},
                   {"id": 2, "file_name": "im2.jpg", "width": WIDTH, "height": HEIGHT}],
        "annotations": things, "categories": [{"id": 1, "name": "cell"}, {"id": 3, "name": "10",
        "supercategory": "none"}],
    }  # fmt: skip
    return {
        "images/im1.png": PNG,
        "images/im2.jpg": JPEG,
        "images/im3.png": PNG,
        "annotations/instances_train.json": _json(tree),
    }


def yolo() -> dict[str, bytes]:
    return {
        "train/images/im1.png": PNG, "train/images/im2.jpg": JPEG,
        "valid/images/im3.png": PNG, "valid/images/im4.png": PNG,
        "train/labels/im1.txt": b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.8\n",
        "train/labels/im2.txt": b"2 0.4 0.4 0.2 0.2\n", "valid/labels/im3.txt": b"",
        "data.yaml": b"train: train/images\nval: valid/images\nnc: 3\nnames: [cell, '10', cast]\n",
    }  # fmt: skip


def darknet() -> dict[str, bytes]:
    return {
        "obj_train_data/im1.png": PNG, "obj_train_data/im2.jpg": JPEG,
        "obj_train_data/im1.txt": b"0 0.5 0.5 0.25 0.5\n",
        "obj_train_data/im2.txt": b"1 0.5 0.5 0.25 0.5\n", "obj.names": b"cell\ncast\n", "classes.txt": b"cell\ncast\n",
        "train.txt": b"data/obj_train_data/im1.png\ndata/obj_train_data/im2.jpg\n",
    }  # fmt: skip


def cvat() -> dict[str, bytes]:
    runs = ", ".join(map(str, _row_runs(_inside()[3:20, 5:30])))
    things = f"""
    <box label="cell" source="manual" occluded="0" xtl="2.5" ytl="3" xbr="12" ybr="11.25" rotation="30"></box>
    <polygon label="cast" occluded="0" points="1,1;9.5,1;9,9" z_order="0"><attribute name="a">b</attribute></polygon>
    <ellipse label="cell" cx="15" cy="12" rx="5" ry="2.5" rotation="45.5" z_order="0"></ellipse>
    <mask label="cell" rle="{runs}" left="5" top="3" width="25" height="17" z_order="0"></mask>"""
    image = '<image id="{}" name="{}" subset="train" width="32" height="24">{}</image>\n'
    body = image.format(0, "im1.png", things) + image.format(1, "im2.jpg", "")
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels><label>'
    head += "<name>cell</name></label></labels></task></meta>\n"
    return {
        "images/train/im1.png": PNG,
        "images/train/im2.jpg": JPEG,
        "annotations.xml": (head + body + "</annotations>").encode(),
    }


def csv_boxes() -> dict[str, bytes]:
    rows = "filename,width,height,class,xmin,ymin,xmax,ymax\nim1.png,32,24,cell,1,2,10,12.5\n"
    rows += "im1.png,32,24,10,3,4,9,9\nim2.jpg,32,24,cell,0,0,32,24\n"
    return {"im1.png": PNG, "im2.jpg": JPEG, "_annotations.csv": rows.encode()}


def csv_labels() -> dict[str, bytes]:
    header = "image_name,class_name,class_id,level_1,level_2,level_3\n"
    return {
        "train/a1.png": PNG, "train/a2.jpg": JPEG, "val/b1.png": PNG,
        "train.csv": (header + "a1.png,Normal,0,negative,,\na2.jpg,ASC-US,1,ASC,ASC-US,\n").encode("utf-8-sig"),
        "val.csv": (header + "b1.png,Normal,0,negative,,\n").encode(),
    }  # fmt: skip


def bare_labels() -> dict[str, bytes]:
    return {"images/B_1.png": PNG, "images/M_2.jpg": JPEG, "test.csv": b"B_1,0\nM_2,1\n"}


def point_table() -> dict[str, bytes]:
    rows = "image_id,image_filename,image_doi,cell_id,bethesda_system,nucleus_x,nucleus_y\n"
    rows += "1,im1.png,d,1,NILM,5,6\n1,im1.png,d,2,HSIL,31,24\n2,im2.jpg,d,3,SCC,8,8\n"
    return {"im1.png": PNG, "im2.jpg": JPEG, "classifications.csv": rows.encode()}


def cric() -> dict[str, bytes]:
    cells = [{"cell_id": i, "bethesda_system": "NILM", "nucleus_x": 3 + i, "nucleus_y": 4.5} for i in range(3)]
    tree = [{"image_id": 1, "image_name": "im1.png", "image_doi": "d", "classifications": cells},
            {"image_id": 2, "image_name": "im2.jpg", "image_doi": "d", "classifications": []}]  # fmt: skip
    return {"im1.png": PNG, "im2.jpg": JPEG, "classifications.json": _json(tree)}


def cervix93() -> dict[str, bytes]:
    return {
        "EDF/frame000.png": PNG, "EDF/frame000.csv": b"3,4\n10,20\n", "EDF/frame001.png": PNG,
        "EDF/frame001.csv": b"5,30\n",
        "labels.csv": b"frame,label,set\nframe000,H,0\nframe001,N,1\n",
    }  # fmt: skip


def labelme() -> dict[str, bytes]:
    def record(name: str) -> bytes:
        kinds = {"polygon": [[1, 1], [9, 1], [9.5, 9]], "rectangle": [[12, 3], [20, 11]], "circle": [[15, 15],
        [18, 15]],
                 "rotation": [[1, 1], [5, 1], [5, 5], [1, 5]], "point": [[3, 3]], "line": [[1, 1], [4, 4]]}  # fmt: skip
        things = [
            {"label": "cell", "points": at, "group_id": None, "shape_type": kind, "flags": {}}
            for kind, at in kinds.items()
        ]
        mask = {"label": "10", "points": [[2, 2], [5, 5]], "shape_type": "mask",
                "mask": base64.b64encode(encoded(picture("1", 4, 4), "PNG")).decode()}  # fmt: skip
        data = base64.b64encode(PNG).decode()
        return _json({"version": "5.2.1", "flags": {}, "shapes": [*things, mask], "imagePath": name, "imageData": data,
                      "imageHeight": HEIGHT, "imageWidth": WIDTH})  # fmt: skip

    return {
        "im1.png": PNG,
        "im1.json": record("im1.png"),
        "im2.jpg": JPEG,
        "im2.json": record("im2.jpg"),
        "im3.png": PNG,
    }


def _labels_png(values: tuple[int, ...]) -> bytes:
    labels_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, value in enumerate(values):
        labels_HW[3 : 12 + i, 6 * i + 1 : 6 * i + 6] = value
    return encoded(Image.fromarray(labels_HW), "PNG")


def semantic_masks() -> dict[str, bytes]:
    return {
        "images/A/A_1.png": PNG, "images/A/A_2.jpg": JPEG, "images/B/B_1.png": PNG,
        "masks/A/A_1.png": _labels_png((1, 2, 7)), "masks/A/A_2.png": _labels_png(()),
        "masks/B/B_1.png": _labels_png((3, 1)),
    }  # fmt: skip


def colour_masks() -> dict[str, bytes]:
    rgb_HW3 = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb_HW3[2:9, 3:8], rgb_HW3[12:20, 5:30] = (250, 50, 83), (51, 221, 255)
    mask = encoded(Image.fromarray(rgb_HW3), "PNG")
    labelmap = b"# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:250,50,83::\ncast:51,221,255::\n"
    return {
        "images/a.png": PNG,
        "images/b.jpg": JPEG,
        "SegmentationClass/a.png": mask,
        "SegmentationClass/b.png": mask,
        "labelmap.txt": labelmap,
    }


def instance_masks() -> dict[str, bytes]:
    numbers_HW = np.zeros((HEIGHT, WIDTH), np.uint16)
    numbers_HW[2:9, 3:8], numbers_HW[12:20, 5:30] = 1, 700
    mask = encoded(Image.fromarray(numbers_HW), "PNG")
    return {"train/000_img.png": PNG, "train/000_masks.png": mask, "test/001_img.png": PNG, "test/001_masks.png": mask}


def object_masks() -> dict[str, bytes]:
    one, two = encoded(Image.fromarray(_inside()), "PNG"), _labels_png((255,))
    return {
        "stage1_train/aa/images/aa.png": PNG, "stage1_train/aa/masks/m1.png": one, "stage1_train/aa/masks/m2.png": two,
        "stage1_train/bb/images/bb.png": PNG,
        "stage1_train_labels.csv": b"ImageId,EncodedPixels\nbb,2 3 30 5\nbb,100 4\n",
    }  # fmt: skip


def rle_json() -> dict[str, bytes]:
    mask = {"size": [HEIGHT, WIDTH], "counts": _row_runs(_inside())}
    data = [{"mask": mask, "category": "NEUTROPHIL"}, {"mask": mask, "category": "UROTHELIAL"}]
    assets = [
        {"asset_id": str(i), "file_name": f"{i}_BB_0{i}.jpg", "set": "train", "annotations": [{"data": data}]}
        for i in (1, 2)
    ]
    return {"center_slice/1_BB_01.jpg": JPEG, "center_slice/2_BB_02.jpg": JPEG, "CISD.json": _json({"assets": assets})}


def sipakmed() -> dict[str, bytes]:
    bmp = encoded(picture(), "BMP")
    files = {}
    for label in ("Koilocytotic", "Parabasal"):
        folder = f"im_{label}/im_{label}"
        files |= {f"{folder}/001.bmp": bmp, f"{folder}/001_cyt01.dat": b"2.5,3\n20,3\n20,18.25\n2,18\n",
                  f"{folder}/001_nuc01.dat": b"8,8\n12,8\n12,12\n", f"{folder}/CROPPED/001_01.bmp": bmp,
                  f"{folder}/CROPPED/001_01_cyt.dat": b"1,1\n9,1\n9,9\n"}  # fmt: skip
    return files


def tiles() -> dict[str, bytes]:
    return {
        f"{label}/{label}_slide{i}/{row}_{column}.jpg": JPEG
        for label in ("NILM", "POS")
        for i in (1, 2)
        for row in (0, 1)
        for column in (2, 10)
    }


def z_stack() -> dict[str, bytes]:
    files = {f"{frame}/{z:02d}.png": PNG for frame in ("frame000", "frame001") for z in range(3)}
    return {**files, "labels.csv": b"stack,label,set\nframe000,H,0\nframe001,N,1\n"}


def stacked_tiffs() -> dict[str, bytes]:
    tiff = encoded(picture(), "TIFF", save_all=True, append_images=[picture("L").convert("RGB")])
    return {f"{label}/s{i}.tif": tiff for label in ("a", "b") for i in (1, 2)}


def runs() -> dict[str, bytes]:
    made = shapes.of_pixels(_inside())
    plain = _json({"size": [HEIGHT, WIDTH], "counts": made.runs_R.tolist()})
    return {"compressed.txt": shapes.text_of(made).encode(), "plain.json": plain}
