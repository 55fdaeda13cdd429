"""The speed benchmarks: what they compute, that they measure the package's own loop, and that each runs to its end."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import METHODS, VIT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ssl_pretrain import pretrain
from ssl_pretrain.data.pack import open_pack
from ssl_pretrain.errors import DataError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import figures  # noqa: E402
import regression  # noqa: E402
import scaling  # noqa: E402

CPU = torch.device("cpu")


def loaded(name: str) -> ModuleType:
    """A benchmark that imports the peers, which warn while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


# What computes


@pytest.mark.parametrize("name", ["figures", "regression", "scaling"])
def test_doctests(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


def test_ratios_are_taken_within_rounds() -> None:
    slow_machine_in_round_2 = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    assert figures.median_ratio(*slow_machine_in_round_2) == 0.5
    assert figures.median_ratio([4, 9, 10], [4, 3, 2]) == 3, "1, 3 and 5; the ratio of the medians would be 3 as well"
    assert figures.median_ratio([2, 30, 5], [1, 10, 1]) == 3, "2, 3 and 5; the ratio of the medians would be 5"
    for over, under in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="cannot be compared"):
            figures.median_ratio(over, under)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1), st.floats(0.1, 10))
def test_a_slow_round_changes_no_ratio(pairs: list[tuple[float, float]], factor: float) -> None:
    over, under = ([pair[side] for pair in pairs] for side in (0, 1))
    known = figures.median_ratio(over, under)
    over[0], under[0] = over[0] * factor, under[0] * factor
    assert figures.median_ratio(over, under) == pytest.approx(known)


def test_efficiency_is_the_limit_over_the_loop_and_above_1_02_it_is_wrong() -> None:
    assert figures.efficiency([1.9], [2.0]) == pytest.approx(0.95)
    figures.trusted({"a": 0.3, "b": 1.0, "c": 1.02})
    for wrong in (1.021, 1.11, math.nan):
        with pytest.raises(figures.WrongBenchmark, match="b: efficiency"):
            figures.trusted({"a": 0.9, "b": wrong})


def test_mfu_by_hand() -> None:
    """48 TFLOP/s are 2 % of 2,400 and a half of 96."""
    assert figures.mfu(48e9, 1000, 2400) == pytest.approx(0.02)
    assert figures.mfu(48e9, 1000, 96) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 PCIe", 756), ("Tesla T4", None)]
)
def test_the_longer_name_comes_first(name: str, peak: float | None) -> None:
    assert figures.peak_tflops(name) == peak


def test_flops_of_a_linear_layer_by_hand() -> None:
    """4 x 3 times 3 x 5: 2 * 60 forward, and as many for the weights' gradient; none for an input that has none."""
    layer, x = nn.Linear(3, 5, bias=False), torch.ones(4, 3)
    assert figures.flops(lambda: layer(x)) == 120
    assert figures.flops(lambda: layer(x).sum().backward()) == 240


def test_rounds_turn_and_the_first_does_not_count() -> None:
    asked: list[str] = []

    def call(name: str) -> Any:
        def run() -> float:
            asked.append(name)
            return float(len(asked))

        return run

    found = figures.rounds({name: call(name) for name in "abc"}, 3)
    assert "".join(asked) == "abccbabcaacb"
    assert found == {"a": [6, 9, 10], "b": [5, 7, 12], "c": [4, 8, 11]}


@pytest.mark.parametrize(("budget_s", "counted"), [(0.0, 1), (25.0, 1), (30.0, 2), (1e9, 5)])
def test_rounds_end_within_the_budget_but_not_before_one_counts(budget_s: float, counted: int) -> None:
    now = [0.0]

    def ten_seconds() -> float:
        now[0] += 10
        return 1.0

    found = figures.rounds({"a": ten_seconds}, 5, budget_s, clock=lambda: now[0])
    assert found == {"a": [1.0] * counted}


