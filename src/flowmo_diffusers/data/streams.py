"""Images that are read from start to end only: from the Hub, or from wherever nothing is to be copied."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import datasets
import fsspec
import numpy as np
import PIL.Image

from flowmo_diffusers.data.decoding import BadImage, decode_image
from flowmo_diffusers.data.sources import DatasetImages, find_image_column, stored_image


_READ_AT_ONCE = 16


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
        file = stored_image(item[self._column])
        if isinstance(file, str) and "://" in file:
            try:
                with fsspec.open(file) as opened:
                    file = opened.read()
            except FileNotFoundError as error:
                raise BadImage(f"not found: {error}") from error
        return decode_image(file)

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
