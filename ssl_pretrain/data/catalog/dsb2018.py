"""2018 Data Science Bowl: nuclei of many kinds, one mask file a nucleus."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="dsb2018",
    title="2018 Data Science Bowl",
    what="nuclei of many kinds",
    images=Count(670, "C"),
    labels="masks",
    readers=("object_masks",),
    layout="stage1_train/<id>/images/<id>.png (RGBA), stage1_train/<id>/masks/*.png, one a nucleus\n"
    "stage1_train_labels.csv (ImageId,EncodedPixels: runs from 1, column by column)",
    traps=("the runs of the csv count pixels from 1, COCO's from 0",),
    group_rule="no source is told: each image is its own group",
    access="client",
    where="https://www.kaggle.com/competitions/data-science-bowl-2018/data",
    citation="2018 Data Science Bowl. Kaggle",
    confidence="A",
    checked="public readers of it; the count is background knowledge (C)",
)
