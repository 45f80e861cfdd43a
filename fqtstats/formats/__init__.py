"""Storage formats of quantized tensors."""

from fqtstats.formats.catalog import INTEGER_FORMATS, uint
from fqtstats.formats.codec import pack, unpack
from fqtstats.formats.spec import IntFormat

__all__ = ["INTEGER_FORMATS", "IntFormat", "pack", "uint", "unpack"]
