"""Images for training and evaluation: data sets, exact sampling over ranks, augmentation, batches."""

from locsgd_dist.data.bundle import DataBundle, build_data
from locsgd_dist.data.checks import DataShape, check_data, data_shape
from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.normalization import Normalization
from locsgd_dist.data.streams import Batch, EvalStream, TrainStream

__all__ = [
    "Batch",
    "DataBundle",
    "DataConfig",
    "DataShape",
    "EvalStream",
    "Normalization",
    "TrainStream",
    "build_data",
    "check_data",
    "data_shape",
]
