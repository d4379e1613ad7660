"""Images by where they are: on the Hub, in folders or files of many kinds; and what is held out of them."""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch

from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.data.arrays import ArrayImages
from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.files import find_files
from flowmo_diffusers.data.sources import DatasetImages, FileImages, FolderImages, ImageSource, Numbered
from flowmo_diffusers.data.streams import ImageStream
from flowmo_diffusers.data.tars import TarImages
from flowmo_diffusers.data.transforms import ImageTransform


logger = logging.getLogger(__name__)

# Sets of images that ship with this package, by name, and what of `assets` each consists of. The photos of birds are
# fewer, and more different from one another: in training, each is shown three times for an emoji.
EMBEDDED = {
    "emoji": {"train": ("emoji",), "test": ("emoji",)},
    "birds": {"train": ("birds",), "test": ("birds",)},
    "emoji+birds": {"train": ("emoji", "birds", "birds", "birds"), "test": ("emoji", "birds")},
}

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_images(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
    image_column: str = "image",
) -> dict[str, ImageSource]:
    """
    The images of all splits that a place has. See `docs/data.md` for examples.

    Args:
        dataset_name: A Hub id, a local dataset folder, or a set embedded in this package: "emoji", "birds" (photos) or
            "emoji+birds" (without labels).
        data_dir: A folder of images (nested folders are classes), a parquet or tar file, a folder of such files, or a
            pattern of their paths ("shards/{000..099}.tar", "shards/*.tar"); the folder that ImageNet, Food-101 or
            nuScenes were downloaded to; or an `.npz` or `.npy` file, see [`ArrayImages`]. If folders or files in it
            are named after splits, they are these; else all are `split`. Tar files and arrays are read in place.
        split: The split that must be there.
        dataset_config_name: Configuration of a Hub dataset.
        cache_dir: Cache of `datasets`, of the index of tar files, and of arrays that are stored compressed.
        image_column: Column of images, or field of the members of a tar file. "image" also stands for the only one.

    Raises:
        ValueError: If not exactly one place is given, the split or column does not exist, only some names are of
            splits, or an array is not of images.
        OSError: If there is no such place, it holds no images or lacks some that it lists, or a file is damaged, or
            compressed in a way that it cannot be read in place.
    """
    kind, found = _find_images(dataset_name, data_dir, split, dataset_config_name, cache_dir)
    _check_split(split, found)
    return {name: _open_images(kind, place, image_column, cache_dir) for name, place in found.items()}


def load_dataset_images(
    dataset: str | Path,
    split: str | None = None,
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
    image_column: str = "image",
    num_images: int | None = None,
    streaming: bool = False,
) -> ImageSource:
    """
    The images of one split, from one word for where they are.

    Args:
        dataset: An embedded set ("emoji", "birds", "emoji+birds"), what `data_dir` is in [`load_images`], the address
            of files, or a Hub id. What exists here goes before a Hub id; a folder "birds" is "./birds".
        split: By default "validation", else "test", else the only one.
        dataset_config_name: Configuration of a Hub dataset.
        cache_dir: See [`load_images`].
        image_column: See [`load_images`].
        num_images: At most so many: spread evenly, or the first ones of a stream.
        streaming: Nothing is downloaded but the first `num_images` images, which are kept in the cache.

    Raises:
        ValueError: If there is no such split or several to choose from, a stream has no `num_images`, and as
            [`load_images`].
        OSError: As [`load_images`].
    """
    local = dataset not in EMBEDDED and (Path(dataset).exists() or not _HUB_ID.fullmatch(str(dataset)))
    place = {"data_dir": dataset} if local else {"dataset_name": str(dataset)}
    options = {"split": split or "validation", "dataset_config_name": dataset_config_name, "cache_dir": cache_dir}
    if streaming:
        builder = _stream_builder(**place, **options)
        return _store_stream(builder, split, image_column, num_images, cache_dir)
    kind, found = _find_images(**place, **options)
    images = _open_images(kind, found[_evaluated_split(split, found)], image_column, cache_dir)
    return images if num_images is None else images.pick(num_images)


def load_streams(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
    image_column: str = "image",
) -> dict[str, ImageStream]:
    """
    As [`load_images`], but nothing is downloaded beforehand, and nothing kept. `data_dir` may also be an address of
    files, "https://.../train-{000..099}.tar" for example; a folder of images cannot be streamed.
    """
    found = _stream_builder(dataset_name, data_dir, split, dataset_config_name, cache_dir).as_streaming_dataset()
    _check_split(split, found)
    return {name: ImageStream(dataset, image_column) for name, dataset in found.items()}


