"""Events for TensorBoard, an optional package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fqtstats.errors import InputError
from fqtstats.results import TOTAL
from fqtstats.trainings import MODEL

__all__ = ["events", "writer_type"]

_SHOWN = {
    "epochs": ("loss", "accuracy", "test_loss", "test_accuracy", "lr"),
    "variance": ("variance", "grad_norm_sq", "snr"),
}
"""Columns that are written, by table."""


def writer_type() -> Any:
    """TensorBoard's writer.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard needs the package tensorboard, which is not installed; "
            "install it with pip install tensorboard, or leave the option out"
        ) from error
    return SummaryWriter


@contextmanager
def events(folder: Path) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Writes rows of a training's tables into ``folder``, by step: losses and accuracies, and total variances."""
    writer = writer_type()(str(folder))

    def write(table: str, row: Mapping[str, Any]) -> None:
        if table == "variance" and row["layer"] != TOTAL:
            return
        step = row["steps"] if table == "epochs" else row["step"]
        prefix = "gradient" if table == "variance" else row["network"]
        for name in _SHOWN[table]:
            if math.isfinite(row[name]):
                writer.add_scalar(f"{prefix}/{name}" if prefix != MODEL else name, row[name], step)

    try:
        yield write
    finally:
        writer.close()
