"""Files that ship inside the package: small real data that needs no download."""

from importlib import resources
from pathlib import Path


def asset_path(*parts: str) -> Path:
    """Path of a file or folder that ships with the package, as in `asset_path("emoji", "train.parquet")`.

    Raises:
        OSError: the installed package lacks it.
    """
    path = Path(str(resources.files(__name__).joinpath(*parts)))
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from the installed package; reinstall it: "
            "pip install --force-reinstall --no-deps flowmo_diffusers"
        )
    return path
