"""CCAgT: cervical cells, AgNOR stain, masks of nuclei and their organiser regions."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

_CLASSES = (
    "nucleus",
    "cluster",
    "satellite",
    "nucleus_out_of_focus",
    "overlapped_nuclei",
    "non_viable_nucleus",
    "leukocyte_nucleus",
)

ENTRY = Entry(
    name="ccagt",
    title="CCAgT",
    what="cervical cells, tiles",
    organ="cervix",
    stain="AgNOR",
    optics="1600 x 1200 px of 0.111 um",
    images=Count(9339, "A"),
    objects=Count(63190, "A"),
    class_count=Count(7, "A"),
    classes=_CLASSES,
    spellings={str(i): name for i, name in enumerate(_CLASSES, 1)},
    labels="boxes, masks",
    readers=("coco", "semantic_masks"),
    layout="images/<slide>/<slide>_*.jpg, masks/<slide>/*.png (same stem, pixel value = class id)\n"
    "CCAgT_COCO_OD.json, CCAgT.parquet.gzip",
    traps=(
        "images and masks come as one zip a slide inside the zip: unpack both levels",
        "mask files may have three equal channels",
        "a satellite is a disc around a click, not an outline; organiser regions overwrite the nucleus in the masks",
        "no official split: split by slide",
    ),
    group_regex=r"([^/]+)/[^/]+$",
    groups=Count(15, "A"),
    group_rule="the slide, A to O: the folder of the image",
    licence="CC BY-NC 3.0",
    commercial=False,
    redistribution=True,
    terms="non-commercial; name the authors",
    access="open",
    where="https://doi.org/10.17632/wg4bpm33hj.2",
    citation="Atkinson Amorim, Matias, Bottamedi, Sanches, Costa, Onofre, Onofre, Wangenheim: CCAgT: Images of "
    "Cervical Cells with AgNOR Stain Technique. Mendeley Data, V2, 2022",
    confidence="A",
    checked="layout, counts and class ids in public readers of it",
)
