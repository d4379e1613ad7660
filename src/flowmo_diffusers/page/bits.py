"""Tokens as bits: seen as a picture, flipped, and mixed. The bits of an image are (tokens, bits per token) of bool."""

import numpy as np
import PIL.Image


CELL = 6  # side of a bit in pixels

_COLOURS = np.array([(20, 20, 20), (245, 245, 245)], np.uint8)
_MARKED = np.array([(191, 87, 0), (255, 176, 92)], np.uint8)
_GAP = np.array((128, 140, 160), np.uint8)


def unpack(packed: bytes, num_tokens: int) -> np.ndarray:
    """
    The bits of what [`FlowMoAutoencoder.pack_codes`] makes of an image.

    Args:
        packed: `tokens x bits / 8` bytes, rounded up.
        num_tokens: Of the image.
    """
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
    return bits[: len(bits) // num_tokens * num_tokens].reshape(num_tokens, -1)


def pack(bits: np.ndarray) -> bytes:
    """The inverse of [`unpack`], which [`FlowMoPipeline.decode`] takes."""
    return np.packbits(bits).tobytes()


def bit_picture(bits: np.ndarray, marked: np.ndarray | None = None) -> PIL.Image.Image:
    """
    Bits in black (0) and white (1), those that are marked in dark and light orange. A row is a token; the rows stand
    in as many columns, the first tokens in the left one, as make the picture about square.

    Args:
        bits: (tokens, bits).
        marked: (tokens, bits), or (tokens, 1) for whole tokens.
    """
    tokens, width = bits.shape
    columns = max(1, round((tokens / (width + 1)) ** 0.5))
    height = -(-tokens // columns)
    cells = _COLOURS[bits.astype(int)]
    if marked is not None:
        cells = np.where(marked[..., None], _MARKED[bits.astype(int)], cells)
    picture = np.tile(_GAP, (height, columns * (width + 1) - 1, 1))
    for column in range(columns):
        part = cells[column * height : (column + 1) * height]
        picture[: len(part), column * (width + 1) :][:, :width] = part
    image = PIL.Image.fromarray(picture)
    return image.resize((image.width * CELL, image.height * CELL), PIL.Image.Resampling.NEAREST)


def flip_bits(
    bits: np.ndarray, count: int, rng: np.random.Generator, first: int = 0, last: int | None = None
) -> np.ndarray:
    """
    A copy in which `count` bits, drawn without repetition from the tokens `first` to `last`, are the opposite.

    Args:
        bits: (tokens, bits).
        first: Number of a token, from 0.
        last: As `first`; it is among them. Default: the last one.

    Raises:
        ValueError: If there are no such tokens, or they have fewer bits.
    """
    last = len(bits) - 1 if last is None else last
    if not 0 <= first <= last < len(bits):
        raise ValueError(f"tokens {first} to {last}: expected 0 <= first <= last <= {len(bits) - 1}")
    available = (last - first + 1) * bits.shape[1]
    if not 0 <= count <= available:
        raise ValueError(f"{count} bits to flip: tokens {first} to {last} have {available}")
    flipped = bits.copy()
    places = first * bits.shape[1] + rng.choice(available, count, replace=False)
    flipped.flat[places] = ~flipped.flat[places]
    return flipped


def mix_tokens(
    bits: np.ndarray, others: np.ndarray, count: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    The tokens of one image, but for `count` that are another image's: the last ones, or any that `rng` draws.

    Args:
        bits: (tokens, bits).
        others: Likewise, of the other image.

    Returns:
        The mixed bits (tokens, bits), and (tokens, 1) bool: which tokens are the other image's.

    Raises:
        ValueError: If the shapes differ, or there are fewer tokens.
    """
    if bits.shape != others.shape:
        raise ValueError(f"bits have shapes {bits.shape} and {others.shape}: they must be of one tokenizer")
    if not 0 <= count <= len(bits):
        raise ValueError(f"{count} tokens of the other image: there are {len(bits)}")
    chosen = np.arange(len(bits) - count, len(bits)) if rng is None else rng.permutation(len(bits))[:count]
    taken = np.zeros((len(bits), 1), bool)
    taken[chosen] = True
    return np.where(taken, others, bits), taken
