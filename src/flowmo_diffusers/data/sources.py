"""Sources of images that can be read in any order."""

import copy
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa

from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS, BadImage, decode_image


# Images that lie side by side and stay together in an order of windows: some megabytes, which a disk reads as one.
READ_RUN = 64


@dataclass
class Labels:
    """
    Args:
        ids: (n,) int64, the class of each image; -1 where it has none.
        names: Of the classes, by id; None where the source has only numbers.
    """

    ids: np.ndarray
    names: list[str] | None = None

    @classmethod
    def of_names(cls, names: Sequence[str | None]) -> "Labels | None":
        """Classes numbered by their sorted names; None where no image has one."""
        classes = sorted(set(names) - {None})
        ids = {name: number for number, name in enumerate(classes)}
        return cls(np.array([ids.get(name, -1) for name in names], np.int64), classes) if classes else None


Some = TypeVar("Some", bound="Numbered")


class Numbered:
    """
    Things by number, from 0 to len - 1, and some of them as things of their own.

    Args:
        count: How many are stored.
    """

    # The `shuffle_buffer` of `order` unless the user asks for another.
    shuffle_buffer: int | None = None

    def __init__(self, count: int):
        self._rows = np.arange(count)

    def __len__(self) -> int:
        return len(self._rows)

    def select(self: Some, indices: Sequence[int] | np.ndarray) -> Some:
        """Those of these numbers."""
        selected = copy.copy(self)
        selected._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return selected

    def pick(self: Some, count: int) -> Some:
        """So many (or all, if there are fewer), spread evenly: they may be sorted by class."""
        return self.select(spread(min(count, len(self)), len(self)))

    def set_aside(self: Some, count: int) -> tuple[Some, Some]:
        """
        All but `count` images, and these, spread evenly.

        Raises:
            ValueError: If none would be left.
        """
        if len(self) <= count:
            raise ValueError(f"{count} images cannot be held out of {len(self)}: lower --num_validation_images")
        picked = spread(count, len(self))
        return self.select(np.delete(np.arange(len(self)), picked)), self.select(picked)

    def order(self, seed: int, epoch: int, shuffle_buffer: int | None) -> np.ndarray:
        """
        The order of an epoch: each number from 0 to len - 1 once, a function of these arguments alone.

        Args:
            shuffle_buffer: None for any order. Else the images fall into windows of so many, each shuffled. A window
                is made of runs of `READ_RUN` images that are stored side by side, drawn from everywhere: a disk is
                read in large pieces, and yet a source sorted by class is mixed.
        """
        generator = np.random.default_rng([seed, zlib.crc32(b"epoch"), epoch])
        count = len(self)
        if shuffle_buffer is None or shuffle_buffer >= count:
            return generator.permutation(count)
        places = np.arange(count)
        runs = places // min(READ_RUN, shuffle_buffer)
        stored = np.argsort(self._rows, kind="stable")
        mixed = stored[np.argsort(generator.permutation(runs[-1] + 1)[runs], kind="stable")]
        return mixed[np.lexsort((generator.random(count), places // shuffle_buffer))]


def spread(count: int, length: int) -> np.ndarray:
    """So many of the numbers from 0 to length - 1, spread evenly."""
    return np.arange(count) * length // max(count, 1)


class ImageSource(Numbered, ABC):
    """
    Images by number, from 0 to len - 1.

    Args:
        count: How many are stored.
    """

    @abstractmethod
    def _read(self, row: int) -> bytes | str | PIL.Image.Image:
        """The image stored in this place: its bytes or its path, or itself where it is not encoded."""

    @abstractmethod
    def _name(self, row: int) -> str: ...

    @abstractmethod
    def _identity(self, row: int) -> str:
        """What tells this image from any other, and from itself once it was changed, without reading it."""

    def __getitem__(self, index: int) -> PIL.Image.Image:
        """In mode RGB. Raises [`BadImage`] if it cannot be decoded."""
        image = self._read(int(self._rows[index]))
        return image if isinstance(image, PIL.Image.Image) else decode_image(image)

    def name(self, index: int) -> str:
        """Where a person finds the image: its path, or a file and the place in it. No two images share a name."""
        return self._name(int(self._rows[index]))

    def fingerprint(self) -> str:
        """
        Hex digest of which images these are and of their order, the same in every process and after a restart; see
        `docs/data.md`. No image is read, so only size and time of change tell that a file was edited.
        """
        digest = hashlib.blake2b(type(self).__name__.encode(), digest_size=16)
        for row in self._rows.tolist():
            digest.update(b"\0" + self._identity(row).encode())
        return digest.hexdigest()

    def labels(self, label_column: str = "label") -> Labels | None:
        """
        The classes of the images, or None if there are none.

        Args:
            label_column: Column of a dataset, field of the members of a tar file or array in an `.npz` file. "label"
                also stands for what is usual: the only column of classes, the field "cls", the array "arr_1", or the
                folders that the images are in.

        Raises:
            ValueError: If a column of another name is not there, or it holds no classes.
        """
        found = self._labels(label_column)
        return None if found is None else Labels(found.ids[self._rows], found.names)

    @abstractmethod
    def _labels(self, label_column: str) -> Labels | None:
        """Of all that are stored."""


class FileImages(ImageSource):
    """
    Files in the order given.

    Args:
        paths: One or more. Files that are gone are found out when they are read.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = pa.array(paths, pa.large_string())
        self._root = os.path.dirname(os.path.commonprefix(paths))
        super().__init__(len(paths))

    def _read(self, row: int) -> str:
        return self._paths[row].as_py()

    _name = _read

    def _identity(self, row: int) -> str:
        path = self._read(row)
        try:
            state = file_state(path)
        except OSError:
            state = "missing"
        return f"{path.removeprefix(self._root)} {state}"

    def _labels(self, label_column: str) -> Labels | None:
        check_no_column(label_column, "files have no columns: their classes are the folders that they are in")
        return Labels.of_names([self._class_name(path) for path in self._paths.to_pylist()])

    def _class_name(self, path: str) -> str | None:
        return os.path.dirname(path.removeprefix(self._root)).rpartition(os.sep)[2] or None


class FolderImages(FileImages):
    """
    The files with an image's extension in folders and theirs, sorted by path. What is hidden is left out.

    Args:
        folders: One or more.

    Raises:
        OSError: If there are no images.
    """

    def __init__(self, folders: Sequence[str | Path]):
        paths = sorted(path for folder in folders for path in files_below(folder, IMAGE_EXTENSIONS))
        if not paths:
            places = ", ".join(map(str, folders))
            raise FileNotFoundError(f"no images in {places} (nested .tar files need a pattern, as 'folder/*/*.tar')")
        self._folders = [os.path.join(folder, "") for folder in folders]
        super().__init__(paths)

    def _class_name(self, path: str) -> str | None:
        """The first folder below, as torchvision's ImageFolder has it."""
        folder = next(folder for folder in self._folders if path.startswith(folder))
        return path.removeprefix(folder).rpartition(os.sep)[0].partition(os.sep)[0] or None


def file_state(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds: others once the file was written to."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def files_below(folder: str | Path, extensions: Container[str]) -> Iterator[str]:
    """Paths of files with one of these extensions (lower case, with the dot) in a folder and its own; none hidden."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = (name for name in folders if name[0] != ".")
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in extensions:
                yield os.path.join(parent, name)


class DatasetImages(ImageSource):
    """
    A column of images of a dataset.

    Args:
        dataset: Of `datasets`.
        image_column: A column of images or of their encoded bytes. "image" also stands for the only one, whatever its
            name.

    Raises:
        ValueError: If there is no such column.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str = "image"):
        self._column = find_image_column(dataset.features, image_column)
        self._fingerprint = dataset._fingerprint
        self._dataset = dataset.select_columns(self._column).cast_column(self._column, datasets.Image(decode=False))
        self._others = dataset.remove_columns(self._column)
        super().__init__(len(dataset))

    def _read(self, row: int) -> bytes | str:
        return stored_image(self._dataset[row][self._column])

    def _name(self, row: int) -> str:
        image = self._dataset[row][self._column] or {"bytes": None, "path": None}
        if image["bytes"] is None and image["path"]:
            return image["path"]
        return f"{self._dataset.split or 'dataset'} row {row}" + (f" ({image['path']})" if image["path"] else "")

    def _identity(self, row: int) -> str:
        return f"{self._fingerprint} {self._column} {row}"

    def _labels(self, label_column: str) -> Labels | None:
        column = find_label_column(self._others.features, label_column)
        if column is None:
            return None
        feature = self._others.features[column]
        values = self._others.select_columns(column).with_format("arrow")[:][column]
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            return Labels.of_names(values.to_pylist())
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        return Labels(values.cast(pa.int64()).fill_null(-1).to_numpy(), names)


def find_image_column(features: Mapping[str, object], image_column: str) -> str:
    """The column that `image_column` means; see [`DatasetImages`]."""
    images = [name for name, feature in features.items() if _holds_images(feature)]
    if image_column in images:
        return image_column
    if image_column == "image" and len(images) == 1:
        return images[0]
    raise ValueError(f"image_column={image_column!r} is no column of images: those are {images}")


def find_label_column(features: Mapping[str, object], label_column: str) -> str | None:
    """The column that `label_column` means; see [`ImageSource.labels`]."""
    if label_column in features:
        feature = features[label_column]
        dtype = getattr(feature, "dtype", "")
        if (
            not isinstance(feature, (datasets.ClassLabel, datasets.Value))
            or "int" not in dtype
            and "string" not in dtype
        ):
            raise ValueError(
                f"label_column={label_column!r} holds no classes (whole numbers or names): it is {feature}"
            )
        return label_column
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    check_no_column(label_column, f"the dataset has {sorted(features)} beside the images")
    if len(classes) > 1:
        raise ValueError(f"label_column (--label_column) must be one of {classes}")
    return classes[0] if classes else None


def check_no_column(label_column: str, reason: str) -> None:
    """Raises `ValueError` unless it is "label", which need not be there."""
    if label_column != "label":
        raise ValueError(f"label_column={label_column!r} (--label_column) does not exist: {reason}")


def _holds_images(feature: object) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def stored_image(value: dict | None) -> bytes | str:
    """The bytes, else the path, in an item of a column `datasets.Image(decode=False)`. Raises [`BadImage`] if none."""
    file = None if value is None else value["path"] if value["bytes"] is None else value["bytes"]
    if file is None:
        raise BadImage("missing")
    return file
