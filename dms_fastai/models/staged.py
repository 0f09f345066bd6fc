"""What timm expects of a convolutional network: its features, and a classifier that can be changed."""

from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["StagedNet"]


class StagedNet(nn.Module):
    """A network of a stem, stages, and a pooled classifier.

    A subclass has `forward_stem`, and makes `stages`, `feature_info` (the stem, then each stage), `num_features`,
    `head_hidden_size`, and the head: `global_pool`, `head_drop` and `fc`, as `create_classifier` gives them.
    """

    stem_names = r"^conv1"  # of parameters, as a regular expression
    note: str | None = None  # what a card says of the architecture

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group the parameters by depth, for layer-wise learning rates."""
        return {"stem": self.stem_names, "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on the network, and another pooling where one is given."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        self.global_pool, self.fc = create_classifier(
            self.head_hidden_size, num_classes, pool_type=pool_type, device=like.device, dtype=like.dtype
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_norm(self, x: Tensor) -> Tensor:
        """What follows the last stage."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps after the stem and after each stage.

        Args:
            x: Images, shape (B, C, H, W).
            indices: The last n if a number, all if None, else those listed; 0 is the stem.
            norm: Give the last stage's map as the classifier gets it, after a final norm if there is one.
            stop_early: Skip the stages after the last of `indices`.
            output_fmt: "NCHW", the only layout there is.
            intermediates_only: Return the list alone.

        Returns:
            The final feature map and the list of intermediate ones, or the list alone.

        Raises:
            ValueError: Another layout.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; the only layout here is 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.forward_stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        stages = self.stages[:max_index] if stop_early else self.stages
        for index, stage in enumerate(stages, start=1):
            x = self.forward_blocks(stage, x)
            if index in take_indices:
                last = index == len(self.feature_info) - 1
                intermediates.append(self.forward_norm(x) if norm and last else x)
        if intermediates_only:
            return intermediates
        return x if len(stages) < len(self.stages) else self.forward_norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head; returns the indices that were kept."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[:max_index]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_blocks(self, blocks: nn.Module, x: Tensor) -> Tensor:
        return checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.forward_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of normalised images, shape (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))
