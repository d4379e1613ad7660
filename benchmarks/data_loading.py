#!/usr/bin/env python
"""
Images per second and core that training can be fed with, for each kind of source.

    python benchmarks/data_loading.py --images my_photos --workers 0 1 2

The images are JPEGs of 500 x 375 pixels at quality 90, as in ImageNet, made of photos (larger ones shrunk, smaller
ones side by side) and kept in the page cache, so that neither a disk nor a network is measured. "Per core" is by
processor time, without workers.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import datasets
import PIL.Image
import PIL.ImageOps
import torch

from flowmo_diffusers.data.decoding import decode_image
from flowmo_diffusers.data.images import load_images, load_streams
from flowmo_diffusers.data.loading import ShuffledImages, StreamedImages, image_batches
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform


SIZE = (500, 375)
PER_SHARD = 250


def photo(pieces: Iterator[PIL.Image.Image]) -> bytes:
    """An encoded image of `SIZE`: one large piece, or as many small ones as fill it."""
    picture, left, top, row = PIL.Image.new("RGB", SIZE), 0, 0, 0
    while top < SIZE[1]:
        piece = next(pieces)
        if piece.width >= SIZE[0] and piece.height >= SIZE[1]:
            picture = PIL.ImageOps.fit(piece, SIZE)
            break
        picture.paste(piece, (left, top))
        left, row = left + piece.width, max(row, piece.height)
        if left >= SIZE[0]:
            left, top, row = 0, top + row, 0
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def write(folder: Path, encoded: list[bytes]) -> None:
    """The same images as files, parquet and tar."""
    for kind in ("folder", "parquet", "tar"):
        (folder / kind).mkdir()
    features = datasets.Features({"image": datasets.Image()})
    for start in range(0, len(encoded), PER_SHARD):
        shard = encoded[start : start + PER_SHARD]
        name = f"train-{start // PER_SHARD:04d}"
        rows = [{"bytes": data, "path": None} for data in shard]
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(
            folder / "parquet" / f"{name}.parquet"
        )
        with tarfile.open(folder / "tar" / f"{name}.tar", "w") as tar:
            for i, data in enumerate(shard, start):
                (folder / "folder" / f"{i:06d}.jpg").write_bytes(data)
                info = tarfile.TarInfo(f"{i:06d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def rate(
    images: ShuffledImages | StreamedImages, batch_size: int, batches: int, num_workers: int
) -> tuple[float, float]:
    """Images per second, and per second of processor time of this process, once the first batches are there (as many
    as workers may have prepared before)."""
    loader = iter(image_batches(images, batch_size, 0, batches + 2 * num_workers + 1, num_workers=num_workers))
    for _ in range(2 * num_workers + 1):
        next(loader)
    started, worked = time.perf_counter(), time.process_time()
    count = sum(len(batch["visits"]) for batch in loader)
    return count / (time.perf_counter() - started), count / (time.process_time() - worked)


def stages(source: ImageSource, transform: ImageTransform, count: int) -> dict[str, float]:
    """Microseconds per image of what one process does."""

    def mean(work: Callable, items: list) -> tuple[float, list]:
        started = time.process_time()
        results = [work(item) for item in items]
        return (time.process_time() - started) / len(items) * 1e6, results

    generator = torch.Generator().manual_seed(0)
    side = transform.resolution
    width = round(SIZE[0] * side / SIZE[1])
    read, files = mean(lambda i: source._read(i), list(range(count)))
    decode, images = mean(decode_image, files)
    resize, _ = mean(lambda image: image.resize((width, side), PIL.Image.Resampling.BILINEAR), images)
    whole, _ = mean(lambda image: transform(image, generator), images)
    return {"read": read, "decode": decode, "resize": resize, "crop, flip, to float": whole - resize}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, help="folder of photos; default: the embedded emoji, which are no photos"
    )
    parser.add_argument("--count", type=int, default=500, help="how many images to make")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=30, help="measured in each case")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s after each epoch of parquet, too long for ones so short
    transform = ImageTransform(args.resolution, random_crop=True, random_flip=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        place = {"data_dir": args.images} if args.images else {"dataset_name": "emoji"}
        pieces = load_images(**place, cache_dir=folder / "cache")["train"]
        numbers = cycle(range(len(pieces)))
        encoded = [photo(pieces[i] for i in numbers) for _ in range(args.count)]
        write(folder, encoded)
        made_of = f"{len(pieces)} images of {args.images}" if args.images else "the embedded emoji"
        size = sum(map(len, encoded)) / len(encoded) / 1000
        print(
            f"{len(encoded)} JPEGs of {SIZE[0]} x {SIZE[1]}, {size:.0f} kB on average, made of {made_of}; "
            f"to {args.resolution} x {args.resolution}, batches of {args.batch_size}\n"
        )

        sources = {
            kind: load_images(data_dir=folder / kind, cache_dir=folder / "cache")
            for kind in ("folder", "parquet", "tar")
        }
        streams = {
            kind: load_streams(data_dir=folder / kind, cache_dir=folder / "cache") for kind in ("parquet", "tar")
        }
        cases = {kind: ShuffledImages(found["train"], transform) for kind, found in sources.items()}
        cases |= {
            f"{kind}, streamed": StreamedImages(found["train"], transform, shuffle_buffer=100)
            for kind, found in streams.items()
        }
        heads = ["no worker" if workers == 0 else f"{workers} worker{'s' * (workers > 1)}" for workers in args.workers]
        print(f"| images/s | {' | '.join(heads)} | per core |\n|---{'|---' * len(heads)}|---|")
        rates = {}
        for name, images in cases.items():
            rates[name] = {n: rate(images, args.batch_size, args.batches, n)[0] for n in args.workers}
            rates[name]["per core"] = rate(images, args.batch_size, args.batches, 0)[1]
            print(f"| {name} | {' | '.join(f'{value:.0f}' for value in rates[name].values())} |", flush=True)

        count = min(args.count, 300)
        costs = {kind: stages(found["train"], transform, count) for kind, found in sources.items()}
        heads = list(costs["folder"])
        print(f"\n| microseconds an image | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
        for kind, cost in costs.items():
            print(f"| {kind} | {' | '.join(f'{value:.0f}' for value in cost.values())} |")
    if args.json:
        record = {
            "images": str(args.images or "emoji"),
            "kilobytes": size,
            "images_per_second": rates,
            "microseconds": costs,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
