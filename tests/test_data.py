"""The data sources: true file formats written here, order of the batches, and every error."""

from __future__ import annotations

import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fqtstats import imports
from fqtstats.data import SOURCES, Data, data, wrap
from fqtstats.data.base import order
from fqtstats.data.text import NUM_SYMBOLS
from fqtstats.errors import InputError


def error(pattern: str) -> Any:
    """An InputError of one line that matches."""
    return pytest.raises(InputError, match=rf"\A.*{pattern}.*\Z")


# --- the sources


@pytest.fixture(scope="module")
def digits() -> Data:
    return data("digits")


@pytest.fixture(scope="module")
def text() -> Data:
    return data("text")


def test_digits(digits: Data) -> None:
    assert (digits.len(), digits.len("test"), digits.num_classes, digits.kind) == (1437, 360, 10, "image")
    inputs, targets = next(digits.batches(1437, seed=0))
    assert inputs.shape == (1437, *digits.input_shape) == (1437, 1, 8, 8)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    torch.testing.assert_close(torch.std_mean(inputs, correction=0), (torch.tensor(1.0), torch.tensor(0.0)))
    assert targets.bincount().min() > 100
    assert digits.fingerprint() == data("digits").fingerprint()


def test_text(text: Data) -> None:
    assert text.kind == "tokens"
    assert text.input_shape == (64,)
    assert text.num_classes == NUM_SYMBOLS
    inputs, targets = next(text.batches(32, seed=0))
    assert inputs.shape == targets.shape == (32, 64)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 0 <= inputs.min() <= inputs.max() < NUM_SYMBOLS
    assert 5_000 < text.len() < 2_000_000 // 64
    first, _ = text.records("train", torch.arange(2))
    decoded = "".join("\n" if s == 1 else chr(s + 30) if s else "?" for s in first.flatten().tolist())
    assert decoded.startswith("# Author: Steven J. Bethard")  # argparse
    assert text.fingerprint() == data("text").fingerprint()


