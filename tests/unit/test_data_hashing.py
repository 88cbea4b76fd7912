"""SplitMix64 against its published output and against unbounded integers."""

import torch

from locsgd_dist.data.hashing import coin, hash64, hash_indices, uniform_int

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The generator's output at a state, as published, in Python's unbounded integers."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def key_state(*key: int) -> int:
    state = 0
    for value in key:
        state = splitmix64(((state ^ value) + 0x9E3779B97F4A7C15) & MASK)
    return state


def test_reference_generator_gives_the_published_sequence() -> None:
    # The test vector that implementations of SplitMix64 are checked with: the first outputs for seed 1234567.
    state, outputs = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        outputs.append(splitmix64(state))
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_index_hash_is_the_generators_output_at_the_index() -> None:
    indices = torch.tensor([[0, 1, 2], [999, 123_456_789, 2**40]])
    start = key_state(7, 3, 1)
    expected = [splitmix64((start + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in indices.flatten().tolist()]
    hashed = hash_indices(indices, 7, 3, 1)
    assert hashed.shape == indices.shape
    assert [value & MASK for value in hashed.flatten().tolist()] == expected


def test_every_part_of_a_key_and_its_order_matter() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (5, 9), (9, 5), (-1, 0)]
    assert len({hash64(*key) for key in keys}) == len(keys)
    indices = torch.arange(100)
    columns = torch.stack([hash_indices(indices, *key) for key in keys])
    assert len(columns.unique()) == columns.numel()


def test_integer_hash_is_a_valid_seed_and_the_chain_of_splitmix() -> None:
    for key in [(0,), (2**63, 5), (-3, 7), (1, 2, 3, 4)]:
        assert hash64(*key) == key_state(*(value & MASK for value in key)) >> 1
        torch.Generator().manual_seed(hash64(*key))


def test_fields_are_uniform_and_independent() -> None:
    num, high = 90_000, 9
    bits = hash_indices(torch.arange(num), 0, 0, 1)
    flips = coin(bits).long()
    fields = [uniform_int(bits, field, high) for field in range(3)]
    for values in fields:
        assert values.min() == 0
        assert values.max() == high - 1
    # Joint counts of two offsets and the coin; chi-square of 161 degrees of freedom, mean 161, deviation 18.
    for first, second in ((0, 1), (0, 2), (1, 2)):
        cells = torch.bincount((fields[first] * high + fields[second]) * 2 + flips, minlength=2 * high**2)
        expected = num / (2 * high**2)
        assert ((cells - expected) ** 2 / expected).sum() < 161 + 4 * 18
