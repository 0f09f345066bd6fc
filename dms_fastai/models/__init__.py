"""The architectures, as timm entries: importing this package registers them."""

from .dmsresnet import DMSResNet

__all__ = ["DMSResNet"]
