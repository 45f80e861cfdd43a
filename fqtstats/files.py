"""Reading and writing whole files, with typed errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fqtstats.errors import RunDirectoryError

__all__ = ["read_bytes", "reason", "write_atomically"]


def reason(error: BaseException) -> str:
    """An error's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _synchronise_directory(path: Path) -> None:
    """Make a rename in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot synchronise a directory
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill ``path``: afterwards the file is the new one, or, on any failure, still the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _synchronise_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunDirectoryError(
                f"cannot write {path}: {reason(error)}; what was saved before is intact, so make room or repair the "
                "disk and continue with --resume"
            ) from error
        raise


def read_bytes(path: Path) -> bytes:
    """The file's contents.

    Raises:
        RunDirectoryError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {reason(error)}") from error
