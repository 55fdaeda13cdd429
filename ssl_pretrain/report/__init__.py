"""What a run looks like: one page with its pictures. Reads a run folder, and adds to it `pictures/` and `report.html`.

`folder` reads the run, `sections` has one file for each part of the page, `sheet` what they draw with, `page` the HTML.
"""
