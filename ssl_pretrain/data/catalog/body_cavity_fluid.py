"""Body Cavity Fluid: effusion smears, benign or malignant."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="body_cavity_fluid",
    title="Body Cavity Fluid",
    what="body fluid smears",
    organ="body cavity fluid",
    stain="Leishman",
    optics="40x, resized to 256 x 192 px",
    class_count=Count(2, "B"),
    classes=("benign", "malignant"),
    labels="image labels",
    readers=("class_folder",),
    layout="benign/*.png, malignant/*.png",
    group_rule="no patient or slide is told: each image is its own group",
    access="client",
    where="https://www.kaggle.com/datasets/cmacus/body-cavity-fluid-cytology-images",
    citation="Sanyal et al.: A machine learning model for screening of body fluid cytology smears. bioRxiv, 2021",
    confidence="B",
    checked="a public reader of it; counts unknown",
)
