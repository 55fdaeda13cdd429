"""Cx22: cervical cells, instances of cytoplasm and nucleus, cut from CCEDD."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="cx22",
    title="Cx22",
    what="cervical cells, instances",
    organ="cervix",
    optics="512 x 512 px",
    images=Count(1320, "A"),
    objects=Count(14946, "C"),
    labels="masks",
    readers=("matlab", "coco"),
    extracted=True,
    layout="Cx22-{Multi-Train,Multi-Test,Pair}/cyto/cyto_{clumps,ins,ins_bbox}.mat, nuc/nuc_... (MATLAB v7.3)\n"
    "generator/{ImageDataNames,ROIs_W_H,ROIs_x_y}.mat, CellNum.mat, OverlapRatio.mat; CCEDD's png/ anywhere below",
    traps=(
        "it has no images: read cuts them from the PNG files of CCEDD, which must lie below ROOT",
        "masks are stored transposed; boxes are y0, x0, y1, x1 from 0, end exclusive",
        "several regions come from one image: split by source image",
        "400 + 100 + 820 images, 12,010 + 1,296 + 1,640 instances (the first by difference)",
        "whether an instance is a cell, or cytoplasm and nucleus each, was not seen: so 14,946 is no checked number",
    ),
    group_rule="the source image in CCEDD, which the reader takes from ImageDataNames",
    licence="own terms",
    commercial=False,
    terms="non-commercial; its images are those of CCEDD, which must not be redistributed",
    access="open",
    where="https://github.com/LGQ330/Cx22",
    citation="Liu et al.: Cx22: A new publicly available dataset for deep learning-based segmentation of cervical "
    "cytology images. Computers in Biology and Medicine 150, 106194, 2022",
    confidence="A",
    checked="its files were parsed",
)
