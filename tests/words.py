"""Streams whose numbers are prescribed."""

from __future__ import annotations

import math

import torch


class Word:
    """Every number is the same ``word``; enumerating the words enumerates the law of each element."""

    def __init__(self, word: int) -> None:
        self.word = word

    def child(self, name: str) -> Word:
        return self

    def bits(self, shape, n=24, *, dtype=torch.int64, device=None, start=0):
        if not 0 <= self.word < 2**n:
            raise ValueError(f"a word of {n} bits was asked for, got {self.word}")
        return torch.full(tuple(shape), self.word, dtype=dtype, device=device)


class Words:
    """Element ``i`` gets number ``words[i]``, row-major."""

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words

    def child(self, name: str) -> Words:
        return self

    def bits(self, shape, n=24, *, dtype=torch.int64, device=None, start=0):
        if not bool(((self.words >= 0) & (self.words < 2**n)).all()):
            raise ValueError(f"words of {n} bits were asked for")
        count = math.prod(shape)
        return self.words.view(-1)[start : start + count].to(dtype).view(tuple(shape))
