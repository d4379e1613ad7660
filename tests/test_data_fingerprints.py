"""Fingerprints of sources: another one for other images, the same one for the same."""

import io
import os
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest

from flowmo_diffusers.data.arrays import write_npz
from flowmo_diffusers.data.images import load_images
from flowmo_diffusers.data.sources import DatasetImages


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, shades: dict[str, int]) -> None:
    for name, shade in shades.items():
        path = folder / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(shade))


def write_list(folder, shades: dict[str, int]) -> None:
    """As Food-101 is downloaded."""
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "train.txt").write_text("\n".join(shades))
    for name, shade in shades.items():
        path = folder / "images" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(shade))


def write_tars(folder, shades: dict[str, int]) -> None:
    """In two tars, of which the second one has the last image."""
    folder.mkdir()
    members = list(shades.items())
    for shard, part in (("train-0", members[:-1]), ("train-1", members[-1:])):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name, shade in part:
                info = tarfile.TarInfo(f"{name}.png")
                info.size = len(encoded(shade))
                tar.addfile(info, io.BytesIO(encoded(shade)))


def write_parquet(folder, shades: dict[str, int]) -> None:
    images = [{"bytes": encoded(shade), "path": f"{name}.png"} for name, shade in shades.items()]
    features = datasets.Features({"image": datasets.Image()})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / "train-0.parquet")


def write_array(folder, shades: dict[str, int]) -> None:
    folder.mkdir()
    images = (np.full((8, 8, 3), shade, np.uint8) for shade in shades.values())
    write_npz(folder / "samples.npz", images, len(shades))


NAMED = [write_folder, write_list, write_tars]
WRITERS = [*NAMED, write_parquet, write_array]
SHADES = {"a": 1, "b": 2, "c": 3, "d": 4}


def load(folder):
    place = folder / "samples.npz" if (folder / "samples.npz").exists() else folder
    return load_images(data_dir=place, cache_dir=folder.parent / "cache")["train"]


def same_times(folder, nanoseconds: int = 10**18) -> None:
    """As if all files were written at once, so that no time tells one folder from another."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(nanoseconds, nanoseconds))


@pytest.mark.parametrize("write", WRITERS)
def test_same_images(tmp_path, write):
    """Catches a fingerprint that a restart changes, and statistics computed anew because a folder was moved (which
    `datasets`, whose own fingerprints are of paths, does not avoid)."""
    write(tmp_path / "set", SHADES)
    expected = load(tmp_path / "set").fingerprint()
    assert load(tmp_path / "set").fingerprint() == expected and len(expected) == 32
    (tmp_path / "set").rename(tmp_path / "moved")
    if write is not write_parquet:
        assert load(tmp_path / "moved").fingerprint() == expected


@pytest.mark.parametrize("write", WRITERS)
def test_selection(tmp_path, write):
    """Catches a part of a source, or another order of it, taken for the whole."""
    write(tmp_path / "set", SHADES)
    source = load(tmp_path / "set")
    selections = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 3], [1, 0, 2, 3], [0, 1, 2, 3, 3], [0]]
    fingerprints = [source.select(rows).fingerprint() for rows in selections]
    assert fingerprints[0] == source.fingerprint() and len(set(fingerprints)) == len(selections)
    assert source.select([3, 2, 1, 0]).select([3, 2, 1, 0]).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("write", NAMED)
@pytest.mark.parametrize(
    "others",
    [
        {"a": 1, "b": 2, "c": 3},
        {"b": 2, "c": 3, "d": 4},
        SHADES | {"e": 5},
        {"a": 1, "b": 2, "c": 3, "e": 4},
    ],
    ids=["last removed", "first removed", "added", "renamed"],
)
def test_other_images(tmp_path, write, others):
    """Catches images removed, added or renamed for which stale statistics would be used, times being equal."""
    assert_different(tmp_path, write, SHADES, others)


@pytest.mark.parametrize("write", [write_list, write_tars])
def test_other_order(tmp_path, write):
    """Catches a list or tar of the same images in another order, by which their noise and picture are numbered."""
    assert_different(tmp_path, write, SHADES, {"b": 2, "a": 1, "c": 3, "d": 4})


def assert_different(tmp_path, write, *sets: dict[str, int]) -> None:
    found = set()
    for number, shades in enumerate(sets):
        write(tmp_path / str(number), shades)
        same_times(tmp_path / str(number))
        found.add(load(tmp_path / str(number)).fingerprint())
    assert len(found) == len(sets)


@pytest.mark.parametrize("write", WRITERS)
def test_edited(tmp_path, write):
    """Catches a file that was written anew, in the same place and of the same size, and is taken for the old one."""
    write(tmp_path / "set", SHADES)
    same_times(tmp_path / "set")
    before = load(tmp_path / "set").fingerprint()
    files = [path for path in (tmp_path / "set").rglob("*") if path.suffix != ".txt" and path.is_file()]
    for change, path in enumerate(files, 1):
        os.utime(path, ns=(10**18 + change * 10**9,) * 2)
        after = load(tmp_path / "set").fingerprint()
        assert after != before
        before = after


def test_size(tmp_path):
    """Catches a file that was edited by a program that kept its time of change."""
    for kind, write in (("folder", write_folder), ("tar", write_tars)):
        write(tmp_path / kind, SHADES)
        same_times(tmp_path / kind)
        before = load(tmp_path / kind).fingerprint()
        path = next(path for path in (tmp_path / kind).rglob("*") if path.is_file())
        path.write_bytes(path.read_bytes() + bytes(1024))
        same_times(tmp_path / kind)
        assert load(tmp_path / kind).fingerprint() != before


def test_missing_file(tmp_path):
    """Catches a file that is gone and ends the run before it begins, although it would only be left out."""
    write_folder(tmp_path / "set", SHADES)
    source = load(tmp_path / "set")
    before = source.fingerprint()
    (tmp_path / "set" / "train" / "b.png").unlink()
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ["one", "other"], [(["a", "bc"], ["ab", "c"]), (["a", "z/c"], ["a/b", "z/c"]), (["x/a", "z/c"], ["y/a", "z/c"])]
)
def test_other_names(tmp_path, one, other):
    """Catches two folders taken for one whose names differ only in where one ends, or in their folder."""
    for folder, names in (("one", one), ("other", other)):
        write_folder(tmp_path / folder, dict.fromkeys(names, 1))
        same_times(tmp_path / folder)
    assert load(tmp_path / "one").fingerprint() != load(tmp_path / "other").fingerprint()


def test_columns():
    """Catches one column of images taken for another of the same data set."""
    features = datasets.Features({name: datasets.Image() for name in ("a", "b")})
    images = {"bytes": encoded(1), "path": None}
    dataset = datasets.Dataset.from_dict({"a": [images], "b": [images]}, features=features)
    assert DatasetImages(dataset, "a").fingerprint() != DatasetImages(dataset, "b").fingerprint()


def test_other_process(tmp_path):
    """Catches a fingerprint that depends on a process: on its hash seed, or on what it loaded before."""
    for write in WRITERS:
        write(tmp_path / write.__name__, SHADES)
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_data_fingerprints import WRITERS, load
print("found", *[load(Path({str(tmp_path)!r}, write.__name__)).fingerprint() for write in reversed(WRITERS)])
"""
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = output.stdout.split("found ")[1].split()
    assert found == [load(tmp_path / write.__name__).fingerprint() for write in reversed(WRITERS)]
