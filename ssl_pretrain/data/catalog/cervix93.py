"""Cervix93: cervical cytology, points on nuclei and a grade for each field."""

from __future__ import annotations

from ssl_pretrain.data.catalog import Count, Entry

ENTRY = Entry(
    name="cervix93",
    title="Cervix93",
    what="cervical cytology, fields",
    organ="cervix",
    stain="Papanicolaou, ThinPrep",
    optics="40x; stacks and their extended focus (EDF), 1280 x 960 px",
    images=Count(93, "A"),
    objects=Count(2705, "A"),
    class_count=Count(1, "A"),
    hints=("labels.csv grades each field: N 16, L 46, H 31",),
    labels="points; grade of a field",
    readers=("point_table", "csv_labels"),
    layout="dataset/EDF/frame000.png + frame000.csv (no header, lines row,col)\n"
    "dataset/labels.csv (frame,label,set; set 0 train, 1 test); the planes of the stacks beside them",
    traps=(
        "points are written row,col, which is y,x",
        "1,983 of the points are train, 722 test",
        "the points have no class name of their own",
        "points and grades are two sorts of labels: give dataset/EDF as ROOT to probe the points",
    ),
    group_regex=r"(frame\d+)",
    groups=Count(93, "A"),
    group_rule="the field: its planes and its EDF image belong together",
    access="open",
    where="https://github.com/parham-ap/cytology_dataset",
    citation="Phoulady, Mouton: A new cervical cytology dataset for nucleus detection and image classification "
    "(Cervix93) and methods for cervical nucleus detection. arXiv:1811.09651, 2018",
    confidence="A",
    checked="label files were read; the image size is third-party (B), the path of the stacks was not seen",
)
