"""What somebody should know about a finished run before they trust it, in one line each."""

import math
from collections.abc import Sequence
from glob import escape
from statistics import linear_regression

from ..errors import UserError
from ..recipes import Recipe, flat
from ..run_folder import Facts, Row, Run, RunFolder

__all__ = ["advice", "other_settings", "teacher_advice"]

FEW_STEPS, GOOD = 300, 0.95  # few steps, and an accuracy with which they have been enough
ROUNDED = 1e-6  # accuracies are float32's
THIRD = 3  # the epochs of a third from which on it has a slope
RISE = 0.05  # of a loss, which is more than noise


def advice(facts: Facts, rows: Sequence[Row], steps: int, largest: float, others: int = 0) -> list[str]:
    """The lines about a run; none, if all is well.

    Args:
        facts: Of the finished run.
        rows: Its epochs.
        steps: Training steps in all.
        largest: Share of the largest class in the validation images.
        others: Finished runs of the same recipe with other settings, validated on the same images.
    """
    first, last, found = rows[0], rows[-1], []
    accuracy, even = last["valid_accuracy"], 1 / facts.classes if facts.classes else 0.0
    if last["train_loss"] > (1 + RISE) * first["train_loss"]:
        losses = f"its training loss rose from {first['train_loss']:.3g} to {last['train_loss']:.3g}"
        found.append(f"it has diverged: {losses}; try a smaller --set optimizer.lr")
    if facts.agreement:
        found.append("its agreement with the teacher is not accuracy; measure that on images with labels")
    elif accuracy <= even + ROUNDED:
        found.append(
            f"an accuracy of {_percent(accuracy)} is not better than chance, {_percent(even)}; check that the labels "
            f"fit the images, and try another --set optimizer.lr"
        )
    elif accuracy <= largest + ROUNDED:
        found.append(
            f"an accuracy of {_percent(accuracy)} is not better than to answer with the largest class every time, "
            f"{_percent(largest)}; train for longer, or on as many images of each class"
        )
    if facts.epochs_done < facts.epochs:
        found.append(f"stopped early, after epoch {facts.epochs_done} of {facts.epochs}")
    if steps < FEW_STEPS and accuracy < GOOD:
        found.append(f"{steps:,} training steps are few; try more --epochs, or a smaller --set data.batch_size")
    if (rise := _overfitting(rows)) is not None:
        found.append(
            f"it overfits: in the last third the validation loss rose by {_percent(rise)} and the training loss fell; "
            f"try fewer --epochs or more augmentation"
        )
    if others and facts.valid == "test":
        found.append(
            "other settings of this recipe have been measured on the same test images; to choose between them, "
            "hold out images of the training set, --set data.valid=0.1"
        )
    return [f"{facts.title}: {line}" for line in found]


def teacher_advice(student: Facts, teacher: Facts) -> list[str]:
    """The lines about a finished student and its teacher, both validated on the same images; none, if all is well."""
    if student.last is None or teacher.last is None or student.agreement or _labelled(student) != _labelled(teacher):
        return []
    taught, teaching = student.last.valid_accuracy, teacher.last.valid_accuracy
    if teaching >= taught:
        return []
    return [
        f"{student.title}: its teacher has {_percent(teaching)} after {_epochs(teacher)}, less than the "
        f"student, {_percent(taught)}; train the teacher for longer, or see with --compare what it is worth"
    ]


def _epochs(facts: Facts) -> str:
    return f"{facts.epochs_done} epoch{'s' * (facts.epochs_done != 1)}"


def _labelled(facts: Facts) -> list[str] | None:
    """The hashes of the images with labels."""
    return facts.data_digest and facts.data_digest[:2]


def _overfitting(rows: Sequence[Row]) -> float | None:
    """By how much of itself the validation loss rose in the last third, while the training loss fell; or None."""
    if len(rows) < 3 * THIRD:
        return None
    third = rows[-(len(rows) // 3) :]
    epochs, *losses = ([row[key] for row in third] for key in ("epoch", "train_loss", "valid_loss"))
    if not all(map(math.isfinite, losses[0] + losses[1])):
        return None
    training, validation = (linear_regression(epochs, values) for values in losses)
    began = validation.intercept + validation.slope * epochs[0]
    rise = validation.slope * (epochs[-1] - epochs[0]) / began if began > 0 else 0.0
    return rise if training.slope < 0 and rise > RISE else None


def other_settings(run: Run) -> int:
    """How many finished runs have the run's recipe with other settings, and its images.

    None count beside another run with the same settings, which has been told: nobody needs to hear it for each seed.
    They are looked for in the run's OUT, in its folders, and in the folder that it is in.
    """
    name, path = run.facts.recipe, run.folder.path.resolve()
    root = [path, *path.parents][: name.count("/") + 3][-1]
    seeds = f"{escape(name)}*/seed*/{run.folder.facts_file.name}"
    found = []
    for file in {*root.glob(seeds), *root.glob(f"*/{seeds}"), *root.parent.glob(seeds)}:
        try:
            other = Run.read(file.parent)
            same = all(
                getattr(other.facts, key) == getattr(run.facts, key) for key in ("recipe", "data_digest", "valid")
            )
            if other.finished and same and other.folder.path != path:
                found.append(_settings(other.folder))
        except UserError:  # a damaged run
            continue
    return 0 if _settings(run.folder) in found else len(found)


def _settings(folder: RunFolder) -> dict[str, object]:
    recipe: Recipe = folder.recipe()
    return flat(recipe.without_folders().to_table())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
