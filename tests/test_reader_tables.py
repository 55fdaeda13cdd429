from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_pretrain.data import tables
from ssl_pretrain.data.files import Rejected
from ssl_pretrain.data.readers import LabelledSet, csv_boxes, csv_labels, point_table, read
from ssl_pretrain.errors import DataError


def image(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path)


def text(path: Path, content: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def shown(labelled: LabelledSet) -> dict[str, tuple[tuple[str, ...], list[list[float]]]]:
    return {item.path.name: (item.labels, item.boxes_N4.tolist()) for item in labelled.images}


def splits(labelled: LabelledSet) -> dict[str, str | None]:
    return {item.path.name: item.split for item in labelled.images}


# --- dialects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("a,b c,\n1,2,\n", "utf-8"),
        ("a,b c,\r\n1,2,\r\n\r\n", "utf-8-sig"),
        ("a;b c;\n1;2;\n", "utf-8"),
        ("a\tb c\t\n1\t2\t\n", "utf-16"),
        ('a|"b c"|\n 1 | "2" |', "utf-8"),
    ],
)
def test_dialects(tmp_path: Path, content: str, encoding: str) -> None:
    text(tmp_path / "x.csv", content, encoding)
    rows = tables.read_rows(tmp_path / "x.csv")
    assert [row.cells for row in rows] == [["a", "b c", ""], ["1", "2", ""]] and [row.line for row in rows] == [1, 2]
    assert tables.head(tmp_path / "x.csv") == rows


def test_what_is_no_table(tmp_path: Path) -> None:
    text(tmp_path / "x.csv", "")
    assert tables.read_rows(tmp_path / "x.csv") == [] == tables.head(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"a,\xff\n")
    with pytest.raises(Rejected, match=r"not UTF-8 text \(byte 2\)"):
        tables.read_rows(tmp_path / "x.csv")
    text(tmp_path / "x.csv", "a,b\n" + "x" * 200_000 + ",1")
    with pytest.raises(Rejected, match="field larger than"):
        tables.read_rows(tmp_path / "x.csv")
    with pytest.raises(Rejected, match="more than 10 bytes"):
        tables.read_rows(tmp_path / "x.csv", 10)
    os.mkfifo(tmp_path / "pipe.csv")
    assert tables.head(tmp_path / "pipe.csv") == [] == tables.head(tmp_path / "none.csv") == tables.head(tmp_path)


def test_the_head_of_a_long_table_ends_with_a_whole_row(tmp_path: Path) -> None:
    text(tmp_path / "x.csv", "a,b\n" + "1,2\n" * 50_000)
    assert [row.cells for row in tables.head(tmp_path / "x.csv", 100_000)][-1] == ["1", "2"]


@pytest.mark.parametrize(
    ("header", "geometry"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "corners"),
        ("x1,y1,x2,y2", "corners"),
        ("Image,x,y,w,h", "size"),
        ("image,X Center,y_center,width,height", "centre"),
        ("image_id,image_filename,image_doi,cell_id,bethesda_system,nucleus_x,nucleus_y", "point"),
        ("x,y", "point"),
        ("image,label,x", "none"),
    ],
)
def test_columns(header: str, geometry: str) -> None:
    assert tables.columns_of(header.split(",")).geometry == geometry


# --- classes of images ------------------------------------------------------------------------------------------------


