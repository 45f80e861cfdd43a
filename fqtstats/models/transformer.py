"""A small causal transformer whose products with weights are all ``nn.Linear``.

Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017; pre-norm as in R. Xiong et al., "On Layer
Normalization in the Transformer Architecture", ICML 2020.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Transformer", "TransformerBlock"]


class TransformerBlock(nn.Module):
    """Causal self-attention and a GELU layer four times as wide, each behind LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, d))
        return cast("Tensor", x + self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Embedding, blocks, LayerNorm and an untied linear head.

    Args:
        vocabulary: number of tokens.
        length: longest sequence T.
        width: D.
        heads: attention heads.
        depth: blocks.
    """

    def __init__(self, vocabulary: int, length: int, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to logits [B, T, vocabulary]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return cast("Tensor", self.head(self.norm(self.blocks(x))))
