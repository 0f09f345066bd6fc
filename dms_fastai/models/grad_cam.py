"""Grad-CAM: where in an image a network finds the class that it answers with."""

import torch
from torch import Tensor, nn

__all__ = ["grad_cam"]


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor | None:
    """The regions of the last feature map that speak for a class (Selvaraju et al., 2017).

    Each channel weighs as much as the mean of the class's gradient over it; of their weighted sum, what is negative is
    cut off.

    Args:
        model: A network with timm's `forward_features` and `forward_head`.
        x: Normalised images, shape (B, C, H, W).
        classes: The class to explain in each of them, shape (B,).

    Returns:
        Shape (B, h, w), at most 1 in each image, on the CPU; None if the network has no feature map with a place for
        each of its values.
    """
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head") or not len(x):
        return None
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            features = model.forward_features(x)
            if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != model.num_features:
                return None
            features = features.detach().requires_grad_()
            score = model.forward_head(features).gather(1, classes[:, None]).sum()
            [gradient] = torch.autograd.grad(score, features)
        weights = gradient.mean((2, 3), keepdim=True)
        maps = (weights * features.detach()).sum(1).clamp(min=0)
        return (maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)).cpu()
    finally:
        model.train(training)
