"""One writer per folder: on this machine by the kernel, on others by the beats in the file."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_pretrain.errors import WriteError
from ssl_pretrain.train import lock
from ssl_pretrain.train.lock import FILE, FRESH_S, Lock, locked

HOLDS = """
import sys, time
from pathlib import Path
from ssl_pretrain.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def beat(folder: Path, host: Any = "another-host", pid: Any = 7, age_s: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps({"host": host, "pid": pid, "time": time.time() - age_s}))


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def test_a_second_process_is_refused_in_one_line_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        for _ in range(3):  # and the refused do not disturb the holder
            with pytest.raises(WriteError) as error, locked(tmp_path / "run"):
                pass
            words = str(error.value)
            assert f"pid {process.pid} on {socket.gethostname()}" in words and "\n" not in words
            assert error.value.exit_code == 74 and "choose another --out" in words
        assert written(tmp_path / "run")["pid"] == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with locked(tmp_path / "run"):
        assert written(tmp_path / "run")["pid"] == os.getpid()


def test_two_locks_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(WriteError), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / FILE).read_text() == ""  # nobody's


def test_another_machine_is_believed_while_its_last_beat_is_fresh(tmp_path: Path) -> None:
    beat(tmp_path / "run", age_s=FRESH_S - 20)
    with pytest.raises(WriteError, match=r"pid 7 on another-host, 4[0-9] s ago"), locked(tmp_path / "run"):
        pass
    beat(tmp_path / "run", age_s=FRESH_S + 1)
    with locked(tmp_path / "run"):
        assert written(tmp_path / "run")["host"] == socket.gethostname()


def test_this_machine_believes_its_kernel_and_not_the_file(tmp_path: Path) -> None:
    """A run that was killed a second ago is continued at once."""
    beat(tmp_path / "run", socket.gethostname(), age_s=1.0)
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 64, b"\xff\xfe\x80", b"{", b"[1]", b"null", b'{"host": "x"}', b"[" * 100_000, b"9" * 5000,
        b'{"host": "x", "pid": 1e999, "time": 1}', b'{"host": "x", "pid": 1, "time": NaN}',
        b'{"host": "x", "pid": 1, "time": -Infinity}', b'{"host": {}, "pid": [], "time": {}}',
    ],
)  # fmt: skip
def test_a_file_that_says_nothing_stops_nobody(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with locked(tmp_path):
        assert written(tmp_path)["pid"] == os.getpid()


def test_a_clock_that_is_far_ahead_stops_nobody_for_ever(tmp_path: Path) -> None:
    beat(tmp_path / "run", age_s=-86400)
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_folder_that_went_is_taken_again(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder) as held:
        held.check()
        if how == "removed":
            (folder / FILE).unlink()
            folder.rmdir()
        else:
            folder.rename(tmp_path / "away")
        held.check()
        assert written(folder)["pid"] == os.getpid()
        with pytest.raises(WriteError), locked(folder):
            pass
        held.check()


def test_a_folder_that_another_process_has_by_now_is_left_to_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run") as held:
        (tmp_path / "run").rename(tmp_path / "away")
        process = holder(tmp_path / "run")
        try:
            with pytest.raises(WriteError, match=f"pid {process.pid} on"):
                held.check()
            assert written(tmp_path / "run")["pid"] == process.pid
        finally:
            process.kill()
            process.communicate()


def test_beats_are_written_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.002)
    with locked(tmp_path / "run"):
        first = written(tmp_path / "run")["time"]
        give_up = time.monotonic() + 30
        while not (content := (tmp_path / "run" / FILE).read_text()) or json.loads(content)["time"] <= first:
            assert time.monotonic() < give_up
            time.sleep(0.002)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_beat_is_never_half_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter beat after a longer one leaves nothing of it."""
    with locked(tmp_path / "run") as held:
        monkeypatch.setattr(time, "time", lambda: 1234567890.123456)
        held.beat()
        monkeypatch.setattr(time, "time", lambda: 1.5)
        held.beat()
        assert written(tmp_path / "run")["time"] == 1.5


def test_a_full_disk_ends_neither_the_beats_nor_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, locked(tmp_path / "run") as held:
        patched.setattr(os, "pwrite", full)
        patched.setattr(os, "ftruncate", full)
        held.beat()
        held.check()
        held.release()
    with locked(tmp_path / "run"):  # it was released
        pass


def test_beats_and_checks_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heart beats in a thread of its own while the folder is taken again and again."""
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    monkeypatch.setattr(lock, "BEAT_S", 1e-5)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with locked(tmp_path / "run") as held:
            for _ in range(300):
                (tmp_path / "run" / FILE).unlink()
                held.check()
    finally:
        sys.setswitchinterval(before)
    assert not died


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WriteError, match="cannot write to"):
        Lock(tmp_path / "file")
    with pytest.raises(WriteError, match="cannot write to"):
        Lock(tmp_path / "file" / "deeper")
