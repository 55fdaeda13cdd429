"""Files from strangers run no code and take no memory; a run keeps its files to itself and talks to nobody.

Each hostile file is met twice, the second time with `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` in the environment, which
turns torch's own default off.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import VIT, small
from faults import Forks, forks

from ssl_pretrain import load_backbone, pretrain
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.train import recipe, source
from ssl_pretrain.train.checkpoint import Checkpoints

PACKAGE = Path(__file__).parents[1] / "ssl_pretrain"
OVERRIDE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture(scope="session")
def pool() -> Forks:
    return forks()


@pytest.fixture(params=["", "1"], ids=["plain", "override"])
def override(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the variable that makes torch's default unsafe."""
    if request.param:
        monkeypatch.setenv(OVERRIDE, request.param)
    return str(request.param)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What the hostile files would make if any of their code ran."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was run"


class System:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


class Evaluated(System):
    def __reduce__(self) -> Any:
        return builtins.eval, (f"open({str(self.canary)!r}, 'w').close()",)


class Stated(System):
    """Code of its own module runs as its state is set; the module is made of this very file."""

    def __getstate__(self) -> dict[str, str]:
        return {"canary": str(self.canary)}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["canary"]).touch()


def hostile(kind: str, canary: Path) -> Any:
    made: dict[str, Any] = {
        "system": System(canary), "eval": Evaluated(canary), "setstate": Stated(canary), "numpy": np.float64(1.0),
    }  # fmt: skip
    return made[kind]


PICKLES = "system", "eval", "setstate", "numpy"