def test_host_reads_are_counted() -> None:
    x = torch.arange(3.0)

    def reads() -> None:
        x.sum().item()
        float(x[0])
        if x.sum() > 0:
            x.tolist()
        x.cpu().numpy()

    assert figures.host_reads(reads, CPU) == 5, "item, float, if, tolist, and cpu with its numpy as one"
    assert figures.host_reads(lambda: (x * 2).sum().lerp(x[1], 0.5), CPU) == 0
    assert figures.host_reads(lambda: x[x > 1], CPU) >= 0
    assert torch.Tensor.tolist(x) == [0, 1, 2], "the methods are themselves again"


@pytest.mark.slow
def test_memory_of_a_child_does_not_begin_with_its_parents() -> None:
    """As `getrusage` has it: a large parent would then be reported as the cost of every small child."""
    words = "import sys; sys.path.append(sys.argv[1]); import figures; print(figures.peak_rss_bytes(), flush=True)"
    script = f"""
import subprocess, sys
large = bytearray(1 << 30)
large[:: 4096] = b"x" * len(large[:: 4096])
print(subprocess.run([sys.executable, "-c", {words!r}, sys.argv[1]], capture_output=True, text=True).stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(BENCHMARKS)], capture_output=True, text=True, check=True, timeout=120
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not say what memory a process had")
    assert 10e6 < int(done.stdout) < 900e6


def test_scaling_by_hand() -> None:
    assert figures.scaling_efficiency(8.0, 4.0, 2) == 1 and figures.scaling_efficiency(8.0, 2.5, 4) == 0.8
    assert figures.exponent([10, 100], [3, 300]) == pytest.approx(2)


# The past


def found_by_throughput(efficiency: Any = 0.97, gpus: tuple[str, ...] = ()) -> dict[str, Any]:
    ours = {"efficiency": efficiency, "vs_lightly": 1.4, "vs_stacked": 1.3, "mfu": None}
    return {
        "machine": {
            "cpu": "x", "cores": 2, "threads": 1, "load": 0.0, "gpus": list(gpus), "versions": {}, "commit": "",
            "date": "2026-11-22",
        },
        "settings": {"quick": False},
        "works": {"SimCLR": {"contenders": {"this package": ours, "limit": {}}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("now", "lines"),
    [(0.97, 0), (0.942, 0), (0.940, 1), (0.5, 1), (1.0, 0)],
    ids=["as before", "within", "beyond", "far", "better"],
)
def test_what_is_slower_than_the_median_of_the_past(now: float, lines: int) -> None:
    past = {"SimCLR (CPU)": {"efficiency": [0.2, 0.97, 0.99]}}
    found = regression.slower(past, regression.ratios(found_by_throughput(now)))
    assert len(found) == lines and all(f"{now:.3f}, and was 0.970" in line for line in found)


def test_a_gpu_is_not_compared_with_a_cpu() -> None:
    past = {"SimCLR (CPU)": {"efficiency": [0.97]}}
    assert regression.slower(past, regression.ratios(found_by_throughput(0.1, gpus=("NVIDIA H200",)))) == []


@pytest.mark.parametrize(
    "broken",
    [{}, [], {"machine": {"gpus": []}, "works": []}, found_by_throughput("fast"), found_by_throughput(None),
     found_by_throughput(math.nan), found_by_throughput(math.inf), found_by_throughput(-0.9), found_by_throughput(0)],
)  # fmt: skip
def test_other_figures_are_refused(broken: Any) -> None:
    with pytest.raises(DataError, match="measure again"):
        regression.ratios(broken)


def asked(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["regression.py", *map(str, words)])
    regression.main()


def test_the_past_grows_by_what_is_not_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past, file = tmp_path / "past.json", tmp_path / "found.json"
    for turn in range(12):
        file.write_text(json.dumps(found_by_throughput(0.90 + turn / 1000)))
        asked(monkeypatch, file, "--past", past, "--keep")
    kept = json.loads(past.read_text())["ratios"]["SimCLR (CPU)"]["efficiency"]
    assert kept == pytest.approx([0.903 + i / 1000 for i in range(9)]), "the last nine"
    before = past.read_bytes()
    asked(monkeypatch, file, "--past", past)
    assert past.read_bytes() == before, "without --keep nothing is written"
    file.write_text(json.dumps(found_by_throughput(0.8)))
    with pytest.raises(SystemExit, match=r"SimCLR \(CPU\): efficiency is 0.800, and was 0.907"):
        asked(monkeypatch, file, "--past", past, "--keep")
    assert past.read_bytes() == before, "what is slower does not become the past"


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000], ids=["empty", "cut", "a list", "deep"])
def test_a_broken_file_is_refused_in_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(DataError, match=r"JSON|not what"):
        asked(monkeypatch, tmp_path / "found.json")


def test_figures_that_json_does_not_know_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        figures.write(tmp_path / "found.json", {"efficiency": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_the_past_of_the_repository_can_be_read() -> None:
    past = regression.read(regression.PAST)["ratios"]
    assert regression.slower(past, {}) == []
    assert all(0 < value for row in past.values() for runs in row.values() for value in runs)


# What is measured


def test_the_synthetic_pack_is_a_pack_that_takes_no_room(tmp_path: Path) -> None:
    scaling.written(tmp_path, 10_000)
    opened = open_pack(tmp_path)
    assert len(opened) == 10_000 and opened.image(9_999).shape == (64, 64, 3)
    assert len(np.unique(opened.by_content_N)) == 10_000
    stat = (tmp_path / "pixels.bin").stat()
    assert stat.st_size == 10_000 * 64 * 64 * 3 and 512 * stat.st_blocks < stat.st_size / 100


@pytest.mark.parametrize(("part", "size"), [("build", 3), ("pack", 70), ("probe", 50)])
def test_parts_of_scaling(part: str, size: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    scaling.child(part, size, tmp_path)
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["peak_bytes"] is None or found["peak_bytes"] > 1e6
    assert all(value is None or value >= 0 for key, value in found.items() if key.endswith("_s") or key == "seconds")


def test_a_child_that_takes_too_long_is_ended_and_said_to(tmp_path: Path) -> None:
    assert scaling.measured("probe", 10, tmp_path, limit_s=0.01) == {"why": "longer than 0 s"}


@pytest.mark.parametrize("case", ["simclr", "dino", "mae"])
def test_the_loop_that_is_measured_is_the_packages(
    case: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of its steps from the start give, bit by bit, the weights of a run of two steps."""
    peers = loaded("peers")
    monkeypatch.setattr(peers, "STEPS", 2)
    work = peers.Work({"backbone": VIT, "method": {"name": case, **METHODS[case]}}, batch=8, epoch=16)
    run = peers.prepared(work, images, tmp_path / "mine")
    run.step = 0
    peers.Ours(run, work.epoch).epoch()
    done = pretrain({**work.recipe, "train": {"batch_size": 8, "steps": 2}}, data=images, out=tmp_path / "theirs")
    theirs = load_file(done.artefact / "model.safetensors")
    mine = run.method.backbone.weights()
    assert run.step == 2 and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_limit_takes_several_batches_in_turn_and_trains(images: Path, tmp_path: Path) -> None:
    peers = loaded("peers")
    work = peers.Work({"backbone": VIT, "method": {"name": "simclr", **METHODS["simclr"]}}, batch=8, epoch=40)
    limit = peers.Ready(peers.prepared(work, images, tmp_path / "run"), work.epoch)
    views = [batch.crops["view"] for batch in limit.views]
    assert len(views) == peers.BATCHES > 1
    assert all(not torch.equal(views[0], other) for other in views[1:])
    before = {name: t.clone() for name, t in limit.run.method.backbone.weights().items()}
    assert limit.seconds_per_image() > 0 and limit.steps == 5
    assert any(not torch.equal(t, before[name]) for name, t in limit.run.method.backbone.weights().items())


