"""Which files a command reads and writes."""

import argparse
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from flowmo_diffusers.data.sources import files_below


@dataclass(frozen=True)
class Job:
    """
    Args:
        source: What is read: a path, or what else is shown to people.
        target: The file that is written.
    """

    source: Path | str
    target: Path


def plan(args: argparse.Namespace, readable: Container[str], writable: Container[str], suffix: str) -> list[Job]:
    """
    A job for each of `args.inputs`, and for each file in those that are folders, which keep their structure.
    Everything that can be known to be wrong is found here, before anything is loaded.

    Args:
        readable: Extensions of the files that are taken from folders.
        writable: Extensions that make `args.output` a file instead of a folder.
        suffix: Of the files written into a folder.

    Raises:
        OSError: If there is no such file, or there are none.
        ValueError: If two files would be written to one place.
    """
    found = [(path, name) for given in args.inputs for path, name in _named_files(given, readable)]
    if args.output.suffix.lower() in writable and not args.output.is_dir():
        if len(found) != 1:
            args.usage_error(f"--output {args.output} is one file, and there are {len(found)} to write: give a folder")
        return [Job(found[0][0], args.output)]
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"--output {args.output} is not a folder")
    jobs, sources = [], {}
    for path, name in found:
        target = args.output / name.with_suffix(suffix)
        if target in sources:
            raise ValueError(f"{sources[target]} and {path} would both be written to {target}: rename one")
        sources[target] = path
        jobs.append(Job(path, target))
    return jobs


def _named_files(given: Path, extensions: Container[str]) -> list[tuple[Path, Path]]:
    """Files by their paths, with what they are called below the folder that was given."""
    if given.is_dir():
        paths = [Path(path) for path in sorted(files_below(given, extensions))]
        if not paths:
            raise FileNotFoundError(f"{given} holds no files of a kind that is read here")
        return [(path, path.relative_to(given)) for path in paths]
    if not given.exists():
        raise FileNotFoundError(f"{given} does not exist")
    return [(given, Path(given.name))]
