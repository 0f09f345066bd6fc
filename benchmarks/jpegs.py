"""Images a second and core in batches that are ready to train on, from a folder of JPEGs, with random resized crops.

    python -m benchmarks.jpegs [--images 5000] [--rounds 3] [--folder JPEGS]

"fastai" is its ImageDataLoaders, which decodes each file in every epoch: RandomResizedCrop and FlipItem of each image,
Normalize of the batch; with its usual number of workers, whose time counts, too, and without any. "ours" is
`load_data`, which has decoded the files once, and here gathers each batch from the disk. What counts is the time of all
cores, and the memory of the process: its own, and with the pages of files, which the system takes back when it needs
them. The JPEGs are synthetic, with the spectrum of photographs. What it takes to decode them once is told apart.
"""

import argparse
import io
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import Normalize, get_image_files
from fastai.vision.augment import FlipItem, RandomResizedCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from rich.console import Console

from benchmarks.common import arguments, in_turn, summary, write
from dms_fastai import load_data
from dms_fastai.data.images import MIDDLE
from dms_fastai.data.sources import load_splits
from dms_fastai.models.dmsresnet import MEAN, STD

CLASSES, DIFFERENT = 10, 100
SHARE = 0.35  # smallest area that is cut out


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--shape", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fastai-images", type=int, default=1280, help="images of an epoch of fastai, the slower one")
    parser.add_argument("--folder", type=Path, help="where the JPEGs are, or are written; None: where they are removed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("DMS_FASTAI_CACHE", f"{temporary}/cache")
        folder = args.folder or Path(temporary) / "jpegs"
        if not folder.is_dir():
            write_jpegs(folder, args.images, args.shape)
        began, wall = time.process_time(), time.perf_counter()
        images = load_splits(folder, args.size, middle=MIDDLE)["train"]
        cpu, wall = time.process_time() - began, time.perf_counter() - wall
        decoding = {"cpu_seconds": round(cpu, 1), "seconds": round(wall, 1), "bytes": images.stored.nbytes}
        figures, peaks = compare(folder, args)
    Console().print(
        f"{len(images):,} JPEGs are decoded once, in {cpu:,.1f} s of the cores: {decoding['bytes']:,} bytes"
    )
    for name, (own, both) in peaks.items():
        Console().print(f"peak memory, {name}: {own:,.0f} MB, and with the pages of files {both:,.0f} MB")
    facts = {"images": len(images), "shape": args.shape, "size": args.size, "batch_size": args.batch_size}
    facts |= {"n": args.rounds, "decoding": decoding, "figures": figures, "peak_mb": peaks}
    write("jpegs", {"unit": "images/s and core", **facts}, args.device, args.out)


def compare(folder: Path, args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """The figures of all, and the peak memory of each: its own, and with the pages of files, in MB."""
    items = get_image_files(folder)
    few = [items[index] for index in np.random.default_rng(0).permutation(len(items))[: args.fastai_images]]

    def fastai(**more: int) -> TfmdDL:
        return ImageDataLoaders.from_path_func(
            folder,
            few,
            lambda file: file.parent.name,
            valid_pct=0.0,
            bs=args.batch_size,
            item_tfms=[RandomResizedCrop(args.size, min_scale=SHARE), FlipItem(0.5)],
            batch_tfms=[Normalize.from_stats(MEAN, STD)],
            device=args.device,
            **more,
        ).train

    own = {"min_area": SHARE, "pad": 0.0, "flip": 0.5, "interpolation": "bilinear"}
    ours = load_data(folder, args.batch_size, args.size, valid=0.01, where="disk", device=args.device, **own).train
    peaks: dict[str, list[float]] = {}

    def epoch(name: str, loader: TfmdDL) -> Callable[[], float]:
        def timed() -> float:
            with Peak() as peak:
                began, count = cpu_seconds(), 0
                for x, _ in loader:
                    count += len(x)
                seconds = cpu_seconds() - began
            peaks[name] = [round(max(pair)) for pair in zip(peaks.get(name, (0.0, 0.0)), peak.found, strict=True)]
            return count / seconds

        return timed

    loaders = {"fastai": fastai(), "fastai, no workers": fastai(num_workers=0), "ours": ours}
    rates = in_turn({name: epoch(name, loader) for name, loader in loaders.items()}, args.rounds)
    return summary(rates, "images/s and core", f"JPEGs, random resized crops of {args.size} pixels"), peaks


def cpu_seconds() -> float:
    """Seconds that all threads have taken, and workers that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Peak:
    """The most memory of the process in a block, in MB: its own, and with the pages of files that it has mapped."""

    def __enter__(self) -> "Peak":
        self.found, self._over = (0.0, 0.0), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            text = Path("/proc/self/status").read_text()
            table = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            own, both = (int(table[key].split()[0]) / 1000 for key in ("RssAnon", "VmRSS"))
            self.found = max(self.found[0], own), max(self.found[1], both)


def write_jpegs(folder: Path, count: int, shape: tuple[int, int]) -> None:
    """Write `count` JPEGs, width and height `shape`, into a folder train/CLASS/, many of them with the same pixels."""
    contents = [photograph(*shape, seed) for seed in range(min(count, DIFFERENT))]
    for index in range(count):
        file = folder / "train" / str(index % CLASSES) / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[index % len(contents)])


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls with its frequency, as that of photographs does."""
    noise = np.fft.rfft2(np.random.default_rng(seed).normal(size=(height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    values = np.fft.irfft2(noise / frequency[..., None] ** 1.2, s=(height, width), axes=(0, 1))
    pixels = (128 + 50 * (values - values.mean()) / values.std()).clip(0, 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG", quality=90)
    return written.getvalue()


if __name__ == "__main__":
    main()