def test_lightly_train_is_asked_for_the_same_views() -> None:
    """Its own DINO has six small crops of 96 px."""
    peers, works = loaded("peers"), loaded("throughput").SMALL
    asked = {name.split()[0]: peers.same_views(work.resolved()) for name, work in works.items()}
    assert asked["SimCLR"] == {"transform_args": {"image_size": [96, 96]}}
    local = {"num_views": 8, "view_size": [48, 48]}
    assert asked["DINO"] == {
        "transform_args": {"image_size": [96, 96], "local_view": local}, "method_args": {"output_dim": 4096},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("least_s", "steps", "calls", "seconds"), [(0.0, None, 1, 0.125), (0.0, 2, 1, 0.625), (12.0, 2, 3, 0.625)]
)
def test_a_turn_is_of_whole_epochs_or_of_a_few_steps(
    least_s: float, steps: int | None, calls: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 s a call: of 10 steps of 4 images, or of 2 steps."""
    peers = loaded("peers")
    now, asked_for = [0.0], []

    class Slow(peers.Contender):
        steps, batch, device = 10, 4, CPU

        def epoch(self, steps: int | None = None) -> None:
            now[0] += 5
            asked_for.append(steps)

    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    assert Slow().seconds_per_image(least_s, steps) == seconds
    assert asked_for == [steps] * calls


def test_jpegs_are_made_once_each_with_bytes_of_its_own(images: Path, tmp_path: Path) -> None:
    peers = loaded("peers")
    few = tmp_path / "few"
    few.mkdir()
    for name in ("00.png", "01.png"):
        (few / name).write_bytes((images / name).read_bytes())
    folder = peers.photographs(str(few), 5, tmp_path / "cache")
    files = sorted(folder.iterdir())
    assert len(files) == 5 and len({file.read_bytes() for file in files}) == 5
    for file in files:
        with Image.open(file) as image:
            assert image.size == (1600, 1200)
    when = [file.stat().st_mtime_ns for file in files]
    assert peers.photographs(str(few), 5, tmp_path / "cache") == folder
    assert [file.stat().st_mtime_ns for file in files] == when
    with pytest.raises(DataError, match="no images"):
        (tmp_path / "none").mkdir()
        peers.photographs(str(tmp_path / "none"), 5, tmp_path / "cache")


@pytest.mark.slow
def test_workers_live_from_epoch_to_epoch_and_end_with_the_contender(images: Path, tmp_path: Path) -> None:
    peers = loaded("peers")
    folder = peers.photographs(str(images), 4, tmp_path / "cache")
    files = peers.Files(folder)
    work = peers.Work({}, batch=2, epoch=8)
    loop = peers._Loading(files, len(files), work, workers=1, device=CPU)
    before = {child.pid for child in multiprocessing.active_children()}
    pids = []
    for _ in range(2):
        assert sum(len(x_BCHW) for x_BCHW in loop.batches(None)) == 8, "four files, twice"
        pids.append({child.pid for child in multiprocessing.active_children()} - before)
    assert pids[0] == pids[1] and len(pids[0]) == 1
    loop.close()
    assert {child.pid for child in multiprocessing.active_children()} <= before


# What is built in, beside what it replaced


def test_lars_of_all_tensors_together_is_lightlys_and_reads_nothing() -> None:
    """Among them a tensor of zeros and one without a gradient's length, which are not scaled."""
    step = loaded("step")
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.zeros(5, 2), torch.randn(3, 3), torch.randn(7)]
    mine, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))

    def groups(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": weights[:3], "weight_decay": 0.1}, {"params": weights[3:], "weight_decay": 0.0}]

    ours = step.Lars(groups(mine), lr=0.5, momentum=0.9, weight_decay=0.0)
    known = step.LARS(groups(theirs), lr=0.5, momentum=0.9, weight_decay=0.0)
    reads = {}
    for _ in range(4):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = torch.zeros_like(a) if i == 2 else torch.randn_like(a)
            b.grad = a.grad.clone()
        reads = {name: figures.host_reads(each.step, CPU) for name, each in (("ours", ours), ("lightly", known))}
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert reads["ours"] == 0 and reads["lightly"] >= 5, "up to two a tensor with weight decay"
    assert not torch.equal(mine[1], start[1])


def test_lars_moves_tensors_together_as_it_moves_each() -> None:
    """On a GPU all go together, on a CPU one by one: no bit differs."""
    lars = loaded("step").Lars
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.zeros(5, 2), torch.randn(3, 3)]
    singly, together = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    one, all_at_once = (lars(each, lr=0.5, momentum=0.9, weight_decay=0.1) for each in (singly, together))
    for _ in range(3):
        for i, (a, b) in enumerate(zip(singly, together, strict=True)):
            a.grad = torch.zeros_like(a) if i == 2 else torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        with torch.no_grad():
            all_at_once._move(together, all_at_once.param_groups[0])
        assert all(torch.equal(a, b) for a, b in zip(singly, together, strict=True))
    assert torch.equal(singly[2], start[2]), "a gradient of zero moves nothing, and is not decayed"


