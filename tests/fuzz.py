"""Harms good files in a bounded child process and says what came of it.

    python tests/fuzz.py                      every format, 50,000 files in all
    python tests/fuzz.py voc --count 200      200 files of one format
    python tests/fuzz.py voc --case 17 --keep FOLDER     one case again, its files left in FOLDER

A case is a pure function of (format, word): a number is a mutation by a keyed draw, anything else a scenario
(`fifo/0`: the first label file is a pipe). The child may take 5 s of processor time a case (the kernel ends it), 3 GiB
more than it starts with, and no core dump; a child that neither speaks nor works for 5 s waits for something that will
not come, and the parent ends it. After an end of either kind the next child goes on behind that case.
Every file that is opened meanwhile is noted by an audit hook: it must lie in the data folder or be Python's own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_mutations
from fuzz_corpus import FORMATS, Format
from fuzz_mutations import Change, Files, Special

from ssl_pretrain.data.files import Rejected
from ssl_pretrain.errors import SslPretrainError

CPU_S = 5.0
SILENT_S = 5.0
MEMORY_BYTES = 3 << 30
CLOSED = (".zip", ".tar", ".tgz", ".gz", ".7z", ".pkl", ".pickle", ".npy", ".pt", ".pth", ".joblib")
"""Never opened in a data folder: archives and what unpickles."""
TOTAL = 50_000


@dataclass
class Report:
    """What came of the cases of one format."""

    name: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[tuple[str, str]] = field(default_factory=list)
    """(word of the case, what happened)."""
    hangs: list[tuple[str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    peak_bytes: int = 0
    longest_problem: int = 0

    def line(self) -> str:
        counts = ", ".join(f"{count} {word}" for word, count in sorted(self.outcomes.items()))
        return (
            f"{self.name:16} {self.tried:6} tried: {counts}; {len(self.crashes)} crashes, {len(self.hangs)} hangs; "
            f"slowest {self.slowest[0]:.2f} s ({self.slowest[1]}), peak {self.peak_bytes >> 20} MiB"
        )


# --- the parent -------------------------------------------------------------------------------------------------------


def fuzz(name: str, words: Iterable[object], cpu_s: float = CPU_S, silent_s: float = SILENT_S) -> Report:
    """Tries the cases of a format, each in a child that may die of it."""
    report, left = Report(name), [str(word) for word in words]
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        while left:
            left = _child(report, left, Path(folder), cpu_s, silent_s)
            subprocess.run(["rm", "-rf", f"{folder}/case"], check=True)  # shutil's own recurses, and gives up far down
    return report


def _child(report: Report, words: list[str], folder: Path, cpu_s: float, silent_s: float) -> list[str]:
    """One child's life; what it did not come to."""
    command = [sys.executable, __file__, report.name, "--child", str(folder), "--cpu-s", str(cpu_s)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        feeding = json.dumps(words).encode()
        (folder / "words.json").write_bytes(feeding)
        child.stdin.close()
        done, current, rest, silent, spent = 0, None, b"", False, -1
        while True:
            if not select.select([child.stdout], [], [], silent_s)[0]:
                state, ticks = _state(child.pid)
                if current is not None and state in "SD" and ticks == spent:  # on a busy machine silence is no hang
                    silent = True
                    child.kill()
                    break
                spent = ticks
                continue
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                record = json.loads(line)
                current = record["word"]
                if "outcome" in record:
                    done, current = done + 1, ""
                    _note(report, record)
        code = child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()[-3:]
    if not current and done == len(words):
        return []
    if not current:
        raise RuntimeError(f"the child of {report.name} ended between cases, code {code}: {' / '.join(said)}")
    report.tried += 1
    if silent or code == -signal.SIGPROF:
        report.hangs.append((current, "waits" if silent else f"more than {cpu_s:g} s of processor time"))
    else:
        report.crashes.append((current, f"the process ended with {code}: {' / '.join(said)[-500:]}"))
    return words[done + 1 :]


def _state(pid: int) -> tuple[str, int]:
    """Of a process: `R` runs or would, `S` and `D` wait; and its processor time in ticks."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return words[0], int(words[11]) + int(words[12])


def _note(report: Report, record: dict[str, Any]) -> None:
    report.tried += 1
    report.outcomes[record["outcome"]] += 1
    if record["outcome"] == "crash":
        report.crashes.append((record["word"], record["detail"]))
    report.slowest = max(report.slowest, (record["cpu_s"], record["word"]))
    report.peak_bytes = max(report.peak_bytes, record["peak_bytes"])


def by_cause(crashes: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The words of the cases by what happened."""
    causes: dict[str, list[str]] = {}
    for word, what in crashes:
        causes.setdefault(what, []).append(word)
    return causes


# --- the child --------------------------------------------------------------------------------------------------------


class Audit:
    """Notes what is opened, run or unpickled while it is on. A hook cannot be taken off again, so it has a switch."""

    EVENTS = frozenset(
        ["pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
         "socket.getaddrinfo", "shutil.unpack_archive", "shutil.copyfile", "os.remove", "os.rename", "os.mkdir",
         "os.rmdir",
         "os.link", "os.symlink", "os.truncate", "os.chmod", "urllib.Request", "webbrowser.open"]
    )  # fmt: skip

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        self.inside: tuple[str, ...] = ()
        """Folders whose files may be opened."""
        code = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), os.path.dirname(os.__file__))
        self.code = (*(os.path.realpath(folder) + os.sep for folder in code), "/proc/", "/sys/")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.EVENTS:
            self.seen.append(f"{event} {values!r:.200}")
        elif event == "open" and not isinstance(values[0], int) and values[0] is not None:
            self.on = False
            self._opened(os.fsdecode(values[0]), values[1], values[2])
            self.on = True
        elif event in ("os.scandir", "os.listdir") and values[0] is not None and not isinstance(values[0], int):
            path = os.path.abspath(os.fsdecode(values[0])) + os.sep
            if not path.startswith(self.inside + self.code):
                self.seen.append(f"lists {path!r:.200}")

    def _opened(self, name: str, mode: str | None, flags: int) -> None:
        path = os.path.abspath(name)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
        if writes or (mode and set(mode) & set("wax+")):
            self.seen.append(f"writes {path!r:.200}")
        elif path.startswith(self.inside):
            if path.lower().endswith(CLOSED):
                self.seen.append(f"opens {path!r:.200}")
        elif not os.path.realpath(path).startswith(self.code):
            self.seen.append(f"opens {path!r:.200}, which is outside")