def test_hicervix(tmp_path: Path) -> None:
    header = "image_name,class_name,class_id,level_1,level_2,level_3\n"
    rows = {
        "train": "1-a.jpg,ASC-US,1,ASC,ASC-US,\n2-b.jpg,AGC,5,AGC,,\n3-c.jpg,AGC,5,AGC,,,,\n4-d.jpg,AGC,5,AGC,,,more\n",
        "val": "5-e.jpg,Normal,0,negative,,\n5-e.jpg,AGC,5,AGC\n",
        "test": "6-f.jpg,,0\n7-g.jpg,AGC,5,AGC\n../8.jpg,AGC\n",
    }
    for split, content in rows.items():
        text(tmp_path / f"{split}.csv", "\ufeff" + header + content)
    for name in ("train/1-a.jpg", "train/2-b.jpg", "train/3-c.jpg", "train/4-d.jpg", "val/5-e.jpg", "test/6-f.jpg"):
        image(tmp_path / name)
    text(tmp_path / "hierarchy_names.csv", "\ufeffname,level\nAGC,1\n")
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind, labelled.classes) == ("csv_labels", "image", ("AGC", "ASC-US", "Normal"))
    assert splits(labelled) == {
        "1-a.jpg": "train", "2-b.jpg": "train", "3-c.jpg": "train", "5-e.jpg": "val", "6-f.jpg": "test",
    }  # fmt: skip
    assert shown(labelled)["2-b.jpg"] == (("AGC",), [[0, 0, 64, 48]])
    assert labelled.annotated == {"AGC": 5, "ASC-US": 1, "Normal": 1, "": 1}
    assert sorted(labelled.problems) == sorted(
        [
            "train.csv: line 5 left out, 7 cells in 6 columns",
            "val.csv: line 3 (AGC) left out, the image has a class already (Normal)",
            "test.csv: line 2 (without a name) left out, it has no class",
            "test.csv: 1 rows left out, missing image 7-g.jpg",
            "test.csv: 1 rows left out, its file name ../8.jpg leads out of the folder",
            "train/4-d.jpg: left out, no label file has it (unlabelled)",
        ]
    )


def test_fnac_has_no_header_and_no_suffix(tmp_path: Path) -> None:
    for name in ("B_1", "B_28", "M_3"):
        image(tmp_path / "images" / f"{name}.jpg")
    text(tmp_path / "test.csv", "B_28,0\nM_3,1\n")
    text(tmp_path / "train.csv", "B_1,0\n")
    labelled = read(tmp_path)
    assert shown(labelled) == {name: ((label,), [[0, 0, 64, 48]]) for name, label in zip(
        ("B_28.jpg", "M_3.jpg", "B_1.jpg"), "010", strict=True
    )}  # fmt: skip
    assert splits(labelled) == {"B_28.jpg": "test", "M_3.jpg": "test", "B_1.jpg": "train"}


def test_aml_annotations(tmp_path: Path) -> None:
    image(tmp_path / "BAS" / "BAS_0001.tiff")
    image(tmp_path / "NGS" / "NGS_0001.tiff")
    text(tmp_path / "annotations.dat", "BAS/BAS_0001.tiff BAS nan nan\nNGS/NGS_0001.tiff EOS EOS nan\n")
    text(tmp_path / "abbreviations.txt", "BAS Basophil\nNGS Neutrophil\n")
    labelled = read(tmp_path)
    assert [item.labels for item in labelled.images] == [("BAS",), ("EOS",)]
    assert labelled.problems == ("annotations.dat: no header, so column 2 is taken for the class; 2 more not used",)


def test_tables_that_are_no_labels(tmp_path: Path) -> None:
    image(tmp_path / "ABE" / "a.png")
    image(tmp_path / "ART" / "b.png")
    text(tmp_path / "abbreviations.csv", "Abbreviation;Meaning\nABE;Abnormal eosinophil\n")
    text(tmp_path / "slides.csv", "slide_1,0\nslide_2,1\n")
    text(tmp_path / "sizes.csv", "image_name,Pixles per microm\na.png,375\n")
    text(tmp_path / "empty.csv", "")
    assert not csv_labels.recognise(tmp_path) and read(tmp_path).format == "class_folder"
    with pytest.raises(DataError, match="has no table"):
        csv_labels.read(tmp_path)