def write_cifar(root: Path, files: dict[str, int], labels: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Files of the given numbers of records in the binary format; returns the records."""
    rng = np.random.default_rng(0)
    written = {}
    for file, n in files.items():
        records = rng.integers(0, 256, (n, len(labels) + 3072), dtype=np.uint8)
        for byte, values in enumerate(labels):
            records[:, byte] %= values
        records.tofile(root / file)
        written[file] = records
    return written


CIFAR10_FILES = {f"data_batch_{k}.bin": k for k in range(1, 6)} | {"test_batch.bin": 3}


def test_cifar10(tmp_path: Path) -> None:
    written = write_cifar(tmp_path, CIFAR10_FILES, (10,))
    source = data("cifar10", tmp_path)
    assert (source.len(), source.len("test"), source.num_classes) == (15, 3, 10)
    inputs, targets = source.records("train", torch.arange(15))
    records = np.concatenate([written[f"data_batch_{k}.bin"] for k in range(1, 6)])
    assert targets.tolist() == records[:, 0].tolist()
    # Oracle: pixel (c, y, x) is byte 1 + 1024 c + 32 y + x.
    expected = (records[7, 1 + 1024 * 2 + 32 * 5 + 6] / 255 - 0.4465) / 0.2616
    assert inputs[7, 2, 5, 6].item() == pytest.approx(expected, rel=1e-5)


def test_cifar100_takes_the_fine_label_and_finds_the_archives_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    written = write_cifar(folder, {"train.bin": 30, "test.bin": 4}, (20, 100))
    source = data("cifar100", str(tmp_path))
    assert source.num_classes == 100
    _, targets = source.records("train", torch.arange(30))
    assert targets.tolist() == written["train.bin"][:, 1].tolist()
    assert source.fingerprint() == data("cifar100", folder).fingerprint()
    write_cifar(folder, {"train.bin": 29}, (20, 100))
    assert source.fingerprint() != data("cifar100", folder).fingerprint()


def test_cifar_errors(tmp_path: Path) -> None:
    with error("needs a root directory"):
        data("cifar10")
    with error("expected a directory at .* found nothing"):
        data("cifar10", tmp_path / "absent")
    with error(r"data_batch_1\.bin' is missing; extract"):
        data("cifar10", tmp_path)
    write_cifar(tmp_path, CIFAR10_FILES, (10,))
    with error("expected a directory at .* found a file"):
        data("cifar10", tmp_path / "test_batch.bin")
    last = tmp_path / "data_batch_5.bin"
    whole = last.read_bytes()
    for damaged in (whole[:-1], b""):
        last.write_bytes(damaged)
        with error(rf"data_batch_5\.bin' has {len(damaged)} bytes, expected a positive multiple of 3073"):
            data("cifar10", tmp_path)
    last.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with error("has label 10 in record 1, expected less than 10"):
        data("cifar10", tmp_path)
    last.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, protocol=2))
    with error(r"data_batch_5\.bin' is the pickled Python version"):
        data("cifar10", tmp_path)
    last.rename(tmp_path / "data_batch_5")
    with error("is missing, only the pickled Python version is there"):
        data("cifar10", tmp_path)
    last.mkdir()
    with error(r"data_batch_5\.bin' cannot be read"):
        data("cifar10", tmp_path)


def write_image(path: Path, size: tuple[int, int] = (20, 10), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_images(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "b" / "1.PNG", (10, 30), (0, 255, 0))
    write_image(tmp_path / "train" / "a" / "2.jpg")
    write_image(tmp_path / "train" / "a" / "1.jpeg")
    write_image(tmp_path / "val" / "b" / "x.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    source = data("images", tmp_path, image_size=16)
    assert (source.len(), source.len("test"), source.num_classes) == (3, 1, 2)
    assert source.input_shape == (3, 16, 16)
    inputs, targets = source.records("train", torch.tensor([2, 0]))
    assert inputs.shape == (2, 3, 16, 16)
    assert targets.tolist() == [1, 0]
    green = (torch.tensor([0.0, 1.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(inputs[0], green.view(3, 1, 1).expand(3, 16, 16))
    assert next(source.batches(8, seed=0, split="test"))[1].tolist() == [1]
    before = source.fingerprint()
    write_image(tmp_path / "train" / "a" / "3.png")
    assert data("images", tmp_path, image_size=16).fingerprint() != before
    assert data("images", tmp_path).input_shape == (3, 224, 224)


def test_images_are_cropped_in_the_centre(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 8))
    picture.paste((255, 255, 255), (16, 0, 24, 8))
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture.save(tmp_path / "train" / "a" / "1.png")
    inputs, _ = data("images", tmp_path, image_size=7).records("train", torch.tensor([0]))
    assert inputs.min() > 2  # only the white middle is left


def test_images_errors(tmp_path: Path) -> None:
    with error("needs a root directory"):
        data("images")
    with error("train' is missing"):
        data("images", tmp_path)
    train = tmp_path / "train"
    train.mkdir()
    with error("has no class folders"):
        data("images", tmp_path)
    (train / "a").mkdir()
    with error("train/a' holds no images"):
        data("images", tmp_path)
    write_image(train / "a" / "1.png")
    with error("image_size must be at least 1"):
        data("images", tmp_path, image_size=0)
    with error("no split 'test'; use one of train"):
        data("images", tmp_path).batches(1, seed=0, split="test")
    write_image(tmp_path / "val" / "z" / "1.png")
    with error(r"has classes that train lacks \(z\)"):
        data("images", tmp_path)
    (tmp_path / "val" / "z").rename(tmp_path / "val" / "a")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(train / "a" / "1.png")
    for broken in (b"", b"not an image", (train / "a" / "1.png").read_bytes()[:5000]):
        (train / "a" / "1.png").write_bytes(broken)
        with error(r"train/a/1\.png' cannot be read as an image"):
            next(data("images", tmp_path).batches(1, seed=0))


def test_unknown_and_unusable_arguments(tmp_path: Path) -> None:
    with error(f"unknown data 'mnist'; known: {', '.join(SOURCES)}"):
        data("mnist")
    with error("reads no directory"):
        data("digits", tmp_path)
    with error("has a fixed size"):
        data("digits", image_size=32)


# --- order of the batches


def test_order_is_a_permutation_that_depends_on_its_key_alone() -> None:
    key = {"seed": 1, "epoch": 2, "split": "train"}
    one = order(1000, **key)
    assert torch.equal(one, order(1000, **key))
    assert one.sort().values.tolist() == list(range(1000))
    for other in ({"seed": 2}, {"epoch": 3}, {"split": "test"}):
        assert not torch.equal(one, order(1000, **(key | other)))


def test_batches(digits: Data) -> None:
    batches = list(digits.batches(100, seed=3))
    assert [len(y) for _, y in batches] == [100] * 14
    assert digits.steps(100) == 14
    again = list(digits.batches(100, seed=3))
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(batches, again, strict=True))
    assert not torch.equal(batches[0][0], next(digits.batches(100, seed=4))[0])
    assert [len(y) for _, y in digits.batches(100, seed=3, split="test")] == [100, 100, 100, 60]
    assert digits.steps(100, "test") == 4
    assert [len(y) for _, y in digits.batches(5000, seed=3)] == [1437]


def test_batches_errors(digits: Data) -> None:
    with error("batch_size must be at least 1, got 0"):
        digits.batches(0, seed=0)
    with error("no split 'val'; use one of train, test"):
        digits.batches(1, seed=0, split="val")
    with error("no split 'val'"):
        digits.len("val")


# --- the user's own


INPUTS = torch.arange(24.0).view(6, 4)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
PAIRS = [(INPUTS[:4], TARGETS[:4]), (INPUTS[4:], TARGETS[4:])]


def collect(source: Data, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(source.batches(2, **({"seed": 0} | options)))


@pytest.mark.parametrize("made", [(INPUTS, TARGETS), TensorDataset(INPUTS, TARGETS)], ids=["tensors", "Dataset"])
def test_custom_samples(made: object) -> None:
    source = wrap(lambda: made, "m:f")
    assert (source.kind, source.input_shape, source.num_classes, source.len()) == ("features", (4,), 3, 6)
    batches = collect(source)
    assert [len(y) for _, y in batches] == [2, 2, 2]
    assert sorted(x[0].item() for x in torch.cat([x for x, _ in batches])) == INPUTS[:, 0].tolist()
    assert source.fingerprint() == wrap(lambda: made, "m:f").fingerprint()


def generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield from PAIRS


@pytest.mark.parametrize(
    "make",
    [lambda: PAIRS, generator, lambda: DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4)],
    ids=["list", "generator", "DataLoader"],
)
def test_custom_ready_batches_keep_their_size_and_can_be_read_again(make: Any) -> None:
    source = wrap(make, "m:f")
    assert (source.num_classes, source.len(), source.steps(1)) == (3, 6, 2)
    for epoch in range(2):
        batches = collect(source, epoch=epoch)
        assert [len(y) for _, y in batches] == [4, 2]
        assert torch.equal(torch.cat([x for x, _ in batches]), INPUTS)
    assert source.fingerprint() == wrap(make, "m:f").fingerprint()
    with error("ready batches, not single samples"):
        source.records("train", torch.tensor([0]))


def test_a_shuffling_loader_depends_on_the_seed_and_not_on_the_global_state() -> None:
    source = wrap(lambda: DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True), "m:f")
    torch.manual_seed(1)
    one = collect(source, seed=5)
    state = torch.get_rng_state()
    two = collect(source, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one[0][0], two[0][0])
    assert any(not torch.equal(one[0][0], collect(source, seed=s)[0][0]) for s in range(6, 10))


def test_custom_kinds_and_classes() -> None:
    assert wrap(lambda: (torch.zeros(2, 3, 4, 4), TARGETS[:2]), "m:f").kind == "image"
    tokens = wrap(lambda: (torch.tensor([[1, 7], [2, 3]]), torch.tensor([[7, 2], [3, 1]])), "m:f")
    assert (tokens.kind, tokens.num_classes) == ("tokens", 8)
    assert wrap(lambda: (INPUTS, INPUTS), "m:f").num_classes == 0  # regression
    assert wrap(lambda: tokens, "m:f") is tokens


class Nameless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return PAIRS[0]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PAIRS)


@pytest.mark.parametrize(
    ("made", "pattern"),
    [
        (3, "returned a int, expected a pair of tensors"),
        (None, "returned a NoneType"),
        ({"inputs": INPUTS}, "returned a dict"),
        (INPUTS, "returned a Tensor"),
        ([], "gave no batches"),
        ([INPUTS, TARGETS], "batch 0 of 'm:f' is a Tensor"),
        ([(INPUTS,)], "batch 0 of 'm:f' is a tuple of Tensor, expected"),
        ([{"x": INPUTS}], "batch 0 of 'm:f' is a dict"),
        ((INPUTS, TARGETS[:3]), r"inputs of shape \(6, 4\) and targets of shape \(3,\)"),
        ((INPUTS[:0], TARGETS[:0]), "same positive number of samples"),
        (TensorDataset(INPUTS), "a sample of 'm:f' is a list of Tensor"),
        (TensorDataset(INPUTS[:0], TARGETS[:0]), "without a length, or an empty one"),
        (Nameless(), "without a length, or an empty one"),
        (Endless(), "IterableDataset of single samples"),
    ],
)
def test_custom_errors(made: object, pattern: str) -> None:
    with error(pattern):
        wrap(lambda: made, "m:f")


def test_an_endless_iterable_gives_batches_but_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield PAIRS[0]

    source = wrap(endless, "m:f")
    assert len(next(source.batches(1, seed=0))[1]) == 4
    assert not source.fingerprint_complete
    assert source.fingerprint()
    monkeypatch.setattr("fqtstats.data.custom.MAX_BATCHES", 100)
    for count in (source.len, lambda: source.num_classes):
        with error("has not ended after 100 batches"):
            count()


# --- package.module:function


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    path = tmp_path / "fqtstats_users_module.py"
    path.write_text(
        textwrap.dedent("""
            import torch
            number = 3
            def pair(n=6): return torch.zeros(n, 4), torch.zeros(n, dtype=torch.long)
            def needs(n): return n
            class Maker:
                @staticmethod
                def make(): return pair()
        """)
    )
    (tmp_path / "fqtstats_users_broken.py").write_text("raise RuntimeError('first\\nsecond')")
    (tmp_path / "fqtstats_users_needy.py").write_text("import fqtstats_users_absent")
    return path


@pytest.mark.usefixtures("own_module")
def test_resolve_and_data_by_spec() -> None:
    assert data("fqtstats_users_module:pair").len() == 6
    assert data("fqtstats_users_module:Maker.make").name == "fqtstats_users_module:Maker.make"
    assert imports.resolve("math:sqrt")(4) == 2
    assert imports.call("builtins:dict") == {}


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("a.py:f", "no module named 'a'"),
        ("path/to.py:f", "expected package.module:function, got"),
        ("module:", "expected package.module:function, got"),
        (":f", "expected package.module:function, got"),
        ("a:b:c", "expected package.module:function, got"),
        ("fqtstats_users_absent:f", "no module named 'fqtstats_users_absent'"),
        ("fqtstats_users_needy:f", "it needs 'fqtstats_users_absent', which is missing"),
        ("fqtstats_users_broken:f", "failed with RuntimeError: first; make it importable"),
        ("fqtstats_users_module:absent", "has no attribute 'absent'"),
        ("fqtstats_users_module:Maker.absent", "'Maker' has no attribute 'absent'"),
        ("fqtstats_users_module:number", "is a int, expected a function"),
        ("fqtstats_users_module:needs", "must be callable without arguments"),
    ],
)
def test_spec_errors(spec: str, pattern: str) -> None:
    with error(pattern):
        data(spec)
