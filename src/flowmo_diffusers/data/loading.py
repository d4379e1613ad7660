"""Training images or tokens without end: which is seen when, in batches, by any number of processes and workers."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.sources import ImageSource, Numbered
from flowmo_diffusers.data.streams import ImageStream
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.signals import follow_parent


logger = logging.getLogger(__name__)

# So many bad images in a row are no accident.
MAX_FAILURES = 100


class Shuffled(Dataset):
    """
    Endless training order over numbered things: item v is the v-th ever visited. Visits v = e n ... (e + 1) n - 1 are
    one epoch, each thing once, in an order drawn from (seed, e). What visit v shows is a function of seed and v alone,
    whatever the number of workers or processes.

    Args:
        source: Images, or tokens.
        seed: Not negative.
        shuffle_buffer: See [`Numbered.order`]; the source's own by default. As many as there are is any order.

    Raises:
        ValueError: If there is nothing or the buffer is not at least 1.
    """

    def __init__(self, source: Numbered, seed: int = 0, shuffle_buffer: int | None = None):
        if len(source) == 0:
            raise ValueError("the dataset is empty")
        _check_buffer(shuffle_buffer)
        self.source = source
        self.seed = seed
        self.shuffle_buffer = source.shuffle_buffer if shuffle_buffer is None else shuffle_buffer
        self._epoch = None
        self._order = None

    def __len__(self) -> int:
        return len(self.source)

    def number(self, visit: int) -> int:
        """Of what a visit shows."""
        epoch, position = divmod(visit, len(self.source))
        if epoch != self._epoch:
            self._order = self.source.order(self.seed, epoch, self.shuffle_buffer)
            self._epoch = epoch
        return int(self._order[position])


class ShuffledImages(Shuffled):
    """
    Endless training order over a source of images, see [`Shuffled`]; crop and flip are drawn from (seed, v).

    An item is {"images": (3, resolution, resolution) in [-1, 1], "visits": v, "bad": [(name, reason), ...]}. In place
    of a bad image another one is shown, drawn from (seed, v), and the bad one is reported.

    Args:
        source: Images.
        transform: See [`ImageTransform`].
        seed: Of order, crop and flip, not negative.
        shuffle_buffer: See [`Shuffled`].

    Raises:
        ValueError: As [`Shuffled`].
        OSError: (from an item) If MAX_FAILURES images in a row are bad.
    """

    def __init__(
        self, source: ImageSource, transform: ImageTransform, seed: int = 0, shuffle_buffer: int | None = None
    ):
        super().__init__(source, seed, shuffle_buffer)
        self.transform = transform

    def __getitem__(self, visit: int) -> dict:
        index, bad = self.number(visit), []
        others = None
        while True:
            try:
                pixels = self.transform(self.source[index], keyed_generator(self.seed, "augmentation", visit))
                return {"images": pixels, "visits": visit, "bad": bad}
            except BadImage as error:
                bad.append((self.source.name(index), str(error)))
                _check_failures(bad)
                others = others or keyed_generator(self.seed, "replacement", visit)
                index = int(torch.randint(len(self.source), (), generator=others))


class StreamedImages:
    """
    Endless training order over a stream, with items as those of [`ShuffledImages`]. Each reader (a process, or a
    worker of one) goes through its share of the stream again and again; an epoch of all readers has each image once.
    What is seen is a function of seed, number of readers and batch size, and of the version of `datasets`.

    In place of a bad image the next good one of the same reader is shown as well.

    Args:
        stream: Images.
        transform: See [`ImageTransform`].
        seed: Of order, crop and flip, not negative.
        shuffle_buffer: How many encoded images each reader holds in memory to draw the next one from; 1000 by default.

    Raises:
        ValueError: If the buffer is not at least 1.
        OSError: (from an item) If MAX_FAILURES images in a row are bad, or a reader's share is empty.
    """

    def __init__(
        self, stream: ImageStream, transform: ImageTransform, seed: int = 0, shuffle_buffer: int | None = None
    ):
        _check_buffer(shuffle_buffer)
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.shuffle_buffer = 1000 if shuffle_buffer is None else shuffle_buffer

    def read(self, reader: int, readers: int, batch_size: int, first_batch: int) -> Iterator[dict]:
        """
        The items of one reader, from its batch of this number on. The batches of all readers in turn, those of number
        0, then those of number 1 and so on, are the visits 0, 1, 2, ...
        """
        waiting: dict[int, list] = {}
        start = first_batch * batch_size
        for number, item in enumerate(self._repeat(reader, readers, start), start):
            batch, place = divmod(number, batch_size)
            visit = (batch * readers + reader) * batch_size + place
            waiting[visit] = []
            try:
                image = self.stream.decode(item)
                shown = {v: self.transform(image, keyed_generator(self.seed, "augmentation", v)) for v in waiting}
            except BadImage as error:
                waiting[visit].append((self.stream.name(item), str(error)))
                _check_failures([bad for reports in waiting.values() for bad in reports])
                continue
            for v, pixels in shown.items():
                yield {"images": pixels, "visits": v, "bad": waiting[v]}
            waiting = {}

    def _repeat(self, reader: int, readers: int, skip: int) -> Iterator[dict]:
        """The reader's share over and over, but for its first items, of which none is decoded."""
        epoch = 0
        while True:
            length = 0
            for item in self.stream.read(reader, readers, (self.seed, epoch), self.shuffle_buffer):
                length += 1
                if skip:
                    skip -= 1
                else:
                    yield item
            if length == 0:
                raise OSError(f"the stream has no images for reader {reader} of {readers}: use fewer workers")
            # All epochs are of this length, so whole ones need not be read to be skipped.
            epoch += 1 + skip // length
            skip %= length


