"""Storage formats of quantized tensors."""

from fqtstats.formats.catalog import INTEGER_FORMATS, LOG_FORMATS, log, uint
from fqtstats.formats.codec import pack, sign_magnitude, signed, unpack
from fqtstats.formats.spec import IntFormat, LogFormat

__all__ = [
    "INTEGER_FORMATS",
    "LOG_FORMATS",
    "IntFormat",
    "LogFormat",
    "log",
    "pack",
    "sign_magnitude",
    "signed",
    "uint",
    "unpack",
]
