"""UFSC OCPap: oral cytology, nuclei."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="ocpap",
    title="UFSC OCPap",
    what="oral cytology, nuclei",
    organ="mouth",
    stain="Papanicolaou",
    optics="Axio Scan.Z1, 1200 x 1600 px",
    images=Count(1934, "B"),
    labels="boxes, masks",
    readers=("coco", "semantic_masks"),
    layout="COCO JSON and masks, most likely; images *.png",
    traps=("all images come from two slides, so a split by slide has two groups",),
    groups=Count(2, "B"),
    group_rule="the slide, of which there are two; how names tell it is unknown: give --group-regex",
    access="open",
    where="https://arquivos.ufsc.br/d/5035aec3c24f421a95d0/",
    citation="Matias et al.: Segmentation, detection, and classification of cell nuclei on oral cytology samples "
    "stained with papanicolaou. SN Computer Science 2.4, 285, 2021",
    confidence="C",
    checked="count and size in its description; the layout is a guess",
)
