"""Class balance of subsets, by counting."""

import numpy as np
import pytest

from locsgd_dist.data.subset import balanced_subset

UNEVEN = np.repeat(np.arange(4), [50, 20, 3, 27])


@pytest.mark.parametrize("num_samples", [0, 1, 3, 4, 10, 11, 12, 13, 60, 99, 100])
def test_classes_are_as_even_as_they_allow(num_samples: int) -> None:
    targets = np.random.default_rng(1).permutation(UNEVEN)
    chosen = balanced_subset(targets, num_samples, seed=0)
    assert len(chosen) == num_samples
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(targets[chosen], minlength=4)
    available = np.bincount(targets)
    # Even but for one: a class with less than the fullest one less one has been used up.
    assert (counts >= np.minimum(available, counts.max() - 1)).all()


def test_seed_decides_and_smaller_choices_are_part_of_larger_ones() -> None:
    targets = np.random.default_rng(1).permutation(UNEVEN)
    assert (balanced_subset(targets, 40, 5) == balanced_subset(targets, 40, 5)).all()
    assert (balanced_subset(targets, 40, 5) != balanced_subset(targets, 40, 6)).any()
    assert set(balanced_subset(targets, 13, 5)) < set(balanced_subset(targets, 40, 5))


def test_each_sample_of_a_class_is_as_likely_as_the_next() -> None:
    targets = np.repeat(np.arange(2), 10)
    seen = np.zeros(20)
    for seed in range(400):
        seen[balanced_subset(targets, 6, seed)] += 1
    # Each is drawn with probability 0.3: 120 times, deviation 9.
    assert (abs(seen - 120) < 5 * 9.2).all()


def test_classes_without_samples_do_not_matter() -> None:
    chosen = balanced_subset(np.array([7, 7, 2, 2, 7]), 4, seed=0)
    assert np.bincount(np.array([7, 7, 2, 2, 7])[chosen], minlength=8).tolist() == [0, 0, 2, 0, 0, 0, 0, 2]
