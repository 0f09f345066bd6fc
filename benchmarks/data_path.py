"""Images a second in batches that are ready to train on: crop, flip, normalise, collate, on one CPU core.

    python -m benchmarks.data_path [--images 4096] [--rounds 7]

"torchvision" does to each image what its examples do: RandomCrop with padding, RandomHorizontalFlip, ToTensor,
Normalize, then a stack and, to a GPU, a copy. "ours" is `BatchLoader`. Random pixels; both start from decoded images
in memory.
"""

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.common import arguments, in_turn, summary, wall, write
from dms_fastai.data import BatchLoader, Crops, ImageSet
from dms_fastai.models.dmsresnet import MEAN, STD


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
    padding = args.size // 8
    transform = transforms.Compose(
        [
            transforms.RandomCrop(args.size, padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    dataset = ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, ["a", "b"], split_idx=0)
    crops = Crops(pad=padding / args.size, flip=0.5)
    loader = BatchLoader(dataset, args.batch_size, shuffle=True, crops=crops, device=args.device)

    def torchvision() -> None:
        order = torch.randperm(args.images).tolist()
        for start in range(0, args.images, args.batch_size):
            torch.stack([transform(images[i]) for i in order[start : start + args.batch_size]]).to(args.device)

    def ours() -> None:
        for _ in loader:
            pass

    seconds = in_turn({"torchvision": wall(torchvision, args.device), "ours": wall(ours, args.device)}, args.rounds)
    rates = {name: [args.images / s for s in values] for name, values in seconds.items()}
    settings = {"images": args.images, "size": args.size, "batch_size": args.batch_size, "n": args.rounds}
    figures = summary(rates, "images/s", "batches ready to train")
    write("data_path", {"unit": "images/s", **settings, "figures": figures}, args.device, args.out)


if __name__ == "__main__":
    main()
