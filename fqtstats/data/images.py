"""An ImageNet-style folder of images: ``root/train/<class>/*.jpg`` and, optionally, ``root/val/<class>/*.jpg``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fqtstats.data.augmentation import CROP_NUMBERS, crop_box, numbers
from fqtstats.data.base import Batch, Data, Kind, root_directory
from fqtstats.errors import InputError

__all__ = ["Images"]

SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDERS = {"train": "train", "test": "val"}

# Per-channel statistics of ImageNet's training images in [0, 1], and the ratio of the resized shorter side to the
# crop. Source: the PyTorch ImageNet example, https://github.com/pytorch/examples/blob/main/imagenet/main.py
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
RESIZE = 256 / 224


class Images(Data):
    """Images read when they are asked for: shorter side resized, centre cropped to [3, size, size], normalized.

    Augmented: a random part, resized to [3, size, size], half of them mirrored, normalized.

    Args:
        root: directory with ``train`` and, for the test split, ``val``.
        size: height and width in pixels.

    Raises:
        InputError: no root, no ``train``, no classes or no images in a class, a class of ``val`` that ``train`` lacks,
            a size below 1; when batches are read, an image that cannot be decoded.
    """

    kind: Kind = "image"
    augments = True

    def __init__(self, root: str | Path | None, size: int = 224) -> None:
        if size < 1:
            raise InputError(f"image_size must be at least 1 pixel, got {size}")
        self.name = "images"
        self.root = root_directory(self.name, root, "train/<class>/*.jpg")
        self.input_shape = (3, size, size)
        train = _scan(self.root / "train")
        found = {"train": train}
        if (self.root / "val").is_dir():
            found["test"] = _scan(self.root / "val")
            foreign = sorted(set(found["test"]) - set(train))
            if foreign:
                raise InputError(
                    f"{str(self.root / 'val')!r} has classes that train lacks ({', '.join(foreign[:3])}); "
                    "use the same class folders in both"
                )
        self.classes = tuple(train)
        self.num_classes = len(self.classes)
        self.splits = tuple(found)
        self._paths = {split: [path for paths in tree.values() for path in paths] for split, tree in found.items()}
        self._targets = {
            split: torch.tensor([self.classes.index(name) for name, paths in tree.items() for _ in paths])
            for split, tree in found.items()
        }

    def len(self, split: str = "train") -> int:
        self.check_split(split)
        return len(self._paths[split])

    def fingerprint(self) -> str:
        """sha256 of the crop size and of every image's relative path and size in bytes, sorted."""
        h = hashlib.sha256(repr(self.input_shape).encode())
        for path in sorted(path for paths in self._paths.values() for path in paths):
            h.update(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode())
        return h.hexdigest()

    def records(self, split: str, indices: Tensor) -> Batch:
        images = [self._centre(self._read(self._paths[split][i])) for i in indices.tolist()]
        return _normalized(images), self._targets[split][indices]

    def augmented(self, indices: Tensor, *, seed: int, epoch: int) -> Batch:
        drawn = numbers(indices, CROP_NUMBERS + 1, seed=seed, epoch=epoch).tolist()
        paths = [self._paths["train"][i] for i in indices.tolist()]
        images = [self._part(self._read(path), own) for path, own in zip(paths, drawn, strict=True)]
        return _normalized(images), self._targets["train"][indices]

    def _read(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                return file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{str(path)!r} cannot be read as an image ({reason}); replace or remove it") from error

    def _centre(self, image: Image.Image) -> Image.Image:
        size = self.input_shape[1]
        scale = round(size * RESIZE) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def _part(self, image: Image.Image, drawn: list[float]) -> Image.Image:
        part = image.crop(crop_box(image.size, drawn[1:]))
        part = part.resize((self.input_shape[1], self.input_shape[2]), Image.Resampling.BILINEAR)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn[0] < 0.5 else part


def _normalized(images: list[Image.Image]) -> Tensor:
    """float32 [N, 3, H, W]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2).float().contiguous() / 255 - MEAN) / STD


def _scan(directory: Path) -> dict[str, list[Path]]:
    """Class name -> image paths, both sorted."""
    if not directory.is_dir():
        raise InputError(f"{str(directory)!r} is missing; expected one folder per class in it")
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{str(directory)!r} has no class folders; expected {directory.name}/<class>/*.jpg or *.png")
    tree = {folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) for folder in folders}
    for name, paths in tree.items():
        if not paths:
            raise InputError(f"{str(directory / name)!r} holds no images ({', '.join(SUFFIXES)}); fill or remove it")
    return tree
