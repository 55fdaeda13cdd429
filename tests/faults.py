"""Children that are made to fail: a server has imported everything once and forks a process for each run.

A test asks by one line of JSON for a run (`Forks.start`) and gets a process that it may kill. What is to go wrong
inside it is part of the request: see `Faults`. `Sites` reaches into every call by which Python writes under a folder.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Site = tuple[str, str, int]
"""An operation, the file's name within the folder (temporary ones end in `~`), and how often that was done before."""
Mode = Literal["once", "always", "kill", "after"]
ROOT = Path(__file__).parents[1]


@dataclass
class Faults:
    """What goes wrong in a child."""

    sites: list[Any] = field(default_factory=list)
    """`[folder, mode, site]`: the site fails once, or it and all after it, or the process is killed at or after it."""
    site_log: str = ""
    """Where every site is noted, one line of JSON each."""
    full: str = ""
    """While this file exists, nothing can be written under the folder of `sites`."""
    nan_steps: list[int] = field(default_factory=list)
    """Whose images are NaN until the run has gone back."""
    pad_bytes: int = 0
    """Added to the state of every checkpoint."""
    step_s: float = 0.0
    """Added to every step."""
    acknowledged: str = ""
    """Where each step is noted whose save has returned."""
    asked_on: list[int] = field(default_factory=list)
    """`[step, signal, ...]`: the process sends itself these in the middle of that step."""


# The test's side


class Child:
    """A forked run."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.forks, self.pid, self.log = forks, pid, log
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = self.forks.ask({"poll": self.pid})["code"]
        return self.code

    def wait(self, seconds: float = 120) -> int:
        """The exit code; a child that hangs fails the test."""
        give_up = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > give_up:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {self.text()[-2000:]}")
            time.sleep(0.005)
        return code

    def send(self, number: int) -> None:
        """A signal; the process is there until `poll` has told its end."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Forks:
    """The server's other end."""

    def __init__(self) -> None:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, recipe: dict[str, Any], data: Path, out: Path, *words: str, env: dict[str, str] | None = None,
        **faults: Any,
    ) -> Child:  # fmt: skip
        """`ssl_pretrain.pretrain` in a process of its own, which ends with the exit codes of the command line."""
        log = out.parent / f"{out.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        asked = {"recipe": recipe, "data": str(data), "out": str(out), "words": words, "log": str(log)}
        return Child(self, self.ask({**asked, "env": env or {}, "faults": asdict(Faults(**faults))})["pid"], log)

    def run(self, recipe: dict[str, Any], data: Path, out: Path, *words: str, **more: Any) -> int:
        """A run to its end; the exit code."""
        return self.start(recipe, data, out, *words, **more).wait()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@functools.cache
def forks() -> Forks:
    """One server for all tests of a session."""
    return Forks()


# The child's side


class Sites:
    """Counts the calls by which Python writes under a folder, and makes one of them fail or the last thing done.

    Python's own `open`, `os.open`, `os.write`, `os.fsync`, `os.replace`, `os.mkdir` and what is written to the files
    that they opened; `os.unlink` is not among them, as a full disk does not stop it.
    """

    def __init__(self, folder: Path, mode: Mode = "once", site: Site | None = None, log: str = "", full: str = ""):
        self.folder, self.mode, self.site, self.full = str(folder), mode, site, full
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self.counts: Counter[tuple[str, str]] = Counter()
        self.broken = self.done = False
        self.cut: set[str] = set()
        """Files to which half was written: their next write fails."""
        self.lock = threading.RLock()
        self.write, self.kill = os.write, os.kill

    def name(self, file: Any) -> str | None:
        """Within the folder, without what differs from run to run; None for other files."""
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
            if path == self.folder or path.startswith(self.folder + "/"):
                name = path.removesuffix(" (deleted)").removeprefix(self.folder).lstrip("/")
                name = re.sub(r"events\.out\..*", "events", name)
                return re.sub(r"(^|/)\.([^/]*)\.tmp-\d+$", r"\1\2~", name) or "."
        return None

    def reach(self, operation: str, name: str) -> bool:
        """Notes a site; returns whether it fails now."""
        with self.lock:
            site = operation, name, self.counts[operation, name]
            self.counts[operation, name] += 1
            if self.log is not None:
                self.write(self.log, json.dumps(site).encode() + b"\n")
            if self.broken or (self.full and os.path.exists(self.full)):
                return True
            if site != self.site or self.done:
                return False
            self.done, self.broken = True, self.mode == "always"
            return True

    def around(self, operation: str, name: str | None, call: Callable[[], Any]) -> Any:
        """A call that is a site: done or not, and whether the process lives on."""
        if name is None:
            return call()
        if not self.reach(operation, name):
            return call()
        if self.mode == "after":
            call()
        if self.mode in ("kill", "after"):
            self.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def writing(self, name: str | None, content: Any, write: Callable[[Any], int]) -> int:
        """A write: where it fails, half arrives first, as a kernel does it, and the next one of that file raises."""
        if name is None:
            return write(content)
        content = memoryview(content).cast("B")
        if name in self.cut:
            self.cut.discard(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self.reach("write", name):
            return write(content)
        half = len(content) if self.mode == "after" else len(content) // 2
        if half:
            write(content[:half])
        if self.mode in ("kill", "after"):
            self.kill(os.getpid(), signal.SIGKILL)
        if half and not self.broken and not self.full:
            self.cut.add(name)
            return half
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        sites, plain = self, builtins.open
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "rename", "mkdir")}

        class Raw(io.FileIO):
            def write(self, content: Any) -> int:
                return sites.writing(sites.name(self.fileno()), content, super().write)

        def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                   newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
            name = sites.name(file)
            if name is None or not set(mode) & set("wax+"):
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            make = functools.partial(Raw, file, mode.replace("b", "").replace("t", ""), closefd, opener)
            raw = make() if isinstance(file, int) else sites.around("open", name, make)
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            call = functools.partial(real["open"], path, flags, mode, dir_fd=dir_fd)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return sites.around("open", sites.name(path) if writes else None, call)

        def moved(name: str) -> Callable[..., None]:
            def move(source: Any, target: Any) -> None:
                sites.around("rename", sites.name(target), lambda: real[name](source, target))

            return move

        def mkdir(path: Any, mode: int = 0o777) -> None:
            new = not os.path.exists(path)
            sites.around("mkdir", sites.name(path) if new else None, lambda: real["mkdir"](path, mode))

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.open, os.replace, os.rename, os.mkdir = os_open, moved("replace"), moved("rename"), mkdir  # type: ignore
        os.write = lambda to, content: sites.writing(sites.name(to), content, lambda part: real["write"](to, part))
        pwrite = os.pwrite
        os.pwrite = lambda to, content, at: sites.writing(sites.name(to), content, lambda part: pwrite(to, part, at))
        os.fsync = lambda to: sites.around("fsync", sites.name(to), lambda: real["fsync"](to))


