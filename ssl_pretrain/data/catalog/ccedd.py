"""CCEDD: overlapping cervical cells, outlines."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="ccedd",
    title="CCEDD",
    what="cervical cells, outlines",
    organ="cervix",
    optics="2048 x 1536 px (C)",
    images=Count(686, "A"),
    labels="polygons, edges",
    readers=("labelme",),
    layout="CCEDD/{png,json,edge}/ or label_correct/, label_no_correct/; <id>.png, <id>.json, <id>_edge.png",
    traps=(
        "the polygons carry no class",
        "label_correct and label_no_correct are two versions of the same labels: give one of them as ROOT",
        "33,614 cut images are 686 x 49 tiles of four overlapping grids: tiles of one image belong together",
    ),
    group_rule="the image; tiles cut from it belong to it",
    licence="own terms",
    commercial=False,
    redistribution=False,
    terms="non-commercial; not to be redistributed",
    access="open",
    where="https://github.com/nachifur/LLPC",
    citation="Liu et al.: Local label point correction for edge detection of overlapping cervical cells. Frontiers in "
    "Neuroinformatics 16, 895290, 2022",
    confidence="A",
    checked="its code and terms; split 6:1:3 with seed 10",
)
