"""CRIC Cervix: conventional Pap smears, points on cells."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="cric",
    title="CRIC Cervix",
    what="cervical smears, fields",
    organ="cervix",
    stain="Papanicolaou, conventional",
    optics="1376 x 1020 px",
    images=Count(400, "A"),
    objects=Count(11534, "A"),
    class_count=Count(6, "A"),
    classes=("NILM", "ASC-US", "LSIL", "ASC-H", "HSIL", "SCC"),
    per_class={"NILM": 6779, "ASC-US": 606, "LSIL": 1360, "ASC-H": 925, "HSIL": 1703, "SCC": 161},
    labels="points",
    readers=("point_table",),
    layout="*.png, classifications.json or classifications.csv (nucleus_x, nucleus_y, bethesda_system)\n"
    "segmentations.csv (polygons of some cells)",
    traps=(
        "points count pixels from 1",
        "a crop's size is a choice: the literature uses 90 or 70 px (--point-px)",
    ),
    group_rule="no patient or slide is told: each image is its own group",
    licence="CC BY 4.0 (C)",
    access="open",
    where="https://database.cric.com.br/downloads",
    citation="Rezende, Silva, Bernardo, Tobias, Oliveira, Machado, Costa, Medeiros, Ushizima, Carneiro, Bianchi: Cric "
    "searchable image database as a public platform for conventional pap smear cytology data. Scientific Data, 2021",
    confidence="A",
    checked="its README; counts of the classes are background knowledge (C), though they sum to 11,534",
)
