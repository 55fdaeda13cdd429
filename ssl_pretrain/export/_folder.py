"""The folder of an export: a copy of the artefact, with BatchNorm statistics for detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_pretrain import artefact
from ssl_pretrain.data import sources
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.export._statistics import has_batch_norm, reestimate
from ssl_pretrain.files import write_durably

FILES = ("model.safetensors", "probe.safetensors", "README.md", "config.json")


def prepare(source: Path, out: Path, images: str | None, size_px: int) -> str:
    """Makes `out` an artefact of the same backbone as `source`; returns a line on its BatchNorm statistics, or nothing.

    images    from which BatchNorm is re-estimated at `size_px`: a pack, a folder, synthetic:N; `none` keeps what
              pretraining left; None takes the images of the run, and keeps where they are no longer there

    Raises `UsageError` where `out` is the source, and what `artefact.load_backbone` and `reestimate` raise.
    """
    if out.exists() and out.resolve() == source.resolve():
        raise UsageError(f"--out is the artefact itself ({out}): an export is a folder of its own")
    loaded = artefact.load_backbone(source)  # refuses one that is damaged
    named = images or str(loaded.card.get("recipe", {}).get("data") or "none")
    folder = None
    said = "kept as pretraining left them"
    if has_batch_norm(loaded.backbone) and named != "none":
        try:
            folder = sources.folder(named, out.parent / "cache")
        except DataError:
            if images is not None:
                raise
            said += f" ({named} is not here; --images says where images are)"
    if folder is None:
        for name in FILES:
            write_durably(out / name, (source / name).read_bytes())
        return f"BatchNorm statistics are {said}" if has_batch_norm(loaded.backbone) else ""
    count = reestimate(loaded.backbone, folder, size_px)
    batch_norm = {"images": count, "size_px": size_px}
    origin: dict[str, Any] = {key: v for key, v in loaded.card.items() if key not in artefact.OWN}
    artefact.write(out, loaded.backbone, {**origin, "batch_norm": batch_norm})
    return f"BatchNorm statistics are of {count} whole images of {named}, at {size_px} px"
