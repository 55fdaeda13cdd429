"""The page in a real browser: it renders, says nothing on its console, and asks for nothing outside itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_report_sections import run_folder

from ssl_pretrain.report.pictures import draw

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"),
]


def visit(page: Path, to: Path, width: int = 1280, height: int = 4000) -> tuple[np.ndarray, list[str], set[str]]:
    """The screenshot (H, W, 3), the lines of the console, and the addresses that the page asked for."""
    assert BROWSER is not None
    log = to / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={to / 'profile'}", f"--log-net-log={log}",
            f"--window-size={width},{height}", f"--screenshot={to / 'page.png'}", "--enable-logging=stderr", "--v=0",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    with Image.open(to / "page.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    return pixels, console, {url for url in asked if "example" in url or url.partition(":")[0] in ("file", "ftp")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with every section that can be drawn without a training."""
    return draw(run_folder(tmp_path_factory.mktemp("run")), Console(quiet=True))[-1]


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_renders_and_is_silent(page: Path, tmp_path: Path, width: int) -> None:
    pixels, console, _ = visit(page, tmp_path, width)
    assert console == []
    assert pixels.shape[1] >= width and pixels.std() > 20, "a blank page"
    parts = np.array_split(pixels[:3000], 3)
    assert all(part.std() > 5 for part in parts), "a blank stretch"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000, "no pictures"
    below = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'dom'}",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240, check=True,
    ).stdout  # fmt: skip
    assert below.count("<h2 ") == page.read_text(encoding="utf-8").count("<h2 ")


def test_a_page_that_fetches_or_fails_would_be_seen(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    faulty = tmp_path / "faulty.html"
    faulty.write_text(text.replace("<h1>", '<img src="http://example.org/x.png"><script>nowhere()</script><h1>'))
    _, console, asked = visit(faulty, tmp_path)
    assert any("nowhere is not defined" in line for line in console)
    assert "http://example.org/x.png" in asked
    (tmp_path / "whole").mkdir()
    assert not [url for url in visit(page, tmp_path / "whole")[2] if not url.startswith("file:")]
