"""AGMC-TU: Pap smears; layout unknown."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Entry

ENTRY = Entry(
    name="agmc_tu",
    title="AGMC-TU",
    what="cervical smears",
    organ="cervix",
    stain="Papanicolaou",
    labels="unknown",
    layout="unknown: read as a folder of images, or as what is recognised",
    group_rule="unknown: each image is its own group unless --group-regex says more",
    access="request",
    where="https://mkbhowmik.in/AGMC-tuDb.aspx",
    citation="Bhowmik et al.: Nucleus region segmentation towards cervical cancer screening using AGMC-TU Pap-smear "
    "dataset. Int. Conf. on Pattern Recognition and Artificial Intelligence, 2018",
    confidence="D",
    checked="nothing but its citation could be found",
)
