"""Files one after the other: what is shown of it, what has failed, and how it ends."""

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from flowmo_diffusers.cli.files import Job
from flowmo_diffusers.cli.main import one_line


Read = TypeVar("Read")


class Work:
    """
    Jobs of a command. A bar on stderr shows how far they are, where that is a terminal; a line on stdout each one that
    is done, a line on stderr each that has failed.

    Args:
        jobs: Those whose file exists already are left out.
        overwrite: None is left out.
    """

    def __init__(self, jobs: Sequence[Job], overwrite: bool):
        self.jobs = [job for job in jobs if overwrite or not job.target.exists()]
        self.kept = len(jobs) - len(self.jobs)
        self.written = self.failed = 0
        self._bar = tqdm(total=len(self.jobs), unit="image", disable=None, leave=False)
        self._started = time.perf_counter()

    def batches(
        self, read: Callable[[Path], Read], size: Callable[[Read], Hashable], batch_size: int
    ) -> Iterator[tuple[list[Job], list[Read]]]:
        """
        What the jobs read, so many at a time that follow each other and have one size. What cannot be read is shown
        and left out.
        """
        jobs, items = [], []
        for job in self.jobs:
            try:
                item = read(job.source)
            except (OSError, ValueError) as error:
                self.fail(job, error)
                continue
            if items and (len(items) == batch_size or size(item) != size(items[0])):
                yield jobs, items
                jobs, items = [], []
            jobs.append(job)
            items.append(item)
        if items:
            yield jobs, items

    def done(self, job: Job, text: str) -> None:
        tqdm.write(f"{job.source} -> {job.target}: {text}", file=sys.stdout)
        self.written += 1
        self._bar.update()

    def fail(self, job: Job, error: Exception) -> None:
        reason = one_line(error)
        name = "" if str(job.source) in reason else f"{job.source}: "
        tqdm.write(f"{name}{reason}", file=sys.stderr)
        self.failed += 1
        self._bar.update()

    def finish(self, *figures: str) -> int:
        """Shows the sum of it and returns the exit code."""
        self._bar.close()
        seconds = time.perf_counter() - self._started
        parts = [f"{self.written} written in {seconds:.1f} s"]
        if self.kept:
            parts.append(f"{self.kept} kept that exist (--overwrite writes them anew)")
        if self.failed:
            parts.append(f"{self.failed} failed")
        print(", ".join([*parts, *figures]))
        return 1 if self.failed else 0
