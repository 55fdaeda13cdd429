"""Cellpose: cells of many kinds, label images of instances."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="cellpose",
    title="Cellpose",
    what="cells of many kinds",
    images=Count(608, "C"),
    splits={"train": 540, "test": 68},
    labels="masks",
    readers=("instance_masks",),
    layout="train/000_img.png + 000_masks.png, test/..., train_cyto2/...",
    traps=(
        "the channels of an image have a meaning of their own, they are no colours",
        "masks are uint16 label images, without class names",
        "540 + 68 images is background knowledge (C); train_cyto2 comes on top",
    ),
    group_rule="no source is told: each image is its own group",
    access="request",
    where="https://www.cellpose.org/dataset",
    citation="Stringer et al.: Cellpose: a generalist algorithm for cellular segmentation. Nature Methods 18.1, "
    "100-106, 2021",
    confidence="A",
    checked="public readers of it; counts unchecked (C)",
)