def prepare(faults: Faults) -> None:
    """Makes this process one in which the faults happen."""
    from ssl_pretrain.train import checkpoint, keeper, loop
    from ssl_pretrain.train.feed import Feed

    keeper.RETRY_S = 0.05
    if faults.sites:
        folder, mode, site = faults.sites
        Sites(Path(folder), mode, tuple(site) if site else None, faults.site_log, faults.full).install()
    drawn, state, save = Feed.views, loop.state, checkpoint.Checkpoints.save

    def views(self: Feed, step: int) -> Iterator[Any]:
        time.sleep(faults.step_s)
        if faults.asked_on[:1] == [step]:
            for number in faults.asked_on[1:]:
                os.kill(os.getpid(), number)
        for part in drawn(self, step):
            if step in faults.nan_steps and not self.detour:
                for crops in part.crops.values():
                    crops.fill_(float("nan"))
            yield part

    def padded(run: Any) -> dict[str, Any]:
        import torch

        return {**state(run), "padding": torch.zeros(faults.pad_bytes, dtype=torch.uint8)}

    def saved(self: Any, step: int, content: dict[str, Any]) -> Path:
        path = save(self, step, content)
        with open(faults.acknowledged, "a") as file:
            file.write(f"{step}\n")
        return path

    Feed.views = views  # type: ignore[method-assign]
    if faults.pad_bytes:
        loop.state = padded
    if faults.acknowledged:
        checkpoint.Checkpoints.save = saved  # type: ignore[method-assign]


def _child(request: dict[str, Any]) -> int:
    """One run, in a forked process; the exit code."""
    from rich.console import Console

    from ssl_pretrain import pretrain
    from ssl_pretrain.errors import SslPretrainError

    os.environ.update(request["env"])
    prepare(Faults(**request["faults"]))
    console = Console(soft_wrap=True)
    try:
        words = tuple(request["words"])
        pretrain(request["recipe"], data=request["data"], out=request["out"], words=words, console=console)
    except SslPretrainError as error:
        console.print(f"ssl-pretrain: {error}", highlight=False, markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _forked(request: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        code = _child(request)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    """Reads requests until the test is over. No thread may run here: a fork would not take it along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    from rich.console import Console

    torch.set_num_threads(1)
    from ssl_pretrain.train import loop

    with tempfile.TemporaryDirectory() as folder:  # what is imported and compiled at the first run only
        made = {"batch_size": 2, "steps": 1, "optimizer": "adamw"}
        loop.pretrain(
            {"backbone": "test_resnet", "method": {"name": "simclr", "size_px": 32}, "train": made},
            data="synthetic:4", out=f"{folder}/run", console=Console(quiet=True),
        )  # fmt: skip


def main() -> None:
    _serve()
    codes: dict[int, int] = {}
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid in running:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.discard(pid)
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": codes.get(pid)}
        else:
            answer = {"pid": _forked(request)}
            running.add(answer["pid"])
            codes.pop(answer["pid"], None)
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
