"""Things that settings of a study call by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeVar

from fqtstats.errors import InputError

__all__ = ["Known", "with_bits"]

Thing = TypeVar("Thing")


class Known(dict[str, Thing]):
    """Things by name; to ask for another one raises an error that lists them.

    Args:
        kind: what they are, for the error.
        things: by name.
    """

    def __init__(self, kind: str, things: Mapping[str, Thing]) -> None:
        super().__init__(things)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        raise InputError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")


def with_bits(text: str) -> tuple[str, int | None]:
    """``"name@bits"`` or ``"name"``.

    Raises:
        InputError: what follows ``@`` is no number.
    """
    name, at, bits = text.partition("@")
    if at and not bits.isdecimal():
        raise InputError(f"expected NAME or NAME@BITS, got {text!r}")
    return name, int(bits) if at else None
