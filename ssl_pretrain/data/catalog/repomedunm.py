"""RepoMedUNM: Pap smears, ThinPrep and not."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="repomedunm",
    title="RepoMedUNM",
    what="cervical smears, fields",
    organ="cervix",
    stain="Papanicolaou, ThinPrep and conventional",
    images=Count(6168, "C"),
    class_count=Count(4, "B"),
    classes=("Normal", "L-Sil", "H-Sil", "Koilocyt"),
    labels="image labels",
    readers=("class_folder",),
    layout="folders of the classes, *.jpg, in groups ThinPrep and non-ThinPrep",
    traps=("6,168 images is what one source says",),
    group_rule="no patient or slide is told: each image is its own group",
    access="request",
    where="http://repomed.nusamandiri.ac.id/eng/",
    citation="Riana et al.: Repomedunm: A new dataset for feature extraction and training of deep learning network for "
    "classification of pap smear images. ICONIP, Springer, 2021",
    confidence="C",
    checked="third-party descriptions only",
)
