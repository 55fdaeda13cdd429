"""Urine Cyto: replication data of a study of urine cytology; layout unknown."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Entry

ENTRY = Entry(
    name="urine_cyto",
    title="Urine Cyto",
    what="voided urine, cytology",
    organ="urine",
    labels="unknown",
    layout="unknown: read as a folder of images, or as what is recognised",
    traps=("its fingerprint (UNF) says that a table is in it; there may be few photographs or none",),
    group_rule="unknown: each image is its own group unless --group-regex says more",
    licence="CC0 (C)",
    access="open",
    where="https://doi.org/10.7910/DVN/JHZCCM",
    citation="Siddig: Replication Data for: Urine cytology in our daily practice. Harvard Dataverse, V1, 2019",
    confidence="D",
    checked="nothing but its citation could be found",
)
