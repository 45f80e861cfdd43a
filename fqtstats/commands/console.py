"""Output and options that commands share."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fqtstats.errors import InputError

__all__ = ["check_counts", "check_writable", "err", "out", "progress", "say_saved", "separated"]

out = Console()
err = Console(stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars of progress on stderr, shown only where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        yield bars


def say_saved(path: Path, names: Sequence[str], console: Console) -> None:
    """Say where something was saved, in lines no wider than the console; only the path is never broken.

    Args:
        path: the file or the folder.
        names: of what is in a folder.
        console: where to say it.
    """
    place = f"{path}:" if names else str(path)
    room = console.width
    lines = [f"saved in {place}"] if len(place) + len("saved in ") <= room else ["saved in", place]
    listed = ", ".join(names)
    if len(lines) == 1 and len(lines[0]) + 1 + len(listed) <= room:
        lines = [f"{lines[0]} {listed}".rstrip()]
    else:
        indent = "  "
        lines += textwrap.wrap(
            listed, room, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def separated(text: str, option: str) -> list[str]:
    """The values of an option that takes several, without repetitions.

    Raises:
        InputError: one is empty.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"expected {option} as one value or several separated by commas, got {text!r}; fill the gaps")
    return list(dict.fromkeys(parts))


def check_counts(**limits: tuple[int, int]) -> None:
    """Raise InputError where an option's value is too small; by option: its value and the least one."""
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_writable(path: Path) -> None:
    """Raise InputError where a file cannot be written, before the work that it is for."""
    if path.is_dir():
        raise InputError(f"expected a file to write, got the folder {str(path)!r}; name a file in it")
    place = path if path.exists() else path.resolve().parent
    if not place.exists():
        raise InputError(f"cannot write {str(path)!r}: its folder does not exist; make it first")
    if not os.access(place, os.W_OK):
        raise InputError(f"cannot write {str(path)!r}: permission denied; choose another place")
