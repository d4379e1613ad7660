"""Images inside tar files, read in place: each member's place is looked up once, and nothing is unpacked."""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS, BadImage
from flowmo_diffusers.data.sources import ImageSource, Labels, check_no_column, file_state
from flowmo_diffusers.engine.files import atomic_file


# All regular files are listed, not only images, so that labels stored beside them can be found by the same index.
_MEMBERS = pa.schema([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512  # bytes, of which a tar has whole numbers
_MAX_OPEN = 64


class TarImages(ImageSource):
    """
    The images in tar files, and in tar files inside these (as in ImageNet's training set), in the order of the files.

    A member "folder/key.field" belongs to the sample "folder/key" (the WebDataset convention: the field begins at the
    name's first dot). Where each sample has one image, all of them are taken, whatever their fields.

    Args:
        shards: Paths of the tar files, which must stay as they are while they are in use.
        image_column: The field to take, as "jpg" or "input.jpg", or a pattern such as "*.jpg"; "image" stands for the
            only one.
        cache_dir: Where an index of each file's members is kept, by default `datasets`' cache. It is made again when
            the file's size or time of change is another.

    Raises:
        ValueError: If samples hold several images and `image_column` does not tell which to take, or there is no such
            field.
        OSError: If a file is missing, compressed, truncated, or no tar, or if there are no images.
    """

    shuffle_buffer = 10_000

    def __init__(self, shards: Sequence[str | Path], image_column: str = "image", cache_dir: str | Path | None = None):
        self._cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tar_members"
        self._shards = [Path(shard) for shard in shards]
        self._root = os.path.dirname(os.path.commonprefix([str(shard) for shard in self._shards]))
        self._states = [file_state(shard) for shard in self._shards]
        images = _choose_images(self._members(), image_column)
        if len(images) == 0:
            raise FileNotFoundError(f"there are no images in {', '.join(map(str, self._shards[:5]))}")
        self._names = images["name"].combine_chunks()
        self._places = np.stack([images[column].to_numpy() for column in ("shard", "offset", "size")], axis=1)
        self._open: dict[int, BinaryIO] = {}
        super().__init__(len(images))

    def _members(self) -> pa.Table:
        """Of all shards: name, offset, size, number of the shard, and key and field of the sample."""
        tables = [tar_members(shard, self._cache) for shard in self._shards]
        numbers = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        members = pa.concat_tables(table.replace_schema_metadata() for table in tables)
        parts = pc.extract_regex(members["name"], r"^(?P<key>(?:.*/)?[^./][^./]*)\.(?P<field>[^/]+)$")
        field = pc.utf8_lower(pc.struct_field(parts, "field"))
        members = members.append_column("shard", pa.array(numbers))
        return members.append_column("key", pc.struct_field(parts, "key")).append_column("field", field)

    def _read(self, row: int) -> bytes:
        return self._content(*self._places[row].tolist())

    def _content(self, shard: int, offset: int, size: int) -> bytes:
        file = self._file(shard)
        try:
            # A file opened before a fork is shared with other processes, its position too; this leaves that alone.
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadImage(str(error)) from error

    def _name(self, row: int) -> str:
        return f"{self._shards[self._places[row, 0]]}/{self._names[row].as_py()}"

    def _identity(self, row: int) -> str:
        shard, offset, size = self._places[row].tolist()
        return f"{self._name(row).removeprefix(self._root)} {offset} {size} {self._states[shard]}"

    def _labels(self, label_column: str) -> Labels | None:
        wanted = "cls" if label_column == "label" else label_column.lower()
        members = self._members()
        stored = members.filter(pc.equal(members["field"], wanted)).select(["shard", "key", "offset", "size"])
        if len(stored) == 0:
            check_no_column(label_column, "the samples of the tar files have no such field")
            return self._folder_labels()
        columns = (stored[name].to_pylist() for name in ("shard", "key", "offset", "size"))
        places = {place[:2]: (place[0], *place[2:]) for place in zip(*columns, strict=True)}
        keys = zip(self._places[:, 0].tolist(), map(_key, self._names.to_pylist()), strict=True)
        found = [places.get(key) for key in keys]
        texts = [None if place is None else self._content(*place).decode().strip() for place in found]
        try:
            return Labels(np.array([-1 if text is None else int(text) for text in texts], np.int64))
        except ValueError:
            return Labels.of_names(texts)

    def _folder_labels(self) -> Labels | None:
        """By the folder, or the tar inside the tar, that each image is in, if there are several."""
        folders = [os.path.basename(os.path.dirname(name)).removesuffix(".tar") for name in self._names.to_pylist()]
        return Labels.of_names([name or None for name in folders]) if len(set(folders)) > 1 else None

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._open:
            path = self._shards[shard]
            if file_state(path) != self._states[shard]:
                raise OSError(f"{path} has changed since its members were looked up")
            if len(self._open) == _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = open(path, "rb", buffering=0)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


def _key(name: str) -> str:
    """Of the sample that an image belongs to."""
    folder, separator, file = name.rpartition("/")
    return folder + separator + file.partition(".")[0]


def _choose_images(members: pa.Table, image_column: str) -> pa.Table:
    extensions = pa.array(extension[1:] for extension in sorted(IMAGE_EXTENSIONS))
    images = members.filter(pc.is_in(pc.replace_substring_regex(members["field"], r"^.*\.", ""), extensions))

    fields = sorted(pc.unique(images["field"]).to_pylist())
    chosen = [name for name in fields if fnmatchcase(name, image_column.lower())]
    if not chosen and image_column == "image":
        per_sample = images.group_by(["shard", "key"]).aggregate([("field", "count_distinct")])
        if pc.any(pc.greater(per_sample["field_count_distinct"], 1)).as_py():
            raise ValueError(f"samples hold several images: choose image_column (--image_column) among {fields[:10]}")
        chosen = fields
    elif not chosen:
        raise ValueError(f"image_column={image_column!r} is no field of images: those are {fields[:10]}")
    return images.filter(pc.is_in(images["field"], pa.array(chosen, pa.string())))


def tar_members(path: Path, cache_dir: Path) -> pa.Table:
    """
    Name, offset and size (bytes) of all regular files in a tar. A tar inside it is replaced by its own members, named
    "inner.tar/name". Only headers are read, and only once: `cache_dir` keeps the result.

    Raises:
        OSError: If the file is missing, compressed, truncated, or no tar.
    """
    identity = {b"file": str(file_state(path)).encode()}
    cached = cache_dir / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]}.parquet"
    if cached.exists():
        table = pq.read_table(cached)
        if table.schema.metadata == identity:
            return table
    with open(path, "rb") as file, atomic_file(cached) as temporary:
        with pq.ParquetWriter(temporary, _MEMBERS.with_metadata(identity)) as writer:
            members = _members(file, 0, os.path.getsize(path))
            while chunk := list(islice(members, 10_000)):
                columns = [pa.array(column) for column in zip(*chunk, strict=True)]
                writer.write_batch(pa.record_batch(columns, writer.schema))
    return pq.read_table(cached)


def _members(file: BinaryIO, start: int, end: int, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Of the tar that these bytes of the file are."""
    file.seek(start)
    head = file.read(4)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise OSError(
                f"{file.name}: {prefix}is compressed by {kind}, so nothing can be read in place: unpack {kind}"
            )
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, errors="backslashreplace") as tar:
            while member := tar.next():
                tar.members.clear()  # else it keeps every one
                name, first = prefix + member.name, member.offset_data
                if member.isreg() and name.endswith(".tar"):
                    yield from _members(file, first, first + member.size, f"{name}/")
                elif member.isreg():
                    yield name, first, member.size
            file.seek(tar.offset)
            # Where a header is damaged or missing, `tarfile` stops without a word.
            if tar.offset + _BLOCK > end or any(file.read(_BLOCK)):
                raise tarfile.ReadError(f"no header and no end of {prefix or 'the archive'} at byte {tar.offset}")
    except tarfile.TarError as error:
        raise OSError(f"{file.name} is no tar file, truncated or damaged: {error}") from error
