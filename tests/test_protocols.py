"""Named protocols, baselines and the verb `probe`: what is compared with what, and what each number carries."""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import shaken
from rich.console import Console
from safetensors.torch import save_file

from ssl_pretrain import artefact, backbones, cli
from ssl_pretrain.artefact import weights_sha256
from ssl_pretrain.data import readers, synthetic
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.errors import UsageError
from ssl_pretrain.probe import baselines, knn, protocols
from ssl_pretrain.probe.features import embed
from ssl_pretrain.probe.objects import cut, leave_one_out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "set"
    synthetic.write(folder, 12, seed=1, size_px=(256, 192))
    return folder


@pytest.fixture(scope="module")
def labelled(drawn: Path) -> LabelledSet:
    """Without a split of its own."""
    found = readers.read(drawn)
    return replace(found, images=tuple(replace(image, split=None) for image in found.images))


def test_protocols_are_frozen() -> None:
    """Whoever changes one gives it another name; this list is the promise."""
    found = {
        name: [
            (q.name, q.features, q.compared, q.judge.keywords if isinstance(q.judge, partial) else {})
            for q in protocol.questions
        ]
        for name, protocol in protocols.PROTOCOLS.items()
    }
    near, near_20 = {"temperature": 0.07}, {"k": 20, "temperature": 0.07}
    shots = {"shots": (1, 5, 10), "draws": 20}
    assert found == {
        "objects/v1": [
            (name, features, figure, settings)
            for name, figure, settings in (
                ("k-NN", "balanced_accuracy", near_20), ("linear", "balanced_accuracy", {}),
                ("few-shot", "balanced_accuracy_5", shots), ("retrieval", "map_balanced", {}),
            )
            for features in ("crop", "roi")
        ],
        "objects-knn/v0": [("k-NN", "crop", "balanced_accuracy", near_20)],
        "dino-knn": [(f"k-NN {k}", "crop", "accuracy", {"k": k, **near}) for k in (10, 20, 100, 200)],
        "lightly-knn": [("k-NN 200", "crop", "accuracy", {"k": 200, "temperature": 0.1})],
    }  # fmt: skip


def test_every_number_says_where_it_comes_from(labelled: LabelledSet) -> None:
    asked = {"mine": shaken("test_resnet"), "pixels": backbones.create("pixels/8")}
    found = protocols.ask(protocols.PROTOCOLS["objects/v1"], asked, labelled, size_px=32, seed=3, rounds=50)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    for number in plain["numbers"]:
        assert (number["protocol"], number["seed"], number["data"]) == ("objects/v1", 3, found.objects.fingerprint)
        assert number["low"] <= number["value"] <= number["high"] or number["figure"].startswith("macro")
        assert re.fullmatch("[0-9a-f]{16}", number["weights"])
    kinds = {(n["backbone"], n["probe"], n["features"]) for n in plain["numbers"]}
    assert {k for k in kinds if k[0] == "mine"} == {
        ("mine", p, f) for p in ("k-NN", "linear", "few-shot", "retrieval") for f in ("crop", "roi")
    }
    assert {k[2] for k in kinds if k[0] == "pixels"} == {"crop"}  # a thumbnail has no maps
    assert {(d["probe"], d["features"]) for d in plain["differences"]} == {
        (p, "crop") for p in ("k-NN", "linear", "few-shot", "retrieval")
    }
    for difference in plain["differences"]:
        mine, other = (
            next(
                n["value"] for n in plain["numbers"]
                if all(n[key] == difference[key] for key in ("probe", "features", "figure")) and n["backbone"] == name
            )
            for name in ("mine", "pixels")
        )  # fmt: skip
        assert difference["value"] == pytest.approx(mine - other)
    assert plain["data"]["split"].startswith("leave one")
    console = Console(width=200, file=io.StringIO())
    console.print(protocols.table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("mine", "pixels", "map balanced", "roi", "most often taken for"))


def test_knn_of_a_protocol_is_the_knn_of_the_library(labelled: LabelledSet) -> None:
    network = shaken("test_resnet")
    report = protocols.ask(protocols.PROTOCOLS["lightly-knn"], {"a": network}, labelled, size_px=32, rounds=20)
    objects = cut(labelled, 32)
    alone = knn.score(objects, embed(network, objects.crops_NSSC), "a", k=200, ks=(200,), temperature=0.1, rounds=20)
    assert report.answers[0].intervals["accuracy"].value == alone.accuracy.value
    np.testing.assert_array_equal(report.answers[0].judged.confusion_CC, alone.confusion_CC)
    everything = protocols.ask(protocols.PROTOCOLS["objects/v1"], {"a": network}, labelled, size_px=32, rounds=20)
    objects = leave_one_out(objects)
    alone = knn.score(objects, embed(network, objects.crops_NSSC), "a", rounds=20)
    assert everything.answers[0].intervals["balanced_accuracy"] == alone.balanced_accuracy


