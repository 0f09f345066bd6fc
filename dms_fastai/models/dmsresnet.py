"""DMSResNet: the small squeeze-and-excitation residual networks of *Tiny Residual Networks*, and their teacher.

Paper: Singh, Khatri, Xu, *Tiny Residual Networks*, 2024, https://doi.org/10.20944/preprints202407.1953.v1

The student is a residual network for small images: a 3x3 stem without pooling, then three stages of 4, 4 and 3
basic blocks with 64, 128 and 256 channels and strides 1, 2, 2. The paper's figure puts squeeze-and-excitation into
every block (`dmsresnet_seblocks`); what its authors ran has one, after the stem (`dmsresnet`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from timm.layers import DropPath, SEModule, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .dropout import Dropout
from .staged import StagedNet

__all__ = ["DMSResNet"]

SE_REDUCTION = 16

# The statistics of CIFAR-10's training images, as the authors' code has them.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PRETRAINED = Path(__file__).parent / "pretrained"
DEPTHS = (4, 4, 3)
SE_PLACES = ("stem", "blocks", None)


def conv_bn(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, **dd: Any) -> list[nn.Module]:
    """A convolution without bias that keeps the image's size at stride 1, and its batch norm."""
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd)]


def squeeze_excite(channels: int, **dd: Any) -> SEModule:
    """Squeeze-and-excitation of two biased 1x1 convolutions with reduction 16 (paper, section 3.2.2)."""
    return SEModule(channels, rd_channels=max(channels // SE_REDUCTION, 1), **dd)


class ResidualBlock(nn.Module):
    """What both block types share: `dropout(relu(residual(x) + shortcut(x)))`.

    The residual is a block type's convolutions, and squeeze-and-excitation where it is wanted. The shortcut is the
    identity, or a 1x1 convolution with batch norm where the shape changes. With stochastic depth, a training image
    skips the residual with probability `drop_path`.
    """

    expansion = 1

    def __init__(
        self,
        in_chs: int,
        planes: int,
        stride: int = 1,
        se: bool = False,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        mid_chs: int | None = None,
        **dd: Any,
    ):
        super().__init__()
        out_chs = planes * self.expansion
        residual = self.convolutions(in_chs, planes if mid_chs is None else mid_chs, out_chs, stride, **dd)
        self.residual = nn.Sequential(*residual, *([squeeze_excite(out_chs, **dd)] if se else []))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(*conv_bn(in_chs, out_chs, 1, stride, **dd))
        self.act = nn.ReLU(inplace=True)
        self.drop = Dropout(drop_rate)

    @staticmethod
    def convolutions(in_chs: int, mid_chs: int, out_chs: int, stride: int, **dd: Any) -> list[nn.Module]:
        """Convolutions with batch norms, and activations between; all but the last give `mid_chs` channels."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.drop_path(self.residual(x)) + self.shortcut(x)))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (paper, section 3.2.1)."""

    @staticmethod
    def convolutions(in_chs: int, mid_chs: int, out_chs: int, stride: int, **dd: Any) -> list[nn.Module]:
        return [
            *conv_bn(in_chs, mid_chs, 3, stride, **dd),
            nn.ReLU(inplace=True),
            *conv_bn(mid_chs, out_chs, 3, **dd),
        ]


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the planes: the teacher's block (paper, section 3.2)."""

    expansion = 4

    @staticmethod
    def convolutions(in_chs: int, mid_chs: int, out_chs: int, stride: int, **dd: Any) -> list[nn.Module]:
        return [
            *conv_bn(in_chs, mid_chs, 1, **dd),
            nn.ReLU(inplace=True),
            *conv_bn(mid_chs, mid_chs, 3, stride, **dd),
            nn.ReLU(inplace=True),
            *conv_bn(mid_chs, out_chs, 1, **dd),
        ]


class DMSResNet(StagedNet):
    """A residual network for small images, any size from 8x8 up."""

    stem_names = r"^conv1|bn1|se\."

    def __init__(
        self,
        block: type[ResidualBlock] = BasicBlock,
        depths: tuple[int, ...] = DEPTHS,
        widths: tuple[int, ...] = (64, 128, 256),
        se: Literal["stem", "blocks"] | None = "stem",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mid_widths: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        """
        Args:
            block: Type of the residual blocks.
            depths: Number of blocks in each stage.
            widths: Planes of each stage; the stem has as many channels as the first stage has planes.
            se: Where squeeze-and-excitation acts: once after the stem, at the end of every block, or nowhere.
            num_classes: Number of classes; 0 leaves the classifier out.
            in_chans: Number of input channels.
            global_pool: Type of the pooling before the classifier; "" leaves it out.
            drop_rate: Dropout probability, after every block and before the classifier (paper, section 3.1).
            drop_path_rate: Probability that a training image skips the last block's residual. It rises linearly from 0
                in the first block (stochastic depth, Huang et al., 2016).
            mid_widths: For each block, first to last, the channels inside: what its convolutions but the last give.
                None: the planes of its stage. A pruned network has fewer; its blocks' outputs stay as wide.

        Raises:
            ValueError: `depths` and `widths` differ in length, `se` is something else, or `mid_widths` is not a width
                for each block.
        """
        super().__init__()
        if len(depths) != len(widths):
            raise ValueError(f"depths {depths} and widths {widths} do not have the same length")
        if se not in SE_PLACES:
            raise ValueError(f"se is {se!r}; it must be 'stem', 'blocks' or None")
        if mid_widths is not None and (len(mid_widths) != sum(depths) or not all(map(_is_width, mid_widths))):
            raise ValueError(f"mid_widths {mid_widths} must be {sum(depths)} whole numbers above 0, one for each block")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        channels = widths[0]
        self.conv1, self.bn1 = conv_bn(in_chans, channels, 3, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.se = squeeze_excite(channels, **dd) if se == "stem" else nn.Identity()
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "se"}]

        last = max(sum(depths) - 1, 1)
        stages = []
        for index, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for number in range(depth):
                stride, place = 2 if index > 0 and number == 0 else 1, sum(depths[:index]) + number
                drop_path = drop_path_rate * place / last
                mid_chs = None if mid_widths is None else mid_widths[place]
                blocks.append(block(channels, planes, stride, se == "blocks", drop_rate, drop_path, mid_chs, **dd))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.head_drop, self.fc = create_classifier(
            channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.se(self.act1(self.bn1(self.conv1(x))))


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _create_dmsresnet(variant: str, pretrained: bool, **kwargs: Any) -> DMSResNet:
    num_stages = len(kwargs.get("depths", DEPTHS))
    feature_cfg = dict(out_indices=tuple(range(num_stages + 1)), flatten_sequential=True)
    model = build_model_with_cfg(DMSResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {"file": None}  # a place on this machine
    return model


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
        "paper_ids": "doi:10.20944/preprints202407.1953.v1",
        "license": "apache-2.0",
        **kwargs,
    }


def _trained(name: str) -> dict[str, Any]:
    """A configuration with the weights that come with this package; NAME.md beside them says where they come from."""
    return _cfg(file=str(PRETRAINED / f"{name}.safetensors"), label_names=CIFAR10)


default_cfgs = generate_default_cfgs(
    {
        "dmsresnet.fast_kd2_cifar10": _trained("dmsresnet.fast_kd2_cifar10"),
        "dmsresnet_plain.untrained": _cfg(),
        "dmsresnet_seblocks.untrained": _cfg(),
        "dmsresnet_lite.untrained": _cfg(),
        "dmsresnet50.untrained": _cfg(pool_size=(4, 4)),
        "dmsresnet_wide.untrained": _cfg(),
        "dmsresnet_small.kd_cifar10": _trained("dmsresnet_small.kd_cifar10"),
        "dmsresnet_mini.kd_cifar10": _trained("dmsresnet_mini.kd_cifar10"),
        "dmsresnet_tiny.untrained": _cfg(),
        "dmsresnet_tiny_plain.untrained": _cfg(),
        "test_dmsresnet.untrained": _cfg(),
        "test_dmsresnet_plain.untrained": _cfg(),
    }
)


@register_model
def dmsresnet(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """The student as the authors ran it: one squeeze-and-excitation, after the stem.

    4,697,742 parameters, 798.7 M MACs.
    """
    return _create_dmsresnet("dmsresnet", pretrained, **kwargs)


@register_model
def dmsresnet_plain(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """The ablation's baseline, without squeeze-and-excitation.

    4,697,162 parameters, 798.7 M MACs.
    """
    return _create_dmsresnet("dmsresnet_plain", pretrained, **dict(dict(se=None), **kwargs))


@register_model
def dmsresnet_seblocks(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """The student as the paper's figure has it: squeeze-and-excitation in every block.

    4,733,610 parameters, 798.7 M MACs.
    """
    return _create_dmsresnet("dmsresnet_seblocks", pretrained, **dict(dict(se="blocks"), **kwargs))


@register_model
def dmsresnet_lite(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """The student with a last stage of 240 channels, below the paper's 4.37 million.

    4,319,758 parameters, 774.5 M MACs.
    """
    return _create_dmsresnet("dmsresnet_lite", pretrained, **dict(dict(widths=(64, 128, 240)), **kwargs))


@register_model
def dmsresnet50(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """The teacher: a ResNet-50 for small images, one squeeze-and-excitation after the stem.

    23,521,422 parameters, 1,297.8 M MACs.
    """
    args = dict(block=Bottleneck, depths=(3, 4, 6, 3), widths=(64, 128, 256, 512))
    return _create_dmsresnet("dmsresnet50", pretrained, **dict(args, **kwargs))


@register_model
def dmsresnet_wide(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """A wide teacher: 4, 4 and 4 basic blocks of 160, 320 and 640 channels.

    36,693,460 parameters, 5,457.0 M MACs.
    """
    args = dict(depths=(4, 4, 4), widths=(160, 320, 640))
    return _create_dmsresnet("dmsresnet_wide", pretrained, **dict(args, **kwargs))


# For devices. A weight of the first stage is used at 1,024 places of an image, one of the second at 256, and one of the
# third at 64: so the first stage is narrow inside, and depth is added behind it.


@register_model
def dmsresnet_small(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """A member for phones and small computers: 2, 2 and 2 blocks, narrow inside in the first stage.

    506,380 parameters, 75.9 M MACs.
    """
    args = dict(depths=(2, 2, 2), widths=(32, 64, 112), mid_widths=(16, 16, 64, 64, 96, 96))
    return _create_dmsresnet("dmsresnet_small", pretrained, **dict(args, **kwargs))


@register_model
def dmsresnet_mini(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """A member for microcontrollers, within the size and the MACs of MLPerf Tiny's ResNet-8.

    73,691 parameters, 12.0 M MACs.
    """
    args = dict(depths=(1, 2, 2), widths=(16, 32, 40), mid_widths=(8, 24, 24, 32, 32))
    return _create_dmsresnet("dmsresnet_mini", pretrained, **dict(args, **kwargs))


TINY = dict(depths=(1, 1, 1), widths=(16, 32, 48))


@register_model
def dmsresnet_tiny(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """A very small member of the family, for quick runs on a CPU.

    56,587 parameters, 11.1 M MACs.
    """
    return _create_dmsresnet("dmsresnet_tiny", pretrained, **dict(TINY, **kwargs))


@register_model
def dmsresnet_tiny_plain(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """`dmsresnet_tiny` without squeeze-and-excitation.

    56,538 parameters, 11.1 M MACs.
    """
    return _create_dmsresnet("dmsresnet_tiny_plain", pretrained, **dict(TINY | dict(se=None), **kwargs))


# The former names of these two. Recipes and finished runs have them, and a run is resumed by the name in its recipe.


@register_model
def test_dmsresnet(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """`dmsresnet_tiny` under its former name.

    56,587 parameters, 11.1 M MACs.
    """
    return _create_dmsresnet("test_dmsresnet", pretrained, **dict(TINY, **kwargs))


@register_model
def test_dmsresnet_plain(pretrained: bool = False, **kwargs: Any) -> DMSResNet:
    """`dmsresnet_tiny_plain` under its former name.

    56,538 parameters, 11.1 M MACs.
    """
    return _create_dmsresnet("test_dmsresnet_plain", pretrained, **dict(TINY | dict(se=None), **kwargs))
