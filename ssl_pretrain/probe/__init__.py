"""What are the features worth? One file a probe; `objects` cuts the labelled objects that the probes look at.

Shapes: N objects, S side in pixels, D width, Q queries, C classes, K neighbours,
U units (independent images), R rounds of the bootstrap.
"""

from __future__ import annotations

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