def test_clipping_together_is_clipping_one_by_one() -> None:
    step = loaded("step")
    torch.manual_seed(0)
    mine, theirs = ([nn.Parameter(torch.zeros(4, 3)) for _ in range(5)] for _ in range(2))
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        a.grad = None if i == 3 else 10.0**i * torch.randn(4, 3) / 100
        b.grad = None if a.grad is None else a.grad.clone()
    step.clip_each(mine, 3.0)
    step.clip_singly(theirs, 3.0)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_packed_crops_have_the_tokens_that_they_have_alone() -> None:
    """Values and gradients; and no crop sees another: one that changes changes nothing else."""
    step = loaded("step")
    torch.manual_seed(0)
    words = {"img_size": 32, "patch_size": 8, "dynamic_img_size": True, "init_values": 0.1, "num_classes": 0}
    vit = timm.create_model("test_vit", **words).eval()
    groups = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    packed = step.packed_forward(vit, groups)
    alone = [vit.forward_features(x) for x in groups]
    gradients = []
    for found in (packed, alone):
        vit.zero_grad()
        sum(t.square().sum() for t in found).backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for a, b in zip([*packed, *gradients[0]], [*alone, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    groups[1][0] += 1
    again = step.packed_forward(vit, groups)
    assert torch.equal(again[0], packed[0]) and torch.equal(again[1][1:], packed[1][1:])
    assert not torch.allclose(again[1][0], packed[1][0])


def test_parts_of_a_step_are_timed_one_by_one() -> None:
    step = loaded("step")
    now = [0.0]
    parts = step.Parts(CPU, clock=lambda: now[0])
    for name, seconds in (("views", 2.0), ("forward", 3.0), ("views", 1.0)):
        now[0] += seconds
        parts.lap(name)
    assert parts.seconds["views"] == 3 and parts.seconds["forward"] == 3 and sum(parts.seconds.values()) == 6


# Each runs to its end


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("throughput", ("--workers", "1")), ("throughput", ("--alone", "--work", "SimCLR")), ("step", ()),
        ("scaling", ()), ("import_cost", ()), ("regression", ()),
        ("larger", ()), ("decoding", ()),
    ],
)  # fmt: skip
def test_quick_runs_to_its_end(script: str, words: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    given = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", *words, "--json", str(out)]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200)
    if "no memory control group" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    found = strict(out.read_text())
    assert {"cpu", "cores", "threads", "gpus", "versions", "commit", "date"} <= found["machine"].keys()
    assert found["machine"]["versions"]["torch"] in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"], "nothing is left behind"
    if script == "throughput":
        for work in found["works"].values():
            rows = work["contenders"]
            known = set() if "--alone" in words else {"lightly's example", "stacked Kornia"}
            assert set(rows) == {"this package", "limit"} | known
            assert rows["limit"]["efficiency"] == 1
            assert not known or rows["lightly's example"]["vs_lightly"] == rows["stacked Kornia"]["vs_stacked"] == 1
            close = work["close"]
            assert len(close["limit"]) == 2
            wanted = figures.efficiency(close["limit"], close["this package"])
            assert rows["this package"]["efficiency"] == wanted, "of the turns of a few steps"
            assert work["gflop_per_image"] > 0 and all(row["images_per_s"] > 0 for row in rows.values())
    if script == "scaling":
        assert found["found"]["ranks"]["rows"]["1"]["efficiency"] == 1
        assert found["found"]["ranks"]["rows"]["2"]["efficiency"] > 0
    if script == "larger":
        assert found["ratios"]["1"] > 0 and found["medians"]["1 limited"]["read_share"] > 0
    if script == "decoding":
        assert found["pack"]["vs_fastest"] > 0
    if script == "import_cost":
        assert not found["found"]["import ssl_pretrain"]["torch"]
