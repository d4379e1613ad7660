"""Images by where they are: on the Hub, in folders, parquet files or tar files; and what is held out of them."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import datasets
import torch

from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.sources import DatasetImages, FolderImages, ImageSource
from flowmo_diffusers.data.streams import ImageStream
from flowmo_diffusers.data.tars import TarImages
from flowmo_diffusers.data.transforms import ImageTransform


logger = logging.getLogger(__name__)

EMBEDDED_DATASET = "emoji"

# Names of folders (their first word) and of files (any word) that make them splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Of all that ImageNet's official download consists of, these are the images with splits as everyone uses them.
IMAGENET = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}

_SHARD = re.compile(r"\.(tar|parquet|tar\.\w+|tgz|tbz2?|txz)$")


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
        dataset_name: A Hub id, a local dataset folder, or "emoji" for the set embedded in this package.
        data_dir: A folder of images (nested folders are classes), a parquet or tar file, a folder of such files, or a
            pattern of their paths ("shards/{000..099}.tar", "shards/*.tar"). If folders or files in it are named
            after splits, they are these; else all are `split`. Tar files are read in place.
        split: The split that must be there.
        dataset_config_name: Configuration of a Hub dataset.
        cache_dir: Cache of `datasets`, and of the index of tar files.
        image_column: Column of images, or field of the members of a tar file. "image" also stands for the only one.

    Raises:
        ValueError: If not exactly one place is given, the split or column does not exist, or only some names are of
            splits.
        OSError: If there is no such place, it holds no images, or a tar file is compressed or damaged.
    """
    _check_one(dataset_name, data_dir)
    if data_dir is None:
        kind, found = "dataset", _load_dataset(dataset_name, dataset_config_name, cache_dir)
    elif "://" in str(data_dir):
        raise ValueError(f"data_dir (--train_data_dir) {data_dir} is not on this machine: stream it (--streaming)")
    else:
        kind, found = find_files(data_dir, split)
    if kind == "parquet":
        kind, found = "dataset", datasets.load_dataset("parquet", data_files=found, cache_dir=cache_dir)
    _check_split(split, found)
    if kind == "dataset":
        return {name: DatasetImages(dataset, image_column) for name, dataset in found.items()}
    if kind == "tar":
        return {name: TarImages(files, image_column, cache_dir) for name, files in found.items()}
    return {name: FolderImages(folders) for name, folders in found.items()}


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
    _check_one(dataset_name, data_dir)
    if data_dir is None:
        found = _load_dataset(dataset_name, dataset_config_name, cache_dir, streaming=True)
    else:
        kind, files = find_files(data_dir, split)
        if kind == "folder":
            raise ValueError(
                f"data_dir (--train_data_dir) {data_dir} is no stream: read it in place, without --streaming"
            )
        builder = {"tar": "webdataset", "parquet": "parquet"}[kind]
        found = datasets.load_dataset(builder, data_files=files, cache_dir=cache_dir, streaming=True)
    _check_split(split, found)
    return {name: ImageStream(dataset, image_column) for name, dataset in found.items()}


def _check_one(dataset_name: str | None, data_dir: str | Path | None) -> None:
    if (dataset_name is None) == (data_dir is None):
        raise ValueError("give exactly one of `dataset_name` (--dataset_name) and `data_dir` (--train_data_dir)")


def _check_split(split: str, found: Mapping[str, object]) -> None:
    if split not in found:
        raise ValueError(f"split={split!r} does not exist: this dataset has {sorted(found)}")


def _load_dataset(name: str, config: str | None, cache_dir: str | Path | None, streaming: bool = False) -> dict:
    if name != EMBEDDED_DATASET:
        return datasets.load_dataset(name, config, cache_dir=cache_dir, streaming=streaming)
    files = {split: str(asset_path("emoji", f"{split}.parquet")) for split in ("train", "test")}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, streaming=streaming)


def find_files(data_dir: str | Path, split: str) -> tuple[str, dict[str, list[str]]]:
    """
    What a `data_dir` is made of ("tar", "parquet" or "folder"), and its files, or folders of images, by split. Left to
    guess, `datasets` takes any file or class that has "train" or "test" in its name for a split and drops all other
    images without a word.
    """
    path = Path(data_dir)
    if path.is_file():
        return _kind_of([str(path)]), {split: [str(path)]}
    if not path.is_dir():
        files = [file for pattern in _expand_braces(str(data_dir)) for file in _matches(pattern)]
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        named = _by_split({os.path.relpath(file, root): file for file in files}, data_dir, "[a-z]+")
        return _kind_of(files), named or {split: files}

    official = {name: [str(path / file)] for name, file in IMAGENET.items() if (path / file).is_file()}
    if official:
        return "tar", official
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    folders = {entry.name: str(entry) for entry in entries if entry.is_dir()}
    files = {entry.name: str(entry) for entry in entries if _SHARD.search(entry.name) and entry.is_file()}
    if any(name.endswith((".tar", ".parquet")) for name in files) or 0 < len(files) == len(entries):
        return _kind_of(files.values()), _by_split(files, data_dir, "[a-z]+") or {split: list(files.values())}
    return "folder", _by_split(folders, data_dir, "^[a-z]+") or {split: [str(path)]}


def _kind_of(files: Iterable[str]) -> str:
    kinds = {}
    for file in files:
        match = _SHARD.search(file)
        if match is None:
            raise OSError(f"data_dir (--train_data_dir) must be a folder or .tar or .parquet files, not {file}")
        if match[1] not in ("tar", "parquet"):
            raise OSError(f"{file} is compressed, so that nothing in it can be read in place: make it a .tar file")
        kinds[match[1]] = file
    if len(kinds) > 1:
        raise ValueError(
            f"data_dir (--train_data_dir) has {list(kinds.values())}: give files of one kind by a pattern"
        )
    return match[1]


def _by_split(paths: Mapping[str, str], data_dir: str | Path, words: str) -> dict[str, list[str]]:
    """The paths by the split that a word of their name tells; nothing if no name does."""
    files, others = {}, []
    for name, path in paths.items():
        found = re.findall(words, name.lower())
        named = next((split for word in found for split, names in SPLIT_WORDS.items() if word in names), None)
        if named is None:
            others.append(name)
        else:
            files.setdefault(named, []).append(path)
    if files and others:
        raise ValueError(
            f"data_dir (--train_data_dir) {data_dir} holds splits {sorted(files)} by name, but also {others[:5]}: "
            "give the folder or the files of one split (classes of images belong in a folder 'train')"
        )
    return files


def _expand_braces(pattern: str) -> list[str]:
    """ "shard-{000..002}.tar" and "shard-{a,b}.tar" as the names that they stand for."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        options = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        options = braces[1].split(",")
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for option in options for name in _expand_braces(head + option + tail)]


def _matches(pattern: str) -> list[str]:
    files = [pattern] if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"data_dir (--train_data_dir) {pattern} does not exist")
    return files


Images = TypeVar("Images", ImageSource, ImageStream)


def hold_out(
    found: Mapping[str, Images], split: str, validation_split: str | None, count: int
) -> tuple[Images, ImageSource]:
    """
    The training images and `count` held-out ones, none of which is trained on.

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
