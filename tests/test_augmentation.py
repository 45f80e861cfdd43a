"""Augmentation of training images: what it does on files of the true formats, and what its numbers depend on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fqtstats.data import Data, data
from fqtstats.data.augmentation import CROP_NUMBERS, CropAndFlip, crop_box, numbers
from fqtstats.errors import InputError
from fqtstats.training import loop as training
from fqtstats.training import recipes


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for file in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        records = rng.integers(0, 256, (40, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(root / file)
    return data("cifar10", root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Pictures whose red is the column, whose green is the row and whose blue is their number."""
    root = tmp_path_factory.mktemp("images")
    for split, number in itertools.product(("train", "val"), range(6)):
        width, height = 120 + 10 * number, 100
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        pixels[..., 2] = 40 * number
        path = root / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return data("images", root, image_size=16)


SOURCES = ("cifar", "folder")


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Data:
    found: Data = request.getfixturevalue(request.param)
    return found


def test_a_sample_depends_on_seed_epoch_and_index_alone(source: Data) -> None:
    some = torch.tensor([3, 0, 5])
    together, targets = source.augmented(some, seed=1, epoch=2)
    for k in (2, 0, 1):  # alone, in another order, as another worker would
        state = torch.get_rng_state()
        torch.manual_seed(k)
        alone, target = source.augmented(some[k : k + 1], seed=1, epoch=2)
        torch.set_rng_state(state)
        assert torch.equal(alone[0], together[k])
        assert target == targets[k]
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        changed, _ = source.augmented(some, **other)
        assert not any(torch.equal(a, b) for a, b in zip(changed, together, strict=True))


def test_augmented_batches_have_the_order_and_targets_of_the_others(source: Data) -> None:
    plain, changed = (list(source.batches(4, seed=3, epoch=1, augment=augment)) for augment in (False, True))
    assert len(plain) == len(changed) == source.steps(4)
    for (x, y), (x2, y2) in zip(plain, changed, strict=True):
        assert torch.equal(y, y2)
        assert x.shape == x2.shape
        assert x2.dtype == torch.float32
        assert x2.is_contiguous()
        assert not torch.equal(x, x2)
    again = list(source.batches(4, seed=3, epoch=1, augment=True))
    assert all(torch.equal(x, x2) for (x, _), (x2, _) in zip(changed, again, strict=True))


def test_only_training_batches_are_augmented(source: Data) -> None:
    with pytest.raises(InputError, match=r"only training batches are augmented, not those of split 'test'"):
        source.batches(4, seed=0, split="test", augment=True)


@pytest.mark.parametrize("name", ["digits", "text"])
def test_sources_without_augmentation_say_so(name: str) -> None:
    plain = data(name)
    assert not plain.augments
    with pytest.raises(InputError, match=f"data '{name}' has no augmentation; leave it out"):
        plain.batches(4, seed=0, augment=True)
    with pytest.raises(InputError, match=f"data '{name}' has no augmentation"):
        plain.augmented(torch.tensor([0]), seed=0, epoch=0)


def test_cifar_is_shifted_with_zeros_from_outside_and_mirrored(cifar: Data) -> None:
    indices = torch.arange(cifar.len())
    plain, _ = cifar.records("train", indices)
    changed, _ = cifar.augmented(indices, seed=0, epoch=0)
    drawn = numbers(indices, 3, seed=0, epoch=0)
    for x, y, (u, v, mirrored) in zip(plain[:40], changed[:40], drawn[:40].tolist(), strict=True):
        down, right = math.floor(9 * u) - 4, math.floor(9 * v) - 4
        # Oracle, pixel by pixel on one channel: what was at (i + down, j + right), zero outside.
        expected = torch.zeros(32, 32)
        for i in range(max(0, -down), min(32, 32 - down)):
            row = torch.zeros(32)
            a, b = max(0, -right), min(32, 32 - right)
            row[a:b] = x[1, i + down, a + right : b + right]
            expected[i] = row
        assert torch.equal(y[1].flip(1) if mirrored < 0.5 else y[1], expected)
    found = {(math.floor(9 * u), math.floor(9 * v)) for u, v, _ in drawn.tolist()}
    assert {i for i, _ in found} == {j for _, j in found} == set(range(9))


def test_training_takes_augmented_batches_where_asked(cifar: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    weights = []
    for augment in (False, True, True):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        recipe = recipes.get("exact")
        training.train(model, cifar, recipe, epochs=1, batch_size=50, seed=1, augment=augment)
        weights.append(model[1].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_the_largest_number_stays_inside() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    largest = torch.full((1, 3), 1 - 2**-24, dtype=torch.float64)
    expected = torch.zeros(4, 4)
    expected[:3, :3] = image[0, 0, 1:, 1:]
    assert torch.equal(CropAndFlip(pad=1)(image, largest)[0, 0], expected)
    left, top, right, bottom = crop_box((30, 20), [1 - 2**-24] * CROP_NUMBERS)
    assert 0 <= left < right <= 30
    assert 0 <= top < bottom <= 20


def test_the_part_of_an_image_is_the_one_that_is_resized(folder: Data) -> None:
    indices = torch.arange(6)
    changed, targets = folder.augmented(indices, seed=5, epoch=1)
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    drawn = numbers(indices, CROP_NUMBERS + 1, seed=5, epoch=1).tolist()
    widths = [120, 140, 160, 130, 150, 170]  # files 0, 2, 4 of class a, then 1, 3, 5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, width, own in zip(changed, widths, drawn, strict=True):
        left, top, right, bottom = crop_box((width, 100), own[1:])
        pixels = 255 * (image * std.view(3, 1, 1) + mean.view(3, 1, 1))
        columns, rows = pixels[0].mean(0), pixels[1].mean(1)
        if own[0] < 0.5:
            columns = columns.flip(0)
        # Red is the column: linear, so resampling keeps its mean and its slope, up to rounding to whole numbers.
        assert columns.mean().item() == pytest.approx((left + right - 1) / 2, abs=1)
        assert rows.mean().item() == pytest.approx((top + bottom - 1) / 2, abs=1)
        assert (columns[12] - columns[3]).item() == pytest.approx(9 * (right - left) / 16, abs=1.5)
        assert (rows[12] - rows[3]).item() == pytest.approx(9 * (bottom - top) / 16, abs=1.5)
    assert len({own[0] < 0.5 for own in drawn}) == 2


@pytest.mark.parametrize("size", [(224, 224), (500, 333), (17, 300), (3, 2), (1, 1)])
def test_parts_of_images_have_the_published_areas_and_ratios(size: tuple[int, int]) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        left, top, right, bottom = crop_box(size, rng.random(CROP_NUMBERS).tolist())
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        w, h = right - left, bottom - top
        areas.append(w * h / (width * height))
        if min(size) >= 200:
            assert 0.74 < w / h < 1.35
    if min(size) >= 200:
        assert 0.075 < min(areas) < 0.15
        assert 0.75 < max(areas) <= 1


def test_where_no_part_fits_it_is_the_largest_allowed_one_in_the_centre() -> None:
    # A whole area can only be met by the ratio of the image, 10: all ten attempts fail.
    assert crop_box((100, 10), [1 - 2**-24, 0.5] * 10 + [0.0, 0.0]) == (43, 0, 56, 10)
    assert crop_box((10, 100), [1 - 2**-24, 0.5] * 10 + [0.0, 0.0]) == (0, 43, 10, 56)
