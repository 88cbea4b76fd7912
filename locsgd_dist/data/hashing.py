"""Randomness as a function: SplitMix64 over integers and over tensors of sample indices.

A random number that is a function of (seed, epoch, sample index) has no state to restore after a resume, and
does not depend on the rank, the worker or the batch that a sample falls to.
"""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def hash64(*values: int) -> int:
    """Hash a sequence of integers to [0, 2**63), all of which torch's generators take as a seed."""
    return _chain(values) >> 1


def hash_indices(indices: Tensor, *key: int) -> Tensor:
    """Hash each index under a key.

    Args:
        indices: int64, any shape, non-negative.
        key: integers such as (seed, epoch, stream).

    Returns:
        int64, same shape and device: output number `index` of a SplitMix64 generator seeded with the key. All
        64 bits are random, so values may be negative.
    """
    # torch's int64 products and sums wrap around as unsigned ones do; only the shifts need care.
    state = (indices + 1) * _signed(_GAMMA) + _signed(_chain(key))
    state = (state ^ _shift_right(state, 30)) * _signed(_MULTIPLIERS[0])
    state = (state ^ _shift_right(state, 27)) * _signed(_MULTIPLIERS[1])
    return state ^ _shift_right(state, 31)


def uniform_int(bits: Tensor, field: int, high: int) -> Tensor:
    """Integers in [0, high) from one of a hash's three disjoint 20-bit fields (0, 1, 2); high <= 2**20."""
    return (_shift_right(bits, 4 + 20 * field) & 0xFFFFF) * high >> 20


def coin(bits: Tensor) -> Tensor:
    """A fair coin per hash (bool), from a bit that `uniform_int` leaves alone."""
    return bits & 1 == 1


def _chain(values: tuple[int, ...]) -> int:
    state = 0
    for value in values:
        state = _mix((state ^ (value & _MASK)) + _GAMMA & _MASK)
    return state


def _mix(state: int) -> int:
    state = (state ^ state >> 30) * _MULTIPLIERS[0] & _MASK
    state = (state ^ state >> 27) * _MULTIPLIERS[1] & _MASK
    return state ^ state >> 31


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift_right(values: Tensor, places: int) -> Tensor:
    """Logical shift; torch's own is arithmetic on int64."""
    return values >> places & ((1 << (64 - places)) - 1)
