"""Breast Cyto: cytological and histological images of breast cancer; layout unknown."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Entry

ENTRY = Entry(
    name="breast_cyto",
    title="Breast Cyto",
    what="breast, cytology and histology",
    organ="breast",
    optics="40x; 3264 x 2448 px",
    labels="unknown",
    layout="unknown: read as a folder of images, or as what is recognised",
    traps=("it has histological images too",),
    group_rule="unknown: each image is its own group unless --group-regex says more",
    licence="CC BY 4.0 (C)",
    access="open",
    where="https://doi.org/10.5281/zenodo.7890874",
    citation="Berezsky, Datsko, Melnyk: Cytological and histological images of breast cancer. Zenodo, 2023",
    confidence="D",
    checked="nothing but its page's title could be found",
)