def _find_images(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[str, dict[str, datasets.Dataset | list[str]]]:
    """A kind of [`find_files`] with its files by split, or "dataset" with its splits."""
    _check_one(dataset_name, data_dir)
    if dataset_name is not None:
        name, options = _dataset(dataset_name, dataset_config_name)
        return "dataset", datasets.load_dataset(name, **options, cache_dir=cache_dir)
    if "://" in str(data_dir):
        raise ValueError(
            f"data_dir (--train_data_dir, --dataset) {data_dir} is not on this machine: stream it (--streaming)"
        )
    kind, found = find_files(data_dir, split)
    if kind == "parquet":
        return "dataset", datasets.load_dataset("parquet", data_files=found, cache_dir=cache_dir)
    return kind, found


def _open_images(
    kind: str, place: datasets.Dataset | list[str], image_column: str, cache_dir: str | Path | None
) -> ImageSource:
    if kind == "dataset":
        return DatasetImages(place, image_column)
    if kind == "tar":
        return TarImages(place, image_column, cache_dir)
    if kind == "file":
        return FileImages(place)
    if kind == "folder":
        return FolderImages(place)
    if len(place) > 1:
        raise ValueError(f"data_dir (--train_data_dir, --dataset) must be a single array, not {place[:5]}")
    return ArrayImages(place[0], cache_dir)


def _stream_builder(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetBuilder:
    _check_one(dataset_name, data_dir)
    if dataset_name is not None:
        name, options = _dataset(dataset_name, dataset_config_name)
        return datasets.load_dataset_builder(name, **options, cache_dir=cache_dir)
    kind, files = find_files(data_dir, split)
    if kind not in ("tar", "parquet"):
        raise ValueError(
            f"data_dir (--train_data_dir, --dataset) {data_dir} is no stream: read it in place, without --streaming"
        )
    builder = {"tar": "webdataset", "parquet": "parquet"}[kind]
    return datasets.load_dataset_builder(builder, data_files=files, cache_dir=cache_dir)


def _store_stream(
    builder: datasets.DatasetBuilder,
    split: str | None,
    image_column: str,
    num_images: int | None,
    cache_dir: str | Path | None,
) -> DatasetImages:
    if num_images is None:
        raise ValueError("num_images (--num_images) must tell how many images of a stream are wanted")
    found = builder.as_streaming_dataset()
    split = _evaluated_split(split, found)
    # The builder's folder is named after all that its data depend on: files, their time of change, revision.
    key = hashlib.sha256(f"{builder.cache_dir} {split} {image_column} {num_images}".encode()).hexdigest()[:32]
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "streamed_images"
    return ImageStream(found[split], image_column).store(cache / f"{key}.arrow", num_images)


def _check_one(dataset_name: str | None, data_dir: str | Path | None) -> None:
    if (dataset_name is None) == (data_dir is None):
        raise ValueError("give exactly one of `dataset_name` (--dataset_name) and `data_dir` (--train_data_dir)")


def _check_split(split: str, found: Mapping[str, object]) -> None:
    if split not in found:
        raise ValueError(f"split={split!r} does not exist: this dataset has {sorted(found)}")


def _evaluated_split(split: str | None, found: Mapping[str, object]) -> str:
    if split is not None:
        _check_split(split, found)
        return split
    named = [name for name in ("validation", "test", *found) if name in found]
    if named[0] not in ("validation", "test") and len(found) > 1:
        raise ValueError(f"split (--split) must be one of {sorted(found)}")
    return named[0]


def _dataset(name: str, config_name: str | None) -> tuple[str, dict[str, Any]]:
    """Name and options by which `datasets` loads a set of this name, embedded or not."""
    if name not in EMBEDDED:
        return name, {"name": config_name}
    parts = EMBEDDED[name]
    files = {split: [str(asset_path(part, f"{split}.parquet")) for part in parts[split]] for split in parts}
    # Files of several kinds have the images in common.
    return "parquet", {"data_files": files} | ({"columns": ["image"]} if "+" in name else {})


Images = TypeVar("Images", bound=Numbered | ImageStream)


def hold_out(
    found: Mapping[str, Images], split: str, validation_split: str | None, count: int
) -> tuple[Images, Numbered]:
    """
    The training images, or tokens, and `count` held-out ones, none of which is trained on.

    Held-out images come from `validation_split`, by default "validation" or "test" where there is one, else from the
    training split, which is shortened by them. They are spread evenly, or the first ones of a stream.

    Raises:
        ValueError: If the split does not exist or holds too few images.
    """
    train = found[split]
    for name in [validation_split] if validation_split else ["validation", "test"]:
        if name in found and name != split:
            return train, found[name].pick(count)
    if validation_split:
        others = sorted(set(found) - {split})
        raise ValueError(f"validation_split={validation_split!r} must be a split beside {split!r}: there are {others}")
    return train.set_aside(count)


def stack_images(source: ImageSource, resolution: int) -> torch.Tensor:
    """
    All images of a small source, centre-cropped: (n, 3, resolution, resolution) in [-1, 1]. Bad ones are left out with
    a warning.

    Raises:
        ValueError: If there is no good one.
    """
    transform, images = ImageTransform(resolution), []
    for index in range(len(source)):
        try:
            images.append(transform(source[index]))
        except BadImage as error:
            logger.warning(f"held-out image {source.name(index)} is left out: {error}")
    if not images:
        raise ValueError(f"none of {len(source)} held-out images can be read")
    return torch.stack(images)
