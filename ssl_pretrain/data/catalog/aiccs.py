"""AICCS: cervical cytology, boxes of lesions and infections."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="aiccs",
    title="AICCS",
    what="cervical cytology, patches",
    organ="cervix",
    optics="the detector takes 1024 px",
    class_count=Count(10, "B"),
    classes=("hsil", "asc_h", "lsil", "asc_us", "scc", "agc", "tri", "actino", "cc", "candida"),
    labels="boxes",
    readers=("voc",),
    layout="JPEGImages/*.png, Annotations/*.xml, ImageSets/Main/*.txt",
    traps=(
        "its slide-level files are pickles, which run code when opened: they are never read here",
        "whether the Zenodo record holds any image is unknown; the repository has none",
    ),
    group_rule="patches of one slide belong together, but their names are unknown: give --group-regex",
    access="open",
    where="https://doi.org/10.5281/zenodo.10828395",
    citation="Wang: Artificial Intelligence Enables Precision Diagnosis of Cervical Cytology Grades and Cervical "
    "Cancer (1.0.0). Zenodo, 2024",
    confidence="B",
    checked="the code of its patch detector (B); the record itself could not be seen (D)",
)
