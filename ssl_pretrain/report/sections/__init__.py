"""The sections of the page, one file each; the folder is the registry.

A section's module has `PLACE`, where it stands among the others (smaller is higher up), and
`section(run: RunFolder) -> Section | None`: None where a run of this kind has nothing of it, and one of the errors of
`ssl_pretrain.errors` where something is missing, which the page then says. What it draws with are free functions of
arrays, which import nothing of a run, so that TensorBoard can show the same while the run goes on.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass

from matplotlib.figure import Figure

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass(frozen=True)
class Section:
    """A heading, a few words on how to read what follows, and a picture or a piece of HTML or both."""

    heading: str
    words: str
    figure: Figure | None = None
    alt: str = ""
    """What the picture shows, for those who do not see it."""
    html: str = ""
    """Stands under the picture, well formed and escaped (`html.py` helps)."""
