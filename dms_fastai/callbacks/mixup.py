"""MixUp with paired labels."""

import math
from typing import Literal

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.torch_core import show_image
from fastai.vision.data import get_grid
from torch import Tensor
from torch.distributions import Beta

from ..errors import UserError
from ..settings import Positive, checked
from ..training.losses import UNLABELLED, DMSLoss
from ..training.parts import order_of

__all__ = ["MixUp"]


@checked
class MixUp(Callback):
    """Mix each image with a partner from its batch and train on both labels (Zhang et al., 2018; equation (i)).

    With a `DMSLoss`, both labels and lambda are in the targets, `yb = (y_a, y_b, lam)`, until the loss is computed. Any
    other loss must average over the batch. It is called twice: `lam * loss(pred, y_a) + (1 - lam) * loss(pred, y_b)`.
    Metrics get `y_a`, as in the paper's training accuracy. Lambda is drawn on the device: nothing waits for it.
    """

    order, run_valid = order_of("mixup"), False
    beta: Beta | None = None
    partner = "random"  # also of Learners that were exported before there was a choice
    _stateattrs = ("beta", "second")

    def __init__(
        self,
        alpha: Positive = 1.0,
        per: Literal["batch", "sample"] = "batch",
        partner: Literal["random", "reversed"] = "random",
    ):
        """
        Args:
            alpha: Lambda is drawn from Beta(alpha, alpha); 1 is uniform.
            per: "batch" draws one lambda for a batch, as the paper does; "sample" one for each image.
            partner: "random" shuffles the batch for the partners; "reversed" turns its order round, as timm does.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.alpha, self.per, self.partner = alpha, per, partner

    def before_train(self) -> None:
        mixers = [cb for cb in self.learn.cbs if isinstance(cb, (MixUp, MixHandler))]
        if len(mixers) > 1:
            names = " and ".join(type(cb).__name__ for cb in mixers)
            raise UserError(f"{names} would mix the same batch; keep one, or take MixUpOrCutMix")
        if self.per == "sample" and not isinstance(self.learn.loss_func, DMSLoss):
            raise UserError("MixUp(per='sample') needs loss_func=DMSLoss(): other losses average over the batch first")

    def before_batch(self) -> None:
        """Mix the images; their shape stays the same.

        Raises:
            UserError: They do not have one target each.
        """
        if len(self.learn.yb) != 1:
            name, n = type(self).__name__, len(self.learn.yb)
            raise UserError(f"{name} mixes one target of each image, and these batches have {n}; leave it out")
        x, y = self.learn.xb[0], self.learn.yb[0]
        mixed, *self.second = self.pair(x, y)
        self.learn.xb = (mixed, *self.learn.xb[1:])
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = (y, *self.second)

    def after_loss(self) -> None:
        """Put the single target back for later callbacks; with another loss, add the loss of the partners' labels."""
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]
            return
        y_b, lam = self.second
        loss_b = self.learn.loss_func(self.learn.pred, y_b)
        self.learn.loss_grad = torch.lerp(loss_b, self.learn.loss_grad, lam.to(loss_b.dtype))
        self.learn.loss = self.learn.loss_grad.detach().clone()

    def after_cancel_batch(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch mixed with its partners, the partners' labels, and lambda, the first image's share."""
        lam = self.draw(len(x), x.device)
        partners = self.partners(len(x), x.device)
        return mix(x, x[partners], lam), y[partners], lam

    def partners(self, n: int, device: torch.device) -> Tensor:
        """The index of each image's partner, shape (n,)."""
        if self.partner == "reversed":
            return torch.arange(n - 1, -1, -1, device=device)
        return torch.randperm(n, device=device)

    def show_batch(self, max_n: int = 9) -> None:
        """Show images of a training batch as the model sees them, with both classes of each and their shares."""
        loader, vocab = self.learn.dls.train, self.learn.dls.vocab
        x, y_a = loader.one_batch()
        x, y_b, lam = self.pair(x, y_a)
        images, _ = loader.decode((x[:max_n], y_a[:max_n]))
        shares, side = lam.cpu().expand(len(x)).tolist(), math.ceil(math.sqrt(len(images)))
        grid = get_grid(len(images), figsize=(3 * side, 3.5 * side))  # titles of two lines
        for image, a, b, share, axes in zip(images, y_a.tolist(), y_b.tolist(), shares, grid, strict=False):
            first, second = ("no label" if label == UNLABELLED else vocab[label] for label in (a, b))
            show_image(image, ctx=axes, title=f"{share:.2f} {first}\n{1 - share:.2f} {second}")

    def draw(self, n: int, device: torch.device) -> Tensor:
        """Draw lambda in float32 on `device`: a scalar, or of shape (n,)."""
        if self.beta is None or self.beta.concentration1.device != device:
            a = torch.full((), self.alpha, device=device)
            self.beta = Beta(a, a, validate_args=False)
        return self.beta.sample(() if self.per == "batch" else (n,))


def mix(x_a: Tensor, x_b: Tensor, lam: Tensor) -> Tensor:
    """lam * x_a + (1 - lam) * x_b for images (B, C, H, W) and lam of shape () or (B,)."""
    share = lam.to(x_a.dtype).view(-1, 1, 1, 1) if lam.ndim else lam.to(x_a.dtype)
    return torch.lerp(x_b, x_a, share)
