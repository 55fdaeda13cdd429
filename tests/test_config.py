"""Recipes and the command line as a newcomer meets them: each mistake is one clear line and its exit code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import small

from ssl_pretrain import named, pretrain
from ssl_pretrain.cli import main
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.train.recipe import load

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_words_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    recipe = load(small("simclr"), ["--train.steps", "3", "--seed=7", "--backbone", "resnet18"])
    assert (recipe.train.steps, recipe.top.seed, recipe.backbone.name, recipe.train.batch_size) == (3, 7, "resnet18", 8)
    assert recipe.origin["train.steps"] == "command line"
    assert recipe.origin["train.batch_size"] == "recipe"
    assert "train.epochs" not in recipe.origin


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    for method in named.names("methods"):
        recipe = load(small(method), ["--views.turn_p", "0.75"])
        assert load(yaml.safe_load(recipe.yaml())) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_that_is_shipped_is_valid(path: Path) -> None:
    if "backbone: ultralytics/" in path.read_text():
        pytest.importorskip("ultralytics", reason="ultralytics, which builds the recipe's backbone, is not installed")
    recipe = load(path)
    assert recipe.optim("vit").lr > 0
    assert recipe.specs()


def test_the_views_section_changes_what_the_images_ask_for() -> None:
    recipe = load({**small("dino"), "views": {"vflip_p": 0.5, "turn_p": 0.75, "gray_p": 0.0, "solarize_p": 0.1}})
    for spec in recipe.specs():
        assert (spec.vflip_p, spec.turn_p, spec.gray_p) == (0.5, 0.75, 0.0)
    assert [spec.solarize_p for spec in recipe.specs()] == [0.0, 0.1, 0.0]


def test_published_rates_follow_the_batch() -> None:
    dino = load({"method": "dino", "backbone": "vit_small_patch16_224", "train": {"batch_size": 1024}})
    assert dino.optim("vit").lr == pytest.approx(5e-4 * 4)
    simclr = load({"method": "simclr", "train": {"batch_size": 1024}})
    assert simclr.optim("convnet").lr == pytest.approx(0.075 * 32)  # 0.075 sqrt(batch), B.1 of the paper
    assert load({"method": "simclr", "train": {"lr": 0.5}}).optim("convnet").lr == 0.5


def test_another_optimizer_brings_its_own_settings() -> None:
    adamw = load({"method": "simclr", "train": {"optimizer": "adamw", "batch_size": 256}}).optim("convnet")
    assert (adamw.lr, adamw.weight_decay) == (1.5e-4, 0.1)  # those of ViTs, and not LARS' 1.2
    with pytest.raises(UsageError, match=r"simclr was never published with train.optimizer sgd: give train.lr too"):
        load({"method": "simclr", "train": {"optimizer": "sgd"}}).optim("convnet")
    sgd = load({"method": "simclr", "train": {"optimizer": "sgd", "lr": 0.1}}).optim("convnet")
    assert (sgd.optimizer, sgd.lr, sgd.weight_decay) == ("sgd", 0.1, 1e-6)


@pytest.mark.parametrize(
    ("given", "words", "says"),
    [
        ({"trian": {}}, [], "unknown key 'trian' in the recipe (did you mean 'train'?)"),
        ({"train": {"epocks": 3}}, [], "unknown key 'epocks' under 'train' (did you mean 'epochs'?)"),
        ({"train": {"epochs": "many"}}, [], "train.epochs: Expected a int. Got value: many"),
        ({"train": 3}, [], "'train' is a section"),
        ({}, ["--train.lr", "fast"], "train.lr: Expected float or null. Got value: fast"),
        ({"train": {"precision": "fp8"}}, [], "train.precision"),
        ({"train": {"batch_size": 0}}, [], "train.batch_size is 0"),
        ({"method": {"name": "simcrl"}}, [], "no method is called 'simcrl' (did you mean 'simclr'?)"),
        ({"method": {"name": "simclr", "temprature": 1}}, [], "did you mean 'temperature'"),
        ({"method": {"name": "simclr", "scale": [0.5, 0.1]}}, [], "scale of view"),
        ({"backbone": "resnet19"}, [], "timm has no model 'resnet19' (did you mean 'resnet1"),
        ({}, ["--train.epochz", "3"], "unknown option --train.epochz (did you mean '--train.epochs'?)"),
        ({}, ["--train.epochs"], "expected one argument"),
        ({}, ["--method"], "expected one argument"),
        ({}, ["--seed", "-1"], "seed is -1"),
        ({}, ["--train.warmup", "10"], "share of the run (0 to 1), not epochs"),
        ({}, ["--probe.every_epochs", "0"], "probe.every_epochs is 0"),
        ({}, ["--method.temperature", "0"], "method.temperature is 0"),
        ({"method": {"name": "dino", "freeze_last_layer": 3}}, [], "method.freeze_last_layer is 3"),
        ({"views": {"preset": "brightfeld"}}, [], "no preset is called 'brightfeld' (did you mean 'brightfield'?)"),
        ({"views": {"hue": "lab"}}, [], "views.hue"),
        ({"views": {"engine": "cuda"}}, [], "views.engine"),
        ({"views": {"extras": ["dust"]}}, [], "views.extras"),
        ({"views": {"extras": [{"dust": {}, "stain": {}}]}}, [], "each name an item of its own"),
        ({"views": {"extras": [{"dust": 3}]}}, [], "each name an item of its own"),
        ({"views": {"extras": [{"dsut": {}}]}}, [], "no extra op is called 'dsut' (did you mean 'dust'?)"),
        ({"views": {"extras": [{"dust": {"moist": 3}}]}}, [], "did you mean 'most'"),
        ({"views": {"extras": [{"dust": {"p": 3}}]}}, [], "dust.p is 3"),
        ({"views": {"extras": [{"RandomJPG": {}}]}}, [], "did you mean 'RandomJPEG'"),
        ({"views": {"extras": [{"RandomJPEG": {"quality": [1, 2]}}]}}, [], "did you mean 'jpeg_quality'"),
        ({"views": {"extras": [{"RandomCrop": {"size": [3, 3]}}]}}, [], "RandomCrop"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(given: dict[str, object], words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        load({**small("simclr"), **given}, words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_mae_with_a_resnet_is_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(
        UsageError, match="mae hides patches from the network, which resnet18 cannot do: it takes plain"
    ):
        load({"method": "mae", "backbone": "resnet18"})


def test_a_backbone_that_cannot_be_trained_or_used_is_refused(pack: Pack, tmp_path: Path) -> None:
    for name, says in (("pixels/16", "nothing to train"), ("swin_tiny_patch4_window7_224", "images of one size only")):
        with pytest.raises(UsageError, match=says):
            pretrain(small("simclr", name), data=pack.folder, out=tmp_path / "a")


def test_no_method_is_refused() -> None:
    with pytest.raises(UsageError, match="names no method"):
        load({"backbone": "resnet18"})


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small("simclr")))
    return path


def test_bad_input_is_one_line_and_its_exit_code(
    recipe: Path, pack: Pack, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orphans = tmp_path / "orphans"
    (orphans / "labels").mkdir(parents=True)
    (orphans / "images").mkdir()
    (orphans / "labels" / "1.txt").write_text("3 4 0\n")
    empty, texts, out = tmp_path / "empty", tmp_path / "texts", tmp_path / "out"
    empty.mkdir()
    texts.mkdir()
    (texts / "a.jpg").write_text("no image")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), 64, ""),
        (("pertrain",), 64, "did you mean 'pretrain'"),
        (("pretrain",), 64, "pretrain needs a recipe"),
        (("pretrain", tmp_path / "recipes.yaml"), 64, "did you mean 'recipe.yaml'"),
        (("pretrain", recipe, "--out", out), 64, "--data"),
        (("pretrain", recipe, "--data", tmp_path / "no", "--out", out), 65, "there is no folder or pack"),
        (("pretrain", recipe, "--data", empty, "--out", out), 65, "no images in"),
        (("pretrain", recipe, "--data", texts, "--out", out), 65, "rejected"),
        (("pretrain", recipe, "--data", pack.folder, "--out", out, "--train.batch_size", 64), 64, "only 40 images"),
        (("pretrain", recipe, "--data", pack.folder, "--out", recipe), 74, "cannot write to"),
        (("pretrain", recipe, "--data", "synthetic:x", "--out", out), 64, "synthetic:N"),
        (("probe", "pixels", "--data", images), 65, "labels"),
        (("probe", "pixels", "--data", orphans), 65, "image"),
        (("probe", "pixels", "--data", tmp_path / "no"), 65, "there is no folder or pack"),
        (("probe", "nothing", "--data", "synthetic:1"), 64, "nothing does not exist"),
        (("probe", "pixels"), 64, "required: data"),
        (("pack", images, "--out", tmp_path / "p", "--short-side", "big"), 64, "--short-side"),
        (("pack", images), 64, "required: out"),
        (("pack", empty, "--out", tmp_path / "p"), 65, "no images"),
        (("export", tmp_path / "no", "--out", out), 64, "does not exist"),
        (("export", empty, "--out", out), 64, "is not an artefact"),
        (("export", empty, "--to", "tim", "--out", out), 64, "did you mean 'timm'"),
        (("report", tmp_path / "no"), 64, ""),
    ]
    for words, expected, says in cases:
        code, line = run(capsys, *words)
        assert code == expected, (words, line)
        assert says in " ".join(line.split()), (words, line)
        assert line.count("\n") <= 1 and "Traceback" not in line, (words, line)


def test_help_is_for_reading(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["pack", "--help"], ["probe", "--help"], ["pretrain", "--help"]):
        try:
            assert main(words) == 0
        except SystemExit as end:
            assert end.code == 0
        assert "usage" in capsys.readouterr().out
    assert main(["pretrain", str(recipe), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--method.temperature" in text and "Of the softmax over cosine similarities." in text


def modules_after(code: str) -> set[str]:
    code = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    return set(done.stdout.split())


DATA = [f"data.{n}" for n in named.names("data")] + [f"data.readers.{n}" for n in named.names("data.readers")]


@pytest.mark.parametrize(
    ("code", "never"),
    [
        ("import ssl_pretrain", ["torch", "numpy", "timm", "lightning", "kornia", "faiss", "lightly"]),
        ("import ssl_pretrain.cli", ["torch", "timm", "lightning", "kornia", "faiss", "lightly"]),
        (
            "import ssl_pretrain.artefact, ssl_pretrain.detectors.torchvision, ssl_pretrain.backbones.timm",
            ["lightning", "pytorch_lightning", "faiss", "kornia", "lightly", "ssl_pretrain.views", "ssl_pretrain.data",
             "ssl_pretrain.methods", "ssl_pretrain.train", "ssl_pretrain.probe", "ssl_pretrain.export"],
        ),
        (
            "; ".join(f"import ssl_pretrain.{name}" for name in DATA),
            ["torch", "kornia", "lightning", "ssl_pretrain.methods"],
        ),
        (
            "; ".join(
                f"import ssl_pretrain.{kind}.{n}"
                for kind in ("probe", "export")
                for n in named.names(kind)
                if n != "ultralytics"  # which stands on the package, and this may not be here
            ),
            ["ssl_pretrain.train", "ssl_pretrain.methods", "lightning", "transformers", "onnx", "mmengine"],
        ),
    ],
)  # fmt: skip
def test_imports_go_down_only(code: str, never: list[str]) -> None:
    loaded = modules_after(code)
    assert not loaded & set(never)
    if "cli" not in code:
        assert not loaded & {"ultralytics", "detectron2", "mmdet", "transformers", "onnx"}


def test_training_names_no_method_reader_or_probe() -> None:
    things = {f"methods.{n}" for n in named.names("methods")} | {f"probe.{n}" for n in named.names("probe")}
    things |= {f"data.readers.{n}" for n in named.names("data.readers")}
    for path in (Path(__file__).parents[1] / "ssl_pretrain" / "train").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
                assert not imported & {f"ssl_pretrain.{thing}" for thing in things}, path


def test_every_public_name_can_be_had() -> None:
    import ssl_pretrain

    for name in ssl_pretrain.__all__:
        assert callable(vars(ssl_pretrain).get(name) or getattr(ssl_pretrain, name))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = ssl_pretrain.pretrian


EACH_METHOD_ALONE = """
import os, sys
import ssl_pretrain.methods, lightly.loss, timm, torch.distributed.nn     # what all of them stand on, once
from ssl_pretrain.named import names
for name in names("methods"):
    sys.stdout.flush()
    if os.fork() == 0:
        __import__(f"ssl_pretrain.methods.{name}")
        asked = "ssl_pretrain", "lightning", "faiss"
        print(name, *(module for module in sys.modules if module.partition(".")[0] in asked))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_a_method_imports_no_other_and_nothing_above_it() -> None:
    done = subprocess.run([sys.executable, "-c", EACH_METHOD_ALONE], capture_output=True, text=True, check=True)
    found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert sorted(found) == named.names("methods")
    for name, modules in found.items():
        assert f"ssl_pretrain.methods.{name}" in modules
        others = {f"ssl_pretrain.methods.{other}" for other in found if other != name}
        above = {f"ssl_pretrain.{floor}" for floor in ("data", "train", "probe", "export")} | {"lightning", "faiss"}
        assert not modules & (others | above), name
