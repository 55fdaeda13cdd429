"""When a run is saved, what is in the file, and what follows when it cannot be written; the clock is made up."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_pretrain.errors import DataError, SslPretrainError, WriteError
from ssl_pretrain.files import write_durably
from ssl_pretrain.train import checkpoint, keeper
from ssl_pretrain.train.checkpoint import KEEP, Checkpoints, sweep
from ssl_pretrain.train.keeper import FAILURES, Keeper
from ssl_pretrain.train.lock import Lock
from ssl_pretrain.train.recipe import TrainSection

FULL = WriteError("cannot write x: No space left on device")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Disk:
    """Stands for `Checkpoints.save`: fails as often as it is told, and writes otherwise."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.failures: list[BaseException | None] = []
        self.calls: list[int] = []
        save = Checkpoints.save

        def saved(checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> Path:
            self.calls.append(step)
            error = self.failures.pop(0) if self.failures else None
            if error is not None:
                raise error
            return save(checkpoints, step, state)

        patched.setattr(Checkpoints, "save", saved)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(keeper, "RETRY_S", 0.0)
    return Disk(monkeypatch)


def made(folder: Path, **train: Any) -> tuple[Keeper, Clock, list[str]]:
    clock, said = Clock(), list[str]()
    return Keeper(folder, TrainSection(**train), said.append, clock=clock), clock, said


def state(value: float = 1.0) -> dict[str, Any]:
    return {"step": int(value), "method": {"w": torch.full((3,), value)}}


def nothing() -> None:
    pass


def fails() -> None:
    raise WriteError("cannot write the artefact: No space left on device")


# When


def test_it_is_due_by_the_clock_or_by_steps(tmp_path: Path) -> None:
    kept, clock, _ = made(tmp_path, save_every_minutes=10.0)
    clock.now += 600
    assert not kept.due(7)
    clock.now += 0.001
    assert kept.due(7)
    kept.save(7, state(), nothing)
    assert not kept.due(8)
    kept, clock, _ = made(tmp_path, save_every_minutes=10.0, save_every_steps=4)
    assert [step for step in range(1, 13) if kept.due(step)] == [4, 8, 12]
    clock.now += 601
    assert kept.due(5)


@given(cost_s=st.floats(0, 1e4), minutes=st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_saves_take_at_most_two_percent_of_the_time(cost_s: float, minutes: float) -> None:
    kept, clock, _ = made(Path("nowhere"), save_every_minutes=minutes)
    kept.cost = cost_s
    interval_s = max(60 * minutes, 50 * cost_s)
    clock.now = kept.saved_at + interval_s * (1 - 1e-9)
    assert not kept.due(1)
    clock.now = kept.saved_at + interval_s * (1 + 1e-9) + 1e-9
    assert kept.due(1) and cost_s <= 0.02 * (clock.now - kept.saved_at) * (1 + 1e-6)


def test_what_training_waits_for_is_the_cost(tmp_path: Path, disk: Disk) -> None:
    """20 s for the artefact: the next save comes after 1000 s, not 600; the thread's own time is no cost."""
    kept, clock, _ = made(tmp_path, save_every_minutes=10.0)

    def beside() -> None:
        clock.now += 20

    kept.save(1, state(), beside)
    kept.wait()
    assert kept.cost == 20
    clock.now += 999
    assert not kept.due(2)
    clock.now += 2
    assert kept.due(2)


# What


def test_the_file_holds_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the thread writes: nothing that it changes may get into the file."""
    begun, go = threading.Event(), threading.Event()
    save = Checkpoints.save

    def slow(self: Checkpoints, step: int, content: dict[str, Any]) -> Path:
        begun.set()
        assert go.wait(30)
        return save(self, step, content)

    monkeypatch.setattr(Checkpoints, "save", slow)
    kept, _, _ = made(tmp_path)
    w, moments, group = torch.arange(4.0), [torch.ones(2), {"exp": torch.ones(1)}], {"lr": 0.1}
    mine = {"step": 3, "method": {"w": w, "view": w[1:3]}, "optimizer": {"moments": moments, "group": group}}
    kept.save(3, mine, nothing)
    assert begun.wait(30)
    w += 100
    moments[0].zero_()
    moments[1]["exp"].zero_()  # type: ignore[index,union-attr]
    moments.append(torch.zeros(1))
    group["lr"] = 0.2
    mine["step"] = 4
    go.set()
    kept.wait()
    found = kept.checkpoints.newest()
    assert found is not None and found["step"] == 3 and found["optimizer"]["group"] == {"lr": 0.1}
    assert found["method"]["w"].tolist() == [0, 1, 2, 3] and found["method"]["view"].tolist() == [1, 2]
    assert len(found["optimizer"]["moments"]) == 2 and found["optimizer"]["moments"][0].tolist() == [1, 1]
    assert found["optimizer"]["moments"][1]["exp"].item() == 1


def test_only_one_save_is_in_the_air(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [0], [0]
    save = Checkpoints.save

    def counted(self: Checkpoints, step: int, content: dict[str, Any]) -> Path:
        running[0] += 1
        most[0] = max(most[0], running[0])
        path = save(self, step, content)
        running[0] -= 1
        return path

    monkeypatch.setattr(Checkpoints, "save", counted)
    with made(tmp_path)[0] as kept:
        for step in range(1, 6):
            kept.save(step, state(step), nothing)
    assert most == [1] and kept.checkpoints.steps() == [5, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "deep", "half", "list"])
def test_nothing_that_is_not_finite_is_saved(value: float, where: str, tmp_path: Path) -> None:
    bad = torch.tensor([1.0, value], dtype=torch.bfloat16 if where == "half" else torch.float32)
    places: dict[str, dict[str, Any]] = {
        "weight": {"method": {"w": bad}}, "half": {"method": {"w": bad}},
        "deep": {"optimizer": {"state": {0: {"exp_avg": bad}}}},
        "list": {"optimizer": {"moments": [torch.ones(1), bad]}},
    }  # fmt: skip
    kept, _, _ = made(tmp_path)
    kept.save(1, state(), nothing)
    kept.save(2, {"step": 2, **places[where]}, nothing)
    with pytest.raises(SslPretrainError, match="not finite at step 2") as error:
        kept.wait()
    assert error.value.exit_code == 70 and kept.checkpoints.steps() == [1]
    with pytest.raises(SslPretrainError, match="not finite at step 3"):
        kept.save_last(3, {"step": 3, **places[where]}, nothing)
    assert not list(tmp_path.rglob(".*tmp*"))


# When it cannot be written


def test_two_failures_are_told_and_a_good_save_forgets_them(tmp_path: Path, disk: Disk) -> None:
    kept, clock, said = made(tmp_path, save_every_minutes=10.0)
    disk.failures = [FULL, FULL, None, FULL, FULL, None]
    for step in range(1, 7):
        clock.now += 601
        assert kept.due(step)
        kept.save(step, state(step), nothing)
        assert not kept.due(step)  # it is tried again an interval later, not in every step
    kept.wait()
    assert kept.failed == 0 and kept.checkpoints.steps() == [6, 3]
    assert [line[-17:] for line in said] == ["(1 of 3 failures)", "(2 of 3 failures)"] * 2


def test_three_in_a_row_end_the_run_and_name_the_last_good_step(tmp_path: Path, disk: Disk) -> None:
    kept, _, said = made(tmp_path)
    disk.failures = [None, FULL, FULL, FULL]
    for step in range(1, 5):
        kept.save(step, state(step), nothing)
    with pytest.raises(
        WriteError, match=r"3 saves in a row failed: .*No space.*; the checkpoint of step 1 is whole"
    ) as e:
        kept.wait()
    assert e.value.exit_code == 74 and len(said) == 2
    assert kept.checkpoints.newest() is not None


def test_a_failure_is_heard_as_soon_as_its_thread_has_ended(tmp_path: Path, disk: Disk) -> None:
    kept, _, _ = made(tmp_path)
    disk.failures = [FULL] * 3
    for step in (1, 2):
        kept.save(step, state(), nothing)
    kept.save(3, state(), nothing)
    assert kept._thread is not None
    kept._thread.join()
    with pytest.raises(WriteError, match="there is no checkpoint yet"):
        kept.due(3)


def test_a_checkpoint_and_an_artefact_that_fail_together_are_one_failure(tmp_path: Path, disk: Disk) -> None:
    """A full disk fails both; three intervals are three."""
    kept, _, said = made(tmp_path)
    disk.failures = [FULL] * 3
    for step in (1, 2):
        kept.save(step, state(), fails)
        kept.wait()
    assert kept.failed == 2 and len(said) == 2
    kept.save(3, state(), fails)
    with pytest.raises(WriteError, match="3 saves in a row"):
        kept.wait()


def test_an_artefact_that_fails_alone_counts_too(tmp_path: Path) -> None:
    kept, _, _ = made(tmp_path)
    for step in (1, 2):
        kept.save(step, state(step), fails)
        kept.wait()
    assert kept.failed == 2 and kept.checkpoints.steps() == [2, 1]
    kept.save(3, state(3), nothing)
    kept.wait()
    assert kept.failed == 0


@pytest.mark.parametrize("failures", range(FAILURES + 1))
def test_the_last_save_tries_three_times(failures: int, tmp_path: Path, disk: Disk) -> None:
    kept, _, said = made(tmp_path)
    kept.save(1, state(), nothing)
    kept.wait()
    disk.failures = [FULL] * failures
    if failures < FAILURES:
        kept.save_last(2, state(2), nothing)
        assert kept.checkpoints.steps() == [2, 1] and len(said) == failures
    else:
        with pytest.raises(WriteError, match=r"step 2 is not saved: .*; the checkpoint of step 1 is whole"):
            kept.save_last(2, state(2), nothing)
        assert kept.checkpoints.steps() == [1]
    assert disk.calls == [1] + [2] * min(failures + 1, FAILURES)


def test_the_last_save_waits_for_the_one_before_and_forgives_it(tmp_path: Path, disk: Disk) -> None:
    kept, _, _ = made(tmp_path)
    disk.failures = [FULL, FULL, FULL]
    for step in (1, 2, 3):
        kept.save(step, state(step), nothing)
    kept.save_last(4, state(4), nothing)
    assert kept.checkpoints.steps() == [4] and not kept.due(4) and kept.failed == 0


def test_another_error_of_the_thread_is_raised_as_it_is(tmp_path: Path, disk: Disk) -> None:
    kept, _, _ = made(tmp_path)
    disk.failures = [MemoryError("host memory")]
    kept.save(1, state(), nothing)
    with pytest.raises(MemoryError):
        kept.wait()
    kept.save(2, state(2), nothing)
    kept.wait()
    assert kept.checkpoints.steps() == [2]


def test_leaving_waits_for_the_thread_but_a_second_interrupt_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, save = threading.Event(), Checkpoints.save

    def slow(self: Checkpoints, step: int, content: dict[str, Any]) -> Path:
        assert go.wait(30)
        return save(self, step, content)

    monkeypatch.setattr(Checkpoints, "save", slow)
    kept = made(tmp_path)[0]
    with pytest.raises(KeyboardInterrupt), kept:
        kept.save(1, state(), nothing)
        raise KeyboardInterrupt
    assert kept._thread is not None and kept._thread.is_alive() and kept._thread.daemon  # which no exit waits for
    thread = kept._thread
    go.set()
    thread.join()
    other = made(tmp_path / "other")[0]
    with pytest.raises(DataError), other:
        other.save(2, state(2), nothing)
        raise DataError("another error is not hidden, and the save is whole")
    assert other.checkpoints.steps() == [2]


def test_leaving_tells_what_went_wrong_last(tmp_path: Path, disk: Disk) -> None:
    disk.failures = [FULL] * 3
    with pytest.raises(WriteError, match="3 saves in a row"), made(tmp_path)[0] as kept:
        for step in (1, 2, 3):
            kept.save(step, state(), nothing)


@pytest.mark.parametrize("last", [False, True])
def test_a_folder_that_another_run_has_taken_is_not_written(last: bool, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run")
    kept = Keeper(tmp_path / "run", TrainSection(), print, lock, Clock())
    (tmp_path / "run").rename(tmp_path / "away")
    other = Lock(tmp_path / "run")
    with pytest.raises(WriteError, match="written by another process"):
        (kept.save_last if last else kept.save)(1, state(), nothing)
    assert not (tmp_path / "run" / "checkpoints").exists()
    other.release()
    lock.release()


# Files


def test_the_first_checkpoint_is_read_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that a safe load refuses, as numpy's scalar, must show in the first minutes and in one line."""
    import numpy as np

    kept, _, _ = made(tmp_path)
    with pytest.raises(SslPretrainError, match=r"^[^\n]*$") as error:
        kept.save_last(1, {"step": 1, "lr": np.float64(0.1)}, nothing)
    assert "scalar" in str(error.value)
    read = []
    monkeypatch.setattr(Checkpoints, "newest", lambda self: read.append(1))
    for step in (2, 3):
        Checkpoints(tmp_path / "b").save(step, state(step))
    assert read == [1]


def test_the_newest_two_are_kept_and_a_marker_goes_before_its_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, state(step))
    assert KEEP == 2 and checkpoints.steps() == [5, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step_00000000{n}.{end}" for n in (4, 5) for end in ("json", "pt")
    ]
    marker = json.loads((tmp_path / "step_000000005.json").read_text())
    assert marker["step"] == 5 and marker["bytes"] == (tmp_path / "step_000000005.pt").stat().st_size


def test_a_torn_newest_one_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    """At least one verified file stays, also when the newest was torn by a disk."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    (tmp_path / "step_000000002.pt").write_bytes(b"torn")
    checkpoints.save(3, state(3))
    found = checkpoints.newest()
    assert found is not None and found["step"] == 3


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_changed_byte_anywhere_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    path = folder / f"step_000000002.{data.draw(st.sampled_from(['pt', 'json']))}"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    found = checkpoints.newest()
    assert found is not None
    if path.suffix == ".pt":
        assert found["step"] == 1
    else:  # the marker's number and size may change without harm; its hash may not
        assert found["step"] in (1, 2) and found["method"]["w"][0] == found["step"]


@pytest.mark.parametrize(
    "marker", [b"", b"[]", b"null", b"[" * 100_000, b'{"sha256": 5}', b"\xff\xfe", b"{}", b"9" * 5000]
)
def test_a_marker_that_is_none_is_passed_over(marker: bytes, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    (tmp_path / "step_000000002.json").write_bytes(marker)
    found = checkpoints.newest()
    assert found is not None and found["step"] == 1


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state())
    left = [
        "checkpoints/.step_000000002.pt.tmp-77", "checkpoints/.step_000000002.json.tmp-77",
        "checkpoints/step_000000002.pt", "artefact/.model.safetensors.tmp-1", "best/.config.json.tmp-5",
        ".recipe.yaml.tmp-9", ".metrics.jsonl.tmp-123456",
    ]  # fmt: skip
    stay = [".lock", "metrics.jsonl", "artefact/model.safetensors", "notes.tmp-1", "checkpoints/README"]
    for name in left + stay:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sweep(tmp_path)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*stay, "checkpoints/step_000000001.pt", "checkpoints/step_000000001.json"}
    sweep(tmp_path / "nowhere")


STEPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "open": lambda patch: patch.setattr("os.open", _full),
    "write": lambda patch: patch.setattr(checkpoint._Hashed, "write", _full),
    "fsync": lambda patch: patch.setattr("os.fsync", _full),
    "rename": lambda patch: patch.setattr("os.replace", _full),
}


def _full(*words: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_that_has_room_again_when_torch_closes_its_file(tmp_path: Path) -> None:
    """Torch's writer then raises an error of its own, about a position, in place of the disk's."""
    write, calls = checkpoint._Hashed.write, [0]

    def once(self: Any, content: bytes) -> int:
        calls[0] += 1
        self.file = _Full(self.file) if calls[0] == 5 else getattr(self.file, "inner", self.file)
        return write(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Hashed, "write", once)
        with pytest.raises(WriteError, match="No space left on device"):
            Checkpoints(tmp_path).save(1, state())
    assert not list(tmp_path.iterdir())


class _Full:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_leaves_the_last_one_and_no_half_file(step: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](patch)
        with pytest.raises(WriteError, match="No space left on device"):
            checkpoints.save(2, state(2))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("step", ["open", "fsync", "rename"])
def test_what_stood_there_still_stands(step: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_durably(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](patch)
        with pytest.raises(WriteError, match="No space left"):
            write_durably(path, b"new and longer")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_order_on_the_disk_is_data_then_name_then_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was forced: data before its name, name before the marker, the marker before its own."""
    import os

    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*words: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            at = os.readlink(f"/proc/self/fd/{words[0]}") if name == "fsync" else str(words[1])
            done.append(f"{name} {Path(at).name.split('.tmp-')[0].lstrip('.')}")
            return real(*words)

        monkeypatch.setattr(os, name, noted)
    Checkpoints(tmp_path / "checkpoints").save(1, state())
    file, marker = "step_000000001.pt", "step_000000001.json"
    assert done == [
        f"fsync {file}", f"replace {file}", "fsync checkpoints", f"fsync {marker}", f"replace {marker}",
        "fsync checkpoints",
    ]  # fmt: skip
