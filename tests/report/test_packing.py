from __future__ import annotations

import base64

import numpy as np
import pytest

from oasis_attn.report.packing import LEVELS, pack_map, packed_bytes


def unpack(text: str, lengths: list[int]) -> list[list[int]]:
    """The numbers of a packed map, one bit after the other."""
    bits = iter(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).tolist())

    def low(count: int) -> int:
        return int("0" + "".join(str(next(bits)) for _ in range(count)), 2)

    rows = []
    for length in lengths:
        k = low(4)
        rows.append([])
        for _ in range(length):
            ones = 0
            while next(bits):
                ones += 1
            rows[-1].append((ones << k) + low(k))
    return rows


def maps() -> list[list[np.ndarray]]:
    """Triangular maps, from peaked to uniform; rows of the worst kind; and weights of up to 1."""
    generator = np.random.default_rng(0)
    lengths = range(1, 60)
    random = [
        [generator.dirichlet(np.full(n, spread)) for n in lengths] for spread in (0.01, 1, 100)
    ]
    halves = [np.minimum(0.5001 / 200, 1 / n) * np.ones(n) for n in lengths]
    return [*random, halves, [np.zeros(n) for n in lengths], [np.ones(n) for n in lengths]]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_number_is_the_nearest_level(levels):
    for rows in maps():
        got = unpack(pack_map(rows, levels), [len(row) for row in rows])
        assert got == [np.rint(row * levels).tolist() for row in rows]


@pytest.mark.parametrize("levels", LEVELS)
def test_no_map_is_larger_than_its_bound(levels):
    for rows in maps()[:-1]:  # those of the last sum to more than 1
        assert len(pack_map(rows, levels)) <= packed_bytes(map(len, rows), levels)
