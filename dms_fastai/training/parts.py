"""The parts of a recipe, in the order in which a training step meets them.

Read this file from top to bottom to follow a step. To add a part, add a line: the part's table in a recipe, where its
constructor is and, for a callback, its order among fastai's. The rest is in the part's own file.
"""

from dataclasses import dataclass

__all__ = ["PARTS", "Part", "order_of"]


@dataclass(frozen=True)
class Part:
    """A part of the training.

    Attributes:
        table: The recipe's table with its settings. Without the table the part is off, unless it is `always` on.
        at: Its class, or a dictionary of classes of which the table's `name` chooses one.
        order: For a callback: fastai calls the callbacks of an event in this order. fastai's own: TrainEval -10,
            MixedPrecision 10, GradientClip 11, Recorder 50, ParamScheduler and ProgressCallback 60.
        always: Whether every recipe has it.
        settings: Where its settings are, if not in its own constructor.
    """

    table: str
    at: str
    order: float | None = None
    always: bool = False
    settings: str | None = None


PARTS = (
    # What is trained, on what, for how long; learning rate and momentum of the step.
    Part("model", "models.build:Model", always=True),
    Part("data", "data.sets:Data", always=True),
    Part("schedule", "training.schedules:SCHEDULES", always=True),
    Part("prune", "training.prune:Prune"),  # the network is what is left of trained weights
    Part("budget", "training.budget:Budget"),  # what is not set of these three is chosen to fit it
    # The loader makes a batch: crops and flips. Then before_batch: the images and their targets.
    Part("augment", "data.augment:Crops", always=True),
    Part("affine", "callbacks.affine:RandomAffine", order=-3),
    Part("trivial_augment", "callbacks.trivial_augment:TrivialAugment", order=-2),
    Part("rand_augment", "callbacks.rand_augment:RandAugment", order=-2),
    Part("cutout", "callbacks.cutout:Cutout", order=-1),
    Part("mixup", "callbacks.mixup:MixUp", order=0),
    Part("cutmix", "callbacks.cutmix:CutMix", order=0),
    Part("mixup_or_cutmix", "callbacks.cutmix:MixUpOrCutMix", order=0),
    Part("erasing", "callbacks.erasing:RandomErasing", order=1),
    Part("progressive_resize", "callbacks.progressive_resize:ProgressiveResize", order=2),
    Part("fixed_views", "callbacks.fixed_views:FixedViews", order=3),  # after everything that draws for the batch
    # The networks: bf16 lasts from here until the teacher has seen the batch; after_pred: the teacher.
    Part("sync_bn", "callbacks.sync_bn:SyncBN", order=9),
    Part("compile", "callbacks.torch_compile:TorchCompile", order=6),  # after TeacherDistill has made its network
    Part("bf16", "callbacks.bf16:BF16", order=11),
    Part("drop_block", "callbacks.drop_block:DropBlockSchedule", order=61),  # after ParamScheduler
    Part("fine_tune", "callbacks.fine_tune:FineTune", order=62),  # after ParamScheduler
    Part("distill", "callbacks.distill:TeacherDistill", order=5, settings="training.losses:Teaching"),
    Part(
        "feature_distill", "callbacks.feature_distill:FeatureDistill", order=5.5
    ),  # of the whole loss; fastai divides at 6
    # The loss; after_backward: the gradients; before_step: what becomes of them.
    Part("loss", "training.losses:DMSLoss", always=True),
    Part("sam", "callbacks.sam:SAM", order=45),  # after whatever completes the targets and the loss
    Part("clip", "callbacks.clip:ClipGradValue", order=11),
    # The step, and after_step: the average.
    Part("optimizer", "training.optimizers:OPTIMIZERS", always=True),
    Part("lookahead", "training.optimizers:Lookahead"),
    Part("ema", "callbacks.ema:EMA", order=8),
    # after_epoch: whether there is to be another one.
    Part("early_stopping", "callbacks.early_stopping:EarlyStopping", order=63),  # after fastai's trackers
)


def order_of(table: str) -> float:
    """The place of a callback among fastai's, by its table."""
    for part in PARTS:
        if part.table == table:
            return part.order
    raise LookupError(f"there is no part {table!r}; add its line to PARTS in training/parts.py")
