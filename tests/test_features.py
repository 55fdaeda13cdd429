"""RoI-pooled features, against backbones whose maps are known: the image itself, and the places of its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.backbones import Backbone, InputSpec, create
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError
from ssl_pretrain.probe.features import pooled_maps, rois
from ssl_pretrain.probe.objects import Objects


class Known(Backbone):
    """Maps at strides 4, 8, 16 and 32 that `what` makes of the normalised image."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.name, self.family, self.dim = "known", "convnet", 3
        self.strides, self.channels = (4, 8, 16, 32), (3, 3, 3, 3)
        self.input = InputSpec((mean,) * 3, (std,) * 3, 64)
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[tuple[tuple[int, ...], bool, torch.dtype, bool]] = []

    def what(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean(dim=(2, 3))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        autocast = torch.is_autocast_enabled("cpu")
        self.seen.append((tuple(x_BCHW.shape), self.norm.training, x_BCHW.dtype, autocast))
        return [F.avg_pool2d(self.what(x_BCHW), stride) for stride in self.strides]

    def config(self) -> dict[str, Any]:
        return {}

    def weights(self) -> dict[str, Tensor]:
        return {}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.load_state_dict(weights)


class Places(Known):
    """Each pixel is where it is: x and y in hundreds of pixels, and 1."""

    def what(self, x_BCHW: Tensor) -> Tensor:
        y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in x_BCHW.shape[2:]), indexing="ij")
        return torch.stack([x / 100, y / 100, torch.ones_like(x)]).expand(len(x_BCHW), -1, -1, -1)


def made(folder: Path, images: list[np.ndarray], squares: list[list[list[float]]]) -> tuple[LabelledSet, Objects]:
    """Objects of these images, where the squares say."""
    items = []
    for i, pixels in enumerate(images):
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(LabelledImage(path, (pixels.shape[1], pixels.shape[0]), np.zeros((0, 4)), (), path.name, None))
    image_N = np.repeat(np.arange(len(images)), [len(of_image) for of_image in squares])
    count = len(image_N)
    objects = Objects(
        crops_NSSC=np.zeros((count, 4, 4, 3), np.uint8), label_N=np.zeros(count, np.int64), image_N=image_N,
        unit_N=image_N, train_N=np.ones(count, bool), square_N3=np.array([s for of in squares for s in of], np.float64),
        classes=("a",), source="", rule="", split="", seed=0, fingerprint="", unreadable_images=0,
        degenerate_objects=0, problems=(),
    )  # fmt: skip
    return LabelledSet("hand", "made by hand", "box", ("a",), tuple(items), ()), objects


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def centres(z_ND: np.ndarray) -> np.ndarray:
    """(N, 3 levels, 2): x and y in pixels, as `Places` tells them."""
    z_N33 = z_ND.reshape(-1, 3, 3)
    return 100 * z_N33[:, :, :2] / z_N33[:, :, 2:]


def test_the_mean_colour_of_the_box(tmp_path: Path) -> None:
    image = np.full((320, 448, 3), 20, np.uint8)
    image[64:224, 96:256] = (200, 100, 50)
    labelled, objects = made(tmp_path, [image], [[[128, 96, 96], [288, 64, 64]]])
    z_ND = rois(Known(), labelled, objects)
    assert z_ND.shape == (2, 9) and z_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z_ND, axis=1), 1, atol=1e-6)
    colour = np.array([200, 100, 50]) / np.linalg.norm([200, 100, 50])
    np.testing.assert_allclose(z_ND[0].reshape(3, 3), np.tile(colour, (3, 1)) / np.sqrt(3), atol=1e-5)
    np.testing.assert_allclose(z_ND[1], np.full(9, 1 / 3), atol=1e-5)


def test_the_field_is_normalised_as_the_backbone_asks(tmp_path: Path) -> None:
    image = np.full((64, 64, 3), (51, 102, 204), np.uint8)  # .2, .4, .8
    labelled, objects = made(tmp_path, [image], [[[16, 16, 32]]])
    z_9 = rois(Known(mean=0.5, std=0.1), labelled, objects)[0]
    np.testing.assert_allclose(z_9[:3] / z_9[2], [-1, -1 / 3, 1], atol=1e-5)


def test_the_centre_of_the_box(tmp_path: Path) -> None:
    squares = [[100.0, 80, 64], [200.5, 120.25, 96], [64, 300, 128]]
    labelled, objects = made(tmp_path, [noise(480, 640)], [squares])
    expected = objects.square_N3[:, :2] + objects.square_N3[:, 2:] / 2
    found = centres(rois(Places(), labelled, objects))
    np.testing.assert_allclose(found, expected[:, None].repeat(3, axis=1), atol=0.01)


def test_squares_are_found_in_a_field_that_is_shrunk(tmp_path: Path) -> None:
    labelled, objects = made(tmp_path, [noise(700, 1000)], [[[300, 200, 200]]])
    backbone = Places()
    found = centres(rois(backbone, labelled, objects, short_side_px=350))
    np.testing.assert_allclose(found[0], np.full((3, 2), (200, 150)), atol=0.01)
    # 500 x 350 px, padded at the right and bottom to multiples of 32
    assert backbone.seen[0][0] == (1, 3, 352, 512)
    rois(backbone, labelled, objects)
    assert backbone.seen[1][0] == (1, 3, 640, 928), "640 px and 914 px are the default"
    rois(backbone, labelled, objects, short_side_px=5000)
    assert backbone.seen[2][0] == (1, 3, 704, 1024), "never enlarged"


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    image[::4] = (200, 100, 100)  # every fourth line: nothing or all of it for four-fold sampling
    image[..., 1] += 25
    labelled, objects = made(tmp_path, [image], [[[64, 64, 128]]])
    z_9 = rois(Known(), labelled, objects, short_side_px=64)[0]
    np.testing.assert_allclose(z_9[:3] / z_9[2], [2, 2, 1], rtol=0.06)  # 50, 25 + 25, 25


