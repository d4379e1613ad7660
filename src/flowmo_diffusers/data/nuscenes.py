"""The camera images of nuScenes (arXiv 1903.11027) and their splits, which are of scenes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


# Numbers of the 150 scenes that the authors' devkit (nuscenes/utils/splits.py) names as validation: from, to.
_VALIDATION = (
    (3, 3), (12, 18), (35, 36), (38, 39), (92, 110), (221, 221), (268, 278), (329, 332), (344, 346), (519, 524),
    (552, 565), (625, 627), (629, 630), (632, 638), (770, 771), (775, 775), (777, 778), (780, 784), (794, 800),
    (802, 802), (904, 917), (919, 931), (962, 963), (966, 969), (971, 972), (1059, 1073),
)  # fmt: skip
_MINI_VALIDATION = ((103, 103), (916, 916))


def nuscenes_images(folder: Path) -> dict[str, list[str]]:
    """
    The keyframes of all six cameras, sorted by path, by split: "train" (700 scenes), "validation" (150) and "test"
    (150) as far as their tables are there, else those of the mini set; nothing without tables.

    Raises:
        OSError: If a table is missing or damaged.
    """
    full = [name for name in ("v1.0-trainval", "v1.0-test") if (folder / name).is_dir()]
    mini = ["v1.0-mini"] if (folder / "v1.0-mini").is_dir() else []
    found = {}
    for name in full or mini:
        tables = folder / name
        try:
            splits = _splits_of_samples(tables)
            for file, sample in _keyframes(tables):
                found.setdefault(splits[sample], []).append(str(folder / file))
        except (KeyError, TypeError, ValueError) as error:
            raise OSError(f"the tables of nuScenes in {tables} are damaged: {error!r}") from error
    return {split: sorted(files) for split, files in found.items()}


def _splits_of_samples(tables: Path) -> dict[str, str]:
    """By the token of a sample, which is a moment of a scene."""
    scenes = {scene["token"]: _split(tables.name, scene["name"]) for scene in _load(tables / "scene.json")}
    return {sample["token"]: scenes[sample["scene_token"]] for sample in _load(tables / "sample.json")}


def _split(version: str, scene: str) -> str:
    if version == "v1.0-test":
        return "test"
    number = int(scene.removeprefix("scene-"))
    ranges = _MINI_VALIDATION if version == "v1.0-mini" else _VALIDATION
    return "validation" if any(first <= number <= last for first, last in ranges) else "train"


def _keyframes(tables: Path) -> list[tuple[str, str]]:
    """File and sample of each camera image that belongs to a sample's moment."""
    # A table of millions of records, most of other times and sensors: each of these is dropped as it is read.
    return [row for row in _load(tables / "sample_data.json", _keyframe) if row is not None]


def _keyframe(row: dict[str, Any]) -> tuple[str, str] | None:
    return (row["filename"], row["sample_token"]) if row["filename"].startswith("samples/CAM_") else None


def _load(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file, object_hook=object_hook)
