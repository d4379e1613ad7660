"""One image as a small file of tokens that says what it is of; `docs/tokens.md` has it byte by byte."""

import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.models.window_layout import count_windows


SUFFIX = ".flowmo"
MAGIC = b"\x89FLOWMO"
VERSION = 1

# Magic, version, tokenizer, height, width, tokens, bits, rows, window, overlap, length of the name.
_HEADER = struct.Struct(">7sB16s7HB")
_CHECKSUM = struct.Struct(">I")

# Far above what anyone stores, and low enough that a header cannot ask a decoder for more than it could have meant.
MAX_PIXELS = 1 << 27
MAX_CODE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """
    The tokens of one image, and all that it takes to decode them but the tokenizer itself.

    Args:
        tokenizer: "digest" of [`~flowmo_diffusers.data.tokens.tokenizer_identity`]: 32 hex digits.
        height: Of the image in pixels, from 1 to 65 535; as `width`. At most 2^27 pixels in all.
        width: See `height`.
        num_tokens: Of a row, from 1 to 65 535.
        bits_per_token: From 1 to 65 535.
        codes: Rows of [`~FlowMoAutoencoder.pack_codes`] one after the other, at most 2^28 bytes.
        num_rows: 1, or as many as there are [`~flowmo_diffusers.models.windows.Windows`], at most 65 535.
        window: Side of a window in pixels; 0 where the image was encoded as a whole. An image smaller than a window
            was extended to one, which has at most 2^27 pixels as well.
        overlap: Pixels that neighbouring windows share at least, less than `window`; 0 where there are none.
        name: Of the tokenizer for people, not checked against anything: at most 255 bytes of UTF-8, all printable.

    Raises:
        ValueError: If a field is out of range, or they do not fit each other; names it.
    """

    tokenizer: str
    height: int
    width: int
    num_tokens: int
    bits_per_token: int
    codes: bytes
    num_rows: int = 1
    window: int = 0
    overlap: int = 0
    name: str = ""

    def __post_init__(self):
        if len(self.tokenizer) != 32 or set(self.tokenizer) - set("0123456789abcdef"):
            raise ValueError(f"tokenizer={self.tokenizer!r} must be 32 hex digits")
        sizes = "height", "width", "num_tokens", "bits_per_token", "num_rows", "window", "overlap"
        check_sizes(**{field: getattr(self, field) for field in sizes})
        if not self.name.isprintable() or len(self.name.encode(errors="replace")) > 255:
            raise ValueError(f"name={self.name!r} must be at most 255 bytes of printable characters")
        if len(self.codes) != self.num_rows * self.row_bytes:
            raise ValueError(f"codes have {len(self.codes)} bytes; {self.num_rows} rows of {self.row_bytes} expected")
        padding = (1 << -self.bits % 8) - 1
        if any(last & padding for last in self.codes[self.row_bytes - 1 :: self.row_bytes]):
            raise ValueError(f"codes have bits set behind the last of the {self.bits} bits of a row")

    @property
    def bits(self) -> int:
        """Of a row."""
        return self.num_tokens * self.bits_per_token

    @property
    def row_bytes(self) -> int:
        """Length of a row: its bits, rounded up to whole bytes."""
        return _row_bytes(self.num_tokens, self.bits_per_token)

    @property
    def packed(self) -> list[bytes]:
        """The rows, as [`~FlowMoAutoencoder.unpack_codes`] takes them."""
        return [self.codes[i : i + self.row_bytes] for i in range(0, len(self.codes), self.row_bytes)]

    @property
    def windows(self) -> dict[str, int]:
        """Arguments of [`~FlowMoPipeline.decode`] that say in which windows the image was encoded; none if in none."""
        return {"window_size": self.window, "window_overlap": self.overlap} if self.window else {}

    def check_tokenizer(self, identity: Mapping[str, Any]) -> None:
        """
        Args:
            identity: Of [`~flowmo_diffusers.data.tokens.tokenizer_identity`].

        Raises:
            ValueError: If these are not tokens of that tokenizer.
        """
        if self.tokenizer != identity["digest"]:
            name = f" ({self.name})" if self.name else ""
            raise ValueError(f"tokens of another tokenizer: {self.tokenizer}{name}, not {identity['digest']}")
        here = self.num_tokens, self.bits_per_token
        there = identity["num_tokens"], identity["token_groups"] * identity["group_bits"]
        if here != there:  # by chance never: the digest depends on both
            raise ValueError(f"{here[0]} tokens of {here[1]} bits; its tokenizer has {there[0]} of {there[1]}")

    def to_bytes(self) -> bytes:
        """The content of a file."""
        name = self.name.encode()
        numbers = self.height, self.width, self.num_tokens, self.bits_per_token
        windows = self.num_rows, self.window, self.overlap
        header = _HEADER.pack(MAGIC, VERSION, bytes.fromhex(self.tokenizer), *numbers, *windows, len(name))
        body = header + name + self.codes
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> "TokenFile":
        """
        The inverse of [`~TokenFile.to_bytes`]. Takes no more memory than a small multiple of the data's own length,
        whatever sizes its header declares.

        Raises:
            ValueError: If it is something else, of an unknown version, cut off, longer than declared, or damaged.
        """
        _check_length(data, len(data))
        (checksum,) = _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)
        if zlib.crc32(memoryview(data)[: -_CHECKSUM.size]) != checksum:
            raise ValueError("damaged: the checksum is not that of the content")
        _, _, tokenizer, height, width, tokens, bits, rows, window, overlap, length = _HEADER.unpack_from(data)
        try:
            name = data[_HEADER.size : _HEADER.size + length].decode()
        except UnicodeDecodeError:
            raise ValueError("the tokenizer's name is no UTF-8") from None
        return cls(
            tokenizer=tokenizer.hex(),
            height=height,
            width=width,
            num_tokens=tokens,
            bits_per_token=bits,
            codes=data[_HEADER.size + length : -_CHECKSUM.size],
            num_rows=rows,
            window=window,
            overlap=overlap,
            name=name,
        )

    def write(self, path: str | Path) -> None:
        """Under a temporary name first, so that no file is ever half written."""
        with atomic_file(path) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def read(cls, path: str | Path) -> "TokenFile":
        """
        Raises:
            ValueError: As [`~TokenFile.from_bytes`], with the path; foreign files are refused by their first bytes.
            OSError: If there is no such file.
        """
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path} is not a file")
        with open(path, "rb") as file:
            try:
                _check_length(file.read(_HEADER.size), os.fstat(file.fileno()).st_size)
                file.seek(0)
                return cls.from_bytes(file.read())
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def check_sizes(
    *,
    height: int,
    width: int,
    num_tokens: int,
    bits_per_token: int,
    num_rows: int = 1,
    window: int = 0,
    overlap: int = 0,
) -> None:
    """
    The arguments are those of [`TokenFile`].

    Raises:
        ValueError: If no token file can have them; names one. Takes no time, whatever they are.
    """
    _check_number("height", height, 1)
    _check_number("width", width, 1)
    _check_number("num_tokens", num_tokens, 1)
    _check_number("bits_per_token", bits_per_token, 1)
    if window and num_rows > 65535:
        raise ValueError(f"{num_rows} windows are more than the 65535 of a token file: larger ones, or less overlap")
    _check_number("num_rows", num_rows, 1)
    _check_number("window", window, 0)
    _check_number("overlap", overlap, 0)
    if not window and (overlap or num_rows != 1):
        raise ValueError(f"overlap={overlap} must be 0 and num_rows={num_rows} must be 1 where window is 0")
    if window and not overlap < window:
        raise ValueError(f"overlap={overlap} must be less than window={window}")
    if max(height, window) * max(width, window) > MAX_PIXELS:
        raise ValueError(f"height={height} x width={width}, window={window} must be at most {MAX_PIXELS} pixels")
    if window and num_rows != (expected := count_windows(height, width, window, overlap)):
        raise ValueError(
            f"num_rows={num_rows} must be {expected}, the windows of {window} pixels that share {overlap} in an image "
            f"of {height} x {width}"
        )
    size = num_rows * _row_bytes(num_tokens, bits_per_token)
    if size > MAX_CODE_BYTES:
        raise ValueError(f"codes of {size} bytes must be at most {MAX_CODE_BYTES}")


def _row_bytes(num_tokens: int, bits_per_token: int) -> int:
    return -(-num_tokens * bits_per_token // 8)


def _check_number(field: str, value: int, least: int) -> None:
    if type(value) is not int or not least <= value <= 65535:
        raise ValueError(f"{field}={value!r} must be a whole number from {least} to 65535")


def _check_length(start: bytes, size: int) -> None:
    """Raises `ValueError` unless something that starts so and has so many bytes can be a token file."""
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise ValueError("not a FlowMo token file")
    if len(start) > len(MAGIC) and start[len(MAGIC)] != VERSION:
        raise ValueError(f"token file of version {start[len(MAGIC)]}; this program reads version {VERSION}")
    if len(start) < _HEADER.size:
        raise ValueError(f"cut off: {size} bytes, less than the header's {_HEADER.size}")
    *_, tokens, bits, rows, _, _, length = _HEADER.unpack_from(start)
    declared = _HEADER.size + length + rows * _row_bytes(tokens, bits) + _CHECKSUM.size
    if size < declared:
        raise ValueError(f"cut off: {size} bytes of {declared}")
    if size > declared:
        raise ValueError(f"{size - declared} bytes more than the {declared} that its header declares")
