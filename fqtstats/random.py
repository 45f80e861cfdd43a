"""Counter-based random streams: Philox4x32-10, keyed by what the numbers are for and indexed by element.

A stream has no state. Its numbers are a pure function of its key and of the element's row-major index, so they are
the same on every thread count, instruction set, process and device, and in any order of evaluation.

Layout (part of the reproducibility contract). The 128-bit Philox counter is ``(b, b >> 32, c2, c3)`` with the block
index ``b`` and two words ``c2, c3`` of the key; each block gives four 32-bit words. Elements are laid out in tiles of
16 blocks, so that a SIMD register of 16 lanes holds 16 consecutive elements without a transpose:

* ``n > 16`` bits: one word per element. Element ``64 t + 16 j + l`` is the top ``n`` bits of word ``j`` of block
  ``16 t + l``  (0 <= j < 4, 0 <= l < 16).
* ``n <= 16`` bits: one half-word per element. Element ``128 t + 16 q + l`` is the top ``n`` bits of half ``q % 2``
  (0 = low) of word ``q // 2`` of block ``16 t + l``  (0 <= q < 8).

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fqtstats import ops
from fqtstats.errors import InputError
from fqtstats.listening import LISTENERS, asked

__all__ = ["Stream", "key_words", "stream"]

_TILE = 128
"""Elements of half a word in a tile, and twice those of a whole word."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One independent sequence of random numbers; make it with :func:`stream`.

    Attributes:
        seed: the experiment's seed.
        step: training step.
        layer: qualified name of the layer.
        site: which use within the layer, for instance ``"grad_input"``.
        draw: index of the repetition (Monte-Carlo draw).
        call: index of the layer's call within the step.
        replica: data-parallel rank.
        path: names of the :meth:`child` uses that lead here.
    """

    seed: int = 0
    step: int = 0
    layer: str = ""
    site: str = ""
    draw: int = 0
    call: int = 0
    replica: int = 0
    path: tuple[str, ...] = ()

    def child(self, name: str) -> Stream:
        """An independent stream for a second use within one call."""
        return replace(self, path=(*self.path, name))

    def words(self) -> tuple[int, int, int, int]:
        """The stream's four 32-bit key words: Philox key ``k0, k1`` and counter words ``c2, c3``.

        An audit takes this for a request of all the stream's numbers.
        """
        if LISTENERS:
            asked(self, 0, None, 32)
        return key_words(self)

    def bits(
        self,
        shape: int | Sequence[int],
        n: int = 24,
        *,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Integers uniform on ``[0, 2^n)``.

        Args:
            shape: shape of the result; element ``i`` (row-major) depends on the key and on ``i`` alone.
            n: bits per element, 1 to 32.
            dtype: ``torch.int64``, or ``torch.int32`` (``n <= 31``) to halve the traffic.
            device: where the result lives; the numbers are the same everywhere.
            start: index of the first element, a multiple of 128, to make a long sequence in pieces.

        Returns:
            Contiguous integer tensor of ``shape``.

        Raises:
            InputError: ``n``, ``dtype`` or ``start`` is out of range.
        """
        if not 1 <= n <= 32:
            raise InputError(f"bits per element must be 1 to 32, got n={n}")
        if dtype not in (torch.int64, torch.int32) or (dtype == torch.int32 and n == 32):
            raise InputError(f"dtype must be torch.int64, or torch.int32 for n <= 31; got {dtype} with n={n}")
        if start % _TILE or start < 0:
            raise InputError(f"start must be a multiple of {_TILE}, at least 0; got {start}")
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        first_tile = start // (_TILE // 2 if n > 16 else _TILE)
        place = torch.device(device or "cpu")
        numel = math.prod(size)
        if LISTENERS:
            asked(self, start, numel, n)
        numbers = ops.philox_bits(*key_words(self), numel, n, dtype=dtype, device=place, first_tile=first_tile)
        return numbers.view(size)

    def uniform(self, shape: int | Sequence[int], *, device: torch.device | str | None = None) -> torch.Tensor:
        """float32 multiples of 2^-24, uniform on [0, 1). Asked twice, it gives the same numbers."""
        return self.bits(shape, 24, dtype=torch.int32, device=device).to(torch.float32).mul_(2.0**-24)


def stream(
    seed: int = 0, step: int = 0, layer: str = "", site: str = "", draw: int = 0, call: int = 0, replica: int = 0
) -> Stream:
    """The stream for one use of randomness; see :class:`Stream` for the parts of the key.

    Raises:
        InputError: a part has the wrong type, or an integer part does not fit in 64 bits (signed).
    """
    for name, value in (("seed", seed), ("step", step), ("draw", draw), ("call", call), ("replica", replica)):
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise InputError(f"{name} must be an integer of at most 64 bits, got {value!r}")
    for name, text in (("layer", layer), ("site", site)):
        if not isinstance(text, str):
            raise InputError(f"{name} must be a string, got {text!r}")
    return Stream(seed, step, layer, site, draw, call, replica)


@lru_cache(maxsize=4096)
def key_words(s: Stream) -> tuple[int, int, int, int]:
    """:meth:`Stream.words`, for those who say by themselves which numbers they use, or use none."""
    # A cryptographic hash of an injective encoding: two different keys share their numbers only if 128 bits collide.
    h = hashlib.blake2b(digest_size=16, person=b"fqtstats.stream")
    for number in (s.seed, s.step, s.draw, s.call, s.replica):
        h.update(number.to_bytes(8, "little", signed=True))
    for text in (s.layer, s.site, *s.path):
        data = text.encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    d = h.digest()
    k0, k1, c2, c3 = (int.from_bytes(d[i : i + 4], "little") for i in range(0, 16, 4))
    return k0, k1, c2, c3
