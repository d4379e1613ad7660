"""A teacher's samples on disk, one for each image, for all epochs and for other runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmo_diffusers.engine.digests import differences
from flowmo_diffusers.engine.files import atomic_file


class SampleCache:
    """
    Images in [-1, 1] by number, in float16. Any number of processes may read and write: what two of them write of one
    number is the same.

    Args:
        folder: Made if it is missing, by one process before the others come.
        shape: (n, c, h, w) of all samples.
        identity: What they depend on, as plain JSON values.

    Raises:
        ValueError: If the folder holds samples of another identity or shape.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, int, int, int], identity: Mapping[str, Any]):
        folder, about = Path(folder), {"shape": list(shape), **identity}
        path = folder / "about.json"  # written last
        if not path.is_file():
            _create(folder / "samples.npy", np.float16, shape)
            _create(folder / "present.npy", np.bool_, shape[:1])
            with atomic_file(path) as unfinished:
                unfinished.write_text(json.dumps(about, indent=2) + "\n")
        if wrong := differences(json.loads(path.read_text()), about):
            raise ValueError(f"{folder} holds the samples of another teacher or of other images: {'; '.join(wrong)}")
        self._samples = np.load(folder / "samples.npy", mmap_mode="r+")
        self._present = np.load(folder / "present.npy", mmap_mode="r+")

    def __len__(self) -> int:
        """How many are there."""
        return int(self._present.sum())

    def read(self, numbers: Sequence[int]) -> torch.Tensor | None:
        """Float32 samples (b, c, h, w) of these numbers, `None` if one is missing."""
        if not self._present[numbers].all():
            return None
        return torch.from_numpy(self._samples[numbers].astype(np.float32))

    def write(self, numbers: Sequence[int], samples: torch.Tensor) -> torch.Tensor:
        """Keeps samples (b, c, h, w), and returns them as they will be read."""
        self._samples[numbers] = samples.cpu().numpy()
        self._present[numbers] = True  # after the sample: a killed process leaves none that is not there
        return self.read(numbers)


def _create(path: Path, dtype: type, shape: Sequence[int]) -> None:
    with atomic_file(path) as unfinished:
        np.lib.format.open_memmap(unfinished, "w+", dtype, tuple(shape)).flush()
