"""A stream that gives prescribed numbers: how a quantizer's expectation is computed without sampling.

A quantizer draws its randomness from the stream it is given and from nowhere else, so that it is a deterministic map of
the numbers that the stream returns. A :class:`Probe` hands out numbers of the caller's choice and records what was
asked for.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fqtstats.errors import InputError, NotExact
from fqtstats.quantizers import registered
from fqtstats.quantizers.base import Quantized, UniformQuantizer
from fqtstats.random import Stream

__all__ = [
    "Held",
    "Outlet",
    "Probe",
    "StreamFunction",
    "attempt",
    "call",
    "repeated",
    "repeated_codes",
    "replay",
    "require_input",
]

StreamFunction = Callable[[torch.Tensor, Stream], torch.Tensor]
"""``f(x, stream) -> tensor``: anything that can be judged; a quantizer is one."""

_Device = torch.device | str | None

_WIDEST = 32


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where the numbers of one call came from.

    Attributes:
        path: the stream itself (``()``) or the child that was used.
        n: bits per number.
    """

    path: tuple[str, ...]
    n: int


@dataclass(slots=True)
class _Record:
    largest: dict[Outlet, int] = field(default_factory=dict)  # one past the largest index that was asked for


class _Prescribed(Stream):
    """A stream whose numbers, or some of them, do not follow from its key."""

    __slots__ = ()

    def words(self) -> tuple[int, int, int, int]:
        raise NotExact("it takes the stream's key instead of its numbers, so that these cannot be prescribed")

    @staticmethod
    def _numbers(
        words: torch.Tensor, size: tuple[int, ...], n: int, start: int, dtype: torch.dtype, device: _Device
    ) -> torch.Tensor:
        """``n`` bits of each of the words from ``start`` on, as :meth:`bits` returns them."""
        numbers = words[start : start + math.prod(size)] >> (_WIDEST - n)
        return numbers.to(device=device or "cpu", dtype=dtype).view(size)


def _size(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


class Probe(_Prescribed):
    """A stream whose element ``i`` has the number ``words[i] >> (32 - n)`` for ``n`` bits.

    Args:
        words: ``[P]`` int64 in ``[0, 2^32)``, one per element.
        key: of the stream that it stands for; a callable may look at it.
        record: of what was asked for; a child writes into its parent's.
        path: of a child, in place of the key's.
        others: by outlet, the words that it has instead; at least as many as are asked for.
    """

    __slots__ = ("_others", "_record", "_words")

    _record: _Record
    _words: torch.Tensor
    _others: Mapping[Outlet, torch.Tensor]

    def __init__(
        self,
        words: torch.Tensor,
        key: Stream,
        record: _Record | None = None,
        path: tuple[str, ...] | None = None,
        others: Mapping[Outlet, torch.Tensor] | None = None,
    ) -> None:
        path = key.path if path is None else path
        super().__init__(key.seed, key.step, key.layer, key.site, key.draw, key.call, key.replica, path)
        # The base class is frozen.
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "_record", _Record() if record is None else record)
        object.__setattr__(self, "_others", {} if others is None else others)

    @property
    def outlets(self) -> frozenset[Outlet]:
        """What was asked for so far."""
        return frozenset(self._record.largest)

    @property
    def counts(self) -> dict[Outlet, int]:
        """How many numbers each outlet was asked for."""
        return dict(self._record.largest)

    def child(self, name: str) -> Probe:
        return Probe(self._words, self, self._record, (*self.path, name), self._others)

    def bits(
        self,
        shape: int | Sequence[int],
        n: int = 24,
        *,
        dtype: torch.dtype = torch.int64,
        device: _Device = None,
        start: int = 0,
    ) -> torch.Tensor:
        size = _size(shape)
        count = math.prod(size)
        outlet = Outlet(self.path, n)
        self._record.largest[outlet] = max(self._record.largest.get(outlet, 0), start + count)
        words = self._others.get(outlet, self._words)
        if start + count > words.numel():
            raise NotExact(f"it asks for {start + count} numbers for a result of {self._words.numel()} elements")
        return self._numbers(words, size, n, start, dtype, device)

    def require_one_outlet(self) -> Outlet | None:
        """The one outlet that was used, with a number for every element; None where nothing was asked for.

        Raises:
            NotExact: there are several, or fewer numbers than elements.
        """
        if not self.outlets:
            return None
        if len(self.outlets) > 1:
            uses = ", ".join(f"{o.n} bits of {'/'.join(o.path) or 'the stream'}" for o in sorted(self.outlets, key=str))
            # So few numbers cannot leave every element one of its own.
            shared = sum(self.counts.values()) < self._words.numel()
            raise NotExact(f"it uses several numbers per element ({uses})", shared=shared)
        ((outlet, largest),) = self._record.largest.items()
        if largest < self._words.numel():
            raise NotExact(
                f"it draws {largest} numbers for {self._words.numel()} elements, which therefore share them",
                shared=True,
            )
        return outlet