def test_two_tables_about_one_image(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    text(tmp_path / "all.csv", "image,label,patient\na.png,x,7\nb.png,y,7\n")
    text(tmp_path / "train.csv", "image,label\na.png,z\n")
    with pytest.raises(DataError, match=r"all.csv and train.csv are both about a.png: give the one"):
        read(tmp_path)
    assert [item.group for item in read(tmp_path / "all.csv").images] == ["7", "7"]
    (only,) = read(tmp_path / "train.csv").images
    assert only.labels == ("z",) and only.split == "train"


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes(tmp_path: Path) -> None:
    image(tmp_path / "train" / "a.png")
    image(tmp_path / "train" / "b.png")
    text(
        tmp_path / "train" / "_annotations.csv",
        "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        "a.png,64,48,RBC,1,2,11,22\na.png,64,48,WBC,60,40,70,50\na.png,64,48,RBC,5,5,5,9\na.png,64,48,RBC,9,5,5,9\n"
        "a.png,64,48,RBC,9,x,5,9\na.png,64,48,,1,1,2,2\na.png,64,48,RBC,nan,1,2,2\nb.png,64,48,,,,,\nc.png,1,1,RBC,1,1,2,2\n",
    )
    labelled = read(tmp_path)
    assert labelled.format == "csv_boxes" and labelled.annotated == {"RBC": 6, "WBC": 1, "": 1}
    assert shown(labelled) == {"a.png": (("RBC", "WBC"), [[1, 2, 11, 22], [60, 40, 64, 48]]), "b.png": ((), [])}
    assert splits(labelled) == {"a.png": "train", "b.png": "train"}
    assert list(labelled.problems) == [
        "_annotations.csv: 1 rows left out, missing image c.png",
        "_annotations.csv: line 4 (RBC) left out, zero-size box at (5, 5)",
        "_annotations.csv: line 5 (RBC) left out, its corners are swapped",
        "_annotations.csv: line 6 (RBC) left out, malformed box",
        "_annotations.csv: line 7 (without a name) left out, it has no class",
        "_annotations.csv: line 8 (RBC) left out, malformed box",
        "1 boxes reached over the edge of their image and were clipped",
    ]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image;label;x;y;w;h", "a.png;c;8;12;16;24"),
        ("image,label,cx,cy,w,h", "a.png,c,16,24,16,24"),
        ("ImageID,LabelName,XMin,XMax,YMin,YMax", "a,c,0.125,0.375,0.25,0.75"),
    ],
)
def test_boxes_by_size_centre_and_fraction(tmp_path: Path, header: str, row: str) -> None:
    image(tmp_path / "a.png")
    text(tmp_path / "boxes.csv", f"{header}\n{row}\n")
    labelled = read(tmp_path)
    assert shown(labelled) == {"a.png": (("c",), [[8, 12, 24, 36]])}
    assert any("fractions" in problem for problem in labelled.problems) == ("XMin" in header)


# --- points -----------------------------------------------------------------------------------------------------------


def test_cric(tmp_path: Path) -> None:
    image(tmp_path / "images" / "1.png")
    image(tmp_path / "images" / "2.png")
    cells = [
        {"cell_id": 1, "bethesda_system": "NILM", "nucleus_x": 1, "nucleus_y": 48},
        {"cell_id": 2, "bethesda_system": "ASC-US", "nucleus_x": 66, "nucleus_y": 5},
        {"cell_id": 3, "bethesda_system": "SCC", "nucleus_x": True, "nucleus_y": 5},
        {"cell_id": 4, "nucleus_x": 4, "nucleus_y": 5},
        7,
    ]
    data = [
        {"image_id": 1, "image_name": "1.png", "classifications": cells},
        {"image_id": 2, "image_name": "lost.png", "classifications": cells[:1]},
        {"image_id": 3, "classifications": []},
        "x",
    ]
    (tmp_path / "classifications.json").write_text(json.dumps(data))
    text(
        tmp_path / "segmentations.csv",
        "image_id,image_filename,image_doi,cell_id,description_id,x,y,is_nucleus\n1,1.png,d,1,1,5,5,1\n",
    )
    labelled = read(tmp_path)
    assert (labelled.format, labelled.kind) == ("point_table", "point")
    assert shown(labelled) == {"1.png": (("NILM",), [[0, 47, 0, 47]])}  # counted from 1
    assert labelled.annotated == {"NILM": 2, "ASC-US": 1, "SCC": 1, "": 2}
    assert list(labelled.problems) == [
        "classifications.json: image 3 left out, it has no image_name or no classifications",
        "classifications.json: image 4 left out, it has no image_name or no classifications",
        "classifications.json: 1 rows left out, missing image lost.png",
        "classifications.json: line 1 (ASC-US) left out, it is at (65, 4), outside the image",
        "classifications.json: line 1 (SCC) left out, malformed point",
        "classifications.json: line 1 (without a name) left out, it has no class",
        "classifications.json: line 1 (without a name) left out, malformed point",
        "images/2.png: left out, no label file has it (unlabelled)",
    ]
    text(
        tmp_path / "classifications.csv",
        "image_id,image_filename,image_doi,cell_id,bethesda_system,nucleus_x,nucleus_y\n1,1.png,d,1,HSIL,5,6\n",
    )
    labelled = read(tmp_path)
    assert shown(labelled) == {"1.png": (("HSIL",), [[4, 5, 4, 5]])}
    assert "classifications.json: not read, classifications.csv says the same" in labelled.problems
    assert read(tmp_path / "classifications.json").classes == ("NILM",)


