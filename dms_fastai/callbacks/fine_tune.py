"""Fine-tuning: the head of a trained network alone at first, then all of it, the body at a lower learning rate."""

import numpy as np
from fastai.learner import Learner
from fastai.torch_core import norm_types
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, notice
from ..settings import PositiveShare, Steps, checked
from ..training.parts import order_of
from .drop_block import lr_schedules
from .releasing import Releasing

__all__ = ["FineTune"]


@checked
class FineTune(Releasing):
    """Train a network's head alone for some epochs, then all of it, at learning rates that are lower in the body.

    fastai's `fine_tune`, within one fit and its schedule. The groups are those of the Learner's splitter; the last one
    is the head, and has the scheduled rate. Norms of a frozen body go on learning, as in fastai, unless the Learner has
    `train_bn=False`. When the body thaws, the optimiser forgets its momenta, as fastai's does. A Learner that was
    frozen before is unfrozen. Nothing but the progress of the fit goes into it, so that a resumed fit goes on alike.
    """

    order, run_valid = order_of("fine_tune"), False
    name = "fine_tuning"  # fastai's would hide Learner.fine_tune
    frozen: tuple[nn.Parameter, ...] = ()
    lr_shares: list[float] | None = None
    _stateattrs = ("frozen", "lr_shares")

    def __init__(self, freeze_epochs: Steps = 1, body_lr: PositiveShare = 0.01):
        """
        Args:
            freeze_epochs: Epochs of the training in which the head is trained alone; all of them: it alone.
            body_lr: Learning rate of the first group, as a share of the head's; of groups between, a geometric mean.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.freeze_epochs, self.body_lr = freeze_epochs, body_lr

    def before_train(self) -> None:
        if self.lr_shares is None:  # not before_fit, which fastai also sends before it validates or predicts
            self.begin()
        if self.learn.epoch < self.freeze_epochs:
            self.freeze()
        else:
            self.thaw()

    def begin(self) -> None:
        """Unfreeze the Learner, and choose each group's learning rate."""
        if self.learn.opt.frozen_idx:  # as by vision_learner
            self.learn.unfreeze()
        last = len(self.learn.opt.param_lists) - 1
        if last == 0:
            raise UserError(
                f"nothing to freeze: {type(self.learn.model).__name__} has one group of parameters; give splitter= a "
                f"function that returns a list of parameters for each group, the head last"
            )
        if self.freeze_epochs >= self.learn.n_epoch:
            notice(
                f"the head alone is trained: freeze_epochs is {self.freeze_epochs}, of {self.learn.n_epoch}; for "
                f"the body, too, take more --epochs, or --set fine_tune.freeze_epochs=0"
            )
        if has_a_rate_for_each_group(self.learn):
            share = f"{self.body_lr:g} times the head's learning rate"
            notice(f"FineTune gives the body {share}, in place of those of the slice")
        self.lr_shares = [self.body_lr ** (1 - place / last) for place in range(last + 1)]

    def before_batch(self) -> None:
        learn = self.learn
        if learn.epoch == self.freeze_epochs > 0 and learn.iter == 0:  # also where a fit resumes here, with momenta
            learn.opt.clear_state()
        lr = learn.opt.hypers[-1]["lr"]
        learn.opt.set_hyper("lr", [lr * share for share in self.lr_shares])

    def release(self) -> None:
        """Thaw the body."""
        self.thaw()
        self.lr_shares = None

    def freeze(self) -> None:
        """Have the body get no gradients, except for its norms."""
        kept = {id(p) for p in _norm_params(self.learn.model)} if self.learn.train_bn else set()
        body = [p for group in self.learn.opt.param_lists[:-1] for p in group if id(p) not in kept]
        self.frozen += tuple(p for p in body if p.requires_grad)  # others never learn, such as fixed positions
        for p in self.frozen:
            p.requires_grad_(False)
            p.grad = None  # of a fit before: the optimiser would go on with it

    def thaw(self) -> None:
        """Have what `freeze` froze get gradients again, and have the optimiser forget the momenta of all weights."""
        if not self.frozen:
            return
        for p in self.frozen:
            p.requires_grad_(True)
        self.frozen = ()
        self.learn.opt.clear_state()  # torch's fused SGD needs the momenta of all weights or of none


def _norm_params(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of fastai's kinds of norms, and of batch norms over several processes."""
    norms = (module for module in model.modules() if isinstance(module, (*norm_types, _BatchNorm)))
    return [p for norm in norms for p in norm.parameters()]


def has_a_rate_for_each_group(learn: Learner) -> bool:
    """Whether a schedule of the fit gives each group of parameters its own learning rate."""
    return any(len(set(np.ravel(schedule(0.5)))) > 1 for schedule in lr_schedules(learn))
