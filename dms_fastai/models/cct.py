"""CCT: compact convolutional transformers, which take their tokens from a convolution and pool them by attention.

Paper: Hassani et al., *Escaping the Big Data Paradigm with Compact Transformers*, 2021,
https://arxiv.org/abs/2104.05704
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .dropout import dropout, on_eager_cpu

__all__ = ["CCT"]

# The statistics of CIFAR-10's training images, as the authors' configuration has them.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def attend(q: Tensor, k: Tensor, v: Tensor, drop_rate: float) -> Tensor:
    """`F.scaled_dot_product_attention` with dropout of the weights, for which torch draws slowly on a CPU."""
    if not drop_rate or not on_eager_cpu(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return dropout(weights, drop_rate, True) @ v


class Attention(nn.Module):
    """Self-attention. Queries, keys and values have no biases; dropout acts on the attention's weights."""

    def __init__(self, dim: int, num_heads: int, drop_rate: float, **dd: Any):
        super().__init__()
        self.num_heads = num_heads
        self.drop_rate = drop_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, dim of a head)
        drop_rate = self.drop_rate if self.training else 0.0
        if torch.jit.is_scripting():
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)
        else:
            x = attend(q, k, v, drop_rate)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Layer(nn.Module):
    """Attention and an MLP. The second norm is of the sum itself, and not of a branch alone as in most transformers."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attn_drop: float, drop_path: float, **dd: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = Attention(dim, num_heads, attn_drop, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.drop_path1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.mlp(x))


def sine_table(tokens: int, dim: int) -> Tensor:
    """Sines (even columns) and cosines (odd ones) of a token's number, at frequencies from 1 to 1 / 10,000."""
    column = torch.arange(dim)
    angles = torch.arange(tokens)[:, None] / 10_000 ** (2 * (column // 2).double() / dim)
    return torch.where(column % 2 == 0, angles.sin(), angles.cos())


class CCT(nn.Module):
    """A compact convolutional transformer for images of one size."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        pos_embed: Literal["learned", "sine"] = "learned",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: Literal["seq", ""] = "seq",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        """
        Args:
            img_size: Height and width of the images. A token stands for two by two pixels.
            embed_dim: Width of a token.
            depth: Number of layers.
            num_heads: Heads of the attention.
            mlp_ratio: Width of an MLP's hidden layer, as a multiple of `embed_dim`.
            pos_embed: The table that is added to the tokens: learned, or fixed sines and cosines. The fixed one is a
                buffer, which is not saved with the weights.
            num_classes: Number of classes; 0 leaves the classifier out.
            in_chans: Number of input channels.
            global_pool: "seq" pools the tokens by attention; "" leaves the pooling out.
            drop_rate: Dropout probability before the classifier.
            attn_drop_rate: Dropout probability of the attention's weights.
            drop_path_rate: Probability that a training image skips a branch of the last layer. It rises linearly from 0
                in the first layer (stochastic depth, Huang et al., 2016).

        Raises:
            ValueError: `embed_dim` is no multiple of `num_heads`, or another `global_pool` or `pos_embed`.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
        if pos_embed not in ("learned", "sine"):
            raise ValueError(f"pos_embed is {pos_embed!r}; it must be 'learned' or 'sine'")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.img_size: tuple[int, int] = tuple(to_2tuple(img_size))
        self.grid_size = tuple((side + 1) // 2 for side in self.img_size)

        self.conv1 = nn.Conv2d(in_chans, embed_dim, 3, padding=1, bias=False, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        tokens = self.grid_size[0] * self.grid_size[1]
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        else:
            table = sine_table(tokens, embed_dim).to(device=device, dtype=dtype or torch.get_default_dtype())
            self.register_buffer("pos_embed", table[None], persistent=False)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.Sequential(
            *(Layer(embed_dim, num_heads, mlp_ratio, attn_drop_rate, rate, **dd) for rate in rates)
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=2, module=f"layers.{i}") for i in range(depth)]
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.pool = nn.Linear(embed_dim, 1, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()
        self.reset_classifier(num_classes, global_pool)

    def init_weights(self) -> None:
        """The authors' initialisation: Kaiming's for the convolution, truncated normal distributions for the rest."""
        nn.init.kaiming_normal_(self.conv1.weight)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.2)
        self.apply(_init_linear)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Take images of another size; the table of positions is resampled, or computed anew. timm's name for it."""
        if img_size is None:
            return
        table, before = self.pos_embed, self.grid_size
        self.img_size = tuple(to_2tuple(img_size))
        self.grid_size = tuple((side + 1) // 2 for side in self.img_size)
        if isinstance(table, nn.Parameter):
            self.pos_embed = nn.Parameter(resample_abs_pos_embed(table.detach(), self.grid_size, before, 0))
        else:
            tokens = self.grid_size[0] * self.grid_size[1]
            self.pos_embed = sine_table(tokens, self.embed_dim).to(table)[None]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^conv1|pos_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on the network, and another pooling where one is given.

        Raises:
            ValueError: Another pooling than "seq" or "".
        """
        if global_pool not in (None, "seq", ""):
            raise ValueError(f"global_pool is {global_pool!r}; it must be 'seq' or ''")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = self.conv1.weight
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            _init_linear(self.head)
        else:
            self.head = nn.Identity()

    def forward_tokens(self, x: Tensor) -> Tensor:
        """The tokens with their positions, row by row: (B, C, H, W) to (B, N, embed_dim)."""
        _assert(x.shape[-2] == self.img_size[0], f"the network was built for images of {self.img_size}: see img_size")
        _assert(x.shape[-1] == self.img_size[1], f"the network was built for images of {self.img_size}: see img_size")
        x = self.maxpool(self.act1(self.conv1(x)))
        return x.flatten(2).transpose(1, 2) + self.pos_embed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What each layer gives.

        Args:
            x: Images, shape (B, C, H, W).
            indices: The last n if a number, all if None, else those listed.
            norm: Apply the final norm to each.
            stop_early: Skip the layers after the last of `indices`.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: Return the list alone.

        Returns:
            The final tokens, normalised, and the list of intermediate ones, or the list alone.

        Raises:
            ValueError: Another layout.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.forward_tokens(x)
        for index, layer in enumerate(self.layers[: max_index + 1] if stop_early else self.layers):
            x = checkpoint_seq([layer], x) if self.grad_checkpointing else layer(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            intermediates = [y.transpose(1, 2).unflatten(2, self.grid_size) for y in intermediates]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of `indices`, and norm and head; returns the indices that were kept."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.pool = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the last layer, normalised: (B, C, H, W) to (B, N, embed_dim)."""
        x = self.forward_tokens(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.layers, x)
        else:
            x = self.layers(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "seq":
            weights = self.pool(x).softmax(1)
            x = (weights.transpose(1, 2) @ x).squeeze(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of normalised images, shape (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: CCT) -> dict[str, Tensor]:
    """A state as `model` takes it: learned positions are resampled, if they were of square images of another size.

    Functions of this name do so for timm's own architectures.
    """
    table = state_dict.get("pos_embed")
    if table is None or table.shape == model.pos_embed.shape:
        return state_dict
    return {**state_dict, "pos_embed": resample_abs_pos_embed(table, model.grid_size, num_prefix_tokens=0)}


def _create_cct(variant: str, pretrained: bool, **kwargs: Any) -> CCT:
    return build_model_with_cfg(
        CCT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "first_conv": "conv1",
        "classifier": "head",
        "paper_ids": "arXiv:2104.05704",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"cct_7_3x1.untrained": _cfg(), "cct_7_3x1_sine.untrained": _cfg(), "test_cct.untrained": _cfg()}
)


@register_model
def cct_7_3x1(pretrained: bool = False, **kwargs: Any) -> CCT:
    """CCT-7/3x1: tokens of a 3x3 convolution, 7 transformer layers, learned positions.

    3,760,139 parameters, 1,181.6 M MACs.
    """
    return _create_cct("cct_7_3x1", pretrained, **kwargs)


@register_model
def cct_7_3x1_sine(pretrained: bool = False, **kwargs: Any) -> CCT:
    """CCT-7/3x1 with fixed sines as positions, for its longer trainings.

    3,694,603 parameters, 1,181.6 M MACs.
    """
    return _create_cct("cct_7_3x1_sine", pretrained, **dict(dict(pos_embed="sine"), **kwargs))


@register_model
def test_cct(pretrained: bool = False, **kwargs: Any) -> CCT:
    """A very small CCT, for quick runs on a CPU.

    70,667 parameters, 34.4 M MACs.
    """
    return _create_cct("test_cct", pretrained, **dict(dict(embed_dim=48, depth=3, num_heads=2), **kwargs))
