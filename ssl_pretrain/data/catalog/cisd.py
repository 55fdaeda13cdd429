"""Cell Instance Segmentation Dataset: urine cytology, masks of single cells."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="cisd",
    title="Cell Instance (CISD)",
    what="urine cytology, cells",
    organ="urine",
    stain="Papanicolaou, nine variations, ThinPrep",
    optics="slide scanner, 21 focal planes",
    images=Count(3911, "A"),
    class_count=Count(4, "A"),
    classes=("RED_BLOOD_CELL", "NEUTROPHIL", "SUPERFICIAL", "UROTHELIAL"),
    labels="masks",
    readers=("rle_json",),
    layout="CISD/CISD.json, CISD/center_slice/*.jpg, CISD/edf/*.jpg, CISD/stack/ (21 planes)",
    traps=(
        "masks are run lengths row by row, background first; COCO's go column by column",
        "the same field is there three times: central plane, extended focus and stack",
    ),
    group_regex=r"(?:^|/)(\d+)_[^/]*$",
    groups=Count(30, "C"),
    group_rule="the first number of an image's name (0241_BB_01471.jpg), which may be the slide (C); 30 slides",
    access="open",
    where="https://doi.org/10.5281/zenodo.5938893",
    citation="Bouyssoux, Fezzani, Olivo-Marin: Cell Instance Segmentation Dataset (1.0.0). ISBI, Zenodo, 2022",
    confidence="A",
    checked="a public reader of it",
)
