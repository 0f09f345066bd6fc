"""Turn a run's weights into those of the package: in float16, measured again in that form, with a model card.

    python -m dms_fastai.release RUN --tag kd_cifar10 --data cifar10

Writes dms_fastai/models/pretrained/ARCH.TAG.safetensors, and beside it a .json with the measurements and a .md with the
model card. `default_cfgs` in dms_fastai/models/dmsresnet.py names the file. The test images are classified in float32,
in the order of the data set, without test-time augmentation.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import track

from .data import load_data
from .data.augment import affine, normalize
from .errors import UserError
from .models.dmsresnet import PRETRAINED
from .models.weights import load_weights, save_weights
from .run_folder import Run
from .runs.machine import choose_device, device_name, versions

BATCH = 200
SAMPLE = 1000  # test images that a test classifies again: those with the smallest hashes, whatever their order


def correct(file: Path, data: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the weights in a file get each test image right, and the images' labels; both of shape (N,)."""
    model, card = load_weights(file)
    model = model.to(device, memory_format=torch.channels_last)
    test = load_data(data, size=card.shape[1], device=device).valid_ds
    scale = affine(card.mean, card.std, 1, device)
    right = []
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in track(range(0, len(test), BATCH), "classifying", transient=True):
            x = normalize(test.images[start : start + BATCH].to(device), *scale)
            right.append(model(x).argmax(1).cpu() == test.labels[start : start + BATCH].cpu())
    return torch.cat(right), test.labels.cpu()


def check(run: Run, data: str) -> None:
    """Raise a UserError for a run whose weights cannot be those of an entry, or are not known to be as good as it says.

    It has not finished, it is pruned, or it was measured on other images than the test images of `data`.
    """
    if not run.finished:
        raise UserError(f"{run.folder.path} holds no finished run; run its command again, which resumes it")
    if "mid_widths" in (run.folder.recipe().model.args or {}):
        raise UserError(f"{run.folder.path} holds a pruned network, which no entry of the package builds; export it")
    if load_data(data, size=run.facts.size, device="cpu").valid_ds.digest() != (run.facts.data_digest or ["", ""])[1]:
        raise UserError(f"the test images of {data} are not those that the run was measured on; give its --data")


def release(folder: Path, tag: str, data: str, device: torch.device, out: Path, note: str | None = None) -> str:
    """Write the three files into `out`, once all of them are there; gives a line about them.

    Raises:
        UserError: There is no finished run in `folder`, or it was measured on other images than those of `data`.
    """
    run = Run.read(folder)
    check(run, data)
    model, card = load_weights(run.folder.weights)
    name = f"{card.arch}.{tag}"
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as aside:
        file = Path(aside) / f"{name}.safetensors"
        save_weights(model, card, file, torch.float16)
        facts = {**measure(file, run, data, device), **({"note": note} if note else {})}
        file.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        file.with_suffix(".md").write_text(card_text(name, facts), encoding="utf-8")
        for each in sorted(Path(aside).iterdir()):
            each.replace(out / each.name)
    accuracy, images = 100 * facts["test_accuracy"], facts["test_images"]
    return f"{out / file.name}: {facts['megabytes']} MB, {accuracy:.2f} % of {images:,} images"


def measure(file: Path, run: Run, data: str, device: torch.device) -> dict[str, Any]:
    """The contents of the .json: where the weights come from, and what was measured with those in the file."""
    facts, recipe = run.facts, run.folder.recipe()
    _, card = load_weights(file)
    test = load_data(data, size=card.shape[1], device="cpu").valid_ds
    hashes = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in test.images]
    sample = sorted(range(len(test)), key=hashes.__getitem__)[:SAMPLE]
    right, labels = correct(file, data, device)
    classes = {name: right[labels == index].float().mean().item() for index, name in enumerate(card.vocab)}
    trained = ("recipe", "model", "parameters", "data", "training_images", "begun_from", "seed", "epochs", "seconds")
    return {
        **{key: getattr(facts, key) for key in (*trained, "device", "threads", "versions", "commit", "started")},
        "schedule": recipe.schedule.name,
        "teacher": facts.teacher,
        "best_epoch_on_test": facts.best.valid_accuracy,
        "last_epoch": facts.last.valid_accuracy,
        "size": card.shape[1],
        "megabytes": round(file.stat().st_size / 1e6, 1),
        "measured_on": {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions()},
        "test_images": len(labels),
        "test_accuracy": right.float().mean().item(),
        "class_accuracy": {name: round(accuracy, 4) for name, accuracy in classes.items()},
        "sample": SAMPLE,
        "sample_last_hash": hashes[sample[-1]],
        "sample_correct": int(right[sample].sum()),
    }


def card_text(name: str, facts: dict[str, Any]) -> str:
    """The model card."""
    note = f"\n| note | {facts['note']} |" if "note" in facts else ""
    recipe = f"`{facts['recipe']}`" + (f", taught by `{facts['teacher']}`" if facts["teacher"] else "")
    recipe += f", begun from `{facts['begun_from']}`" if facts.get("begun_from") else ""
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    per_class = "\n".join(f"| {name} | {percent(share)} |" for name, share in facts["class_accuracy"].items())
    accuracy, n = facts["test_accuracy"], facts["test_images"]
    size, classes = facts["size"], len(facts["class_accuracy"])
    best, hours = facts["best_epoch_on_test"], facts["seconds"] / 3600
    error, threads = (accuracy * (1 - accuracy) / n) ** 0.5, facts["threads"]
    computing = facts["device"] + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    return f"""# {name}

`timm.create_model("{name}", pretrained=True)` after `import dms_fastai`: {facts["parameters"]:,} parameters in a
file of {facts["megabytes"]} MB (float16). Colour images of {size}x{size} pixels in, {classes} classes out.

| | |
|---|---|
| test accuracy | **{percent(accuracy)}** of {n:,} images (standard error {percent(error)}), computed in float32 |
| in training | last epoch {percent(facts["last_epoch"])}, best epoch on the test set {percent(best)} |
| data | {facts["data"]}, all {facts["training_images"]:,} training images |
| recipe | {recipe}; {facts["epochs"]} epochs, {facts["schedule"]}; the last epoch's weights |{note}
| seed | {facts["seed"]}, one run |
| code | commit {facts["commit"]}; {versions} |
| hardware | {computing}, {hours:.1f} hours, {facts["started"][:10]} |

| class | accuracy |
|---|---|
{per_class}

## Limits

One run: another seed may differ by some tenths of a point. It knows the {classes} classes of {facts["data"]}
and nothing else: any other image gets one of their names, often with high confidence. The data set's labels and images
carry their own errors and biases. Not for decisions about people.

Written by `python -m dms_fastai.release`; `tests/test_pretrained.py` checks it where CIFAR-10 is at hand.
"""


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tag", required=True, help="tells these weights from others of the architecture")
    parser.add_argument("--data", default="cifar10", help="data set with the test images")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--note", help="a sentence for the card, about what the run does not say")
    parser.add_argument("--out", type=Path, default=PRETRAINED, help="folder of the weights")
    args = parser.parse_args()
    try:
        print(release(args.run, args.tag, args.data, args.device, args.out, args.note))
    except UserError as error:
        print(error.message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
