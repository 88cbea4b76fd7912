"""What can go wrong while training and how a run takes it: preemption, steps that are not finite, a network that
collapses, ranks that hang."""

from locsgd_dist.faults.collapse import Collapse, CollapsedError, CollapseWatch
from locsgd_dist.faults.config import FaultConfig
from locsgd_dist.faults.hang import naming_silent_ranks
from locsgd_dist.faults.preemption import Preempted, StopSignals, clear_marker, write_marker
from locsgd_dist.faults.step_guard import StepGuard, TooManyBadStepsError

__all__ = [
    "Collapse",
    "CollapseWatch",
    "CollapsedError",
    "FaultConfig",
    "Preempted",
    "StepGuard",
    "StopSignals",
    "TooManyBadStepsError",
    "clear_marker",
    "naming_silent_ranks",
    "write_marker",
]
