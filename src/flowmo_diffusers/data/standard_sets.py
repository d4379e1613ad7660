"""Data sets in the form in which their makers offer them, where names alone do not tell what is a split."""

import os
from pathlib import Path

from flowmo_diffusers.data.nuscenes import nuscenes_images


# Of all that ImageNet's official download consists of, these are the images with splits as everyone uses them.
IMAGENET = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}

# Sets whose splits are text files of names, one a line: these files, and the image that a name stands for.
LISTED = (({"train": "meta/train.txt", "test": "meta/test.txt"}, "images/{}.jpg"),)  # Food-101


def standard_set(folder: Path, split: str) -> tuple[str, dict[str, list[str]]] | None:
    """
    As [`find_files`], or nothing if the folder is of no set known here.

    Args:
        split: What the images are if nothing tells their split.

    Raises:
        OSError: If images that the set lists are missing, or its tables are no such.
    """
    if archives := {name: [str(folder / file)] for name, file in IMAGENET.items() if (folder / file).is_file()}:
        return "tar", archives
    if listed := _listed_images(folder):
        return "file", _check_files(listed, folder)
    if cameras := sorted(map(str, folder.glob("samples/CAM_*"))):
        keyframes = nuscenes_images(folder)
        return ("file", _check_files(keyframes, folder)) if keyframes else ("folder", {split: cameras})
    return None


def _listed_images(folder: Path) -> dict[str, list[str]]:
    for lists, image in LISTED:
        if found := {split: folder / file for split, file in lists.items() if (folder / file).is_file()}:
            return {
                split: [str(folder / image.format(name)) for name in file.read_text("utf-8").split()]
                for split, file in found.items()
            }
    return {}


def _check_files(files: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    for split, paths in files.items():
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing or not paths:
            first = f", the first is {missing[0]}" if missing else ""
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(paths)} images that it lists as {split!r}{first}"
            )
    return files