def child(format: Format, folder: Path, cpu_s: float) -> None:
    """Tries the words in `words.json`, a line before and after each."""
    words = json.loads((folder / "words.json").read_bytes())
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    audit = Audit()
    tree = Tree(folder / "case" / "data", format)
    format.prepare()
    audit.inside = (str(tree.root) + os.sep, str(tree.root))
    warnings.simplefilter("error")
    bound(cpu_s)
    for word in words:
        out.write(json.dumps({"word": word}).encode() + b"\n")
        changes = changes_of(format, word, tree.files)
        tree.apply(changes)
        began = time.process_time()
        outcome, detail = attempt(format, tree.root, changes, audit, cpu_s)
        spent = time.process_time() - began
        tree.restore()
        record = {"word": word, "outcome": outcome, "detail": detail, "cpu_s": spent, "peak_bytes": peak_bytes()}
        out.write(json.dumps(record).encode() + b"\n")


def bound(cpu_s: float) -> None:
    """Memory, core dumps; open files too, so that none is forgotten open."""
    with open("/proc/self/statm", "rb") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def peak_bytes() -> int:
    """Of this process; `getrusage` would count its parent's before the exec."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def attempt(format: Format, root: Path, changes: dict[str, Change], audit: Audit, cpu_s: float) -> tuple[str, str]:
    """`read` or `refused`, or `crash` and what happened."""
    audit.seen.clear()
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # the kernel ends the process, also in the middle of C code
    audit.on = True
    try:
        format.attempt(root, [name for name, change in changes.items() if isinstance(change, bytes)])
        outcome, detail = "read", ""
    except (SslPretrainError, Rejected) as error:
        said = error.detail if isinstance(error, Rejected) else str(error)
        outcome, detail = "refused", said
        if not said.isprintable() or not said:
            outcome, detail = "crash", f"{type(error).__name__} is not one printable line: {said!r:.300}"
    except BaseException as error:
        outcome, detail = "crash", _cause(error)
    audit.on = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    if audit.seen and outcome != "crash":
        outcome, detail = "crash", f"the audit: {audit.seen[0]}"
    return outcome, detail


def _cause(error: BaseException) -> str:
    """Exception and the lines of the package that it came through, nearest last."""
    places = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__))
    own = [
        f"{Path(file).name}:{line}" for file, line in places if "ssl_pretrain" in file and "site-packages" not in file
    ][-3:]
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first[:160]!r} at {' > '.join(own)}"


def changes_of(format: Format, word: str, files: Files) -> dict[str, Change]:
    """What a case does to the files of its format."""
    if word.isdigit():
        return fuzz_mutations.mutated(files, format.targets(files), fuzz_mutations.Draw(format.name, int(word)))
    kind, _, place = word.partition("/")
    return SCENARIOS[kind](format, files, int(place or 0))


class Tree:
    """A data set on disk that is harmed and made good again."""

    def __init__(self, root: Path, format: Format) -> None:
        self.root = root
        self.files = format.files()
        self._made: list[str] = []
        """Paths that a case made, folders too, in that order."""
        self._changed: list[str] = []
        for name, data in self.files.items():
            self._put(name, data)
        self._made.clear()

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _put(self, name: str, change: Change) -> None:
        path = self._path(name)
        parts = path.split("/")
        for i in range(2, len(parts)):  # os.makedirs recurses
            folder = "/".join(parts[:i])
            if not os.path.lexists(folder):
                os.mkdir(folder)
                self._made.append(folder)
        if name not in self.files:
            self._made.append(path)
        if isinstance(change, bytes):
            with open(path, "wb") as file:
                file.write(change)
        elif isinstance(change, Special):
            self._put_special(path, change.kind)

    def _put_special(self, path: str, kind: str) -> None:
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "socket":
                with socket.socket(socket.AF_UNIX) as bound:  # its name must be short: bound from its own folder
                    here = os.getcwd()
                    os.chdir(os.path.dirname(path))
                    try:
                        bound.bind(os.path.basename(path)[:100])
                    finally:
                        os.chdir(here)
            case "zero":
                os.symlink("/dev/zero", path)
            case "loop":
                os.symlink(os.path.basename(path), path)
            case "dangling":
                os.symlink("nowhere", path)
            case "folder":
                os.mkdir(path)
            case "up":
                os.symlink("..", path)
            case _:
                raise ValueError(kind)

    def apply(self, changes: dict[str, Change]) -> None:
        """Makes the changes; a name that this file system cannot have is left out."""
        for name, change in changes.items():
            if name in self.files:
                os.remove(self._path(name))
                self._changed.append(name)
            if change is not None:
                try:
                    self._put(name, change)
                except OSError:
                    continue

    def restore(self) -> None:
        """As at first."""
        for path in [*(self._path(name) for name in self._changed), *reversed(self._made)]:
            if os.path.isdir(path) and not os.path.islink(path):
                os.rmdir(path)
            elif os.path.lexists(path):
                os.remove(path)
        self._made.clear()
        for name in self._changed:
            self._put(name, self.files[name])
        self._changed.clear()
        self._made.clear()


# --- scenarios: one kind of harm, at each label file in turn ----------------------------------------------------------


def _at(kind: str) -> Any:
    return lambda format, files, place: {format.labels(files)[place]: Special(kind)}


def _filled(piece: bytes, total: int) -> Any:
    return lambda format, files, place: {format.labels(files)[place]: piece * (total // len(piece))}


HOSTILE = ("../outside.png", "../../outside.png", "/etc/passwd", "..\\outside.png", "images/../../outside.png",
           "./../outside.png", "../data/../outside.png", "a/../../../outside.png")  # fmt: skip
UPWARDS = ("..", "../..", "/etc", "/", "C:")


def _traversal(format: Format, files: Files, place: int) -> dict[str, Change]:
    """Every label file names an image that exists, but outside; the later places do it with folders' names."""
    images = {name for name in files if name not in format.labels(files)}
    if place < len(HOSTILE):
        named = {word for name in images for word in (name, Path(name).name, Path(name).stem)}
        hostile = HOSTILE[place]
    else:
        named = {str(folder) for name in images for folder in Path(name).parents} - {"."}
        hostile = UPWARDS[place - len(HOSTILE)]
    changes: dict[str, Change] = {}
    for name in format.labels(files):
        data = files[name]
        for word in sorted(named, key=len, reverse=True):
            data = data.replace(word.encode(), b"\0")
        changes[name] = data.replace(b"\0", hostile.encode())
    outside = files[min(images)] if images else b"outside"
    return {**changes, "../outside.png": outside, "../../outside.png": outside}


