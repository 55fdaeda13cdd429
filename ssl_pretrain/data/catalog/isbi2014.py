"""ISBI 2014: overlapping cervical cells, synthetic fields with masks."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="isbi2014",
    title="ISBI 2014",
    what="cervical cells, synthetic",
    organ="cervix",
    stain="Papanicolaou",
    optics="synthetic 512 x 512 px grey; 16 real fields of extended focus",
    images=Count(945, "B"),
    unlabelled=Count(16, "B"),
    labels="masks",
    readers=("matlab", "coco"),
    extracted=True,
    layout="isbi_train.mat + isbi_train_GT.mat (45), isbi_test90.mat + isbi_test90_GT.mat (90): MATLAB v5\n"
    "Dataset/Synthetic/testset.mat + testset_GT.mat (900): MATLAB v7.3; Dataset/EDF/EDF000.png ... (16, real)",
    traps=(
        "the images lie inside the MATLAB files: read writes them as PNG",
        "the 900 of testset.mat are the 90 and 810 more",
        "masks of cells overlap",
    ),
    group_rule="no source is told: each image is its own group",
    licence="research use (C)",
    access="open",
    where="https://cs.adelaide.edu.au/~carneiro/isbi14_challenge/dataset.html",
    citation="Lu, Carneiro, Bradley, Ushizima, Nosrati, Bianchi, Carneiro, Hamarneh: Evaluation of Three Algorithms "
    "for the Segmentation of Overlapping Cervical Cells. IEEE J-BHI, 2015",
    confidence="A",
    checked="two public loaders of it",
)
