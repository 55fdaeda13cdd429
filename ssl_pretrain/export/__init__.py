"""Export: the artefact in the form that a consumer loads. One file a consumer, with `write(artefact, out) -> str`."""

from __future__ import annotations

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
