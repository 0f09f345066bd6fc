"""DropBlock: dropout that blanks small squares of feature maps, the same in all channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DropBlock"]


class DropBlock(nn.Module):
    """Blanks 2x2 squares of a training image's feature map, the same in all channels (Ghiasi et al., 2018).

    Every position is a seed with probability rate / 4. A seed blanks itself and its neighbours to the right, below, and
    below to the right. What is left is scaled by positions / positions left, counted over the batch.
    """

    __jit_unused_properties__ = ("rate",)

    def __init__(self, rate: float = 0.0):
        """
        Args:
            rate: Share of the positions to blank, or nearly: squares may overlap. It may be set anew during training.
        """
        super().__init__()
        self._rate = rate
        # A tensor, because a compiled network would be compiled anew for every other number.
        self.register_buffer("seed_rate", torch.tensor(rate / 4), persistent=False)

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = rate
        self.seed_rate.fill_(rate / 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seeds = torch.rand_like(x[:, :1], dtype=torch.float32) < self.seed_rate
        blanked = F.max_pool2d(seeds.float(), 2, stride=1, padding=1)[:, :, :-1, :-1]
        left = blanked == 0
        scale = left.numel() / left.sum().clamp(min=1)  # not in half precision, where so many positions are infinite
        return x * (left * scale).to(x.dtype)
