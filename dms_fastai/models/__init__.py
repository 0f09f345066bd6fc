"""The architectures, as timm entries: importing this package registers them."""

from .cct import CCT
from .dmsresnet import DMSResNet
from .hcgnet import HCGNet
from .plain_cnn import PlainCNN

__all__ = ["CCT", "DMSResNet", "HCGNet", "PlainCNN"]
