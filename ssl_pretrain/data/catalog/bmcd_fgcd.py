"""BMCD-FGCD: bone marrow and blood cells, fine-grained classes."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="bmcd_fgcd",
    title="BMCD-FGCD",
    what="bone marrow, single cells",
    organ="bone marrow",
    images=Count(92335, "A"),
    class_count=Count(32, "A"),
    splits={"train": 73877, "test": 18458},
    labels="image labels",
    readers=("class_folder",),
    layout="<class>/*.jpg or *.png, class_indices.json",
    traps=(
        "40 ids, 8 of them without an image",
        "its README says over 10,000 cells, its table 92,335",
        "whether the split is in the folders was not seen",
    ),
    group_rule="no patient is told: each image is its own group",
    terms="the code is under MIT; whether that holds for the images is unknown",
    access="open",
    where="https://github.com/JustlfC03/SCKansformer",
    citation="Chen et al.: SCKansformer: Fine-grained classification of bone marrow cells via Kansformer backbone and "
    "hierarchical attention mechanisms. IEEE J-BHI, 2024",
    confidence="B",
    checked="the table in its repository was seen (A); names of the folders are third-party (B)",
)
