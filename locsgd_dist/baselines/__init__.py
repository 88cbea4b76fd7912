"""What LoCal+SGD is compared with: stochastic depth and pruning during training.

Freezing, random directions and replayed boundaries are rules and selections of ``localized`` itself.
"""

from .baseline import Baseline
from .build import check_baselines, make_baseline, restore_trained
from .pruning import PruningConfig
from .stochastic_depth import StochasticDepthConfig, with_droppable_blocks

__all__ = [
    "Baseline",
    "PruningConfig",
    "StochasticDepthConfig",
    "check_baselines",
    "make_baseline",
    "restore_trained",
    "with_droppable_blocks",
]