def _lying_about(named: dict[str, bytes]) -> Any:
    """The same strange files in every folder of the data set."""

    def changes(format: Format, files: Files, place: int) -> dict[str, Change]:
        folders = {""} | {f"{parent}/" for name in files for parent in Path(name).parents if str(parent) != "."}
        return {f"{folder}{name}": data for folder in folders for name, data in named.items()}

    return changes


def _many(format: Format, files: Files, place: int) -> dict[str, Change]:
    """A hundred thousand label files, of the images that there are or not."""
    name = Path(format.labels(files)[0])
    return {str(name.with_name(f"n{i:06d}{name.suffix}")): files[str(name)] for i in range(100_000)}


def _archives() -> dict[str, bytes]:
    import io
    import tarfile
    import zipfile

    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr("images/a.png", "x")
    with tarfile.open(fileobj=tarred, mode="w:gz") as tape:
        tape.addfile(tarfile.TarInfo("../../evil.txt"))
    return {"a.zip": zipped.getvalue(), "a.tar.gz": tarred.getvalue(), "a.tgz": tarred.getvalue()}


def _far_down(format: Format, files: Files, place: int) -> dict[str, Change]:
    """A label file 1,200 folders further down."""
    name = Path(format.labels(files)[place])
    return {str(Path(*name.parent.parts, *["d"] * 1200, name.name)): files[str(name)]}


