"""AML-Cytomorphology_LMU: single leukocytes of blood smears, 15 classes."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="aml_lmu",
    title="AML-Cytomorphology_LMU",
    what="blood, single leukocytes",
    organ="blood",
    optics="crops of 400 x 400 px, TIFF (RGBA, C)",
    images=Count(18365, "B"),
    class_count=Count(15, "B"),
    classes=tuple("BAS EBO EOS KSC LYA LYT MMZ MOB MON MYB MYO NGB NGS PMB PMO".split()),
    labels="image labels",
    readers=("class_folder", "csv_labels"),
    layout="<CLS>/<CLS>_0001.tiff, annotations.dat (re-annotations, separated by spaces), abbreviations.txt",
    traps=("extremely unequal classes: the largest, NGS, has 8,484 images, the smallest 11",),
    group_rule="the names tell no patient: each image is its own group",
    licence="CC BY 3.0",
    commercial=True,
    redistribution=True,
    access="open",
    where="https://www.kaggle.com/datasets/livepriyanka09/aml-cytology/data (a mirror; The Cancer Imaging Archive)",
    citation="AML-Cytomorphology_LMU: single cell leukocytes from AML patients and non-malignant controls. "
    "The Cancer Imaging Archive",
    confidence="B",
    checked="a public reader of it; 11 GB",
)
