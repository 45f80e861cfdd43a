"""The variance profile: which quantizer puts how much variance into which parameter's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

__all__ = ["Profile"]


@dataclass(frozen=True)
class Profile:
    """Which quantizer puts how much variance into which parameter's gradient (Theorem 2).

    Attributes:
        table: one row per pair of a source and a parameter that its noise reaches.
        sources: one row per source, in forward order of layers, ``grad_weight`` before ``grad_input``.
        parameters: one row per trainable parameter, and one with layer "total".
        metadata: plain JSON.
    """

    table: pd.DataFrame
    sources: pd.DataFrame
    parameters: pd.DataFrame
    metadata: dict[str, Any]
