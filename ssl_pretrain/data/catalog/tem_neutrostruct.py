"""TEM-NeutroStruct: neutrophil granules and vesicles in electron micrographs."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="tem_neutrostruct",
    title="TEM-NeutroStruct",
    what="neutrophils, electron microscopy",
    organ="blood",
    optics="transmission electron microscope; most images 4096 x 4224 px, six 2048 x 2115 px, grey",
    images=Count(93, "A"),
    objects=Count(24293, "A"),
    class_count=Count(7, "A"),
    classes=(
        "Specific",
        "Non-specific primary",
        "Non-specific tertiary",
        "Non-specific secondary",
        "Empty vesicles",
        "Emptying vesicles",
        "Vacuoles",
    ),
    splits={"train": 83, "test": 10},
    labels="boxes, ellipses, masks",
    readers=("coco", "cvat", "semantic_masks"),
    layout="7classes_version/train/annotations/annotations_4classes.json, annotations_7classes.json (COCO)\n"
    "CVAT XML of the ellipses, masks as coloured PNG\n"
    "metadata/train_images_statistics.xlsx, metadata/test_images_statistics.xlsx",
    traps=(
        "4-class and 7-class annotations lie side by side: give the JSON file that is meant as ROOT",
        "ids mean different classes in the two versions: classes go by name, never by id",
        "the 4-class names and the colours of the masks are not public",
        "21,143 annotations are train, 3,150 test",
        "to make 7 classes of 4: ssl-pretrain datasets neutrostruct",
    ),
    group_rule="no patient or cell is told: each image is its own group",
    access="open",
    where="Zenodo (address not in the sources)",
    citation="TEM-NeutroStruct: A Robust Dataset of Neutrophil Ultrastructures for Deep Learning and Biomedical "
    "Applications",
    confidence="A",
    checked="counts and the scripts' paths were read in its repository (A); image and mask folders are unknown (D)",
)
