"""Results of many items that are kept as they come, so that a killed run continues and processes share the work."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from flowmo_diffusers.engine.digests import differences
from flowmo_diffusers.engine.files import atomic_file


class Chunks:
    """
    Rows of items 0 ... count - 1 in files of `size` items, each written whole when its items are done.

    All processes of a run must see the same folder.

    Args:
        folder: Of these results alone.
        description: Plain JSON values, everything that the results depend on. It is stored with them.
        count: Number of items.
        size: Items of a file.

    Raises:
        ValueError: If the folder holds results of another description, number of items or size; names the difference.
    """

    def __init__(self, folder: str | Path, description: Mapping[str, Any], count: int, size: int):
        if count < 1 or size < 1:
            raise ValueError(f"count={count} and size={size} must be at least 1")
        self.folder = Path(folder)
        self.count = count
        self.size = size
        wanted = {**description, "count": count, "chunk_size": size}
        file = self.folder / "description.json"
        if file.is_file():
            if found := differences(json.loads(file.read_text()), wanted):
                raise ValueError(f"{self.folder} holds results of something else: {'; '.join(found)}")
        else:
            with atomic_file(file) as path:
                path.write_text(json.dumps(wanted, indent=2) + "\n")

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def items(self, chunk: int) -> range:
        """The items of a chunk."""
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))

    def missing(self, process_index: int = 0, num_processes: int = 1) -> list[int]:
        """Chunks that are one process's to do and are not there yet."""
        return [n for n in range(process_index, len(self), num_processes) if not self._file(n).is_file()]

    def write(self, chunk: int, rows: Mapping[str, torch.Tensor], notes: Sequence[Any] = ()) -> None:
        """
        Args:
            rows: Tensors with one row an item, or fewer where items were left out.
            notes: Plain JSON values that come back by [`~Chunks.notes`].
        """
        rows = {name: tensor.detach().cpu().contiguous() for name, tensor in rows.items()}
        with atomic_file(self._file(chunk)) as path:
            safetensors.torch.save_file(rows, path, {"notes": json.dumps(list(notes))})

    def read(self, *names: str) -> dict[str, torch.Tensor]:
        """
        Whole columns: the rows of all items in order.

        Raises:
            OSError: If a chunk is missing.
        """
        parts = list(self.stream(*names))
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}

    def stream(self, *names: str) -> Iterator[dict[str, torch.Tensor]]:
        """As [`~Chunks.read`], chunk after chunk; one without a single row may lack columns."""
        for chunk in range(len(self)):
            with self._open(chunk) as file:
                yield {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118

    def columns(self) -> set[str]:
        """Names of the columns."""
        return {name for chunk in range(len(self)) for name in self._names(chunk)}

    def notes(self) -> list[Any]:
        """The notes of all chunks, in order."""
        found = []
        for chunk in range(len(self)):
            with self._open(chunk) as file:
                found += json.loads(file.metadata()["notes"])
        return found

    def _names(self, chunk: int) -> list[str]:
        with self._open(chunk) as file:
            return list(file.keys())

    def _open(self, chunk: int) -> safetensors.safe_open:
        file = self._file(chunk)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the run that makes it has not ended")
        return safetensors.safe_open(file, "pt")

    def _file(self, chunk: int) -> Path:
        return self.folder / f"rows-{chunk:06}.safetensors"
