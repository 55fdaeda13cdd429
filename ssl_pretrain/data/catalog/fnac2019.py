"""FNAC2019: fine needle aspirates, benign or malignant."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="fnac2019",
    title="FNAC2019",
    what="fine needle aspirates",
    images=Count(212, "A"),
    class_count=Count(2, "A"),
    classes=("benign", "malignant"),
    spellings={"B": "benign", "M": "malignant", "0": "benign", "1": "malignant"},
    per_class={"benign": 99, "malignant": 113},
    per_class_mark="A",
    labels="image labels",
    readers=("class_folder", "csv_labels"),
    layout="B_1 ... B_99, M_1 ... M_113 (images); csv lines such as B_28,0",
    traps=("its test list has 43 images",),
    group_rule="no patient is told: each image is its own group",
    access="request",
    where="https://github.com/CVIU-CSU/TCT-InfoNCE",
    citation="Huang et al.: An efficient framework based on large foundation model for cervical cytopathology whole "
    "slide image screening. arXiv:2407.11486, 2024",
    confidence="A",
    checked="csv files of a repository that uses it",
)