class Held(_Prescribed):
    """A stream of which one outlet has prescribed numbers, and all others their own.

    Args:
        stream: where the others come from.
        outlet: the one that is held; its path counts from ``stream``.
        words: ``[K]`` int64 in ``[0, 2^32)``, number ``i`` of ``n`` bits being ``words[i] >> (32 - n)``.
        path: of a child, what it adds to that of ``stream``.
    """

    __slots__ = ("_base", "_outlet", "_own", "_words")

    _base: Stream
    _outlet: Outlet
    _words: torch.Tensor
    _own: tuple[str, ...]

    def __init__(self, stream: Stream, outlet: Outlet, words: torch.Tensor, path: tuple[str, ...] = ()) -> None:
        s = stream
        super().__init__(s.seed, s.step, s.layer, s.site, s.draw, s.call, s.replica, s.path)
        for name, value in (("_base", stream), ("_outlet", outlet), ("_words", words), ("_own", path)):
            object.__setattr__(self, name, value)

    def child(self, name: str) -> Held:
        return Held(self._base.child(name), self._outlet, self._words, (*self._own, name))

    def bits(
        self,
        shape: int | Sequence[int],
        n: int = 24,
        *,
        dtype: torch.dtype = torch.int64,
        device: _Device = None,
        start: int = 0,
    ) -> torch.Tensor:
        if (self._own, n) != (self._outlet.path, self._outlet.n):
            return self._base.bits(shape, n, dtype=dtype, device=device, start=start)
        return self._numbers(self._words, _size(shape), n, start, dtype, device)


@dataclass(frozen=True, slots=True)
class _Repeated:
    name: str
    drawn: Callable[[Stream], torch.Tensor]

    def __call__(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        return self.drawn(stream)


def repeated(f: StreamFunction, x: torch.Tensor) -> StreamFunction:
    """``f`` for many calls on this ``x``: of a registered quantizer, what does not depend on the stream is kept.

    Others may do anything when they are called, and are called.
    """
    return _Repeated(f.name, f.for_input(x)) if registered(f) else f


def repeated_codes(q: UniformQuantizer, x: torch.Tensor) -> Callable[[Stream], Quantized]:
    """The codes of ``x`` from each stream, likewise."""
    return q.encode_input(x) if registered(q) else partial(q.encode, x)


def call(f: StreamFunction, x: torch.Tensor, stream: Stream) -> torch.Tensor:
    """``f(x, stream)``, checked: a finite floating-point tensor of ``x``'s shape and dtype, ``x`` left as it was.

    Raises:
        InputError: it is not, or ``f`` raises; the message says how to call it again.
    """
    out = attempt(f, x.clone(), stream)
    if not isinstance(out, torch.Tensor):
        raise InputError(f"{_name(f)} must return a tensor, got {type(out).__name__}; called with {replay(x, stream)}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise InputError(
            f"{_name(f)} must return {x.dtype} {list(x.shape)} like its input, got {out.dtype} {list(out.shape)}; "
            f"called with {replay(x, stream)}"
        )
    # A sum of finite numbers is finite, or too large.
    bad = 0 if math.isfinite(float(out.sum())) else int((~torch.isfinite(out)).sum())
    if bad:
        raise InputError(
            f"{_name(f)} returned {bad} NaN or Inf of {out.numel()} elements for finite input; called with "
            f"{replay(x, stream)}"
        )
    return out.detach()


def require_input(x: torch.Tensor) -> None:
    """Raise InputError unless ``x`` is a tensor that a callable can be judged on: floating-point, not empty, finite."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() == 0 or x.numel() == 0:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"x must be a non-empty floating-point tensor [N, ...], got {got}")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"x must be finite, got {int((~torch.isfinite(x)).sum())} NaN or Inf of {x.numel()} elements")


def attempt(f: StreamFunction, x: torch.Tensor, stream: Stream) -> torch.Tensor:
    """``f(x, stream)``, unchecked.

    Raises:
        InputError: ``f`` raises; the message says where, and how to call it again.
    """
    try:
        return f(x, stream)
    except (InputError, NotExact):
        raise
    except Exception as error:
        raise InputError(
            f"{_name(f)} raised {type(error).__name__}: {error}{_place(error)}; called with {replay(x, stream)}"
        ) from error


def replay(x: torch.Tensor, stream: Stream) -> str:
    """What reproduces one call, for error messages."""
    numbers = ", with numbers of the probe's choice" if isinstance(stream, Probe) else ""
    return f"x {list(x.shape)} {x.dtype}, seed {stream.seed}, draw {stream.draw}, site {stream.site!r}{numbers}"


def _name(f: StreamFunction) -> str:
    # Of a function made in another, both: "<lambda>" alone would not tell which.
    own = getattr(f, "__qualname__", "").replace(".<locals>", "")
    return getattr(f, "name", None) or own or type(f).__name__


def _place(error: Exception) -> str:
    """Where in the callable's own code it was raised; nothing if it was not called at all."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
