"""Mendeley-BTTFA: cervical cells, masks of nuclei."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="bttfa",
    title="Mendeley-BTTFA",
    what="cervical cells, nuclei",
    organ="cervix",
    stain="liquid based",
    images=Count(104, "B"),
    class_count=Count(1, "B"),
    classes=("nucleus",),
    spellings={"255": "nucleus", "1": "nucleus", "foreground": "nucleus"},
    labels="masks",
    readers=("semantic_masks",),
    layout="dataset_forsubmit/{imgbmp,GroundTruth,groundtruth_mask}/*.bmp, 104 each",
    traps=("white is nucleus; nuclei that touch are one in a mask",),
    group_rule="no patient or slide is told: each image is its own group",
    licence="CC BY 4.0",
    commercial=True,
    redistribution=True,
    access="open",
    where="https://doi.org/10.17632/jks43dkjj7.1",
    citation="Zhang: Data for: Binary Tree-like Network with Two-path Fusion Attention Feature for Cervical Cell "
    "Nucleus Segmentation. Mendeley Data, V1, 2019",
    confidence="B",
    checked="a public reader of it",
)