def test_cervix93(tmp_path: Path) -> None:
    for i in range(3):
        image(tmp_path / "EDF" / f"frame00{i}.png")
    text(tmp_path / "EDF" / "frame000.csv", "10,60\n47,5\n50,5\n1,2\n3,4\n7\n")
    text(tmp_path / "EDF" / "frame001.csv", "")
    text(tmp_path / "labels.csv", "frame,label,set\nframe000,H,0\nframe001,L,1\n")
    with pytest.raises(DataError, match="looks like csv_labels and point_table"):
        read(tmp_path)
    labelled = read(tmp_path, format="point_table")
    assert shown(labelled) == {
        "frame000.png": (
            ("point",) * 4,
            [[60, 10, 60, 10], [5, 47, 5, 47], [2, 1, 2, 1], [4, 3, 4, 3]],
        ),  # row before column
        "frame001.png": ((), []),
    }
    assert (
        splits(labelled)
        == {"frame000.png": "train", "frame001.png": "test"}
        == splits(read(tmp_path, format="csv_labels"))
    )
    assert splits(read(tmp_path / "EDF")) == {"frame000.png": "train", "frame001.png": "test"}
    assert labelled.found.endswith("; the tables name no class, so all are called 'point'")
    assert list(labelled.problems) == [
        "frame000.csv: line 3 (point) left out, it is at (5, 50), outside the image",
        "frame000.csv: line 6 (point) left out, not two numbers, row and column",
        "frame001.csv: empty label file (no objects)",
        "EDF/frame002.png: left out, no label file has it (unlabelled)",
    ]


def test_points_in_one_table(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    text(tmp_path / "points.csv", "image,x,y,class\na.png,1.5,2,RBC\na.png,,2,RBC\n")
    assert shown(read(tmp_path)) == {"a.png": (("RBC",), [[1.5, 2, 1.5, 2]])}
    image(tmp_path / "b.png")
    text(tmp_path / "b.csv", "1,2\n")
    with pytest.raises(DataError, match=r"points.csv and b.png both have points"):
        read(tmp_path)
    (tmp_path / "points.csv").unlink()
    text(tmp_path / "classifications.json", '[{"classifications": "')
    with pytest.raises(DataError, match="cannot be read: not JSON"):
        read(tmp_path)


# --- any content ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one image, for label files that come and go."""
    folder = tmp_path_factory.mktemp("any")
    image(folder / "a.png", 16, 16)
    return folder


CELL = st.sampled_from(
    ["a.png", "b", "image", "label", "x", "y", "w", "h", "1", "0.5", "", "nan", "é", "\0", '"', "-3"]
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(CELL, max_size=7).map(",".join), max_size=5).map("\n".join))
def test_any_table_is_read_or_refused_in_words(folder: Path, content: str) -> None:
    text(folder / "x.csv", content)
    fitting = [reader for reader in (csv_boxes, csv_labels, point_table) if reader.recognise(folder)]
    assert len(fitting) <= 1
    for reader in (csv_boxes, csv_labels, point_table):
        try:
            labelled = reader.read(folder)
        except DataError as error:
            assert str(error).isprintable()
            continue
        assert all((item.boxes_N4 >= 0).all() and (item.boxes_N4 <= 16).all() for item in labelled.images)
        assert all(problem.isprintable() for problem in labelled.problems)
