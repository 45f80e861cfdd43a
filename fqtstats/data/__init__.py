"""Data sources: one row of :data:`SOURCES` each. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fqtstats import imports
from fqtstats.data.base import Batch, Data, Kind
from fqtstats.data.cifar import CIFAR10, CIFAR100, cifar
from fqtstats.data.custom import wrap
from fqtstats.data.digits import digits
from fqtstats.data.images import Images
from fqtstats.data.text import text
from fqtstats.errors import InputError

__all__ = ["SOURCES", "Batch", "Data", "Kind", "Source", "data", "wrap"]


@dataclass(frozen=True)
class Source:
    """One registered source.

    Attributes:
        summary: one line for listings.
        make: from (root, image size) to the data; sources that need neither are given None.
        needs_root: whether a directory has to be given.
        sized: whether the image size can be chosen.
    """

    summary: str
    make: Callable[[str | Path | None, int], Data]
    needs_root: bool = False
    sized: bool = False


SOURCES: dict[str, Source] = {
    "digits": Source("8x8 handwritten digits embedded in scikit-learn, 1437 + 360", lambda root, size: digits()),
    "text": Source("characters of the Python standard library's source, sequences of 64", lambda root, size: text()),
    "cifar10": Source("CIFAR-10, binary version", lambda root, size: cifar(CIFAR10, root), needs_root=True),
    "cifar100": Source("CIFAR-100, binary version, fine", lambda root, size: cifar(CIFAR100, root), needs_root=True),
    "images": Source("folder root/train/<class>/*.jpg|png, root/val/...", Images, needs_root=True, sized=True),
}


def data(name: str, root: str | Path | None = None, *, image_size: int | None = None) -> Data:
    """A data source by name.

    Args:
        name: a name in :data:`SOURCES`, or ``package.module:function`` for the user's own (see :func:`wrap`).
        root: directory of a source that is read from disk.
        image_size: height and width in pixels, for ``images`` (default 224).

    Raises:
        InputError: unknown name, missing or unused ``root`` or ``image_size``, or unusable files.
    """
    if ":" not in name and name not in SOURCES:
        known = ", ".join(SOURCES)
        raise InputError(f"unknown data {name!r}; known: {known}, or package.module:function for your own")
    source = SOURCES.get(name)
    if root is not None and not (source and source.needs_root):
        raise InputError(f"data {name!r} reads no directory, got root={str(root)!r}; leave it out")
    if image_size is not None and not (source and source.sized):
        raise InputError(f"data {name!r} has a fixed size, got image_size={image_size}; leave it out")
    if source is None:
        return wrap(partial(imports.call, name), name)
    return source.make(root, 224 if image_size is None else image_size)
