"""Features as files, the search among them and the choice of what to label."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from ssl_pretrain import artefact, cli
from ssl_pretrain import embedding_files as files
from ssl_pretrain.artefact import weights_sha256
from ssl_pretrain.backbones import create
from ssl_pretrain.data.building import build
from ssl_pretrain.embedding import (
    Embedding,
    Picked,
    alike,
    embed_images,
    embed_objects,
    farthest_first,
    like,
    nearest,
    select,
    windows,
)
from ssl_pretrain.errors import DataError, UsageError

PIXELS = create("pixels/4", img_size=32)


def unit(z: np.ndarray) -> np.ndarray:
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def colours(folder: Path, count: int = 6) -> Path:
    """Plain images whose hue turns slowly."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = (200 - 30 * i, 20 + 30 * i, 90)
        Image.new("RGB", (48 + i, 40), colour).save(folder / f"{i}.png")
    return folder


def classes(folder: Path) -> Path:
    for name, seed in (("cast", 0), ("cell", 1)):
        for i in range(3):
            (folder / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * seed + i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


# --- windows and images -----------------------------------------------------------------------------------------------


@given(st.integers(16, 900), st.integers(16, 900), st.one_of(st.none(), st.integers(16, 900)))
@settings(max_examples=60, deadline=None)
def test_windows_cover_all_of_an_image_and_stay_inside(height: int, width: int, window_px: int | None) -> None:
    seen = np.zeros((height, width), bool)
    squares = windows(height, width, window_px)
    for left, top, side in squares:
        assert 0 <= left <= width - side and 0 <= top <= height - side
        seen[top : top + side, left : left + side] = True
    side = squares[0][2]
    assert seen.all() and side == min(window_px or height, height, width)
    assert len(squares) == -(-width // side) * -(-height // side), "no fewer could cover it"


def test_the_feature_of_an_image_is_the_mean_over_its_windows(tmp_path: Path) -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, :32, 0] = 255  # the left window is red, the right one blue
    image[:, 32:, 2] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    made = embed_images(PIXELS, tmp_path)
    z_316 = made.z_ND[0].reshape(3, 16)
    np.testing.assert_allclose(z_316[0], z_316[2], atol=1e-6)
    np.testing.assert_allclose(z_316[1], 0, atol=1e-6)
    assert np.linalg.norm(made.z_ND[0]) == pytest.approx(1)
    small = embed_images(PIXELS, tmp_path, window_px=16).z_ND
    np.testing.assert_allclose(small, made.z_ND, atol=1e-6)


def test_a_folder_and_its_pack_give_the_same_but_for_the_short_side(images: Path, tmp_path: Path) -> None:
    packed = build([images], tmp_path / "pack", processes=0)
    from_folder, from_pack = embed_images(PIXELS, images), embed_images(PIXELS, packed.folder)
    assert from_folder.names == from_pack.names and len(from_folder.names) == 40
    np.testing.assert_array_equal(from_folder.z_ND, from_pack.z_ND)
    assert from_pack.about["data"] == packed.fingerprint
    assert from_folder.about | {"data": ""} == from_pack.about | {"data": ""}


def test_blocks_of_windows_make_no_difference(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed_images(PIXELS, images, window_px=20)
    monkeypatch.setattr("ssl_pretrain.embedding.WINDOWS_AT_A_TIME", 5)
    np.testing.assert_allclose(embed_images(PIXELS, images, window_px=20).z_ND, whole.z_ND, atol=1e-6)


def test_what_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    colours(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    made = embed_images(PIXELS, tmp_path)
    assert made.names == ("0.png", "1.png", "3.png", "4.png", "5.png")
    [line] = made.problems
    assert line.startswith("1 images are left out, the first is 2.png: unknown_format, not one of JPEG")
    for path in tmp_path.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image in .* can be used: 0\.png"):
        embed_images(PIXELS, tmp_path)
    with pytest.raises(UsageError, match="window-px"):
        embed_images(PIXELS, tmp_path, window_px=3)


def test_objects_keep_their_labels_and_places(tmp_path: Path) -> None:
    made = embed_objects(PIXELS, classes(tmp_path))
    assert made.labels == ("cast",) * 3 + ("cell",) * 3
    assert made.names[0] == "cast/0.png#0" and made.images[5] == "cell/2.png"
    assert made.square_N3 is not None and made.square_N3[0].tolist() == [0, -5, 30]
    assert made.z_ND.shape == (6, 48) and made.about["of"] == "objects" and "padded" in made.about["crops"]


def test_the_hash_is_that_of_the_artefact(tmp_path: Path) -> None:
    backbone = create("test_resnet")
    artefact.write(tmp_path, backbone, {})
    card = json.loads((tmp_path / "config.json").read_text())["ssl_pretrain"]
    assert weights_sha256(backbone) == card["weights_sha256"] != weights_sha256(create("test_resnet"))


# --- search and choice ------------------------------------------------------------------------------------------------


def test_the_nearest_are_those_of_all_pairs() -> None:
    draw = np.random.default_rng(0)
    z_ND, query_QD = unit(draw.normal(size=(200, 12))), unit(draw.normal(size=(7, 12)))
    found, similarity = nearest(z_ND, query_QD, 9)
    every = query_QD @ z_ND.T
    np.testing.assert_array_equal(found, np.argsort(-every, axis=1)[:, :9])
    np.testing.assert_allclose(similarity, -np.sort(-every, axis=1)[:, :9], atol=1e-6)
    assert nearest(z_ND, query_QD, 500)[0].shape == (7, 200)
    with pytest.raises(UsageError):
        nearest(z_ND, query_QD, 0)


def test_an_image_is_most_like_itself(tmp_path: Path) -> None:
    folder = colours(tmp_path)
    made = embed_images(PIXELS, folder, window_px=24)
    for i in range(6):
        picked = like(PIXELS, made, folder / f"{i}.png", 3, window_px=24)
        assert picked.row_K[0] == i and picked.value_K[0] == pytest.approx(1) and picked.by == "similarity"
        assert set(picked.row_K[:2]) <= {i - 1, i, i + 1}
    objects = embed_objects(PIXELS, classes(tmp_path / "objects"))
    picked = like(PIXELS, objects, tmp_path / "objects" / "cell" / "1.png")
    assert picked.row_K[0] == 4 and picked.value_K[0] == pytest.approx(1) and len(picked.row_K) == 6
    with pytest.raises(DataError, match="gone"):
        like(PIXELS, made, tmp_path / "gone.png")


def greedy(z_ND: np.ndarray, count: int, covered: list[np.ndarray], chosen: list[int]) -> list[int]:
    """By the definition: the smallest index whose least distance to all that is covered is largest."""
    while len(chosen) < count:
        known = [*covered, *(z_ND[i] for i in chosen)]
        gaps = [
            -1.0 if i in chosen else min(float(np.linalg.norm(z - other)) for other in known)
            for i, z in enumerate(z_ND)
        ]
        chosen = [*chosen, int(np.argmax(gaps))]
    return chosen


@given(st.integers(0, 2**31), st.integers(1, 25), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_farthest_first_is_its_definition(seed: int, count: int, covered: int) -> None:
    draw = np.random.default_rng(seed)
    z_ND, known_MD = draw.normal(size=(25, 3)), draw.normal(size=(covered, 3))
    rows, far = farthest_first(z_ND, count, 4)
    assert rows.tolist() == greedy(z_ND, count, [], [4])
    assert far[0] == np.inf and (np.diff(far[1:]) <= 1e-9).all()
    rows, far = farthest_first(z_ND, count, known_MD)
    assert rows.tolist() == greedy(z_ND, count, list(known_MD), [])
    first = np.linalg.norm(z_ND[:, None] - known_MD[None], axis=2).min(axis=1).max()
    assert far[0] == pytest.approx(first)


def test_farthest_first_is_at_most_twice_the_best_radius() -> None:
    z_ND = np.random.default_rng(2).normal(size=(11, 2))
    apart = np.linalg.norm(z_ND[:, None] - z_ND[None], axis=2)
    best = min(apart[list(some)].min(axis=0).max() for some in itertools.combinations(range(11), 3))
    for start in range(11):
        rows, _ = farthest_first(z_ND, 3, start)
        assert best <= apart[rows].min(axis=0).max() <= 2 * best


def test_pairs_that_are_alike_are_those_of_all_pairs() -> None:
    random = np.random.default_rng(0)
    z_ND = random.normal(size=(60, 8)).astype(np.float32)
    z_ND[40] = z_ND[7] + 0.01  # a copy, found from both sides and told once
    z_ND /= np.linalg.norm(z_ND, axis=1, keepdims=True)
    made = Embedding(z_ND, tuple(map(str, range(60))), np.zeros((60, 1, 1, 3), np.uint8), {}, ())
    picked = alike(made, 5)
    similarity_NN = np.triu(z_ND @ z_ND.T, 1)
    best = np.argsort(-similarity_NN[np.triu_indices(60, 1)])[:5]
    expected = np.column_stack(np.triu_indices(60, 1))[best]
    assert picked.row_K.reshape(-1, 2).tolist() == expected.tolist() and picked.row_K[:2].tolist() == [7, 40]
    np.testing.assert_allclose(picked.value_K[::2], similarity_NN[expected[:, 0], expected[:, 1]], atol=1e-6)
    with pytest.raises(UsageError):
        alike(made, 0)


def test_copies_are_chosen_last_and_nothing_twice() -> None:
    z_ND = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0.6, 0.8]])
    rows, far = farthest_first(z_ND, 5, 0)
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4] and rows.tolist()[:3] == [0, 2, 4]
    assert far[3:] == pytest.approx([0, 0], abs=1e-7)
    for wrong in (0, 6):
        with pytest.raises(UsageError, match="from 1 to 5"):
            farthest_first(z_ND, wrong, 0)


