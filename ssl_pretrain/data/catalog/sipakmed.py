"""SIPaKMeD: cervical cells, polygons of cytoplasm and nucleus, five classes."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="sipakmed",
    title="SIPaKMeD",
    what="cervical smears, cells",
    organ="cervix",
    stain="Papanicolaou",
    optics="fields of 2048 x 1536 px",
    images=Count(966, "B"),
    objects=Count(4049, "B"),
    class_count=Count(5, "B"),
    classes=("Superficial-Intermediate", "Parabasal", "Koilocytotic", "Dyskeratotic", "Metaplastic"),
    per_class={
        "Superficial-Intermediate": 831,
        "Parabasal": 787,
        "Koilocytotic": 825,
        "Dyskeratotic": 813,
        "Metaplastic": 793,
    },
    labels="polygons",
    readers=("sipakmed",),
    layout="im_<Class>/im_<Class>/001.bmp + 001_cyt01.dat, 001_nuc01.dat (polygons, lines x,y)\n"
    "im_<Class>/im_<Class>/CROPPED/001_01.bmp + 001_01_cyt.dat, 001_01_nuc.dat",
    traps=("crops of one field are not independent: 001_01 and 001_02 are cut from 001",),
    groups=Count(966, "B"),
    group_rule="the field: class folder and number, which the reader takes from the names",
    licence="free with citation",
    access="open",
    where="https://www.cs.uoi.gr/~marina/sipakmed.html",
    citation="Plissiti, Dimitrakopoulos, Sfikas, Nikou, Krikoni, Charchanti: SIPAKMED: A new dataset for feature and "
    "image based classification of normal and pathological cervical cells in Pap smear images. ICIP, 2018",
    confidence="B",
    checked="public readers of it; counts of the classes are background knowledge (C), though they sum to 4,049",
)
