"""Philox4x32-10 by the paper's definition, in Python integers, and the element layout by index arithmetic.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from functools import lru_cache

Words = tuple[int, int, int, int]


@lru_cache(maxsize=2**16)
def block(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    (left1, right1, left2, right2), (k0, k1) = counter, key
    for _ in range(rounds):
        high1, low1 = divmod(left1 * 0xD2511F53, 2**32)
        high2, low2 = divmod(left2 * 0xCD9E8D57, 2**32)
        left1, right1, left2, right2 = high2 ^ right1 ^ k0, low2, high1 ^ right2 ^ k1, low1
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return left1, right1, left2, right2


def element(key: Words, i: int, n: int, rounds: int = 10) -> int:
    """Element ``i`` of the stream with key words ``(k0, k1, c2, c3)``: ``n`` bits."""
    k0, k1, c2, c3 = key
    bits_each = 32 if n > 16 else 16
    tile, within = divmod(i, 16 * 128 // bits_each)
    slot, lane = divmod(within, 16)
    high, low = divmod(16 * tile + lane, 2**32)
    words = block((low, high, c2, c3), (k0, k1), rounds)
    all_bits = sum(word << (32 * j) for j, word in enumerate(words))
    return (all_bits >> (bits_each * slot)) % 2**bits_each >> (bits_each - n)
