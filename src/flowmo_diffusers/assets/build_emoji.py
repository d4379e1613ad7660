"""Rebuilds the embedded emoji data set: `python -m flowmo_diffusers.assets.build_emoji OUT`.

Needs npm, and the `datasets` and `pillow` packages. See `emoji/README.md` for what the files hold.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image


IMAGES = "@lobehub/fluent-emoji-3d@1.1.0"
GROUPS = "unicode-emoji-json@0.9.0"
SIZE = 64
STEP = 6  # spacing of the stored pixel levels, counted down from white
TEST_SIZE = 256
LARGEST_HELD_OUT_FAMILY = 6  # an emoji and its five skin tones; holding out larger ones would cost too many images

# Emoji that Unicode gives a code point of their own though they show one subject by gender or presentation.
SAME_SUBJECT = {
    **dict.fromkeys(["1f468", "1f469", "1f471"], "1f9d1"),  # man, woman, blond person: person
    **dict.fromkeys(["1f466", "1f467"], "1f9d2"),  # boy, girl: child
    **dict.fromkeys(["1f474", "1f475"], "1f9d3"),  # old man, old woman: older person
    **dict.fromkeys(["1f478", "1fac5"], "1f934"),  # princess, person with crown: prince
    **dict.fromkeys(["1f936", "1f9d1-200d-1f384"], "1f385"),  # the other two Santas
    **dict.fromkeys(["1f930", "1fac3"], "1fac4"),  # pregnant woman, man: pregnant person
    **dict.fromkeys(["1f46b", "1f46c", "1f46d", "1f48f", "1f491"], "1f46a"),  # couples: with the families
    "2603": "26c4",  # the two snowmen, with snow and without
    "1f57a": "1f483",  # man dancing: woman dancing
    "1faf1-200d-1faf2": "1f91d",  # handshake of two skin tones
}


class Emoji(NamedTuple):
    """One image: its code points ("1f44b-1f3fb"), its Unicode group, its stored RGB pixels, uint8 (64, 64, 3)."""

    name: str
    group: str
    pixels: np.ndarray


def base(name: str) -> str:
    """The emoji that `name` is a variant of: without skin tone, gender, hair, direction and presentation."""
    name = re.sub(r"-(1f3f[b-f]|fe0f)", "", name)
    name = re.sub(r"-200d-(2640|2642|27a1|1f9b[0-3])", "", name)
    points = [SAME_SUBJECT.get(point, point) for point in name.split("-")]
    if sum(point in ("1f9d1", "1f9d2") for point in points) > 1:
        return "1f46a"  # couples and families
    name = "-".join(points)
    return SAME_SUBJECT.get(name, name)


def order(name: str) -> str:
    """Sort key of a fixed shuffle that neither Python's nor NumPy's version can change."""
    return hashlib.sha256(name.encode()).hexdigest()


def npm_package(spec: str, folder: Path) -> Path:
    """Downloads and unpacks an npm package into `folder`."""
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def render(path: Path) -> Image.Image:
    """The emoji on white, RGB at 64x64."""
    image = Image.open(path).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def quantize(pixels: np.ndarray) -> np.ndarray:
    """The nearest stored level of each uint8 value: at most STEP / 2 away, white exact."""
    levels = 255 - np.round((255 - pixels.astype(np.float64)) / STEP) * STEP
    return levels.clip(0, 255).astype(np.uint8)


def read_emoji(images: Path, groups: Path) -> list[Emoji]:
    """All emoji of the two unpacked packages, in order of name, without repeated ones.

    The images package has some emoji under two spellings of one name, and one drawing under two names.
    """

    def key(points: list[int]) -> tuple[int, ...]:
        return tuple(p for p in points if p not in (0xFE0F, 0xE007F))  # some names lack these two

    by_emoji = json.loads((groups / "data-by-emoji.json").read_text(encoding="utf-8"))
    group_of = {key([ord(c) for c in emoji]): entry["group"] for emoji, entry in by_emoji.items()}
    emoji, seen_names, seen_pixels = [], set(), set()
    for path in sorted((images / "assets").glob("*.webp")):
        points = [int(p, 16) for p in re.split("[-_]", path.stem)]
        toneless = [p for p in points if not 0x1F3FB <= p <= 0x1F3FF]
        group = group_of.get(key(points)) or group_of[key(toneless)]
        pixels = quantize(np.asarray(render(path)))
        if key(points) not in seen_names and pixels.tobytes() not in seen_pixels:
            seen_names.add(key(points))
            seen_pixels.add(pixels.tobytes())
            emoji.append(Emoji("-".join(f"{p:04x}" for p in points), group, pixels))
    return emoji


def apportion(counts: dict[str, int], total: int) -> dict[str, int]:
    """Shares `total` out in proportion to `counts`, by largest remainder."""
    exact = {name: total * count / sum(counts.values()) for name, count in counts.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def split(emoji: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """
    Train and test, no family of variants in both: test has one image of each of its families, train has none. Test is
    shuffled, so that its first images stand for all.
    """
    families: dict[str, list[Emoji]] = defaultdict(list)
    for e in emoji:
        families[base(e.name)].append(e)
    by_group: dict[str, list[str]] = defaultdict(list)
    for name in sorted(families, key=order):
        by_group[families[name][0].group].append(name)

    held_out: set[str] = set()
    for group, share in apportion({group: len(names) for group, names in by_group.items()}, TEST_SIZE).items():
        eligible = [name for name in by_group[group] if len(families[name]) <= LARGEST_HELD_OUT_FAMILY]
        held_out.update(eligible[:share])
    test = [min(families[name], key=lambda e: order(e.name)) for name in held_out]
    return [e for e in emoji if base(e.name) not in held_out], sorted(test, key=lambda e: order(e.name))


def write(path: Path, emoji: list[Emoji], groups: list[str]) -> None:
    """Writes a Hugging Face data set (image, label, name) whole or not at all."""
    encoded = []
    for e in emoji:
        buffer = io.BytesIO()
        Image.fromarray(e.pixels).save(buffer, "WEBP", lossless=True, quality=80, method=6)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    dataset = Dataset.from_dict(
        {"image": encoded, "label": [groups.index(e.group) for e in emoji], "name": [e.name for e in emoji]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=groups), "name": Value("string")}),
    )
    partial = path.with_suffix(".partial")
    dataset.to_parquet(partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuilds train.parquet and test.parquet of the emoji data set.")
    parser.add_argument("out", type=Path, help="folder for the two files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        images = npm_package(IMAGES, Path(folder, "images"))
        groups = npm_package(GROUPS, Path(folder, "groups"))
        emoji = read_emoji(images, groups)
    names = sorted({e.group for e in emoji})
    for file, part in zip(("train.parquet", "test.parquet"), split(emoji), strict=True):
        write(out / file, part, names)
        print(f"{file}: {len(part)} images, {(out / file).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
