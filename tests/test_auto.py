"""What `auto` becomes: numbers worked by hand, published constants at ImageNet's size, and a run that keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import VIT, small
from rich.console import Console

from ssl_pretrain import pretrain
from ssl_pretrain.data import readers, synthetic
from ssl_pretrain.data.building import build
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import MethodConfig, config_class
from ssl_pretrain.named import names
from ssl_pretrain.train import planning, setup
from ssl_pretrain.train.auto import RULES, Choice, Facts, plan
from ssl_pretrain.train.recipe import load

IMAGENET = Facts(images=1_281_167, batch_size=4096, family="vit", image_px=(375, 500))
METHODS = names("methods")


def config(method: str) -> MethodConfig:
    return config_class(method)(**({"teacher": "random:resnet18"} if method == "distill" else {}))


def keys(method: str) -> list[str]:
    own = {f"method.{field.name}" for field in dataclasses.fields(config_class(method))}
    return [key for key in RULES if key in own or key.startswith("train.")]


def values(facts: Facts, method: str = "dino") -> dict[str, Any]:
    return {key.partition(".")[2]: choice.value for key, choice in plan(facts, config(method), keys(method)).items()}


@pytest.mark.parametrize(
    ("images", "batch", "by_hand"),
    [
        # 5 steps an epoch; 10,000 steps would be 2,000 epochs; 4,000 steps: 1 % are 40, under 50; 100 are 2.5 %
        (370, 64, {"epochs": 800, "prototypes": 1024, "teacher_temperature": 0.04, "momentum": 0.98,
                   "freeze_last_layer": 0.025, "lr": 2.5e-4, "weight_decay_end": None, "warmup": 0.1}),
        # 22 steps an epoch; 10,000 / 22 = 454.5; 10,010 steps: 1 % are 100
        (5_640, 256, {"epochs": 455, "prototypes": 1024, "teacher_temperature": 0.04, "momentum": 0.99,
                      "freeze_last_layer": 0.01, "lr": 5e-4, "weight_decay_end": None, "warmup": 0.1}),
        # 390 steps an epoch; 39,000 steps: 1 % are 390, over the paper's 250
        (100_000, 256, {"epochs": 100, "prototypes": 16384, "teacher_temperature": 0.04, "momentum": 0.996,
                        "freeze_last_layer": 0.01, "lr": 5e-4, "weight_decay_end": 0.0694, "warmup": 0.1}),
        (1_281_167, 1024, {"epochs": 100, "prototypes": 65536, "teacher_temperature": 0.04, "momentum": 0.996,
                           "freeze_last_layer": 0.01, "lr": 2e-3, "weight_decay_end": 0.4, "warmup": 0.1}),
    ],
)  # fmt: skip
def test_dino_by_hand(images: int, batch: int, by_hand: dict[str, Any]) -> None:
    found = values(Facts(images=images, batch_size=batch, family="vit", image_px=(480, 640)))
    assert {key: found[key] for key in by_hand} == by_hand
    assert (found["weight_decay"], found["teacher_temperature_warmup"]) == (0.04, 0.3)
    assert (found["global_scale"], found["local_scale"]) == ((0.4, 1.0), (0.05, 0.4))  # objects are not known
    assert found["teacher_temperature_start"] <= found["teacher_temperature"]


@pytest.mark.parametrize("method", METHODS)
def test_at_the_size_of_imagenet_everything_is_as_published(method: str) -> None:
    for family in ("vit", "convnet"):
        spec = config(method).optim(family)
        found = values(dataclasses.replace(IMAGENET, family=family), method)
        ratio = 16 if spec.lr_scaling == "linear" else 4
        assert found.pop("lr") == pytest.approx(spec.lr * ratio, rel=5e-3)  # three digits are given
        ours = {key: found.pop(key) for key in ("warmup", "weight_decay", "weight_decay_end")}
        assert ours == {key: vars(spec)[key] for key in ours}
        assert (found.pop("epochs"), found.pop("optimizer")) == (100, spec.optimizer)
        assert found == {key: vars(config(method))[key] for key in found}


def test_monotone_in_images_and_in_steps() -> None:
    by_images = [values(Facts(images=n, batch_size=64, family="vit")) for n in np.geomspace(64, 4e6, 60).astype(int)]
    for key, sign in (("prototypes", 1), ("epochs", -1)):
        column = [sign * found[key] for found in by_images]
        assert column == sorted(column), key
        assert len(set(column)) > 3, key
    at = [
        values(Facts(n, 64, "vit"), "ibot")["teacher_temperature"] for n in (370, 20_000, 100_000, 510_000, 2_000_000)
    ]
    assert at == [0.04, 0.04, 0.0424, 0.055, 0.07]  # 80 / 980 and a half of the way
    ends = [found["weight_decay_end"] or 0.04 for found in by_images]
    assert ends == sorted(ends) and ends[-1] == 0.4
    steps = [100, 300, 1000, 3000, 10_000, 30_000, 100_000]
    by_steps = [values(Facts(images=640, batch_size=64, family="vit", steps=n)) for n in steps]
    assert [found["momentum"] for found in by_steps] == [0.98, 0.98, 0.98, 0.98, 0.99, 0.996, 0.996]
    assert [found["freeze_last_layer"] for found in by_steps] == [0.03] * 3 + [0.03, 0.01, 0.01, 0.01]
    rates = [values(Facts(images=10_000, batch_size=b, family="vit"))["lr"] for b in (16, 64, 256, 1024)]
    assert rates == [1.25e-4, 2.5e-4, 5e-4, 2e-3]


def test_the_work_is_bounded() -> None:
    for batch in (8, 64, 256, 1024):
        for images in np.geomspace(batch, 4e6, 40).astype(int).tolist():
            facts = Facts(images=images, batch_size=batch, family="vit")
            seen = values(facts)["epochs"] * facts.steps_per_epoch * batch
            assert seen <= max(100 * images, (10_000 + facts.steps_per_epoch) * batch)


def test_every_number_has_a_reason_and_is_of_its_keys_type() -> None:
    for method in METHODS:
        for images in (370, 5_640, 100_000):
            for key, choice in plan(Facts(images, 64, "convnet"), config(method), keys(method)).items():
                assert len(choice.reason) > 10 and "\n" not in choice.reason, key
                if key.startswith("method."):
                    assert type(choice.value) is type(vars(config(method))[key[7:]]), key


@pytest.mark.parametrize(
    ("object_px", "window_px", "local", "globally"),
    [
        (None, 256, (0.05, 0.4), (0.4, 1.0)),
        (20, None, (0.05, 0.4), (0.4, 1.0)),  # 20 of 554 px
        (100, 250, (0.16, 0.4), (0.4, 1.0)),  # 0.4 squared
        (150, 250, (0.2, 0.4), (0.4, 1.0)),  # 0.36 is over half of the upper bound
        (170, 250, (0.2, 0.4), (0.462, 1.0)),  # 0.68 squared
        (500, 250, (0.2, 0.4), (0.5, 1.0)),
        (277.128, None, (0.2, 0.4), (0.4, 1.0)),
    ],
)
def test_crops_are_as_large_as_objects(
    object_px: float | None, window_px: int | None, local: tuple[float, float], globally: tuple[float, float]
) -> None:
    found = values(Facts(370, 64, "vit", image_px=(480, 640), object_px=object_px, window_px=window_px))
    assert (found["local_scale"], found["global_scale"]) == (local, globally)


def test_a_contrastive_temperature_goes_by_the_images_told_apart() -> None:
    at = [values(Facts(100_000, batch, "vit"), "simclr")["temperature"] for batch in (64, 256, 1024, 4096, 16384)]
    assert at == [0.2, 0.2, 0.141, 0.1, 0.1]
    assert values(Facts(100_000, 4096, "vit", accumulate=4), "simclr")["temperature"] == 0.141
    assert values(Facts(100_000, 4096, "vit"), "densegeo")["temperature"] == 0.2


def test_the_rate_is_that_of_the_optimizer_in_use() -> None:
    def settings(facts: Facts) -> tuple[Any, Any]:
        found = plan(facts, config("dino"), ["train.lr", "train.weight_decay"])
        return found["train.lr"].value, found["train.weight_decay"].value

    resnet = Facts(370, 128, "convnet", steps=300)
    assert settings(resnet) == (0.015, 1e-4)  # the authors' SGD at 0.03 for 256
    adamw = dataclasses.replace(resnet, optimizer="adamw")
    assert settings(adamw) == (3.54e-4, 0.04)  # 5e-4 sqrt(1/2), and not SGD's 0.015
    with pytest.raises(UsageError, match=r"train.lr: auto has no rule for train.optimizer lars"):
        settings(dataclasses.replace(resnet, optimizer="lars"))


def test_a_convolutional_network_on_a_small_set_gets_adamw() -> None:
    small_set = values(Facts(370, 128, "convnet", steps=300))
    assert (small_set["optimizer"], small_set["lr"], small_set["weight_decay"]) == ("adamw", 1.41e-3, 0.05)
    contrast = values(Facts(370, 128, "convnet", steps=300), "simclr")
    assert (contrast["optimizer"], contrast["lr"], contrast["weight_decay"]) == ("adamw", 1.41e-3, 0.05)
    large = values(Facts(20_001, 128, "convnet", steps=300))
    assert (large["optimizer"], large["lr"]) == ("sgd", 0.015)
    assert values(Facts(370, 128, "convnet", steps=300), "spark")["lr"] == 1.41e-4  # its paper's is AdamW


def test_a_teacher_of_few_images_has_something_to_say() -> None:
    """BatchNorm in the head."""
    assert values(Facts(370, 64, "convnet"))["head_norm"] == "batch"
    assert values(Facts(510_000, 64, "convnet"))["head_norm"] == "none"
    assert values(Facts(370, 64, "vit"), "ibot")["head_norm"] == "batch"


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_processes_changes_nothing(method: str) -> None:
    alone = Facts(images=5_640, batch_size=512, family="vit", image_px=(480, 640), object_px=50)
    many = dataclasses.replace(alone, ranks=8)
    assert plan(alone, config(method), keys(method)) == plan(many, config(method), keys(method))


def test_prototypes_step_where_the_table_does() -> None:
    images = (1, 19_999, 20_000, 49_999, 50_000, 99_999, 100_000, 199_999, 200_000, 499_999, 500_000)
    found = [values(Facts(n, 1, "vit"))["prototypes"] for n in images]
    assert found == [1024, 1024, 2048, 2048, 4096, 4096, 16384, 16384, 32768, 32768, 65536]
    assert [values(Facts(n, 1, "vit"), "ibot")["prototypes"] for n in images[4:]] == [4096, 4096] + [8192] * 5


# In a recipe


def asking(method: str = "dino", **top: Any) -> dict[str, Any]:
    recipe = {**small(method), **top}
    auto = {"prototypes": "auto", "momentum": "auto", "local_scale": "auto"}
    return {**recipe, "method": {**recipe["method"], **auto}, "train": {**recipe["train"], "lr": "auto"}}


def test_what_is_auto_waits_and_what_is_named_wins() -> None:
    recipe = load(asking())
    assert recipe.auto == {"method.prototypes", "method.momentum", "method.local_scale", "train.lr"}
    assert recipe.flat()["method.prototypes"] == "auto" and "prototypes: auto" in recipe.yaml()
    assert load(yaml.safe_load(recipe.yaml())) == recipe
    assert recipe.default("method.prototypes") == 65536 and recipe.method.freeze_last_layer == 0.2
    named = load(asking(), ["--method.prototypes", "77", "--train.lr=0.5"])
    assert named.auto == {"method.momentum", "method.local_scale"}
    assert (vars(named.method)["prototypes"], named.train.lr) == (77, 0.5)
    word = load(small("dino"), ["--method.momentum", "auto", "--method.prototypes", "auto"])
    assert word.auto == {"method.momentum", "method.prototypes"}
    assert vars(word.method)["momentum"] == 0.996  # the paper's, and not the recipe's, is what a rule starts from


def test_auto_true_asks_for_all_that_is_not_named() -> None:
    recipe = load({**small("dino"), "auto": True})
    assert recipe.auto == {
        "train.warmup", "train.weight_decay", "train.weight_decay_end", "method.teacher_temperature",
        "method.teacher_temperature_start", "method.teacher_temperature_warmup", "method.center_start",
        "method.head_norm", "method.global_scale", "method.local_scale",
    }  # fmt: skip
    assert load({**small("dino"), "auto": True}, ["--train.weight_decay", "0.1"]).auto == recipe.auto - {
        "train.weight_decay", "train.weight_decay_end",
    }  # fmt: skip
    assert load({**small("dino"), "auto": True}, ["--auto", "false"]).auto == frozenset()
    assert "train.epochs" in load({"method": "mae", "backbone": VIT}, ["--auto", "true"]).auto
    assert load({**small("simclr"), "train": {"precision": "auto", "accelerator": "auto"}}).auto == frozenset()
    for method in METHODS:
        everything = load({**small(method), "auto": True})
        assert load(yaml.safe_load(everything.yaml())) == everything


@pytest.mark.parametrize(
    ("given", "words", "says"),
    [
        ({"train": {"batch_size": "auto"}}, [], "train.batch_size: auto has no rule for it; it is for train.epochs, "),
        ({}, ["--seed", "auto"], "seed: auto has no rule"),
        ({}, ["--method.hidden_dim=auto"], "method.hidden_dim: auto has no rule"),
        ({"train": {"epocks": "auto"}}, [], "did you mean 'epochs'"),
        ({"auto": "all"}, [], "auto"),
    ],
)
def test_auto_without_a_rule_is_refused_in_one_line(given: dict[str, Any], words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        load({**small("dino"), **given}, words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_waits_builds_no_method() -> None:
    with pytest.raises(UsageError, match=r"method\.local_scale, method\.momentum.*plan first"):
        setup.method(load(asking()))


def test_a_run_writes_numbers_and_goes_on_with_them(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200)
    done = pretrain(asking(), data=pack.folder, out=tmp_path / "run", words=("--train.steps", "2"), console=console)
    assert done.step == 2
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    written = yaml.safe_load(text)
    assert (written["method"]["prototypes"], written["method"]["momentum"]) == (1024, 0.98)
    assert written["train"]["lr"] == 8.84e-5  # 5e-4 sqrt(8 / 256): AdamW, as the recipe says, on a ResNet
    (reason,) = (line.split("#")[1].strip() for line in text.splitlines() if "prototypes:" in line)
    assert reason.startswith("auto: lightly-train's table")
    shown = console.export_text()
    assert "40 images of" in shown and "method.momentum" in shown and "50 steps of 2" in shown
    assert load(yaml.safe_load(text)).auto == frozenset()

    def never(*_: Any) -> dict[str, Choice]:
        raise AssertionError("a run that goes on is not planned anew")

    monkeypatch.setattr(planning, "plan", never)
    again = pretrain(asking(), data=pack.folder, out=tmp_path / "run", words=("--train.steps", "2"))
    assert again.step == 2
    other = pretrain(yaml.safe_load(text), data=pack.folder, out=tmp_path / "run")  # the numbers themselves go on too
    assert other.step == 2


def test_objects_are_measured_on_labels_or_guessed(tmp_path: Path, pack: Pack) -> None:
    folder = synthetic.write(tmp_path / "drawn", 6, size_px=(256, 192))
    drawn = build([folder / "JPEGImages"], tmp_path / "pack", short_side_px=96, processes=0)
    recipe = load({**asking(), "probe": {"data": str(folder)}})
    facts = planning.gather(recipe, drawn, 1, tmp_path)
    box_N4 = np.concatenate([image.boxes_N4 for image in readers.read(folder).images])
    expected = np.median(np.sqrt((box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])))
    assert (facts.object_px, facts.objects_from) == (expected, "labels of probe.data")
    assert (facts.images, facts.image_px, facts.family, facts.steps) == (6, (192, 256), "convnet", 6)
    guessed = planning.gather(load(asking()), drawn, 1, tmp_path)
    assert guessed.objects_from == "guessed from contrast"
    assert guessed.object_px is not None and expected / 3 < guessed.object_px < 3 * expected  # in pixels of the files
    assert planning.gather(load(asking()), drawn, 1, tmp_path) == guessed
    nothing = load({**small("dino"), "train": {**small("dino")["train"], "lr": "auto"}})
    assert planning.gather(nothing, drawn, 1, tmp_path).object_px is None  # no rule asks for it


def test_an_end_of_the_weight_decay_can_be_named() -> None:
    both = load(small("dino", weight_decay=0.1, weight_decay_end=0.3)).optim("vit")
    assert (both.weight_decay, both.weight_decay_end) == (0.1, 0.3)
    assert load(small("dino", weight_decay=0.1)).optim("vit").weight_decay_end is None
    assert load(small("dino", weight_decay_end=0.3)).optim("vit").weight_decay_end == 0.3
    assert load(small("dino")).optim("vit").weight_decay_end == 0.4