def test_a_selection_starts_in_the_middle_or_far_from_what_is_labelled(tmp_path: Path) -> None:
    made = embed_images(PIXELS, colours(tmp_path / "all"))
    alone = select(made, 3)
    assert alone.row_K[0] in (2, 3) and alone.value_K[0] == np.inf and set(alone.row_K[1:]) == {0, 5}
    labelled = embed_images(PIXELS, colours(tmp_path / "some", 2))
    picked = select(made, 2, labelled)
    assert picked.row_K[0] == 5 and picked.by == "distance" and np.isfinite(picked.value_K).all()


# --- files ------------------------------------------------------------------------------------------------------------


def small(tmp_path: Path, objects: bool = True) -> Embedding:
    return embed_objects(PIXELS, classes(tmp_path / "d")) if objects else embed_images(PIXELS, colours(tmp_path / "d"))


@pytest.mark.parametrize("objects", [True, False])
def test_npz(tmp_path: Path, objects: bool) -> None:
    made = small(tmp_path, objects)
    assert "numpy.load" in files.write(made, tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["z_ND"], made.z_ND)
        assert found["z_ND"].dtype == np.float32 and tuple(found["names"]) == made.names
        assert json.loads(str(found["about"])) == made.about
        assert set(made.about) == {"backbone", "weights_sha256", "of", "size_px", "crops", "data"}
        assert ("labels" in found.files) == objects
        if objects:
            assert tuple(found["labels"]) == made.labels and tuple(found["images"]) == made.images
            np.testing.assert_array_equal(found["square_N3"], made.square_N3)


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made = small(tmp_path)
    files.write(made, tmp_path / "f.parquet")
    found = parquet.read_table(tmp_path / "f.parquet")
    assert found.column("name").to_pylist() == list(made.names)
    np.testing.assert_array_equal(np.array(found.column("z").to_pylist(), np.float32), made.z_ND)
    assert found.column("label").to_pylist() == list(made.labels)
    assert found.column("top").to_pylist() == [-5.0] * 6
    assert json.loads(found.schema.metadata[b"about"]) == made.about


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is here")
def test_parquet_without_pyarrow(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pip install 'ssl-pretrain\[data\]'"):
        files.check(tmp_path / "f.parquet")


def test_other_files_are_refused_before_anything_is_computed() -> None:
    files.check(Path("a.npz")), files.check(Path("runs/projector"))
    with pytest.raises(UsageError, match=r"\.npz or \.parquet"):
        files.check(Path("a.csv"))


@pytest.mark.parametrize("objects", [True, False])
def test_projector_as_tensorboard_reads_it(tmp_path: Path, objects: bool) -> None:
    made, folder = small(tmp_path, objects), tmp_path / "p"
    for _ in range(2):  # again is the same, nothing is added
        files.write(made, folder)
    [info] = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings
    z_ND = np.loadtxt(folder / info.tensor_path, delimiter="\t")
    np.testing.assert_allclose(z_ND, made.z_ND, atol=1e-5)
    lines = (folder / info.metadata_path).read_text().splitlines()
    if objects:
        assert lines[:2] == ["name\tlabel", "cast/0.png#0\tcast"] and len(lines) == 7
    else:
        assert tuple(lines) == made.names, "a single column has no heading"
    side = info.sprite.single_image_dim[0]
    with Image.open(folder / info.sprite.image_path) as sprite:
        assert sprite.size == (3 * side, 3 * side)
        # the sixth picture ends the second row of three
        last = np.asarray(sprite.crop((2 * side, side, 3 * side, 2 * side)), float)
    assert abs(last - made.picture_NSSC[5]).max() <= 1


def test_a_sprite_stays_small_enough_for_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SPRITE_PX", 40)
    files.write(small(tmp_path), tmp_path / "p")
    with Image.open(tmp_path / "p" / "sprite.png") as sprite:
        assert sprite.size == (39, 39)


def test_table_names_and_sheet(tmp_path: Path) -> None:
    made = small(tmp_path)
    picked = Picked(np.array([4, 0]), np.array([np.inf, 0.5]), "distance")
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(files.table(made, picked))
    shown = console.export_text()
    assert "cell/1.png#0" in shown and "0.500" in shown and "first" in shown and "inf" not in shown
    assert files.names(made, picked) == b"cell/1.png#0\ncast/0.png#0\n"
    with Image.open(io.BytesIO(files.sheet(made, picked))) as sheet:
        assert sheet.size == (8 + 2 * 168, 8 + 184)
        left = np.asarray(sheet.crop((8, 8, 168, 168)).resize((32, 32), Image.Resampling.BOX), float)
    assert abs(left - made.picture_NSSC[4]).mean() < abs(left - made.picture_NSSC[0]).mean() / 2


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    colours(tmp_path / "d")
    words = ["embed", "pixels", "--data", "d", "--out", "f.npz"]
    assert cli.main([*words, "--like", "d/2.png", "--nearest", "2", "--sheet", "s.png", "--list", "l.txt"]) == 0
    assert "1.000" in capsys.readouterr().out
    assert (tmp_path / "l.txt").read_text().splitlines()[0] == "2.png" and (tmp_path / "s.png").is_file()
    colours(tmp_path / "known", 1)
    assert cli.main([*words, "--select", "2", "--labelled", "known"]) == 0
    for wrong in (["--select", "0"], ["--select", "99"], ["--sheet", "s.png"], ["--labelled", "known"]):
        assert cli.main([*words, *wrong]) == 64
    assert cli.main([*words[:-1], "f.csv"]) == 64
    assert cli.main([*words, "--like", "gone.png"]) == 65