_PICKLED = b"cos\nsystem\n(S'false'\ntR."
_OBJECTS = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n".ljust(128)
SCENARIOS: dict[str, Any] = {
    "good": lambda format, files, place: {},
    **{kind: _at(kind) for kind in ("fifo", "socket", "zero", "loop", "dangling", "folder", "up")},
    "traversal": _traversal,
    "archives": _lying_about(_archives()),
    "pickles": _lying_about(
        {"a.pkl": _PICKLED, "a.npy": _OBJECTS + _PICKLED,
         "a.pt": _PICKLED, "a.joblib": _PICKLED}
    ),
    "many": _many,
    "far_down": _far_down,
    "garbage": _filled(b"\xa7\x00garbage<{[\n,;", 100 << 20),
    "text": _filled(b"1 2 cell\n", 60 << 20),
    "oneline": _filled(b"0.5 ", 60 << 20),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="all of them unless named")
    parser.add_argument("--count", type=int, help="files of each; 50,000 in all by their shares unless given")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-s", type=float, default=CPU_S, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        from fuzz_faults import FAULTS

        name = given.formats[0]
        child(FAULTS.get(name) or FORMATS[name], given.child, given.cpu_s)
        return 0
    if given.case is not None:
        return _again(FORMATS[given.formats[0]], given.case, given.keep)
    bad, chosen = 0, given.formats or list(FORMATS)
    for name in chosen:
        count = given.count or share(name, chosen, TOTAL)
        report = fuzz(name, range(given.first, given.first + count))
        print(report.line(), flush=True)
        for kind, found in (("crash", report.crashes), ("hang", report.hangs)):
            for what, words in by_cause(found).items():
                bad += len(words)
                print(f"    {kind} {len(words)}x, such as {name} --case {words[0]}: {what}", flush=True)
    return int(bad > 0)


def share(name: str, chosen: Sequence[str], total: int) -> int:
    """How many of `total` files fall to a format, by the weights of those chosen."""
    return max(1, round(total * FORMATS[name].weight / sum(FORMATS[other].weight for other in chosen)))


def _again(format: Format, word: str, keep: Path | None) -> int:
    """One case without bounds, with its traceback."""
    root = (keep or Path(tempfile.mkdtemp(prefix="fuzz-"))).absolute() / "data"
    tree = Tree(root, format)
    changes = changes_of(format, word, tree.files)
    tree.apply(changes)
    for name, change in changes.items():
        print(f"{root}/{name}".encode("utf-8", "backslashreplace").decode(), f"{change!r:.300}")
    format.prepare()
    warnings.simplefilter("error")
    format.attempt(root, [name for name, change in changes.items() if isinstance(change, bytes)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
