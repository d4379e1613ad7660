"""Images that are read from start to end only: from the Hub, or from wherever nothing is to be copied."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import numpy as np
import PIL.Image
from datasets.arrow_writer import ArrowWriter

from flowmo_diffusers.data.decoding import BadImage, decode_image
from flowmo_diffusers.data.sources import DatasetImages, find_image_column, stored_image
from flowmo_diffusers.engine.files import atomic_file


_READ_AT_ONCE = 16
_WRITTEN_AT_ONCE = 64


class ImageStream:
    """
    A column of images of a dataset that is streamed.

    Args:
        dataset: Of `datasets`, loaded with `streaming=True`.
        image_column: A column of images or of their encoded bytes. "image" also stands for the only one, whatever its
            name.

    Raises:
        ValueError: If there is no such column.
    """

    def __init__(self, dataset: datasets.IterableDataset, image_column: str = "image"):
        features = dataset.features or {}
        self._column = find_image_column(features, image_column)
        columns = [name for name in (self._column, "__url__") if name in features]
        self._dataset = dataset.select_columns(columns).cast_column(self._column, datasets.Image(decode=False))
        self._left_out: frozenset[bytes] = frozenset()

    @property
    def num_shards(self) -> int:
        return self._dataset.num_shards

    def pick(self, count: int) -> DatasetImages:
        """The first images, at most so many, in memory."""
        return self._in_memory(list(self._dataset.take(count)))

    def store(self, file: str | Path, count: int) -> DatasetImages:
        """
        The first images, at most so many, still encoded, on disk: written to an Arrow file, one at a time, unless it
        is there already. They can then be read in any order.
        """
        if not Path(file).exists():
            features = datasets.Features({self._column: datasets.Image()})
            with (
                atomic_file(file) as temporary,
                ArrowWriter(features=features, path=str(temporary), writer_batch_size=_WRITTEN_AT_ONCE) as writer,
            ):
                for item in self._dataset.take(count):
                    writer.write({self._column: self._stored(item)})
                writer.finalize()
        return DatasetImages(datasets.Dataset.from_file(str(file)), self._column)

    def set_aside(self, count: int) -> tuple["ImageStream", DatasetImages]:
        """
        The stream without its first images (and without copies of them), and these, in memory.

        Raises:
            ValueError: If there are fewer.
        """
        first = list(self._dataset.take(count))
        if len(first) < count:
            raise ValueError(f"{count} images cannot be held out of {len(first)}: lower --num_validation_images")
        rest = copy.copy(self)
        rest._left_out = self._left_out.union(map(self._digest, first))
        return rest, self._in_memory(first)

    def read(self, reader: int, readers: int, seed: Sequence[int], shuffle_buffer: int) -> Iterator[dict]:
        """
        The share of one reader, numbered from 0, in an order drawn from the seed. All readers together have each image
        once: each has shards of its own where there are as many as readers, else all read everything and keep every
        so many-th.

        Args:
            shuffle_buffer: How many images, still encoded, are held in memory to draw the next one from.

        Returns:
            Items for [`~ImageStream.decode`] and [`~ImageStream.name`].
        """
        divided = self.num_shards >= readers
        dataset = self._dataset.shard(readers, reader, contiguous=False) if divided else self._dataset
        number = np.random.SeedSequence([*seed, reader if divided else 0]).generate_state(1)[0]
        # In batches, because else `datasets` would once more divide the shards among the workers of a DataLoader.
        batches = dataset.shuffle(seed=int(number), buffer_size=shuffle_buffer).iter(batch_size=_READ_AT_ONCE)
        items = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        if self._left_out:
            items = (item for item in items if self._digest(item) not in self._left_out)
        return items if divided else islice(items, reader, None, readers)

    def decode(self, item: dict) -> PIL.Image.Image:
        """In mode RGB. Raises [`BadImage`] if it cannot be decoded."""
        return decode_image(self._encoded(item))

    def _encoded(self, item: dict) -> bytes | str:
        """The bytes, or the path of a local file. Raises [`BadImage`] if there are none."""
        file = stored_image(item[self._column])
        if isinstance(file, str) and "://" in file:
            try:
                with fsspec.open(file) as opened:
                    return opened.read()
            except FileNotFoundError as error:
                raise BadImage(f"not found: {error}") from error
        return file

    def _stored(self, item: dict) -> dict | None:
        try:
            file = self._encoded(item)
        except BadImage:
            return None
        return {"bytes": file if isinstance(file, bytes) else None, "path": item[self._column]["path"]}

    def name(self, item: dict) -> str:
        """Where a person finds the image, as far as it is known; no two different images share a name."""
        path = (item[self._column] or {}).get("path")
        if "__url__" in item:
            return f"{item['__url__']}/{path}"
        return f"{path or 'image'} (digest {self._digest(item).hex()})"

    def _digest(self, item: dict) -> bytes:
        image = item[self._column] or {"bytes": b"", "path": ""}
        content = image["path"].encode() if image["bytes"] is None else image["bytes"]
        return hashlib.blake2b(content, digest_size=8).digest()

    def _in_memory(self, items: list[dict]) -> DatasetImages:
        features = datasets.Features({self._column: datasets.Image()})
        images = [{self._column: item[self._column]} for item in items]
        return DatasetImages(datasets.Dataset.from_list(images, features), self._column)
