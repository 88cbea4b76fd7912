"""How much memory training needs: measured on this rank, traced over time, estimated without a device."""

from locsgd_dist.memory.footprint import Footprint
from locsgd_dist.memory.monitor import FootprintMonitor, MonitorConfig

__all__ = ["Footprint", "FootprintMonitor", "MonitorConfig"]
