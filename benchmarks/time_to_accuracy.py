"""The work that it took to reach an accuracy on CIFAR-10: finished runs beside what others have published.

    python -m benchmarks.time_to_accuracy [FOLDER ...]

Work is counted in PFLOP of training, forward and backward, which no machine changes. A run's accuracy is that of its
last epoch, without test-time augmentation; its work does not hold the training of its teacher.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dms_fastai.names import entries
from dms_fastai.run_folder import Run, find_runs


@dataclass(frozen=True)
class Result:
    """An accuracy, in per cent, and the PFLOP that it took."""

    what: str
    accuracy: float
    pflop: float
    epochs: float | None = None
    published: bool = True


# https://github.com/KellerJordan/cifar10-airbench, with its test-time augmentation; a ResNet-18 the usual way is its
# comparison, without.
PUBLISHED = (
    Result("airbench94_muon", 94.0, 0.29, 8),
    Result("airbench95", 95.0, 1.4, 15),
    Result("airbench96_faster", 96.0, 3.1),
    Result("ResNet-18, the usual way", 96.0, 32.0),
)


def own(folders: list[Path]) -> list[Result]:
    """The finished runs on CIFAR-10 whose work is known."""
    found = []
    for folder in folders:
        for run in find_runs([folder])[0]:
            facts, pflop = run.facts, pflop_of(run)
            if run.finished and facts.data == "cifar10" and facts.valid == "test" and pflop is not None:
                what = f"{facts.model}: {run.folder.path.relative_to(folder)}"
                found.append(Result(what, 100 * facts.last.valid_accuracy, pflop, facts.epochs_done, published=False))
    return found


def pflop_of(run: Run) -> float | None:
    """What run.json says; of a run of an earlier version, what its architecture, images and epochs tell."""
    facts = run.facts
    if facts.train_pflop is not None:
        return facts.train_pflop.total
    macs = next((entry.macs for entry in entries() if entry.name == facts.model), None)
    if macs is None or facts.teacher is not None or facts.size != 32 or run.folder.recipe().model.args:
        return None
    return 6 * 1e6 * float(macs.split()[0].replace(",", "")) * facts.training_images * facts.epochs_done / 1e15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("artifacts")], help="folders with runs")
    found = [*own(parser.parse_args().folders), *PUBLISHED]
    table = Table("what", "accuracy, %", "PFLOP", "epochs", "", title="CIFAR-10: accuracy and the work that it took")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:4]:
        column.justify = "right"
    for result in sorted(found, key=lambda result: result.pflop):
        epochs = "" if result.epochs is None else f"{result.epochs:g}"
        note = "published" if result.published else ""
        table.add_row(result.what, f"{result.accuracy:.2f}", f"{result.pflop:.3g}", epochs, note)
    Console().print(table)


if __name__ == "__main__":
    main()
