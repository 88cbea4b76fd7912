"""What a run will need and take on GPUs that are not there yet: memory, batch, traffic, time."""

from locsgd_dist.planner.costs import Machine
from locsgd_dist.planner.footprint import BoundaryStep, StepEstimator
from locsgd_dist.planner.inputs import PlannedData, planned_data
from locsgd_dist.planner.plan import Planner
from locsgd_dist.planner.timeline import MemoryParts, StepMemory

__all__ = [
    "BoundaryStep",
    "Machine",
    "MemoryParts",
    "PlannedData",
    "Planner",
    "StepEstimator",
    "StepMemory",
    "planned_data",
]
