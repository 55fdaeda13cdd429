"""The folder is the registry: a method, backbone family, reader, probe or export target is one file in its folder."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from ssl_pretrain.errors import UsageError

EXTRAS = {
    "ultralytics": "'ssl-pretrain[ultralytics]' (AGPL-3.0)",
    "transformers": "'ssl-pretrain[hf]'",
    "scipy": "'ssl-pretrain[hf]'",
    "h5py": "'ssl-pretrain[data]'",
    "openpyxl": "'ssl-pretrain[data]'",
    "onnx": "'ssl-pretrain[onnx]'",
    "onnxscript": "'ssl-pretrain[onnx]'",
    "onnxruntime": "'ssl-pretrain[onnx]'",
}
"""What to install for packages that only some files need."""


def names(kind: str) -> list[str]:
    """The names that a folder of the package offers, sorted: `names("methods")` -> `["dino", "mae", "simclr"]`.

    Files in `<kind>/` of a folder in the environment variable `SSL_PRETRAIN_PATH` count too.
    """
    package = importlib.import_module(f"ssl_pretrain.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def named(kind: str, name: str) -> ModuleType:
    """The module `ssl_pretrain.<kind>.<name>`; an unknown name raises `UsageError` that tells the nearest."""
    offered = names(kind)
    if name not in offered:
        raise UsageError(
            f"no {kind.rstrip('s')} is called {name!r}{nearest(name, offered)}; there are: {', '.join(offered)}"
        )
    try:
        return importlib.import_module(f"ssl_pretrain.{kind}.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ssl_pretrain"):
            raise
        extra = EXTRAS.get(package, package)
        raise UsageError(f"{name} needs {package}, which is not installed: pip install {extra}") from error


def nearest(wrong: str, known: list[str]) -> str:
    """`" (did you mean 'epochs'?)"`, or nothing when no known word is near."""
    by_lower = {name.lower(): name for name in reversed(known)}
    close = [by_lower[found] for found in get_close_matches(wrong.lower(), list(by_lower), n=1, cutoff=0.5)]
    return f" (did you mean {close[0]!r}?)" if close else ""
