"""Packs maps of probabilities for a page, in fewer bits than one byte a cell.

A probability p becomes the whole number q = round(levels * p).  A row of a map sums to at most 1,
so most of its n numbers are small if the row is long, and a Rice code stores them well:

    row       4 bits: k; then the code of each number
    number    q >> k ones and a zero; then the last k bits of q

with k = floor(log2(sum q / n)), or 0.  A row then takes at most 4 + n (1 + k) + (sum q) / 2^k bits,
whatever its numbers are, so that the size of a page has a bound: see `packed_bytes`.  The page
decodes one map at a time, when it is shown: `unpack` in `text_page.js`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import numpy as np

LEVELS = (100, 200, 1000, 10000)
"""Numbers of levels to choose from; with each k is at most 13, which fits in 4 bits."""
_K_BITS = 4


def pack_map(rows: Sequence[np.ndarray], levels: int) -> str:
    """The rows of a map as base64 text.

    Args:
        rows: one-dimensional arrays of numbers from 0 to 1; their lengths may differ.
        levels: the number that stands for 1.
    """
    numbers = [np.rint(np.clip(row, 0, 1) * levels).astype(np.int64) for row in rows]
    sums = np.array([row.sum() for row in numbers])
    lengths = np.array([row.size for row in numbers])
    k_R = _rice_parameters(sums, lengths)
    # Each row starts with the number k, of which all 4 bits are low ones, and no ones come before.
    starts_R = np.cumsum(lengths) - lengths
    q_N = np.insert(np.concatenate(numbers), starts_R, k_R)
    k_N = np.insert(np.repeat(k_R, lengths), starts_R, _K_BITS)
    unary_N = (q_N >> k_N) + 1  # the ones and the zero
    unary_N[starts_R + np.arange(len(starts_R))] = 0
    ends_N = np.cumsum(unary_N + k_N)
    bits = np.ones(int(ends_N[-1]), np.uint8)
    low_N = ends_N - k_N  # where the low bits start
    bits[low_N[unary_N > 0] - 1] = 0
    for place in range(int(k_N.max())):
        has = k_N > place
        bits[ends_N[has] - 1 - place] = (q_N[has] >> place) & 1
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def packed_bytes(lengths: Iterable[int], levels: int) -> int:
    """The largest number of characters of `pack_map` for rows of these lengths that sum to 1."""
    n_R = np.array(list(lengths), np.int64)
    most_R = levels + n_R // 2 + 1  # each of the n numbers may have been rounded up
    k_R = _rice_parameters(most_R, n_R)
    bits = int((_K_BITS + n_R * (1 + k_R) + (most_R >> k_R)).sum())
    return -(-bits // 24) * 4


def _rice_parameters(sums_R: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    """floor(log2(sum / n)) of each row, or 0."""
    means_R = np.maximum(sums_R // lengths_R, 1)
    return np.frexp(means_R)[1].astype(np.int64) - 1
