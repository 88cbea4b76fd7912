"""How much memory training needs, and what the batch makes of it: footprints, the batch policy, out-of-memory."""

from locsgd_dist.memory.batch_policy import BatchConfig, BatchPolicy, ElasticConfig, LrScale, LrScaling
from locsgd_dist.memory.footprint import Footprint
from locsgd_dist.memory.monitor import FootprintMonitor, MonitorConfig
from locsgd_dist.memory.out_of_memory import OutOfMemoryLog, StepOutOfMemoryError, is_out_of_memory

__all__ = [
    "BatchConfig",
    "BatchPolicy",
    "ElasticConfig",
    "Footprint",
    "FootprintMonitor",
    "LrScale",
    "LrScaling",
    "MonitorConfig",
    "OutOfMemoryLog",
    "StepOutOfMemoryError",
    "is_out_of_memory",
]
