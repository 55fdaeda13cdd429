"""TF Cytology: most likely tear film; nothing is known of its layout."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Entry

ENTRY = Entry(
    name="tf_cytology",
    title="TF Cytology",
    what="tear film, most likely",
    labels="unknown",
    layout="unknown: read as a folder of images, or as what is recognised",
    group_rule="unknown: each image is its own group unless --group-regex says more",
    access="open",
    where="https://doi.org/10.5281/zenodo.10813218",
    citation="Szczęsna-Iskander: TF Cytology. Zenodo, 2024",
    confidence="D",
    checked="nothing but its title could be found; that TF means tear film follows from the author's field of work",
)
