"""HiCervix: cervical cells, classes in three levels."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="hicervix",
    title="HiCervix",
    what="cervical cells, crops",
    organ="cervix",
    images=Count(40229, "A"),
    class_count=Count(26, "A"),
    hints=("class_id runs from 0 (Normal) to 25 (CC); level_1 is negative, ASC, AGC or microbe",),
    splits={"train": 28160, "val": 4018, "test": 8051},
    labels="image labels",
    readers=("csv_labels",),
    layout="{train,val,test}/<uuid>.jpg, {train,val,test}.csv\n"
    "header image_name,class_name,class_id,level_1,level_2,level_3",
    traps=(
        "trailing levels may be empty: level_2 for AGC, level_3 for most",
        "its hierarchy_names.csv begins with a byte order mark",
    ),
    group_rule="the names are random: no patient or slide is told; take its own split",
    access="request",
    where="https://doi.org/10.5281/zenodo.11087263",
    citation="Cai, Yang, Tang, Huang, Xiyue: HiCervix: An Extensive Hierarchical Dataset and Benchmark for Cervical "
    "Cytology Classification. Zenodo, 2024",
    confidence="A",
    checked="its csv files were counted",
)
