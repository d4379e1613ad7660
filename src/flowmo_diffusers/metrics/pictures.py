"""Pictures that show what numbers do not."""

from collections.abc import Mapping

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from flowmo_diffusers.metrics.reconstruction import to_uint8


def labelled_rows(rows: Mapping[str, torch.Tensor], side: int = 96) -> PIL.Image.Image:
    """
    One picture with a labelled row of images for each entry, images of one column belonging together.

    Args:
        rows: Label to images (n, 3, h, w) in [-1, 1].
        side: Height of a shown image in pixels; small images are enlarged without smoothing.
    """
    font = PIL.ImageFont.load_default(size=15)
    margin, text = 6, 24
    first = next(iter(rows.values()))
    height = side
    width = round(side * first.shape[-1] / first.shape[-2])
    columns = max(len(images) for images in rows.values())
    size = (margin + columns * (width + margin), margin + len(rows) * (text + height + margin))
    picture = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(picture)
    for row, (label, images) in enumerate(rows.items()):
        top = margin + row * (text + height + margin)
        draw.text((margin, top), label, fill="black", font=font)
        for column, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
            tile = PIL.Image.fromarray(image)
            kind = PIL.Image.Resampling.NEAREST if tile.height <= side else PIL.Image.Resampling.LANCZOS
            picture.paste(tile.resize((width, height), kind), (margin + column * (width + margin), top + text))
    return picture
