"""HCGNet: convolutional networks whose modules gate and extend what the ones before have found.

Paper: Yang et al., *Gated Convolutional Networks with Hybrid Connectivity for Image Classification*, 2019,
https://arxiv.org/abs/1908.09699

Modules are connected as in a DenseNet: each adds its channels to those of all before it. A module's gates decay its
own feature map, and add a vector of global context, which is the same at all positions.
"""

from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .dropblock import DropBlock
from .staged import StagedNet

__all__ = ["HCGNet"]

# The statistics of CIFAR-10's training images, as the authors' code has them.
MEAN = (0.49139968, 0.48215827, 0.44653124)
STD = (0.24703233, 0.24348505, 0.26158768)


def norm_act(channels: int, **dd: Any) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, **dd), nn.ReLU(inplace=True)]


def norm_act_conv(in_chs: int, out_chs: int, kernel_size: int, dd: dict[str, Any], **kwargs: Any) -> nn.Sequential:
    """Batch norm, ReLU, and a convolution without bias."""
    return nn.Sequential(*norm_act(in_chs, **dd), nn.Conv2d(in_chs, out_chs, kernel_size, bias=False, **kwargs, **dd))


class AttentionPool(nn.Module):
    """The sum of a map's positions, (B, C, H, W) to (B, C), weighted by a softmax over a linear score of each."""

    def __init__(self, channels: int, **dd: Any):
        super().__init__()
        self.score = nn.Linear(channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)  # (B, H * W, C), without a copy
        weights = self.score(positions).softmax(1)
        return (weights.transpose(1, 2) @ positions).squeeze(1)


class Gates(nn.Module):
    """The forget gate scales each channel; the update gate adds global context: a vector, the same at all positions.

    The context is a mixture of two pooled vectors, one of near neighbours and one of far ones. Their shares are found
    for each channel.
    """

    def __init__(self, channels: int, forget_reduction: int, update_reduction: int, **dd: Any):
        super().__init__()
        squeezed = channels // forget_reduction
        self.forget_pool = AttentionPool(channels, **dd)
        self.forget = nn.Sequential(
            nn.Linear(channels, squeezed, **dd),
            nn.BatchNorm1d(squeezed, **dd),
            nn.Tanh(),
            nn.Linear(squeezed, channels, **dd),
            nn.Sigmoid(),
        )
        self.near = norm_act_conv(channels, channels, 3, dd, padding=1, groups=channels)
        self.far = norm_act_conv(channels, channels, 3, dd, padding=2, dilation=2, groups=channels)
        self.near_pool, self.far_pool = AttentionPool(channels, **dd), AttentionPool(channels, **dd)
        squeezed = 2 * channels // update_reduction
        self.update = nn.Sequential(nn.Linear(2 * channels, squeezed, **dd), nn.BatchNorm1d(squeezed, **dd), nn.Tanh())
        self.near_logit, self.far_logit = (nn.Linear(squeezed, channels, **dd) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        forget = self.forget(self.forget_pool(x))
        near, far = self.near_pool(self.near(x)), self.far_pool(self.far(x))
        both = self.update(torch.cat([near, far], 1))
        share = torch.sigmoid(self.near_logit(both) - self.far_logit(both))  # a softmax of two
        context = far + share * (near - far)
        return torch.addcmul(context[:, :, None, None], forget[:, :, None, None], x)  # forget * x + context


class SMG(nn.Module):
    """A module of a block: a bottleneck and a grouped 3x3 convolution, their gates, and the channels so far."""

    def __init__(self, in_chs: int, growth: int, **dd: Any):
        super().__init__()
        self.reduce = norm_act_conv(in_chs, 4 * growth, 1, dd)
        self.conv = norm_act_conv(4 * growth, growth, 3, dd, padding=1, groups=4)
        self.gates = Gates(growth, forget_reduction=2, update_reduction=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.gates(self.conv(self.reduce(x)))], 1)


class Transition(nn.Module):
    """Between two blocks: half the channels, half the height and width."""

    def __init__(self, in_chs: int, out_chs: int, drop_block_rate: float, **dd: Any):
        super().__init__()
        middle = in_chs - (in_chs - out_chs) // 2
        self.reduce = norm_act_conv(in_chs, middle, 1, dd)
        self.conv = norm_act_conv(middle, out_chs, 3, dd, stride=2, padding=1)
        self.gates = Gates(out_chs, forget_reduction=4, update_reduction=4, **dd)
        self.drop_block = DropBlock(drop_block_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_block(self.gates(self.conv(self.reduce(x))))


class HCGNet(StagedNet):
    """A hybrid-connected, gated network for small images, any size from 8x8 up.

    Its gates have batch norms over vectors: in training, a batch of one image raises torch's ValueError.
    """

    def __init__(
        self,
        growths: tuple[int, ...] = (24, 36, 64),
        depths: tuple[int, ...] = (8, 8, 8),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            growths: How many channels a module of each block adds; multiples of 4.
            depths: Number of modules in each block.
            num_classes: Number of classes; 0 leaves the classifier out.
            in_chans: Number of input channels.
            global_pool: Type of the pooling before the classifier; "" leaves it out.
            drop_rate: Dropout probability before the classifier.
            drop_block_rate: Rate of DropBlock after each transition.

        Raises:
            ValueError: `growths` and `depths` differ in length.
        """
        super().__init__()
        if len(growths) != len(depths):
            raise ValueError(f"growths {growths} and depths {depths} do not have the same length")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        channels = 2 * growths[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **dd)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "conv1"}]
        stages = []
        for index, (growth, depth) in enumerate(zip(growths, depths, strict=True)):
            blocks = []
            if index > 0:
                blocks.append(Transition(channels, channels // 2, drop_block_rate, **dd))
                channels //= 2
            for _ in range(depth):
                blocks.append(SMG(channels, growth, **dd))
                channels += growth
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(*norm_act(channels, **dd))

        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.head_drop, self.fc = create_classifier(
            channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def forward_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head; returns the indices that were kept."""
        stages = len(self.stages)
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < stages:
            self.norm = nn.Identity()
        return kept


def _create_hcgnet(variant: str, pretrained: bool, **kwargs: Any) -> HCGNet:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_model_with_cfg(HCGNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:1908.09699",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"hcgnet_a2.untrained": _cfg(), "test_hcgnet.untrained": _cfg()})


@register_model
def hcgnet_a2(pretrained: bool = False, **kwargs: Any) -> HCGNet:
    """HCGNet-A2: three blocks of 8 gated modules with growths of 24, 36 and 64 channels.

    3,069,149 parameters, 489.6 M MACs.
    """
    return _create_hcgnet("hcgnet_a2", pretrained, **kwargs)


@register_model
def test_hcgnet(pretrained: bool = False, **kwargs: Any) -> HCGNet:
    """A very small HCGNet, for quick runs on a CPU.

    13,199 parameters, 2.5 M MACs.
    """
    args = dict(growths=(4, 8, 8), depths=(2, 2, 2))
    return _create_hcgnet("test_hcgnet", pretrained, **dict(args, **kwargs))
