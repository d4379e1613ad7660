"""Images in a NumPy array on disk, the form in which generators exchange their samples: read and written in place."""

import hashlib
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import PIL.Image

from flowmo_diffusers.data.sources import ImageSource, Labels, check_no_column, file_state
from flowmo_diffusers.engine.files import atomic_file


ARRAY_EXTENSIONS = (".npz", ".npy")

# The names that `numpy.savez(path, images, labels)` gives, and that guided-diffusion's evaluation expects.
_IMAGES, _LABELS = "arr_0", "arr_1"

_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayImages(ImageSource):
    """
    The images of an `.npy` file, or of `arr_0` in an `.npz` file: (n, height, width, 3), uint8. Each is read when it
    is asked for.

    Args:
        path: Of the file, which must stay as it is while it is in use.
        cache_dir: Where the array of a compressed `.npz` file is unpacked, once; by default `datasets`' cache.

    Raises:
        ValueError: If the array is missing, empty, of another shape or type, or the file holds statistics instead.
        OSError: If there is no such file, or it is truncated or damaged.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "arrays"
        self._path = Path(path)
        self._state = file_state(path)
        self._file, header = _locate(self._path, cache)
        with open(self._file, "rb") as file:
            file.seek(header)
            try:
                shape, fortran_order, dtype = _HEADER_READERS[np.lib.format.read_magic(file)](file)
            except (KeyError, ValueError) as error:
                raise OSError(f"{path} holds no NumPy array that can be read: {error}") from error
            offset = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{path} must hold images (n, height, width, 3) of uint8, not {shape} of {dtype}")
        if os.path.getsize(self._file) < offset + np.prod(shape, dtype=np.int64):
            raise OSError(f"{path} is truncated: it ends within its {shape[0]} images")
        self._map = {"offset": offset, "shape": shape, "order": "F" if fortran_order else "C"}
        super().__init__(shape[0])

    def _read(self, row: int) -> PIL.Image.Image:
        # Mapped anew each time (45 µs), so that nothing is open that a fork or a pickle would have to care for.
        images = np.memmap(self._file, np.uint8, "r", **self._map)
        return PIL.Image.fromarray(np.ascontiguousarray(images[row]))

    def _name(self, row: int) -> str:
        return f"{self._path} row {row}"

    def _identity(self, row: int) -> str:
        return f"{self._path.name} {self._state} {row}"

    def _labels(self, label_column: str) -> Labels | None:
        name = _LABELS if label_column == "label" else label_column
        arrays = {}
        if self._path.suffix == ".npz":
            with np.load(self._path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in {name} & set(archive.files)}
        if name not in arrays:
            check_no_column(label_column, f"{self._path} holds no such array")
            return None
        ids = arrays[name]
        if ids.shape != self._map["shape"][:1] or not np.issubdtype(ids.dtype, np.integer):
            expected = f"({self._map['shape'][0]},) of whole numbers"
            raise ValueError(f"{name} in {self._path} must be classes {expected}, not {ids.shape} of {ids.dtype}")
        return Labels(ids.astype(np.int64))


def _locate(path: Path, cache_dir: Path) -> tuple[Path, int]:
    """The file with the array of images as it is, and the byte at which the array's header begins."""
    if path.suffix == ".npy":
        return path, 0
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if _IMAGES not in names:
                what = "statistics, not images" if "mu" in names else f"no array {_IMAGES!r} of images"
                raise ValueError(f"{path} holds {what}: it has {names}")
            member = archive.getinfo(f"{_IMAGES}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                return path, _content_start(path, member)
            return _unpack(archive, member, cache_dir), 0
    except (zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path} is no .npz file, truncated or damaged: {error}") from error


def _content_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Behind the header that a zip file repeats in front of each member, of 30 bytes, a name and extra fields."""
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, cache_dir: Path) -> Path:
    path = os.path.abspath(archive.filename)
    size, time = file_state(path)
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    unpacked = cache_dir / f"{name}-{size}-{time}.npy"
    if not unpacked.exists():
        with atomic_file(unpacked) as temporary, archive.open(member) as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        for old in set(cache_dir.glob(f"{name}-*.npy")) - {unpacked}:
            old.unlink(missing_ok=True)
    return unpacked


def write_npz(
    path: str | Path, images: Iterable[np.ndarray], count: int, labels: Sequence[int] | np.ndarray | None = None
) -> None:
    """
    Writes what `numpy.savez(path, images, labels)` would, one image at a time: `arr_0` (count, height, width, 3) of
    uint8 and, where labels are given, `arr_1` (count,) of int64. Equal images make equal files.

    Args:
        path: Of the file, which is not there before all of it is.
        images: (height, width, 3) each, uint8.

    Raises:
        ValueError: If there are not `count` images or labels, at least one, or an image is of another type or shape.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if labels is not None and len(labels) != count:
        raise ValueError(f"there are {len(labels)} labels for count={count} images")
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{_IMAGES}.npy"), "w", force_zip64=True) as member:
            _write_images(member, images, count)
        if labels is not None:
            with archive.open(zipfile.ZipInfo(f"{_LABELS}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64))


def _write_images(file: BinaryIO, images: Iterable[np.ndarray], count: int) -> None:
    number, shape = -1, None
    for number, image in enumerate(images):
        if number == 0 and image.ndim == 3 and image.shape[2] == 3:
            shape = image.shape
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        if image.dtype != np.uint8 or image.shape != shape:
            raise ValueError(
                f"image {number} must be {shape or '(height, width, 3)'} of uint8, not {image.shape} of {image.dtype}"
            )
        if number == count:
            raise ValueError(f"there are more images than count={count}")
        file.write(np.ascontiguousarray(image))
    if number + 1 < count:
        raise ValueError(f"there are {number + 1} images, not count={count}")