def _check_buffer(shuffle_buffer: int | None) -> None:
    if shuffle_buffer is not None and shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1")


def _check_failures(bad: list[tuple[str, str]]) -> None:
    if len(bad) >= MAX_FAILURES:
        raise OSError(f"{len(bad)} images in a row cannot be used, among them {_listed(bad[:5])}")


def _listed(bad: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in bad)


def image_batches(
    images: Shuffled | StreamedImages,
    batch_size: int,
    first: int,
    last: int,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """
    One process's batches of number first ... last - 1: {"images": (batch_size, 3, resolution, resolution) in [-1, 1],
    "visits": (batch_size,) int64, "bad": [(name, reason), ...]}, or whatever else the items have, stacked.

    Batch n of process p has the visits that follow on (n num_processes + p) batch_size. So all processes together see
    what a single one with the joint batch sees (of a stream: one with as many readers), and a run continues where it
    was by its number of batches.

    Args:
        images: See [`Shuffled`] and [`StreamedImages`]. Of a stream, every worker is a reader.
        num_workers: Worker processes, each with one thread; 0 loads in this process.
    """
    options = {
        "num_workers": num_workers,
        "collate_fn": _collate,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": follow_parent,
        # Else it would draw from the global generator, once more with each resume.
        "generator": torch.Generator(),
    }
    if isinstance(images, Shuffled):
        batches = _Batches(batch_size, first, last, process_index, num_processes)
        return DataLoader(images, batch_sampler=batches, **options)
    shards, readers = images.stream.num_shards, num_processes * max(num_workers, 1)
    if shards % readers:
        result = "some see their images more often than others" if shards > readers else "each has to read everything"
        logger.warning(f"{shards} shards cannot be divided evenly among {readers} readers (workers), so {result}")
    batches = _StreamBatches(images, batch_size, first, last, process_index, num_processes)
    return DataLoader(batches, batch_size, **options)


class _Batches(Sampler[range]):
    """The visits of each of one process's batches."""

    def __init__(self, batch_size: int, first: int, last: int, process_index: int, num_processes: int):
        self.batch_size = batch_size
        # Of the joint sequence in which processes take turns.
        self.numbers = range(first * num_processes + process_index, last * num_processes, num_processes)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[range]:
        for number in self.numbers:
            yield range(number * self.batch_size, (number + 1) * self.batch_size)


class _StreamBatches(IterableDataset):
    """The items of one process's batches, of those that this worker has to load."""

    def __init__(
        self, images: StreamedImages, batch_size: int, first: int, last: int, process_index: int, num_processes: int
    ):
        self.images = images
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return (self.last - self.first) * self.batch_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        position, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn and the first one first: this one has first + position, and every
        # workers-th batch from there. A reader has the same batches wherever a run begins.
        numbers = range(self.first + position, self.last, workers)
        reader = (self.first + position) % workers * self.num_processes + self.process_index
        first_batch = (self.first + position) // workers
        items = self.images.read(reader, workers * self.num_processes, self.batch_size, first_batch)
        return islice(items, len(numbers) * self.batch_size)


def _collate(items: list[dict]) -> dict:
    names = [name for name in items[0] if name != "bad"]
    stacked = {name: default_collate([item[name] for item in items]) for name in names}
    return stacked | {"bad": [bad for item in items for bad in item["bad"]]}


class BadImages:
    """
    The bad images of a run: each is counted once and logged with its reason (the first 20, then every hundredth).

    Args:
        max_fraction: More than this share of the images stops the run.
        num_images: How many images there are; None of a stream, where those seen so far count instead.
    """

    def __init__(self, max_fraction: float, num_images: int | None = None):
        self.max_fraction = max_fraction
        self.num_images = num_images
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Pairs of name and reason, from this process or from all of them; known names do not count again."""
        for name, reason in bad:
            if name not in self.reasons:
                self.reasons[name] = reason
                if len(self) <= 20 or len(self) % 100 == 0:
                    logger.warning(f"bad image number {len(self)}: {name}: {reason}")

    def check(self, seen: int = 0) -> None:
        """
        Raises `OSError` with a list if there are too many.

        Args:
            seen: Visits of the run so far, needed for a stream: its share is of these, but of at least 1000.
        """
        total = max(seen, 1000) if self.num_images is None else self.num_images
        if len(self) > self.max_fraction * total:
            raise OSError(
                f"{len(self)} of {total} images cannot be used, more than max_bad_fraction (--max_bad_fraction) "
                f"{self.max_fraction}: {_listed(islice(self.reasons.items(), 20))}"
                + (" ..." if len(self) > 20 else "")
            )

    def state_dict(self) -> dict:
        """Plain JSON values."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict) -> None:
        self.reasons = dict(state["reasons"])
