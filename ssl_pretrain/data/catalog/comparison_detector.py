"""Comparison Detector: cervical cells and clumps, boxes of 11 classes."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="comparison_detector",
    title="Comparison Detector",
    what="cervical cells and clumps",
    organ="cervix",
    images=Count(7410, "A"),
    objects=Count(48587, "A"),
    class_count=Count(11, "A"),
    classes=(
        "ascus",
        "asch",
        "lsil",
        "hsil",
        "scc",
        "agc",
        "trichomonas",
        "candida",
        "flora",
        "herps",
        "actinomyces",
    ),
    splits={"train": 6666, "test": 744},
    labels="boxes",
    readers=("coco",),
    layout="COCO JSON of train and test, *.jpg",
    traps=(
        "its README warns of boxes of 1 px width or height",
        "`herps` is its own spelling",
    ),
    group_rule="no patient or slide is told: each image is its own group",
    access="request",
    where="https://github.com/CVIU-CSU/ComparisonDetector",
    citation="Liang et al.: Comparison-based convolutional neural networks for cervical cell/clumps detection in the "
    "limited data scenario. arXiv:1810.05952, 2018",
    confidence="A",
    checked="its code and README",
)
