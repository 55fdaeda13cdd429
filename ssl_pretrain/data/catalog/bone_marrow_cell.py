"""Bone Marrow Cell: single cells of bone marrow smears, 21 classes."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="bone_marrow_cell",
    title="Bone Marrow Cell",
    what="bone marrow, single cells",
    organ="bone marrow",
    stain="May-Grünwald-Giemsa / Pappenheim",
    optics="40x, oil immersion; crops of 250 x 250 px",
    images=Count(171375, "B"),
    class_count=Count(21, "A"),
    classes=tuple("ABE ART BAS BLA EBO EOS FGC HAC KSC LYI LYT MMZ MON MYB NGB NGS NIF OTH PEB PLM PMO".split()),
    labels="image labels",
    readers=("class_folder",),
    layout="bone_marrow_cell_dataset/<CLS>/0001-1000/<CLS>_00001.jpg, abbreviations.csv (separated by ;)",
    traps=(
        "one more level of folders, blocks of 1000, lies between class and image",
        "extremely unequal classes (C: OTH 294, NGS 29,424)",
    ),
    group_rule="945 patients, who are not told by the names: a split by patient is not possible",
    licence="CC BY 4.0",
    commercial=True,
    redistribution=True,
    access="open",
    where="https://doi.org/10.7937/TCIA.AXH3-T579",
    citation="Matek, Krappe, Münzenmayer, Haferlach, Marr: An Expert-Annotated Dataset of Bone Marrow Cytology in "
    "Hematologic Malignancies. The Cancer Imaging Archive, 2021",
    confidence="B",
    checked="names in a public reader (A), licence and count on the archive's page",
)
