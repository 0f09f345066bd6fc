"""Images a second in batches that are ready to train on, on one CPU core, with each augmentation of its own.

    python -m benchmarks.data_path [--images 4096] [--rounds 7]

"torchvision" does to each image what its examples do: RandomCrop with padding, RandomHorizontalFlip, ToTensor,
Normalize, then a stack and, to a GPU, a copy. "ours" is `BatchLoader`. Then the same without crop and flip, but with
another augmentation: torchvision's or, for RandAugment, timm's, and the part of a recipe that does the same by the
batch. Random pixels; all start from decoded images in memory.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from benchmarks.common import arguments, in_turn, summary, wall, write
from dms_fastai import RandAugment, RandomAffine, RandomErasing
from dms_fastai.data import BatchLoader, Crops, ImageSet
from dms_fastai.models.dmsresnet import MEAN, STD

NONE = Crops(pad=0.0, flip=0.0)


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)

    pixels = np.random.default_rng(0).integers(0, 256, (args.images, args.size, args.size, 3), dtype=np.uint8)
    labels = torch.zeros(args.images, dtype=torch.long)
    images = [Image.fromarray(p) for p in pixels]
    dataset = ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, ["a", "b"], split_idx=0)
    padding = args.size // 8

    def torchvision(before: list[Callable], after: list[Callable] = ()) -> Callable[[], None]:
        """An epoch with transforms of images before, and of tensors after they become normalised tensors."""
        transform = transforms.Compose([*before, transforms.ToTensor(), transforms.Normalize(MEAN, STD), *after])

        def epoch() -> None:
            order = torch.randperm(args.images).tolist()
            for start in range(0, args.images, args.batch_size):
                torch.stack([transform(images[i]) for i in order[start : start + args.batch_size]]).to(args.device)

        return epoch

    def ours(crops: Crops, part: Callback | None = None) -> Callable[[], None]:
        """An epoch of the loader, with a callback that changes each batch."""
        loader = BatchLoader(dataset, args.batch_size, shuffle=True, crops=crops, device=args.device)

        def epoch() -> None:
            for x, _ in loader:
                if part is not None:
                    part.learn = SimpleNamespace(xb=(x,), dls=SimpleNamespace(train=loader))
                    part.before_batch()

        return epoch

    flip = [transforms.RandomCrop(args.size, padding), transforms.RandomHorizontalFlip()]
    enlarged = transforms.RandomResizedCrop(args.size, (0.8, 1.0), interpolation=InterpolationMode.BICUBIC)
    fill = {"img_mean": tuple(round(255 * mean) for mean in MEAN)}
    policy = rand_augment_transform("rand-m9-inc1", fill)  # all of one magnitude: Pillow refuses posterize at 10
    moved = transforms.RandomAffine(0, (0.1, 0.1), (0.9, 1.1), 10, InterpolationMode.BILINEAR)
    erased = transforms.RandomErasing(0.25, (0.02, 0.333), (0.3, 3.3), "random")
    pairs = {
        "crop and flip": (torchvision(flip), ours(Crops(pad=padding / args.size, flip=0.5))),
        "resized crop": (torchvision([enlarged]), ours(Crops(0.0, 0.0, min_area=0.8, interpolation="bicubic"))),
        "RandAugment": (torchvision([policy]), ours(NONE, RandAugment())),
        "affine": (torchvision([moved]), ours(NONE, RandomAffine())),
        "erasing": (torchvision([], [erased]), ours(NONE, RandomErasing())),
    }
    found = {}
    for name, (theirs, own) in pairs.items():
        first = "timm" if name == "RandAugment" else "torchvision"
        seconds = in_turn({first: wall(theirs, args.device), "ours": wall(own, args.device)}, args.rounds)
        rates = {who: [args.images / s for s in values] for who, values in seconds.items()}
        found[name] = summary(rates, "images/s", f"batches ready to train: {name}")
    figures = found.pop("crop and flip")
    settings = {"images": args.images, "size": args.size, "batch_size": args.batch_size, "n": args.rounds}
    write(
        "data_path", {"unit": "images/s", **settings, "figures": figures, "augmentations": found}, args.device, args.out
    )


if __name__ == "__main__":
    main()
