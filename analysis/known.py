"""Things that settings of a study call by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeVar

from fqtstats.errors import InputError

__all__ = ["Known"]

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
