"""
Means and covariances of features in the `.npz` form of guided-diffusion's evaluation (Dhariwal and Nichol 2021, arXiv
2105.05233): `mu` and `sigma` for FID, `mu_s` and `sigma_s` for sFID, and beside them maybe images, `arr_0`.
"""

import json
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmo_diffusers.data.arrays import write_npz
from flowmo_diffusers.engine.digests import differences
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.metrics.frechet import Moments


logger = logging.getLogger(__name__)

# Names of mean and covariance by the feature that they are of.
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def array_names(path: str | Path) -> set[str]:
    """
    Names of the arrays in an `.npz` file.

    Raises:
        OSError: If there is no such file, or it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise OSError(f"{path} is no .npz file, truncated or damaged: {error}") from error


def read_text(path: str | Path, name: str) -> Any:
    """
    Plain JSON values that are stored as a string beside the arrays of an `.npz` file, `None` where there are none.

    Raises:
        OSError: If there is no such file, or it is damaged.
    """
    if name not in array_names(path):
        return None
    return json.loads(str(_read_array(path, name)))


def add_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts arrays beside those of an `.npz` file, or into a new one."""
    with zipfile.ZipFile(path, "a") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def write_statistics(
    path: str | Path,
    statistics: Mapping[str, Moments | None],
    protocol: Mapping[str, Any],
    images: Iterable[np.ndarray] = (),
    num_images: int = 0,
) -> None:
    """
    Stores what generated images are compared with. Besides the keys of guided-diffusion there are `count`, the number
    of images measured, and `protocol`; its evaluator passes over these, but needs images.

    Args:
        path: Of the file, which is not there before all of it is.
        statistics: "pool" and, `None` where the network has none, "spatial".
        protocol: Plain JSON values: all that the features depend on besides the images.
        images: (height, width, 3) each, uint8, for precision and recall. guided-diffusion has 10 000.
        num_images: How many.
    """
    arrays = {"count": np.array(statistics["pool"].count), "protocol": np.array(json.dumps(protocol))}
    for feature, (mean, covariance) in _KEYS.items():
        if (moments := statistics[feature]) is not None:
            arrays |= {mean: moments.mean.numpy(), covariance: moments.covariance.numpy()}
    with atomic_file(path) as temporary:
        if num_images:
            write_npz(temporary, images, num_images)
        add_arrays(temporary, arrays)


def read_statistics(path: str | Path, protocol: Mapping[str, Any] | None = None) -> dict[str, Moments | None]:
    """
    Reads what [`write_statistics`], guided-diffusion or pytorch-fid have stored.

    Args:
        protocol: Of what is to be compared with these statistics. A file of others does not say its own: a warning
            tells.

    Returns:
        "pool" and, `None` where the file has none, "spatial"; their count is `None` where the file does not say.

    Raises:
        ValueError: If there are no statistics, they are of another protocol, or cannot be mean and covariance.
        OSError: If there is no such file, or it is damaged.
    """
    names = array_names(path)
    if "mu" not in names:
        raise ValueError(f"{path} holds no statistics (mu and sigma): it has {sorted(names)}")
    stored = read_text(path, "protocol")
    if stored is None:
        logger.warning(f"{path} does not say by which protocol it was made: check that it is yours")
    elif protocol is not None and (differing := differences(stored, protocol)):
        raise ValueError(f"{path} holds statistics of another protocol: {'; '.join(differing)}")
    count = int(_read_array(path, "count")) if "count" in names else None
    spatial = {"mu_s", "sigma_s"} & names
    return {
        "pool": _read_moments(path, *_KEYS["pool"], count),
        "spatial": _read_moments(path, *_KEYS["spatial"], count) if spatial else None,
    }


def _read_moments(path: str | Path, mean: str, covariance: str, count: int | None) -> Moments:
    try:
        arrays = [torch.from_numpy(_read_array(path, name).astype(np.float64)) for name in (mean, covariance)]
        return Moments.from_statistics(*arrays, count)
    except ValueError as error:
        raise ValueError(f"{path}: {mean} and {covariance} are no statistics: {error}") from error


def _read_array(path: str | Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except KeyError as error:
        raise ValueError(f"{name} is missing") from error
    except (zipfile.BadZipFile, zipfile.zlib.error, EOFError) as error:
        raise OSError(f"{path} is damaged: {error}") from error
