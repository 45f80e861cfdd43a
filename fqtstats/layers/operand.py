"""What a product multiplies: codes in their storage layout, or real numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fqtstats.quantizers.storage import Stored

__all__ = ["Operand", "images"]


def images(x: torch.Tensor) -> torch.Tensor:
    """``[N, C, L]`` as images ``[N, C, 1, L]``; other shapes as they are."""
    return x.unsqueeze(2) if x.dim() == 3 else x


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product: a matrix, or images (of height 1 in a 1-D convolution).

    Attributes:
        content: codes with what they mean, or real numbers.
        why: why there are no codes; None where there are, and in a gradient whose quantizer sits out this draw.
    """

    content: Stored | torch.Tensor
    why: str | None = None

    @staticmethod
    def real(x: torch.Tensor, why: str | None = None) -> Operand:
        """Real numbers."""
        return Operand(images(x), why)

    @property
    def stored(self) -> Stored | None:
        """The codes, if that is what it holds."""
        return self.content if isinstance(self.content, Stored) else None

    @property
    def undrawn(self) -> bool:
        """Whether it is a gradient whose quantizer sits out this draw."""
        return self.stored is None and self.why is None

    @property
    def width(self) -> str:
        """That of a code in memory, and whether it is logarithmic: ``"4"``, ``"log4"``."""
        assert isinstance(self.content, Stored)
        codes = self.content.codes
        return f"{'log' if codes.affine.magnitudes else ''}{codes.bits}"

    def decode(self) -> torch.Tensor:
        """The real numbers, in the dtype that products are computed in."""
        return self.content.decode() if isinstance(self.content, Stored) else self.content

    @property
    def data(self) -> torch.Tensor:
        """The one large tensor in it: what autograd has to keep."""
        return self.content.codes.data if isinstance(self.content, Stored) else self.content

    def with_data(self, data: torch.Tensor) -> Operand:
        """The same with other :attr:`data`."""
        if isinstance(self.content, Stored):
            codes = replace(self.content.codes, data=data)
            return replace(self, content=replace(self.content, codes=codes))
        return replace(self, content=data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.content.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        if isinstance(self.content, Stored):
            return self.content.nbytes
        return self.content.numel() * self.content.element_size()
