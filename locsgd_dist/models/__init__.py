"""Networks: the paper's for CIFAR, torchvision's, timm's, and one's own by ``package.module:factory``."""

from .cifar import resnet18, vgg13
from .config import ModelConfig
from .factory import build_model, check_model
from .memory_format import to_channels_last
from .size import network_size

__all__ = ["ModelConfig", "build_model", "check_model", "network_size", "resnet18", "to_channels_last", "vgg13"]
