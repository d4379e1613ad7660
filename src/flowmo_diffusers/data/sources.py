"""Sources of images that can be read in any order."""

import copy
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa

from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS, BadImage, decode_image


# Images that lie side by side and stay together in an order of windows: some megabytes, which a disk reads as one.
READ_RUN = 64


class ImageSource(ABC):
    """
    Images by number, from 0 to len - 1.

    Args:
        count: How many are stored.
    """

    # The `shuffle_buffer` of `order` unless the user asks for another.
    shuffle_buffer: int | None = None

    def __init__(self, count: int):
        self._rows = np.arange(count)

    @abstractmethod
    def _read(self, row: int) -> bytes | str | PIL.Image.Image:
        """The image stored in this place: its bytes or its path, or itself where it is not encoded."""

    @abstractmethod
    def _name(self, row: int) -> str: ...

    @abstractmethod
    def _identity(self, row: int) -> str:
        """What tells this image from any other, and from itself once it was changed, without reading it."""

    def __len__(self) -> int:
        return len(self._rows)

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

    def select(self, indices: Sequence[int] | np.ndarray) -> "ImageSource":
        """The images of these numbers, as a source of their own."""
        selected = copy.copy(self)
        selected._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return selected

    def pick(self, count: int) -> "ImageSource":
        """So many images (or all, if there are fewer), spread evenly: a source may be sorted by class."""
        count = min(count, len(self))
        return self.select(np.arange(count) * len(self) // max(count, 1))

    def set_aside(self, count: int) -> tuple["ImageSource", "ImageSource"]:
        """
        All but `count` images, and these, spread evenly.

        Raises:
            ValueError: If none would be left.
        """
        if len(self) <= count:
            raise ValueError(f"{count} images cannot be held out of {len(self)}: lower --num_validation_images")
        picked = np.arange(count) * len(self) // max(count, 1)
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


class FolderImages(FileImages):
    """
    The files with an image's extension in folders and theirs, sorted by path. What is hidden is left out.

    Args:
        folders: One or more.

    Raises:
        OSError: If there are no images.
    """

    def __init__(self, folders: Sequence[str | Path]):
        paths = sorted(path for folder in folders for path in _image_files(folder))
        if not paths:
            places = ", ".join(map(str, folders))
            raise FileNotFoundError(f"no images in {places} (nested .tar files need a pattern, as 'folder/*/*.tar')")
        super().__init__(paths)


def file_state(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds: others once the file was written to."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _image_files(folder: str | Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = (name for name in folders if name[0] != ".")
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
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


def find_image_column(features: Mapping[str, object], image_column: str) -> str:
    """The column that `image_column` means; see [`DatasetImages`]."""
    images = [name for name, feature in features.items() if _holds_images(feature)]
    if image_column in images:
        return image_column
    if image_column == "image" and len(images) == 1:
        return images[0]
    raise ValueError(f"image_column={image_column!r} is no column of images: those are {images}")


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
