"""CIFAR-10 and CIFAR-100 in their binary format, read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fqtstats.data.augmentation import CropAndFlip
from fqtstats.data.base import InMemory, root_directory
from fqtstats.errors import InputError

__all__ = ["CIFAR10", "CIFAR100", "CifarFormat", "cifar"]

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarFormat:
    """Layout of one data set; a record is its label bytes followed by 3072 pixels (red, green, blue planes, row-major).

    Attributes:
        name: registry name.
        folder: directory inside the published archive.
        train, test: file names.
        labels: number of values of each label byte; the last one is the class.
        mean, std: per channel, of pixels in [0, 1] over the training set.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Source of both layouts: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
CIFAR10 = CifarFormat(
    name="cifar10",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
    test=("test_batch.bin",),
    labels=(10,),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = CifarFormat(
    name="cifar100",
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    labels=(20, 100),  # coarse, fine
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar(layout: CifarFormat, root: str | Path | None) -> InMemory:
    """Images [3, 32, 32], normalized per channel, with their (fine) classes; augmented: shifted and mirrored.

    Args:
        layout: :data:`CIFAR10` or :data:`CIFAR100`.
        root: the directory with the ``.bin`` files, or its parent.

    Raises:
        InputError: a file is missing, truncated, or not in the binary format.
    """
    directory = root_directory(layout.name, root, f"the binary version's {layout.train[0]}")
    if (directory / layout.folder).is_dir():
        directory = directory / layout.folder
    train = torch.cat([_read(layout, directory / file) for file in layout.train])
    test = torch.cat([_read(layout, directory / file) for file in layout.test])
    splits = {"train": train, "test": test}
    first = len(layout.labels)
    return InMemory(
        name=layout.name,
        kind="image",
        num_classes=layout.labels[-1],
        inputs={split: records[:, first:].reshape(-1, 3, 32, 32) for split, records in splits.items()},
        targets={split: records[:, first - 1].clone() for split, records in splits.items()},
        transform=partial(_normalize, mean=layout.mean, std=layout.std),
        augmentation=CropAndFlip(),
    )


def _normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _read(layout: CifarFormat, path: Path) -> Tensor:
    """The file's records, uint8 [N, label bytes + 3072]."""
    size = len(layout.labels) + PIXELS
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        if path.with_suffix("").is_file():
            raise InputError(
                f"{str(path)!r} is missing, only the pickled Python version is there; get the binary version"
            ) from None
        raise InputError(f"{str(path)!r} is missing; extract the binary version of {layout.name} there") from None
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({error.strerror}); check the file and its permissions"
        ) from error
    # A pickle of protocol >= 2 starts with 0x80 and its number; 0x80 is out of range for every first label byte.
    if len(raw) > 1 and raw[0] == 0x80 and 2 <= raw[1] <= 5:
        raise InputError(f"{str(path)!r} is the pickled Python version; get the binary version of {layout.name}")
    if len(raw) == 0 or len(raw) % size:
        raise InputError(
            f"{str(path)!r} has {len(raw)} bytes, expected a positive multiple of {size} (binary {layout.name}); "
            "it is truncated or another file: extract it again"
        )
    records = torch.from_numpy(raw).view(-1, size)
    for byte, values in enumerate(layout.labels):
        bad = (records[:, byte] >= values).nonzero()
        if len(bad):
            k = int(bad[0])
            raise InputError(
                f"{str(path)!r} has label {int(records[k, byte])} in record {k}, expected less than {values}; "
                f"it is not a {layout.name} binary file"
            )
    return records
