"""Files that are never seen half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: str | Path) -> None:
    """Forces a file, or a folder's list of names, to disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: str | Path) -> None:
    """Removes what writers that were killed left under temporary names, anywhere in `folder`."""
    for path in list(Path(folder).rglob(".partial-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """
    A temporary folder beside `target` to write into. On success its files take their places in `target`, each by one
    rename, those at the top last (an index such as `model_index.json` thus never points at what is not there yet).
    A folder written into replaces the one of its name, without what that held besides. On failure `target` is as it
    was.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        yield temporary
        files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda p: -len(p.parts))
        for path in files:
            place = target / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        written = {path.relative_to(temporary) for path in files}
        for folder in {path.parts[0] for path in written if len(path.parts) > 1}:
            for old in (target / folder).rglob("*"):
                if old.is_file() and old.relative_to(target) not in written:
                    old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target` that is renamed to it on success and removed on failure."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
