"""The emoji data set that ships inside the package."""

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict, load_dataset

from flowmo_diffusers.assets import asset_path


GROUPS = [
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]
# Skin tones, U+FE0F, and what follows a joiner to mark gender or hair; then man, woman and person are one.
VARIANT = re.compile(r"-1f3f[b-f]|-fe0f|-200d-(2640|2642|1f9b[0-3])")
ADULT = re.compile("1f468|1f469")


def base(name: str) -> str:
    """Deliberately not the one of `build_emoji.py`, so that a mistake there shows here."""
    return ADULT.sub("1f9d1", VARIANT.sub("", name.replace("-fe0f", "")))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    files = {split: str(asset_path("emoji", f"{split}.parquet")) for split in ("train", "test")}
    return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def pixels(emoji: DatasetDict) -> dict[str, list[np.ndarray]]:
    return {split: [np.asarray(image) for image in emoji[split]["image"]] for split in emoji}


def test_counts_and_classes(emoji: DatasetDict) -> None:
    """Catches a rebuild that loses images, changes the held-out number, or leaves a class out of a split."""
    assert emoji.num_rows == {"train": 3018, "test": 256}
    for split in emoji.values():
        assert split.column_names == ["image", "label", "name"]
        assert split.features["label"].names == GROUPS
        assert set(split["label"]) == set(range(9))
    assert min(np.bincount(emoji["test"]["label"])) >= 13


def test_images_decode_to_rgb(pixels: dict[str, list[np.ndarray]]) -> None:
    """Catches images that decode with alpha, at another size, or on a background that is not exactly white."""
    for images in pixels.values():
        assert {(image.shape, image.dtype) for image in images} == {((64, 64, 3), np.dtype("uint8"))}
        assert np.median([image[0, 0] for image in images]) == 255


def test_no_family_in_both_splits(emoji: DatasetDict) -> None:
    """Catches a split that trains on another skin tone or gender of a held-out emoji."""
    assert base("1f469-1f3fd-200d-1f692") == base("1f9d1-200d-1f692")
    assert base("1f3c3-1f3fb-200d-2642-fe0f") == base("1f3c3")
    held_out = [base(name) for name in emoji["test"]["name"]]
    assert len(set(held_out)) == 256
    assert not set(held_out) & {base(name) for name in emoji["train"]["name"]}


def test_no_image_twice(emoji: DatasetDict, pixels: dict[str, list[np.ndarray]]) -> None:
    """Catches emoji drawn alike, or stored under two spellings of a name, on both sides of the split."""
    assert len({image.tobytes() for images in pixels.values() for image in images}) == 3274
    names = [name.replace("-fe0f", "").lstrip("0") for split in emoji.values() for name in split["name"]]
    assert len(set(names)) == 3274


def test_size_and_licence() -> None:
    """Catches an encoding that bloats the package, and images shipped without their licence."""
    assert sum(file.stat().st_size for file in asset_path("emoji").iterdir()) < 8_000_000
    licence = asset_path("emoji", "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License") and "Copyright (c) Microsoft Corporation." in licence


def test_missing_asset_is_named() -> None:
    """Catches a missing file surfacing as an obscure error far from its cause."""
    with pytest.raises(OSError, match=rf"{re.escape(str(Path('emoji', 'nothing.parquet')))}.*reinstall"):
        asset_path("emoji", "nothing.parquet")
