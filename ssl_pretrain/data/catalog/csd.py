"""CSD: tiles of cervical slides, positive or not; private."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="csd",
    title="CSD",
    what="cervical slides, tiles",
    organ="cervix",
    optics="tiles resized to 224 px",
    class_count=Count(2, "A"),
    classes=("NILM", "POS"),
    labels="slide labels",
    readers=("tiles",),
    layout="<NILM|POS>/<slide>/<row>_<col>.jpg; csv slide_id,label without a header",
    traps=(
        "the data set is private, only features are given out",
        "slides, not images: gc train 1,471, val 368, test 786; ngc 764, 102, 95",
        "a tile carries its slide's label, which may not be true of the tile",
    ),
    group_regex=r"([^/]+)/[^/]+$",
    group_rule="the slide: the folder of the tile",
    access="request",
    where="https://github.com/CVIU-CSU/TCT-InfoNCE",
    citation="Huang et al.: An efficient framework based on large foundation model for cervical cytopathology whole "
    "slide image screening. arXiv:2407.11486, 2024",
    confidence="A",
    checked="its code and csv files",
)
