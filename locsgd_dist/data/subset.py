"""A seeded, class-balanced choice of samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def balanced_subset(targets: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Choose samples as evenly over the classes as these allow.

    Each class is shuffled, then the classes are dealt out in rounds of one sample each until there are enough:
    class counts differ by at most one, except where a class has run out. A smaller choice with the same seed is
    part of a larger one.

    Args:
        targets: [n], the class of each sample.
        num_samples: how many to choose, in [0, n].
        seed: of the shuffles and of the order of classes within a round.

    Returns:
        [num_samples] sample indices, ascending.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    classes, inverse, counts = np.unique(targets[by_class], return_inverse=True, return_counts=True)
    round_of = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    turn_of = rng.permutation(len(classes))[inverse]
    dealt = by_class[np.lexsort((turn_of, round_of))]
    return np.sort(dealt[:num_samples])
