"""Mendeley-LBC: cervical smears, one grade an image."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="mendeley_lbc",
    title="Mendeley-LBC",
    what="cervical smears, fields",
    organ="cervix",
    stain="Papanicolaou, liquid based",
    optics="40x, Leica ICC50 HD; 2048 x 1536 px (C)",
    images=Count(963, "B"),
    class_count=Count(4, "B"),
    classes=(
        "High squamous intra-epithelial lesion",
        "Low squamous intra-epithelial lesion",
        "Negative for Intraepithelial malignancy",
        "Squamous cell carcinoma",
    ),
    spellings={
        "HSIL": "High squamous intra-epithelial lesion",
        "LSIL": "Low squamous intra-epithelial lesion",
        "NILM": "Negative for Intraepithelial malignancy",
        "SCC": "Squamous cell carcinoma",
    },
    per_class={
        "High squamous intra-epithelial lesion": 163,
        "Low squamous intra-epithelial lesion": 113,
        "Negative for Intraepithelial malignancy": 613,
        "Squamous cell carcinoma": 74,
    },
    per_class_mark="B",
    labels="image labels",
    readers=("class_folder",),
    layout="<class>/*.jpg, four folders (the zip has more folders above them)",
    traps=(
        "the folders' names differ in case and hyphens between mirrors",
        "one source counts 612 NILM instead of 613",
    ),
    group_rule="no patient or slide is told: each image is its own group",
    licence="CC BY 4.0",
    commercial=True,
    redistribution=True,
    access="open",
    where="https://doi.org/10.17632/zddtpgzv63.4",
    citation="Hussain: Liquid based cytology pap smear images for multi-class diagnosis of cervical cancer. "
    "Mendeley Data, V4, 2019",
    confidence="B",
    checked="a public reader of it and its page",
)
