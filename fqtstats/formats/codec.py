"""Codes to bytes and back: 8, 4, 2 or 1 bits per code, the first code in the lowest bits of the first byte."""

from __future__ import annotations

import torch

from fqtstats.formats.spec import IntFormat, LogFormat

__all__ = ["pack", "sign_magnitude", "signed", "unpack"]


def pack(codes: torch.Tensor, fmt: IntFormat | LogFormat) -> torch.Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8 tensor of any shape, values below ``2^fmt.bits``.
        fmt: the format of the codes.

    Returns:
        uint8 tensor ``[ceil(numel * fmt.storage_bits / 8)]``; unused high bits of the last byte are zero.
    """
    flat = codes.reshape(-1)
    per_byte = 8 // fmt.storage_bits
    if per_byte == 1:
        return flat.clone()
    count = -(-flat.numel() // per_byte)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(count, per_byte)
    packed = flat[:, 0].clone()
    for position in range(1, per_byte):
        packed |= flat[:, position] << (position * fmt.storage_bits)
    return packed


def unpack(packed: torch.Tensor, fmt: IntFormat | LogFormat, numel: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 codes ``[numel]``."""
    per_byte = 8 // fmt.storage_bits
    if per_byte == 1:
        return packed
    mask = 2**fmt.storage_bits - 1
    columns = [(packed >> (position * fmt.storage_bits)) & mask for position in range(per_byte)]
    return torch.stack(columns, dim=1).view(-1)[:numel]


def sign_magnitude(steps: torch.Tensor, fmt: LogFormat) -> torch.Tensor:
    """Codes of a logarithmic format, uint8: the sign bit above the exponent field.

    Args:
        steps: integer-valued, how many points above (below) zero: ``-fmt.magnitudes .. fmt.magnitudes``.
        fmt: the format.
    """
    return (steps.abs() + (steps < 0) * (1 << fmt.exponent_bits)).to(torch.uint8)


def signed(codes: torch.Tensor, fmt: LogFormat) -> torch.Tensor:
    """Inverse of :func:`sign_magnitude`, int16."""
    field = (codes & fmt.magnitudes).to(torch.int16)
    return torch.where(codes > fmt.magnitudes, -field, field)
