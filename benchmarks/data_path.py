"""Batches ready to train on one CPU core: crop, flip, normalise, collate. Images a second, side by side.

    python -m benchmarks.data_path [--pictures 4096] [--rounds 7]

"torchvision" does to each picture what its examples do: RandomCrop with padding, RandomHorizontalFlip, ToTensor,
Normalize, then a stack and, to a GPU, a copy. "ours" is `BatchLoader`. Random pixels; both start from decoded pictures
in memory.
"""

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.common import arguments, in_turn, summary, wall, write
from dms_fastai.data import BatchLoader, ImageSet
from dms_fastai.models.dmsresnet import MEAN, STD


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)

    pixels = np.random.default_rng(0).integers(0, 256, (args.pictures, args.size, args.size, 3), dtype=np.uint8)
    labels = torch.zeros(args.pictures, dtype=torch.long)
    pictures = [Image.fromarray(p) for p in pixels]
    padding = args.size // 8
    transform = transforms.Compose(
        [
            transforms.RandomCrop(args.size, padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, ["a", "b"], split_idx=0)
    loader = BatchLoader(images, args.batch_size, shuffle=True, pad=0.125, flip=0.5, device=args.device)

    def torchvision() -> None:
        order = torch.randperm(args.pictures).tolist()
        for start in range(0, args.pictures, args.batch_size):
            torch.stack([transform(pictures[i]) for i in order[start : start + args.batch_size]]).to(args.device)

    def ours() -> None:
        for _ in loader:
            pass

    seconds = in_turn({"torchvision": wall(torchvision, args.device), "ours": wall(ours, args.device)}, args.rounds)
    rates = {name: [args.pictures / s for s in values] for name, values in seconds.items()}
    settings = {"pictures": args.pictures, "size": args.size, "batch_size": args.batch_size, "n": args.rounds}
    figures = summary(rates, "images/s", "batches ready to train")
    write("data_path", {"unit": "images/s", **settings, "figures": figures}, args.device, args.out)


if __name__ == "__main__":
    main()
