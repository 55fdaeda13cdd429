"""BMT: Brown Multicellular ThinPrep, three grades."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="bmt",
    title="BMT",
    what="cervical cytology, fields",
    organ="cervix",
    stain="Papanicolaou, ThinPrep",
    optics="1920 x 1080 px",
    images=Count(600, "B"),
    class_count=Count(3, "B"),
    classes=("nilm", "lsil", "hsil"),
    spellings={"nil": "nilm"},
    per_class={"nilm": 200, "lsil": 200, "hsil": 200},
    per_class_mark="B",
    labels="image labels",
    readers=("class_folder",),
    layout="three folders of the classes, or one folder of *.JPG with names that begin with nil or nilm, lsil, hsil",
    traps=(
        "a folder of annotated pictures comes with it: leave it out of ROOT",
        "nil and nilm are the same class",
    ),
    group_rule="180 patients with 1 to 5 fields each; how names tell the patient is unknown: give --group-regex",
    access="client",
    where="https://doi.org/10.7303/syn55259257",
    citation="Brown Multicellular ThinPrep Database. Synapse, syn55259257",
    confidence="B",
    checked="third-party code",
)