def test_a_backbone_is_not_better_than_itself(labelled: LabelledSet) -> None:
    network = shaken("test_resnet")
    report = protocols.ask(
        protocols.PROTOCOLS["dino-knn"], {"a": network, "b": copy.deepcopy(network)}, labelled, size_px=32, rounds=50
    )
    for difference in report.differences:
        assert vars(difference.interval) == {"value": 0, "low": 0, "high": 0}
        assert "not distinguishable" in difference.sentence


def test_the_untrained_network_is_another_draw_of_the_same_architecture() -> None:
    mine = shaken("test_vit", img_size=32, patch_size=8)
    fresh = baselines.untrained(mine)
    assert {k: v.shape for k, v in fresh.weights().items()} == {k: v.shape for k, v in mine.weights().items()}
    assert weights_sha256(fresh) != weights_sha256(mine)
    assert weights_sha256(fresh) == weights_sha256(baselines.untrained(mine))
    assert weights_sha256(fresh) != weights_sha256(baselines.untrained(mine, seed=1))
    state = torch.get_rng_state()
    baselines.untrained(mine)
    assert torch.equal(state, torch.get_rng_state())


def test_an_untrained_batch_norm_is_settled_and_a_trained_one_is_left_alone() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8)
    mine = shaken("test_resnet")
    assert baselines.settled(mine, crops) is mine
    fresh = baselines.untrained(mine)
    found = baselines.settled(fresh, crops)
    assert found is not fresh and not found.training
    first = next(m for m in found.modules() if isinstance(m, torch.nn.BatchNorm2d))
    conv = next(m for m in found.modules() if isinstance(m, torch.nn.Conv2d))
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(found.input.mean).view(3, 1, 1)) / torch.tensor(found.input.std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(first.running_mean, conv(x).mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    born = next(m for m in fresh.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert born.running_mean is not None and not born.running_mean.any()


def test_imagenet_weights_are_taken_from_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = shaken("test_resnet")
    monkeypatch.setattr("ssl_pretrain.backbones.timm.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert baselines.imagenet(mine) is None
    published = timm.create_model("test_resnet")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "ssl_pretrain.backbones.timm.try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors")
    )
    found = baselines.imagenet(mine)
    assert found is not None
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in found.weights().items())
    assert baselines.imagenet(backbones.create("pixels/8")) is None


def test_the_verb(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artefact.write(tmp_path / "mine", shaken("test_resnet"), {})
    words = ["probe", str(folder), "--data", str(drawn), "--size-px", "32", "--json", str(tmp_path / "found.json")]
    assert cli.main([*words, "--protocol", "dino-knn"]) == 0
    said = capsys.readouterr().out
    assert "pixels" in said and "untrained test_resnet" in said and "points" in said
    plain = json.loads((tmp_path / "found.json").read_text())
    assert plain["protocol"] == "dino-knn" and {n["probe"] for n in plain["numbers"]} >= {"k-NN 10", "k-NN 200"}
    assert cli.main([*words, "--protocol", "lightly-knn", "--against", "none"]) == 0
    assert "untrained" not in capsys.readouterr().out
    assert cli.main([*words, "--protocol", "objects/v2"]) == UsageError.exit_code
    assert "objects/v1" in capsys.readouterr().err
    assert cli.main([*words, "--against", str(tmp_path / "nothing")]) == UsageError.exit_code
    assert cli.main(["probe", str(tmp_path), "--data", str(drawn)]) == UsageError.exit_code


def test_baselines_are_chosen_by_what_is_judged(tmp_path: Path) -> None:
    folder = str(artefact.write(tmp_path / "mine", shaken("test_resnet"), {}))
    assert list(baselines.chosen(folder, ["baselines"])) == [folder, "pixels", "untrained test_resnet"]
    assert list(baselines.chosen("pixels", ["baselines"])) == ["pixels"]
    assert list(baselines.chosen(folder, ["none"])) == [folder]
    assert list(baselines.chosen(folder, ["pixels", "random:test_vit"], 32)) == [folder, "pixels", "random:test_vit"]
