"""Figures and pictures to Accelerate's trackers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)


class RunningMeans:
    """Means of scalars by name since they were last read, kept on their device: adding waits for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        self._count += 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, empty where nothing was added. Every process must call this."""
        if not self._count:
            return {}
        means = accelerator.reduce(torch.stack(list(self._sums.values())) / self._count, "mean").tolist()
        names = list(self._sums)
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))


def log_picture(accelerator: Accelerator, name: str, picture: PIL.Image.Image, step: int) -> None:
    """One picture to every tracker that takes pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step)


@contextmanager
def tolerant_of_full_disk(accelerator: Accelerator) -> Iterator[None]:
    """Around what is only written to be looked at: that it cannot be written is logged, but does not end a run."""
    try:
        yield
    except OSError as error:
        logger.error(f"figures could not be written: {error}")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                # Its writing thread has died of this. The next figures begin a file, and a thread, of their own.
                tracker.writer.file_writer = tracker.writer.all_writers = None