def one_line(error: BaseException) -> str:
    words = str(error)
    assert "\n" not in words and len(words) < 1000 and words
    return words


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    """Opened as trusting programs open them, they do run code."""
    for kind in ("system", "eval", "setstate"):
        canary = tmp_path / kind
        torch.save({"x": hostile(kind, canary)}, tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert canary.exists(), kind


@pytest.fixture(scope="module")
def run(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrain(small("simclr", steps=1), data=pack.folder, out=out)
    return out


def copied(run: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, to))


# Pickles


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("form", ["raw", "zip"])
def test_a_pickle_as_weights_of_an_artefact(
    kind: str, form: str, run: Path, tmp_path: Path, canary: Path, override: str
) -> None:
    mine = copied(run, tmp_path / "mine")
    weights = mine / "artefact" / "model.safetensors"
    if form == "raw":
        weights.write_bytes(pickle.dumps(hostile(kind, canary)))
    else:
        torch.save(hostile(kind, canary), weights)
    card = json.loads((mine / "artefact" / "config.json").read_text())
    card["ssl_pretrain"]["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (mine / "artefact" / "config.json").write_text(json.dumps(card))
    with pytest.raises(DataError) as error:
        load_backbone(mine)
    one_line(error.value)


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors"])
def test_a_pickle_as_weights_to_start_from(kind: str, suffix: str, tmp_path: Path, canary: Path, override: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save({"conv1.weight": torch.zeros(1), "x": hostile(kind, canary)}, path)
    with pytest.raises((UsageError, DataError)) as error:
        source.opened(str(path), "resnet18")
    one_line(error.value)
    path.write_bytes(pickle.dumps(hostile(kind, canary)))
    with pytest.raises((UsageError, DataError)) as error:
        source.opened(str(path), "resnet18")
    one_line(error.value)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_as_a_checkpoint_with_a_right_marker(
    kind: str, run: Path, pack: Pack, tmp_path: Path, canary: Path, override: str
) -> None:
    mine = copied(run, tmp_path / "mine")
    planted(mine, {**saved(mine), "step": 9, "x": hostile(kind, canary)})
    with pytest.raises(DataError) as error:
        pretrain(small("simclr", steps=10), data=pack.folder, out=mine)
    assert "step_000000009.pt" in one_line(error.value)


def saved(run: Path) -> dict[str, Any]:
    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    return found


def planted(run: Path, content: Any, step: int = 9) -> Path:
    """A checkpoint whose marker is right, as only its writer could have made it."""
    path = run / "checkpoints" / f"step_{step:09d}.pt"
    torch.save(content, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"step": step, "bytes": path.stat().st_size, "sha256": sha256}))
    return path


@pytest.mark.parametrize("content", [[], {}, {"step": "9"}, "text", torch.zeros(1), {"step": None}], ids=str)
def test_a_checkpoint_that_is_none(content: Any, run: Path, pack: Pack, tmp_path: Path) -> None:
    mine = copied(run, tmp_path / "mine")
    planted(mine, content)
    with pytest.raises(DataError) as error:
        pretrain(small("simclr", steps=10), data=pack.folder, out=mine)
    one_line(error.value)


# Bombs


def bomb(*shape: int) -> torch.Tensor:
    """A tensor of one stored value and any shape: 1.5 kB in a file."""
    return torch.zeros(1).as_strided(shape, [0] * len(shape))


@pytest.mark.parametrize("name", ["conv1.weight", "pos_embed"])
def test_a_tensor_of_terabytes_in_a_small_file(name: str, tmp_path: Path, override: str) -> None:
    """2^40 positions are a square, so resampling them would be tried."""
    path = tmp_path / "x.pt"
    torch.save({name: bomb(1, 2**40, 192)}, path)
    assert path.stat().st_size < 4000
    with pytest.raises(DataError, match=f"{name} claims more values than the file holds") as error:
        source.opened(str(path), "resnet18")
    one_line(error.value)


@pytest.mark.parametrize("place", ["method", "optimizer"])
def test_a_checkpoint_of_terabytes(place: str, run: Path, pack: Pack, tmp_path: Path) -> None:
    mine = copied(run, tmp_path / "mine")
    content = saved(mine)
    content["step"] = 9
    if place == "method":
        content["method"] = {name: bomb(2**40) for name in content["method"]}
    else:
        content["optimizer"]["state"][0]["exp_avg"] = bomb(2**40).to(torch.float32)
    planted(mine, content)
    with pytest.raises(DataError, match="claims more values than the file holds"):
        pretrain(small("simclr", steps=10), data=pack.folder, out=mine)


def header(claims: dict[str, Any], size: int | None = None) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


SAFETENSORS = {
    "empty": b"", "text": b"no weights at all", "huge header": header({}, 1 << 62), "truncated": header({}, 500),
    "offsets": header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}),
    "backwards": header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}) + bytes(8),
    "shape": header({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}) + bytes(4),
    "overflow": header({"w": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 0]}}),
    "overlap": header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                       "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}) + bytes(6),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_lie(name: str, tmp_path: Path, run: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises((UsageError, DataError)) as error:
        source.opened(str(path), "resnet18")
    one_line(error.value)
    mine = copied(run, tmp_path / "mine")
    (mine / "artefact" / "model.safetensors").write_bytes(SAFETENSORS[name])
    with pytest.raises(DataError) as error:
        load_backbone(mine)
    one_line(error.value)


