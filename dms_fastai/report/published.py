"""Published figures of the paper and others, to be set beside what is measured here."""

from dataclasses import dataclass

from ..names import entries

__all__ = ["STAGES", "TABLE_1", "Published", "System"]


@dataclass(frozen=True)
class Published:
    """A stage as somebody else reports it.

    Attributes:
        who: Who reports it.
        last, best, training: Accuracy in the last epoch, in the best one on the test set, and in training, in per cent.
        parameters: Number of parameters of the network.
        seconds: Seconds of training.
        epochs: Epochs of training.
    """

    who: str
    last: float | None = None
    best: float | None = None
    training: float | None = None
    parameters: int | None = None
    seconds: int | None = None
    epochs: int = 200


STUDENT = Published("authors' log", 96.14, 96.24, 52.90, 4_697_742, 200 * 126)
TEACHER = Published("authors' log", 96.61, 96.72, None, 23_521_422, 200 * 92)

# CIFAR-10, by recipe, in the ablation's order; the authors' log is from recipes/authors on one P100.
STAGES = {
    "baseline": [Published("paper", None, 81.79, 100.0)],
    "se": [Published("paper", None, 95.51, 99.99)],
    "mixup": [Published("paper", None, 96.46, 52.43)],
    "teacher": [TEACHER],
    "kd": [Published("paper", None, 96.56, 52.90, 4_367_742), STUDENT],
    "authors/teacher": [TEACHER],
    "authors/kd": [STUDENT],
}

TRAINING_IMAGES = 50_000
PASSES = 3  # a step costs as much as three forward passes


@dataclass(frozen=True)
class System:
    """A system that somebody has trained on CIFAR-10.

    Attributes:
        name: Its name, with what tells its training from others.
        parameters: In millions.
        accuracy: In per cent, best on the test set or not said to be the last epoch's.
        epochs: Epochs of training.
        entry: The architecture of this package that is the same network, or stands for it.
    """

    name: str
    parameters: float
    accuracy: float
    epochs: int
    entry: str

    @property
    def macs(self) -> float:
        """Millions of multiply-accumulates for one image of 32x32 pixels."""
        return next(float(e.macs.split()[0].replace(",", "")) for e in entries() if e.name == self.entry)

    @property
    def train_pflop(self) -> float:
        """PFLOP of all its epochs, two for a multiply-accumulate, without those of a teacher."""
        return self.macs * 1e6 * 2 * PASSES * TRAINING_IMAGES * self.epochs / 1e15


# The paper's Table 1, by data set.
TABLE_1 = {
    "cifar10": [
        System("plain CNN, 2,500 epochs", 4.3, 94.29, 2500, "plain_cnn"),
        System("CCT-7/3x1, 300 epochs", 3.76, 96.53, 310, "cct_7_3x1"),
        System("HCGNet-A2, 1,260 epochs", 3.1, 97.71, 1260, "hcgnet_a2"),
        System("DMSResNet, the paper's, 200 epochs", 4.367742, 96.56, 200, "dmsresnet"),
    ]
}
