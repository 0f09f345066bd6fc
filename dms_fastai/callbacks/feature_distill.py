"""Distillation of features: the student's are projected onto the teacher's."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import processes
from ..errors import UserError
from ..models.groups import classifiers
from ..settings import NotNegative, Positive, checked
from ..trained.network import members_of
from ..training.losses import DMSLoss
from ..training.parts import order_of
from .drop_block import highest_lr
from .releasing import Releasing
from .twins import refuse_twin

__all__ = ["FeatureDistill", "Pooled", "feature_loss"]


@checked
class FeatureDistill(Releasing):
    """Add a term to the loss: how far the student's features, projected, are from those of `TeacherDistill`'s teacher.

    Features are what a classifier is given: pooled, shape (B, D), of any timm network. A linear projection turns the
    student's into as many as the teacher's (FitNets, Romero et al., 2015); it is trained beside the student, by an
    AdamW of its own whose learning rate follows the student's, and left behind afterwards. Of several teachers, the
    features stand side by side.
    """

    order, run_valid = order_of("feature_distill"), False
    ours = theirs = projection = project = adam = saved = None
    _stateattrs = ("ours", "theirs", "projection", "project", "adam", "saved")

    def __init__(self, weight: NotNegative = 1.0, loss: Literal["cosine", "mse"] = "cosine", lr: Positive = 1e-3):
        """
        Args:
            weight: Weight of the term, which is added to the whole loss.
            loss: "cosine": 1 minus the cosine of the angle between two images' features; "mse": their mean squared
                difference.
            lr: Highest learning rate of the projection.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.weight, self.kind, self.lr = weight, loss, lr

    def before_train(self) -> None:
        refuse_twin(self)
        if not hasattr(self.learn, "teacher_distill"):
            raise UserError("FeatureDistill needs a teacher; add TeacherDistill(teacher), or take a recipe with one")
        if hasattr(self.learn, "sam"):
            raise UserError("FeatureDistill's term would miss from SAM's second pass; leave one of the two out")
        if hasattr(self.learn, "fixed_views"):
            raise UserError(
                "[fixed_views] keeps what the teacher says, and the features are not kept; leave one of the two out"
            )
        if self.ours is None:
            student = self.learn.model
            self.ours, self.highest_lr = Pooled(student, student, "student"), highest_lr(self.learn)

    def before_batch(self) -> None:
        if self.theirs is None:  # only now, as TeacherDistill may have made its network after before_train
            distill = self.learn.teacher_distill
            self.theirs = Pooled(distill.network, distill.teacher.model, "teacher")

    def after_loss(self) -> None:
        ours, theirs = self.ours.take(), self.theirs.take()
        if self.projection is None:
            self.begin(ours, theirs)
        term = feature_loss(self.project(ours), theirs, self.kind)
        self.learn.loss_grad = self.learn.loss_grad + self.weight * term
        self.learn.loss = self.learn.loss_grad.detach().clone()
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.loss_func.parts["features"] = term.detach()

    def after_step(self) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.lr * self.learn.opt.hypers[-1]["lr"] / self.highest_lr
        scaler = getattr(self.learn, "scaler", None)  # of to_fp16(): gradients are scaled, and may have overflowed
        if scaler is None:
            self.adam.step()
        else:
            scaler.step(self.adam)
        self.adam.zero_grad()

    def begin(self, ours: Tensor, theirs: Tensor) -> None:
        """Make the projection, or put the saved one in its place. torch's random state stays as it is."""
        with torch.random.fork_rng():
            self.projection = nn.Linear(ours.shape[1], theirs.shape[1], bias=False).to(ours.device)
        self.adam = torch.optim.AdamW(self.projection.parameters(), self.lr)
        if self.saved is not None:
            self.projection.load_state_dict(self.saved["projection"])
            self.adam.load_state_dict(self.saved["optimizer"])
            self.saved = None
        self.project = processes.replicated(self.projection)

    def release(self) -> None:
        """Leave the networks and the projection."""
        for pooled in (self.ours, self.theirs):
            if pooled is not None:
                pooled.remove()
        self.ours = self.theirs = self.projection = self.project = self.adam = None

    def state(self) -> dict[str, Any] | None:
        """What `restore` needs to resume the projection."""
        if self.projection is None:  # no step yet since it was restored
            return self.saved
        return {"projection": self.projection.state_dict(), "optimizer": self.adam.state_dict()}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Have the next fit resume with a saved projection."""
        self.saved = saved


class Pooled:
    """What the classifiers of a network are given, caught as it runs."""

    def __init__(self, network: nn.Module, original: nn.Module, whose: str):
        """
        Args:
            network: A network that runs.
            original: The timm network that it is a copy of, or itself; or an ensemble of them, its `members`.
            whose: What an error calls it.

        Raises:
            UserError: It does not say what its classifier is.
        """
        self.caught: dict[nn.Module, Tensor] = {}
        heads = [classifiers(member)[:1] for member in members_of(original)]
        if not all(heads):
            raise UserError(
                f"the {whose}, {type(original).__name__}, does not say what its classifier is (timm's get_classifier), "
                f"so that its features are unknown; take a timm network, or leave [feature_distill] out"
            )
        names = {module: name for name, module in original.named_modules()}
        found = [network.get_submodule(names[head]) for [head] in heads]
        self.handles = [head.register_forward_pre_hook(self.catch) for head in found]

    def catch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.caught[module] = inputs[0].flatten(1)

    def take(self) -> Tensor:
        """The features of the last batch, shape (B, D), in float32."""
        found = torch.cat(list(self.caught.values()), dim=1).float()
        self.caught.clear()
        return found

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def feature_loss(ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    """The distance of features of shape (B, D), the mean over the images: "cosine" or "mse"."""
    if kind == "mse":
        return F.mse_loss(ours, theirs)
    return (1 - F.cosine_similarity(ours, theirs, dim=1)).mean()
