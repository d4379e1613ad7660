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
        num_rows: 1, or the number of windows that a large image was divided into, up to 65 535.
        window: Side of a window in pixels, 0 where there is one row.
        overlap: Pixels that neighbouring windows share, less than `window`; 0 where there is one row.
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
        for field in ("height", "width", "num_tokens", "bits_per_token", "num_rows"):
            _check_number(field, getattr(self, field), 1)
        for field in ("window", "overlap"):
            _check_number(field, getattr(self, field), 0)
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"height={self.height} x width={self.width} must be at most {MAX_PIXELS} pixels")
        if self.num_rows == 1 and (self.window or self.overlap):
            raise ValueError(f"window={self.window} and overlap={self.overlap} must be 0 where num_rows is 1")
        if self.num_rows > 1 and not self.overlap < self.window < max(self.height, self.width):
            raise ValueError(
                f"window={self.window} of num_rows={self.num_rows} must be more than overlap={self.overlap} and less "
                f"than the image's longer side, {max(self.height, self.width)}"
            )
        if not self.name.isprintable() or len(self.name.encode(errors="replace")) > 255:
            raise ValueError(f"name={self.name!r} must be at most 255 bytes of printable characters")
        size = self.num_rows * self.row_bytes
        if size > MAX_CODE_BYTES:
            raise ValueError(f"codes of {size} bytes must be at most {MAX_CODE_BYTES}")
        if len(self.codes) != size:
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
        return -(-self.bits // 8)

    @property
    def packed(self) -> list[bytes]:
        """The rows, as [`~FlowMoPipeline.decode`] takes them."""
        return [self.codes[i : i + self.row_bytes] for i in range(0, len(self.codes), self.row_bytes)]

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
    declared = _HEADER.size + length + rows * -(-tokens * bits // 8) + _CHECKSUM.size
    if size < declared:
        raise ValueError(f"cut off: {size} bytes of {declared}")
    if size > declared:
        raise ValueError(f"{size - declared} bytes more than the {declared} that its header declares")
