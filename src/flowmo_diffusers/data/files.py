"""What a folder, file or pattern of files is made of, and which part of it is which split."""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from flowmo_diffusers.data.arrays import ARRAY_EXTENSIONS
from flowmo_diffusers.data.standard_sets import standard_set


# Names of folders (their first word) and of files (any word) that make them splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_SHARD = re.compile(r"\.(tar|parquet|tar\.\w+|tgz|tbz2?|txz)$")


def find_files(data_dir: str | Path, split: str) -> tuple[str, dict[str, list[str]]]:
    """
    What a `data_dir` is made of ("tar", "parquet", "array", "file" or "folder"), and its files, or folders of images,
    by split. Left to guess, `datasets` takes any file or class that has "train" or "test" in its name for a split and
    drops all other images without a word.

    Args:
        split: What the images are if nothing tells their split.
    """
    path = Path(data_dir)
    if path.is_file():
        return _kind_of([str(path)]), {split: [str(path)]}
    if not path.is_dir():
        files = [file for pattern in _expand_braces(str(data_dir)) for file in _matches(pattern)]
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        named = _by_split({os.path.relpath(file, root): file for file in files}, data_dir, "[a-z]+")
        return _kind_of(files), named or {split: files}

    if found := standard_set(path, split):
        return found
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    folders = {entry.name: str(entry) for entry in entries if entry.is_dir()}
    files = {entry.name: str(entry) for entry in entries if _SHARD.search(entry.name) and entry.is_file()}
    if any(name.endswith((".tar", ".parquet")) for name in files) or 0 < len(files) == len(entries):
        return _kind_of(files.values()), _by_split(files, data_dir, "[a-z]+") or {split: list(files.values())}
    return "folder", _by_split(folders, data_dir, "^[a-z]+") or {split: [str(path)]}


def _kind_of(files: Iterable[str]) -> str:
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"data_dir (--train_data_dir, --dataset) has {list(kinds.values())}: give files of one kind by a pattern"
        )
    return next(iter(kinds))


def _kind(file: str) -> str:
    if file.endswith(ARRAY_EXTENSIONS):
        return "array"
    match = _SHARD.search(file)
    if match is None:
        known = "a folder, .tar or .parquet files, or an .npz or .npy file"
        raise OSError(f"data_dir (--train_data_dir, --dataset) must be {known}, not {file}")
    if match[1] not in ("tar", "parquet"):
        raise OSError(f"{file} is compressed, so that nothing in it can be read in place: make it a .tar file")
    return match[1]


def _by_split(paths: Mapping[str, str], data_dir: str | Path, words: str) -> dict[str, list[str]]:
    """The paths by the split that a word of their name tells; nothing if no name does."""
    files, others = {}, []
    for name, path in paths.items():
        found = re.findall(words, name.lower())
        named = next((split for word in found for split, names in SPLIT_WORDS.items() if word in names), None)
        if named is None:
            others.append(name)
        else:
            files.setdefault(named, []).append(path)
    if files and others:
        raise ValueError(
            f"data_dir (--train_data_dir, --dataset) {data_dir} holds splits {sorted(files)} by name, but also "
            f"{others[:5]}: give the folder or the files of one split (classes of images belong in a folder 'train')"
        )
    return files


def _expand_braces(pattern: str) -> list[str]:
    """ "shard-{000..002}.tar" and "shard-{a,b}.tar" as the names that they stand for."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        options = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        options = braces[1].split(",")
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for option in options for name in _expand_braces(head + option + tail)]


def _matches(pattern: str) -> list[str]:
    files = [pattern] if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"data_dir (--train_data_dir, --dataset) {pattern} does not exist")
    return files
