"""One epoch of a recipe on all the training pictures, its loss step by step: does it train at all, and how fast here?

    python -m benchmarks.first_epoch --data cifar10 --recipe se [--arch dmsresnet]

Prints and writes fastai's smoothed training loss every --every steps, and the validation accuracy after the epoch.
"""

import time

import torch
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop

from benchmarks.common import arguments, write
from dms_fastai import dms_learner, load_data


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--recipe", default="se")
    parser.add_argument("--arch", default=None)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=25)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dls = load_data(args.data, bs=args.batch_size, device=args.device)
    learn = dms_learner(dls, args.recipe, arch=args.arch, settings={"schedule.name": "one-cycle"})
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    began = time.perf_counter()
    learn.fit_recipe(epochs=1)
    seconds = time.perf_counter() - began
    steps = len(learn.recorder.losses)
    losses = {
        step: round(float(learn.recorder.losses[step - 1]), 4) for step in range(args.every, steps + 1, args.every)
    }
    accuracy = float(learn.recorder.values[-1][-1])
    for step, loss in losses.items():
        print(f"step {step:4d}  loss {loss:.4f}")
    print(f"{steps} steps of {args.batch_size} pictures; validation accuracy {100 * accuracy:.2f} %; {seconds:.0f} s")
    facts = {
        "model": learn.recipe.model.name,
        "data": dls.train_ds.name,
        "recipe": args.recipe,
        "batch_size": args.batch_size,
        "steps": steps,
        "smoothed_loss_by_step": losses,
        "valid_accuracy": accuracy,
        "seconds": round(seconds, 1),
    }
    write("first_epoch", facts, args.device, args.out)


if __name__ == "__main__":
    main()
