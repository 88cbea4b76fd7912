"""Networks: the paper's for CIFAR, torchvision's, timm's, and one's own by ``package.module:factory``."""

from .cifar import resnet18, vgg13
from .config import ModelConfig
from .factory import build_model, check_model

__all__ = ["ModelConfig", "build_model", "check_model", "resnet18", "vgg13"]