def test_a_square_beyond_the_image_ends_at_its_edge(tmp_path: Path) -> None:
    """RoIAlign would take zeros from beyond the map, and the padding from within it."""
    squares = [[-50.0, -50, 150], [540, 400, 200], [-20, 100, 200]]
    labelled, objects = made(tmp_path, [noise(480, 640)], [squares])
    found = centres(rois(Places(), labelled, objects))
    # x 0..100, y 0..100; x 540..640, y 400..480; x 0..180, y 100..300. Half a cell at an edge repeats its value.
    np.testing.assert_allclose(found[:, 0], [[50, 50], [590, 440], [90, 200]], atol=0.6)
    bright = np.full((150, 150, 3), (200, 100, 50), np.uint8)
    labelled, objects = made(tmp_path, [bright], [[[-40.0, -40, 120]]])
    z_9 = rois(Known(), labelled, objects)[0]
    np.testing.assert_allclose(z_9[:3] / z_9[2], [4, 2, 1], rtol=1e-4)


def test_batches_make_no_difference_and_the_order_is_that_of_the_objects(tmp_path: Path) -> None:
    sizes = [(96, 128), (128, 96), (96, 128), (90, 120), (96, 128)]  # the fourth is padded to the size of the first
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    squares = [[[8.0 * i, 10, 40], [30, 20 + i, 33]] for i in range(5)]
    labelled, objects = made(tmp_path, images, squares)
    torch.manual_seed(0)
    backbone = create("test_resnet")
    alone, together = (rois(backbone, labelled, objects, batch_size=size) for size in (1, 4))
    assert alone.shape == (10, sum(c for s, c in zip(backbone.strides, backbone.channels, strict=True) if s >= 8))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.linalg.norm(alone[:, None] - alone[None], axis=2)[np.triu_indices(10, 1)].min() > 1e-3
    # an object's feature depends neither on other objects nor on where it stands among them
    order = np.array([7, 0, 4])
    some = Objects(
        **{
            **vars(objects),
            **{name: vars(objects)[name][order] for name in ("label_N", "image_N", "unit_N", "square_N3")},
        }
    )
    np.testing.assert_allclose(rois(backbone, labelled, some), alone[order], atol=1e-5)


def test_a_few_rois_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, objects = made(tmp_path, [noise(96, 128)], [[[5.0 * i, 3 * i, 40] for i in range(7)]])
    whole = rois(Known(), labelled, objects)
    monkeypatch.setattr("ssl_pretrain.probe.features.ROIS_AT_A_TIME", 3)
    np.testing.assert_array_equal(rois(Known(), labelled, objects), whole)


def test_rois_leave_no_trace(tmp_path: Path) -> None:
    labelled, objects = made(tmp_path, [noise(96, 128)], [[[5.0, 3, 40]]])
    backbone = Known().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rois(backbone, labelled, objects)
    np.testing.assert_array_equal(cast, rois(backbone, labelled, objects))
    assert all((training, dtype, auto) == (False, torch.float32, False) for _, training, dtype, auto in backbone.seen)
    assert backbone.training and backbone.norm.training


@pytest.mark.parametrize("patch_size", [8, 14])
def test_a_vit_with_fields_of_any_size(tmp_path: Path, patch_size: int) -> None:
    labelled, objects = made(tmp_path, [noise(90, 130), noise(64, 64, 1)], [[[5.0, 3, 40], [60, 20, 50]], [[0, 0, 64]]])
    backbone = create("test_vit", patch_size=patch_size, img_size=patch_size * 4)
    found = rois(backbone, labelled, objects)
    assert found.shape == (3, 3 * backbone.channels[0]) and np.linalg.norm(found[0] - found[1]) > 1e-3


def test_what_has_no_maps_is_refused(tmp_path: Path) -> None:
    labelled, objects = made(tmp_path, [noise(96, 128)], [[[5.0, 3, 40]]])
    with pytest.raises(UsageError, match=r"pixels/16 gives a map of 16 x 16 .* judge it by crops"):
        rois(create("pixels/16"), labelled, objects)
    with pytest.raises(UsageError, match="32 or more"):
        rois(Known(), labelled, objects, short_side_px=31)


def test_images_that_changed_and_features_that_are_not_finite(tmp_path: Path) -> None:
    labelled, objects = made(tmp_path, [noise(96, 128)], [[[5.0, 3, 40]]])
    backbone = Known(mean=float("nan")).train()
    with pytest.raises(SslPretrainError, match="1 of 1"):
        rois(backbone, labelled, objects)
    assert backbone.training
    Image.fromarray(noise(96, 130)).save(labelled.images[0].path)
    with pytest.raises(DataError, match=r"0\.png has changed"):
        rois(Known(), labelled, objects)
    labelled.images[0].path.unlink()
    with pytest.raises(DataError, match=r"0\.png can no longer be read"):
        rois(Known(), labelled, objects)


def test_pooled_maps_takes_the_levels_of_a_detector() -> None:
    x_BCHW = torch.rand(2, 3, 64, 64)
    z_BD = pooled_maps(Known(), x_BCHW)
    mean_BC = F.normalize(x_BCHW.mean(dim=(2, 3)), dim=1)
    torch.testing.assert_close(z_BD, mean_BC.repeat(1, 3))
