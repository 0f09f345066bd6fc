"""A plain convolutional network: an approximation of one whose layers are not public.

Paper: Y. Assiri, *Stochastic Optimization of Plain Convolutional Neural Networks with Simple Methods*, 2020,
https://arxiv.org/abs/2001.08856

This network puts together what is known of it: the first ten convolutions of SimpleNet (Hasanpour et al., 2016), after
which it was built, a hidden layer of 2,048 units, a single dropout of 0.8 directly before the last layer, and 4.3 to
4.4 million parameters. Other widths give that number, too.
"""

from typing import Any

from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .staged import StagedNet

__all__ = ["PlainCNN"]

WIDTHS = ((64, 128, 128, 128), (128, 128, 256), (256, 256), (512,))


def conv_block(in_chs: int, out_chs: int, **dd: Any) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False, **dd)
    return nn.Sequential(conv, nn.BatchNorm2d(out_chs, **dd), nn.ReLU(inplace=True))


def check_pool(global_pool: str) -> str:
    """A type of pooling, if it keeps the number of channels."""
    if global_pool.endswith("catavgmax"):
        raise ValueError(f"global_pool is {global_pool!r}, which doubles the channels; take 'avg', 'max' or 'avgmax'")
    return global_pool


class PlainCNN(StagedNet):
    """3x3 convolutions with max-pooling between the stages, any size from 8x8 up; and a classifier of two layers."""

    note = "approximate: the paper's layers are not public"

    def __init__(
        self,
        widths: tuple[tuple[int, ...], ...] = WIDTHS,
        hidden: int = 2048,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.8,
        device=None,
        dtype=None,
    ):
        """
        Args:
            widths: Channels of each convolution, for each stage. The first convolution is the stem.
            hidden: Units of the hidden layer of the classifier.
            num_classes: Number of classes; 0 leaves the last layer out.
            in_chans: Number of input channels.
            global_pool: Type of the pooling before the classifier; "" leaves out pooling and classifier.
            drop_rate: Dropout probability of the hidden units, directly before the last layer; there is no other.

        Raises:
            ValueError: A pooling that doubles the channels, which the hidden layer does not take.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        (channels, *first), *others = widths
        self.conv1 = conv_block(in_chans, channels, **dd)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "conv1.2"}]
        stages = []
        for index, stage in enumerate((first, *others)):
            blocks = [nn.MaxPool2d(2)] if index > 0 else []
            for width in stage:
                blocks.append(conv_block(channels, width, **dd))
                channels = width
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)

        self.num_features, self.head_hidden_size = channels, hidden
        self.hidden = nn.Sequential(nn.Linear(channels, hidden, **dd), nn.ReLU(inplace=True))
        self.global_pool, self.head_drop, self.fc = create_classifier(
            hidden, num_classes, pool_type=check_pool(global_pool), drop_rate=drop_rate, **dd
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """`StagedNet.reset_classifier`; the hidden layer stays.

        Raises:
            ValueError: As in the constructor.
        """
        super().reset_classifier(num_classes, None if global_pool is None else check_pool(global_pool))

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.global_pool.is_identity():
            return x
        x = self.head_drop(self.hidden(x))
        return x if pre_logits else self.fc(x)


def _create_plain_cnn(variant: str, pretrained: bool, **kwargs: Any) -> PlainCNN:
    feature_cfg = dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True)
    return build_model_with_cfg(PlainCNN, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),  # of the paper's normalisation, only the scaling by 1/255 is known
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1.0",
        "classifier": "fc",
        "notes": (PlainCNN.note,),
        "paper_ids": "arXiv:2001.08856",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"plain_cnn.untrained": _cfg(), "test_plain_cnn.untrained": _cfg()})


@register_model
def plain_cnn(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """An approximate plain CNN: ten 3x3 convolutions of SimpleNet, and two linear layers.

    4,394,570 parameters, 625.7 M MACs.
    """
    return _create_plain_cnn("plain_cnn", pretrained, **kwargs)


@register_model
def test_plain_cnn(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """A very small, approximate plain CNN, for quick runs on a CPU.

    22,802 parameters, 3.0 M MACs.
    """
    args = dict(widths=((8, 16), (16, 16), (32,), (32,)), hidden=64)
    return _create_plain_cnn("test_plain_cnn", pretrained, **dict(args, **kwargs))