LIMITED = """
import resource, sys
import torch
from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.train import source
from ssl_pretrain.train.recipe import load
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        load(path, ()) if path.suffix == ".yaml" else source.opened(str(path), "resnet18")
        print("taken", path.name)
    except SslPretrainError as error:
        print("refused", path.name, len(str(error)), str(error).count(chr(10)))
    except BaseException as error:
        print("broke", path.name, type(error).__name__, str(error)[:200])
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def alias_bomb(levels: int) -> str:
    """One value; ten aliases of the level before on each level: 10^levels values from a few hundred bytes."""
    lists = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels + 1)]
    return f"[{', '.join(lists)}]"


def bombs(folder: Path) -> list[Path]:
    """Files that are small, and large where they are believed."""
    folder.mkdir()
    torch.save({"w": bomb(2**40)}, folder / "stride.pt")
    torch.save({"w": torch.zeros(1 << 24)}, folder / "plain.pt")
    with (
        zipfile.ZipFile(folder / "plain.pt") as plain,
        zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for item in plain.infolist():
            packed.writestr(item.filename, plain.read(item))
    (folder / "plain.pt").unlink()
    (folder / "huge.safetensors").write_bytes(SAFETENSORS["huge header"])
    method = "method: {name: simclr}\n"
    bomb_at = {
        "unknown": "a: {}", "data": "data: {}", "section": "train: {}", "value": "train: {{lr: {}}}",
        "name": "backbone: {}", "list": "views: {{extras: {}}}", "method": "method: {{size_px: {}}}",
    }  # fmt: skip
    for name, use in bomb_at.items():
        own = "" if name == "method" else method
        (folder / f"alias_{name}.yaml").write_text(f"{own}{use.format(alias_bomb(8))}\n")
    (folder / "merge.yaml").write_text("a: &a {" + ", ".join(f"k{i}: 0" for i in range(9)) + "}\n" + method)
    (folder / "large.yaml").write_text(method + "# " + "x" * (1 << 20))
    (folder / "deep.yaml").write_text(method + "data: " + "[" * 50_000)
    (folder / "digits.yaml").write_text(method + "seed: " + "9" * 5000 + "\n")
    (folder / "recursive.yaml").write_text(f"{method}train: &t {{lr: *t}}\n")
    return sorted(folder.iterdir())


def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """In a process that may have 1 GiB more than it began with."""
    paths = bombs(tmp_path / "bombs")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, paths)], capture_output=True, text=True, timeout=300,
        env={**os.environ, OVERRIDE: "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    bad = [line for line in lines[:-1] if not (line.startswith("refused") and line.endswith(" 0"))]
    assert len(lines) == len(paths) + 1 and not bad, (bad, done.stderr[-1000:])
    assert all(int(line.split()[2]) < 1000 for line in lines[:-1]) and int(lines[-1].split()[1]) < 300


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch {canary}']", "data: !!python/name:os.system",
        "data: !!python/object/new:subprocess.Popen [['touch', '{canary}']]", "data: !!python/module:antigravity",
    ],
)  # fmt: skip
def test_yaml_that_wants_objects(text: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: {name: simclr}\n" + text.replace("{canary}", str(canary)))
    with pytest.raises(UsageError) as error:
        recipe.load(path)
    one_line(error.value)


def test_a_recipe_reads_no_environment(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for word in ("$SECRET", "${SECRET}", "${oc.env:SECRET}", "%SECRET%", "~/x"):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"method": {"name": "simclr"}, "backbone": "test_resnet", "data": word}))
        assert recipe.load(path).top.data == word


# What the package itself does


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def says(call: ast.Call, name: str) -> Any:
    """The constant that a call gives to a keyword; None where it does not."""
    found = [word.value for word in call.keywords if word.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


PICKLES_IN = {
    "export/detectron2.py": "Detectron2 reads nothing but pickles; written, never read",
    "train/source.py": "for the name of the error that torch raises",
}
ALLOWED_NETWORK = {
    "train/lock.py": "the name of this machine",
    "train/setup.py": "listens on loopback",
    "backbones/timm.py": "published weights, where the recipe names them",
}  # fmt: skip
UNSAFE_YAML = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader",
               "yaml.FullLoader", "yaml.load_unsafe"}  # fmt: skip


def test_no_line_of_the_package_could_run_what_a_file_says() -> None:
    """The lint of the security rules; `torch.load` always says `weights_only=True` itself."""
    loads, found = 0, []
    for name, tree in trees():
        for node in ast.walk(tree):
            at = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for module in modules:
                    top = module.split(".")[0]
                    if top in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pandas"):
                        found += [] if name in PICKLES_IN else [f"{at} imports {module}"]
                    if top in ("urllib", "requests", "http", "httpx", "aiohttp", "ftplib", "socket", "socketserver",
                               "smtplib", "paramiko", "wandb", "mlflow", "sentry_sdk", "huggingface_hub"):  # fmt: skip
                        found += [] if name in ALLOWED_NETWORK else [f"{at} imports {module}"]
                    if module in ("torch.hub", "omegaconf"):
                        found.append(f"{at} imports {module}")
            if not isinstance(node, ast.Call):
                continue
            called = dotted(node.func)
            if called in ("torch.load", "load_from_checkpoint"):
                loads += 1
                found += [] if says(node, "weights_only") is True else [f"{at} torch.load without weights_only=True"]
            if called in ("np.load", "numpy.load", "np.save", "np.savez") and says(node, "allow_pickle"):
                found.append(f"{at} allows pickles")
            if called in UNSAFE_YAML:
                safe = any(ast.unparse(word.value) in ("yaml.BaseLoader", "yaml.SafeLoader") for word in node.keywords)
                found += [] if called == "yaml.load" and safe else [f"{at} {called}"]
            if called.endswith(("expandvars", "extractall")) or called in ("eval", "exec", "os.system", "os.popen"):
                found.append(f"{at} {called}")
            if says(node, "shell") is True or called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
                found.append(f"{at} {called}")
            if called.startswith("torch.hub.") and name != "backbones/timm.py":
                found.append(f"{at} {called}")
    assert not found
    assert loads >= 2


# Files and sockets of a run


def test_only_the_owner_can_read_a_run(pack: Pack, tmp_path: Path) -> None:
    """As the umask of most machines would let everybody."""
    before = os.umask(0o022)
    try:
        out = tmp_path / "runs" / "run"
        pretrain({**small("simclr", steps=5), "probe": {"data": "synthetic:12:1", "every_epochs": 1, "size_px": 32}},
                 data=pack.folder, out=out)  # fmt: skip
    finally:
        os.umask(before)
    modes = {str(p.relative_to(out)): p.stat().st_mode & 0o777 for p in [out, *out.rglob("*")]}
    open_ones = {name: oct(mode) for name, mode in modes.items() if mode & 0o077}
    assert not open_ones


def listening(pids: list[int]) -> set[str]:
    """Addresses, in hexadecimal as the kernel writes them, on which these processes wait for connections."""
    held = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                held.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in held and (words[3] == "0A" or table.startswith("udp")):
                found.add(words[1].rpartition(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_the_table_of_sockets_is_read_rightly() -> None:
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)):
        assert listening([os.getpid()]) >= {"0100007F", "00000000"}


def test_one_process_listens_on_nothing(pool: Forks, pack: Pack, tmp_path: Path) -> None:
    child = pool.start(small("simclr", steps=1000), pack.folder, tmp_path / "run", step_s=0.05)
    log, seen, give_up = tmp_path / "run" / "metrics.jsonl", set(), time.monotonic() + 120
    while not (log.exists() and log.read_text().count("train/loss") >= 2):
        seen |= listening([child.pid])
        assert child.poll() is None and time.monotonic() < give_up, child.text()[-2000:]
        time.sleep(0.01)
    child.kill()
    assert not seen


def test_two_processes_of_this_machine_listen_on_loopback_only(pack: Pack, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(small("simclr", VIT, steps=100000, devices=2, accelerator="cpu")))
    words = [
        sys.executable,
        "-m",
        "ssl_pretrain.cli",
        "pretrain",
        str(path),
        "--data",
        str(pack.folder),
        "--out",
        str(out),
    ]
    env = {key: value for key, value in os.environ.items() if key not in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR")}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    seen: set[str] = set()
    try:
        give_up = time.monotonic() + 200
        while not ((out / "metrics.jsonl").exists() and "train/loss" in (out / "metrics.jsonl").read_text()):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            seen |= listening([process.pid, *map(int, children)])
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(60)
    assert seen and not seen - LOOPBACK
