"""Knowledge distillation: a teacher whose logits enter the loss."""

import copy
import math
from dataclasses import asdict
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner
from fastai.torch_core import show_image
from fastai.vision.data import get_grid
from torch import Tensor, nn

from .. import processes
from ..data.augment import at_size
from ..data.imageset import ImageSet
from ..data.loader import BatchLoader, statistics, unlabelled_images, vocabulary
from ..errors import UserError, notice
from ..files import amount
from ..trained import KeptLogits, check_teacher, images_of, load_teacher, renormalize
from ..trained.network import Ensemble, averaged, folded
from ..training.losses import DMSLoss, Targets, Teaching
from ..training.parts import order_of
from .bf16 import has_bf16
from .mixup import MixUp
from .progressive_resize import students_shape
from .releasing import Releasing
from .twins import refuse_twin

__all__ = ["TeacherDistill"]

ROUNDING = 0.05  # of logits, as a share of them; bf16 has 0.01


class TeacherDistill(Releasing):
    """Show each training batch, as mixed, to a frozen teacher, and pass the teacher's logits to the loss.

    The teacher sees the student's images at its own size: that which its weights were trained on. They are enlarged, or
    made smaller; where `load_data` got a `view`, they have been larger from the beginning.
    With a `DMSLoss`, the logits are added to the targets, and the loss gives equation (ii) or (iv), with its own alpha
    and T. Any other loss becomes `alpha T^2 KL(teacher || student) + (1 - alpha) loss`. The teacher is in evaluation
    mode, has no gradients, plays no part in validation, and stays out of exported and pickled Learners.

    Of an image without a label, as `ImageLoaders.with_unlabelled` gives them, a `DMSLoss` is the teacher's part alone.
    """

    # The loss is complete before gradient accumulation (6) divides it; mixed precision is still on in after_pred.
    order, run_valid = order_of("distill"), False
    teacher = logits = None
    network = made_of = None  # the teacher's faster copy on the student's device, and the teacher that it is a copy of
    answers, trusted = None, False  # what is kept on the disk, and whether one of them has been compared
    _stateattrs = ("teacher", "network", "made_of", "logits", "answers")

    def __init__(self, teacher: Any, size: int | None = None, **distillation: Any):
        """
        Args:
            teacher: Whatever `load_teacher` takes; for a .pkl that you trust, give `load_teacher(file, trust=True)`.
            size: Height and width of the teacher's images, in place of those that its weights were trained on.
            distillation: alpha, T and the rest of `Distillation`. Not with a `DMSLoss`, which has its own.

        Raises:
            UserError: There is no such teacher, its network does not take that size, or a value is out of range.
        """
        super().__init__()
        self.given, self.distillation = sorted(distillation), Teaching(**distillation, size=size)
        self.teacher = load_teacher(teacher, size=size)

    def before_train(self) -> None:
        """Check that teacher and student fit, and put a faster copy of the teacher on the student's device."""
        refuse_twin(self)
        if self.teacher is None:
            raise UserError(
                "this Learner was exported or copied without its teacher; set learn.teacher_distill.teacher = "
                "load_teacher(...), or remove the callback: learn.remove_cb(TeacherDistill)"
            )
        if self.given and isinstance(self.learn.loss_func, DMSLoss):
            raise UserError(f"{', '.join(self.given)} given to TeacherDistill, but DMSLoss has its own; set it there")
        unlabelled = unlabelled_images(self.learn.dls)
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.loss_func.partial = unlabelled > 0
        elif unlabelled:
            raise UserError(f"{unlabelled} training images have no label, for which the loss must be DMSLoss()")
        if self.network is not None and self.made_of is self.teacher:
            return
        dls = self.learn.dls
        images = images_of(dls)
        if images is not None:
            check_teacher(self.teacher, getattr(dls, "c", None), images, vocabulary(dls))
        if getattr(dls.train_ds, "seen", None) is not None and not hasattr(self.learn, "progressive_resize"):
            raise UserError(
                f"the images are larger than the student's {dls.train_ds.size} pixels; leave out view=, or add "
                f"ProgressiveResize(1.0, 0.0, 0.0) to the callbacks, which makes the student's images of them"
            )
        device = next(self.learn.model.parameters()).device
        self.made_of = self.teacher
        teacher = self.teacher
        frozen = copy.deepcopy(teacher.model) if images is None else folded(teacher.model, images.shape, teacher.size)
        self.network = frozen.eval().to(device, memory_format=torch.channels_last)
        self.size, self.affine = self.teacher.size, self._affine(device)
        if isinstance(dls.train_ds, ImageSet):  # which may hold larger images than the student's
            self._fill_sizes(dls.train_ds.shape[1:])
        if hasattr(self.learn, "bf16") and has_bf16(device):
            cast_weights(self.network, torch.bfloat16)
        if hasattr(self.learn, "fixed_views"):
            self.answers, self.trusted = self.kept(), False

    def after_pred(self) -> None:
        """Run the teacher on the images that the student has just seen, or recall what it said of them."""
        self.logits = self.ask() if self.answers is None else self.recall()
        theirs, ours = self.logits.shape[1], self.learn.pred.shape[1]
        if theirs != ours:
            raise UserError(f"the teacher gives {theirs} logits an image, the student {ours}; they need the same")
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.loss_func.progress = self.learn.pct_train
            y_a, y_b, lam = (*self.learn.yb, None, None)[:3]
            self.learn.yb = (y_a, y_b, lam, self.logits)

    def ask(self) -> Tensor:
        """The teacher's logits."""
        with torch.no_grad():
            return self.network(self.view())

    def recall(self) -> Tensor:
        """The teacher's logits, asked for where nobody has asked yet; always as they are kept, in float16.

        The first time that something is recalled, the teacher is asked all the same: its weights alone tell it from
        others, so that the answers may be those of a network that computes something else with the same weights.
        """
        view, step = self.learn.fixed_views.view, self.learn.iter
        kept = self.answers.get(view, step)
        if kept is None:
            self.answers.put(view, step, self.ask())
            kept = self.answers.get(view, step)
        elif not self.trusted:
            said, folder = self.ask(), self.answers.folder
            if not alike(kept, said):
                self.answers = None
                notice(f"the teacher is asked in every step, because it does not say what {folder} has; remove that")
                return said
            self.trusted = True
        return kept.to(self.learn.pred.device)

    def kept(self) -> KeptLogits | None:
        """What the teacher has said of these views, in any run; None where nobody knows what they depend on."""
        learn, loader = self.learn, self.learn.dls.train
        if not isinstance(loader, BatchLoader):
            return None
        if not loader.drop_last:
            notice("the teacher is asked in every step, because the last batch is smaller than the others")
            return None
        changes, strange = changes_of(learn)
        if strange:
            notice(f"the teacher is asked in every step, because {strange[0]} may change the images in before_batch")
            return None
        teacher, sizes = self.teacher, self.network.sizes if isinstance(self.network, Ensemble) else [self.size]
        facts = {
            "teacher": [teacher.digest, sizes, teacher.mean, teacher.std, averaged(teacher.model)],
            "images": [loader.dataset.digest(), [len(loader.dataset), *loader.dataset.stored.shape]],
            "loader": [loader.mean, loader.std, asdict(loader.crops), loader.balance, loader.shuffle],
            "changes": changes,
            "drawn_on": (loader.device or torch.device("cpu")).type,  # its generator makes the crops
        }
        if processes.count() > 1:
            facts["rows"] = [processes.rank(), processes.count()]
        shape = (learn.fixed_views.count, len(loader), processes.rows_of(loader.bs), learn.dls.c)
        answers = KeptLogits.of(facts, shape)
        notice(
            f"the teacher is asked once about each of {learn.fixed_views.count} views of an image; {answers.share:.0%} "
            f"of its answers are there, in {answers.folder} ({amount(answers.nbytes)})"
        )
        return answers

    def view(self) -> Tensor:
        """The batch as the teacher sees it: at its size, in its normalisation. An ensemble sees to its members."""
        x = self._given()
        if self.size is not None:
            x = at_size(x, self.size)
        if self.affine is not None:
            scale, shift = self.affine
            x = x * scale + shift
        return x

    def after_loss(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]
            return
        distillation = self.distillation.at(self.learn.pct_train)
        soft = distillation.soft(self.learn.pred, self.logits, self.targets())
        self.learn.loss_grad = distillation.total(self.learn.loss_grad, soft)
        self.learn.loss = self.learn.loss_grad.detach().clone()

    def targets(self) -> Targets:
        """The classes of the batch, with those of the partners where `MixUp`, or fastai's own, has mixed it."""
        for cb in self.learn.cbs:
            if isinstance(cb, MixUp) and cb.run:
                return Targets(self.learn.yb[0], *cb.second)
            if isinstance(cb, MixHandler) and cb.run and cb.stack_y:
                return Targets(self.learn.yb[0], *cb.yb1, cb.lam)
        return Targets(self.learn.yb[0])

    def after_cancel_batch(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]

    def release(self) -> None:
        """Give the teacher's copy up."""
        self.network = self.made_of = self.logits = self.answers = None

    def show_batch(self, max_n: int = 4) -> None:
        """Show images of a training batch as the student sees them and, below, as the teacher sees them."""
        learn, loader = self.learn, self.learn.dls.train
        x, y = loader.one_batch()
        learn.xb, learn.yb, learn.training, learn.pct_train = (x,), (y,), True, 0.0
        for callback in learn.cbs.sorted("order"):
            if callback.order <= order_of("progressive_resize") and hasattr(type(callback), "before_batch"):
                callback.before_batch()
        student = learn.xb[0][:max_n]
        size = max(filter(None, self.teacher.sizes), key=math.prod, default=students_shape(learn.dls, x)[1:])
        rows = [loader.decode((part, y[:max_n]))[0] for part in (student, at_size(self._given()[:max_n], size))]
        grid = get_grid(2 * len(student), nrows=2)
        for image, axes in zip([*rows[0], *rows[1]], grid, strict=True):
            show_image(image, ctx=axes, title="x".join(map(str, image.shape[-2:])))

    def _given(self) -> Tensor:
        """The batch as all callbacks but the student's resize have left it."""
        given = getattr(getattr(self.learn, "progressive_resize", None), "given", None)
        return self.learn.xb[0] if given is None else given.as_subclass(Tensor)

    def _fill_sizes(self, students: tuple[int, int]) -> None:
        """Have networks that no size is known of see images of the student's size."""
        if isinstance(self.network, Ensemble):
            self.network.set_sizes(lambda size: size or students)
        else:
            self.size = self.size or students

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Scale and shift from the student's normalisation to the teacher's; None where they are the same."""
        theirs, ours = (self.teacher.mean, self.teacher.std), statistics(self.learn.dls)
        if theirs[0] is None or theirs == ours:
            return None
        return tuple(t.to(device) for t in renormalize(ours, theirs))


def alike(kept: Tensor, said: Tensor) -> bool:
    """Whether logits are the same but for rounding, which depends on precision, threads and machine."""
    said = said.detach().float().cpu()
    return bool((kept.float() - said).norm() <= ROUNDING * said.norm())


def changes_of(learn: Learner) -> tuple[list, list[str]]:
    """What changes a batch before a teacher sees it: the callbacks of this folder, in order, each with its settings.

    They come before the student's resize. Then the names of others that change a batch, or may: neither this package's,
    which look on or keep some rows, nor fastai's, or fastai's MixUp and CutMix.
    """
    here, found, strange = __package__.split("."), [], []
    for cb in learn.cbs.sorted("order"):
        if not cb.run or not (hasattr(type(cb), "before_batch") or "before_batch" in vars(cb)):
            continue
        home = [] if "before_batch" in vars(cb) else type(cb).__module__.split(".")
        if home[:2] == here:
            found += [_settings(cb)] if cb.order < order_of("progressive_resize") else []
        elif home[:1] not in (here[:1], ["fastai"]) or isinstance(cb, MixHandler):
            strange.append(type(cb).__name__)
    return found, strange


def _settings(cb: Callback) -> list:
    """A callback's class and what it was made with; of callbacks in it, the same."""
    own = {name: value for name, value in vars(cb).items() if name not in ("learn", "run", *cb._stateattrs)}
    return [
        type(cb).__name__,
        {name: _settings(value) if isinstance(value, Callback) else value for name, value in own.items()},
    ]


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a frozen network's large weights once to the type that autocast would cast them to in every step."""
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # not their subclasses, which may compute with their weights
            module.to(dtype)
