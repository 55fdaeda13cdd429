"""OpenUrine: urine sediment, few labelled fields and many unlabelled ones."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="openurine",
    title="OpenUrine",
    what="urine sediment, fields",
    organ="urine",
    optics="many microscopes and phone cameras",
    images=Count(790, "A"),
    unlabelled=Count(5640, "A"),
    objects=Count(31285, "A"),
    class_count=Count(39, "A"),
    hints=(
        "Cells: RBC, WBC, Epithelial cells (Squamous, Transitional, Renal), WBC Clumps, RBC Clumps, Lipid Casts (sic)",
        "Casts: Hyaline, Granular, Waxy, Cellular (RBC, WBC), Broad, Fatty",
        "Crystals: Calcium Oxalate, Triple Phosphate, Uric Acid, Amorphous, Cystine, Tyrosine, Leucine, Cholesterol, "
        "Bilirubin, and more",
        "Microorganisms: Bacteria, Yeast, Fungal Hyphae, Parasites (Trichomonas vaginalis, Schistosoma haematobium, "
        "Enterobius vermicularis)",
        "Others: Sperm, Mucus, Fat Droplets, Oval Fat Bodies; Artifacts",
    ),
    labels="boxes",
    readers=("yolo", "coco", "voc"),
    layout="labelled part: images/ + labels/ + data.yaml (YOLO), COCO JSON, or Pascal VOC\n"
    "unlabelled part: a folder of images, flat or nested",
    traps=(
        "the annotation format and the folders are not public: the labelled part is looked for in all three formats",
        "its README names about 35 of the 39 classes; the names come from data.yaml or the categories, never from here",
    ),
    group_rule="split by patient: images carry randomly assigned codes, and which part of a name is the patient's is "
    "not public. Give --group-regex; without it a split is by image, not by patient",
    licence="own terms",
    commercial=False,
    redistribution=False,
    terms="academic and non-commercial research only; not to be given to third parties without explicit permission; "
    "cite the publication; comply with ethical standards for medical data",
    access="request",
    where="https://forms.gle/JKgV63B6hdr5XjD29 (form), https://github.com/alikarimi120/OpenUrine",
    citation="Alizadeh, Karimi, Barikbin, Movahed, Akbarzadeh, Sirati-Sabet, Akhaee: A Multi-Head YOLOv12 with "
    "Self-Supervised Pretraining for Urinary Sediment Particle Detection. 2025",
    confidence="D",
    checked="counts and terms were read in its README (A); annotation format and folders are not public (D)",
)
