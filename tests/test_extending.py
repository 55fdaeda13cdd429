"""CONTRIBUTING's promise: a method is one file and a recipe. Its two blocks are taken as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return str(found)


def test_a_method_is_one_file_and_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine" / "methods").mkdir(parents=True)
    (tmp_path / "mine" / "methods" / "toy.py").write_text(block("python"))
    (tmp_path / "toy.yaml").write_text(block("yaml"))
    env = {**os.environ, "SSL_PRETRAIN_PATH": str(tmp_path / "mine")}
    words = [sys.executable, "-W", "error", "-m", "ssl_pretrain.cli", "pretrain", "toy.yaml", "--out", "runs/toy"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "toy on test_resnet, 16 images, for 2 steps" in done.stdout
    assert (tmp_path / "runs" / "toy" / "artefact" / "model.safetensors").exists()
    words = [sys.executable, "-m", "ssl_pretrain.cli", "pretrain", "toy.yaml", "--method.size_pix", "64"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 64 and "did you mean '--method.size_px'" in " ".join(done.stderr.split())
