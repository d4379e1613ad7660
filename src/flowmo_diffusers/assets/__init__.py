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


def starter() -> Path:
    """
    The tokenizer that ships with the package (`docs/starter.md`), as a folder for
    `FlowMoPipeline.from_pretrained`: 32 x 32 pixels, 192 bytes an image.

    Raises:
        OSError: As [`asset_path`].
    """
    return asset_path("starter")


def starter_generator() -> Path:
    """
    The generator of the starter's tokens, as a folder for
    `FlowMoGenerationPipeline.from_pretrained`: the nine groups of the embedded emoji.

    Raises:
        OSError: As [`asset_path`].
    """
    return asset_path("starter_generator")
