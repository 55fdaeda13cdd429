"""APCData: cervical cytology, boxes of cells."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

_CLASSES = "NILM", "ASCUS", "ASCH", "LSIL", "HSIL", "SCC"

ENTRY = Entry(
    name="apc",
    title="APCData",
    what="cervical cytology, fields",
    organ="cervix",
    optics="40x, Olympus CX40RF100 with LC30 camera; 2048 x 1532 px",
    images=Count(425, "B"),
    objects=Count(3619, "C"),
    class_count=Count(6, "B"),
    classes=_CLASSES,
    spellings={str(i): name for i, name in enumerate(_CLASSES)},
    labels="boxes",
    readers=("yolo",),
    layout="APCData_YOLO/: images *.jpg + YOLO *.txt (ids 0 to 5)",
    traps=(
        "the label folders hold junk files `*:Zone.Identifier`",
        "there is a version with points too",
        "about 3,619 cells: the exact number was not seen",
    ),
    group_rule="no patient or slide is told: each image is its own group",
    licence="CC BY 4.0 (C)",
    access="open",
    where="https://doi.org/10.17632/ytd568rh3p.1",
    citation="Cuña Cabrera, Pachiarotti, Guerra: APCData cervical cytology cells. Mendeley Data, V1, 2024",
    confidence="B",
    checked="a public repository's reader (its 343 / 82 split is its own)",
)
