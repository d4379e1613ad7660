"""Token files: what is written is read back, and nothing else is."""

import os
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmo_diffusers.data.token_file import MAGIC, MAX_CODE_BYTES, TokenFile
from flowmo_diffusers.models.windows import Windows


HEADER_BYTES = 39
OVERHEAD = HEADER_BYTES + 4

# 4000 + 3500 of whole files that are none, 1500 damaged ones, 2 x 1000 of a wrong length: 11 000, and round trips.
always = settings(
    derandomize=True,
    deadline=5000,  # milliseconds for one case: nothing hangs
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

printable = st.text(st.characters(exclude_categories=("C", "Z")), max_size=60)
sides = st.integers(1, 65535)


@st.composite
def whole_images(draw) -> dict:
    height = draw(sides)
    return {"height": height, "width": draw(st.integers(1, min(65535, 2**27 // height)))}


@st.composite
def windowed_images(draw) -> dict:
    """Of one to six windows, and any height and width that have so many."""
    window = draw(st.integers(1, 4700))  # 6 x 4700² is less than 2^27 pixels
    overlap = draw(st.integers(0, window - 1))
    down = draw(st.integers(1, 6))
    across = draw(st.integers(1, 6 // down))

    def side(count: int) -> int:
        longest = window + (count - 1) * (window - overlap)
        return draw(st.integers(longest - (window - overlap) + 1 if count > 1 else 1, longest))

    size = {"height": side(down), "width": side(across)}
    return size | {"num_rows": down * across, "window": window, "overlap": overlap}


@st.composite
def token_files(draw) -> TokenFile:
    """Any valid one of at most some hundred bytes."""
    tokens, bits = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    size = draw(st.one_of(whole_images(), windowed_images()))
    rows = size.get("num_rows", 1)
    row_bytes, padding = -(-tokens * bits // 8), -tokens * bits % 8
    codes = bytearray(draw(st.binary(min_size=rows * row_bytes, max_size=rows * row_bytes)))
    for last in range(row_bytes - 1, len(codes), row_bytes):
        codes[last] = codes[last] >> padding << padding
    return TokenFile(
        tokenizer=draw(st.binary(min_size=16, max_size=16)).hex(),
        num_tokens=tokens,
        bits_per_token=bits,
        codes=bytes(codes),
        name=draw(printable),
        **size,
    )


def starter_like(**changes) -> TokenFile:
    """A file of the embedded starter's sizes."""
    values = {
        "tokenizer": "6bdb010e641ced8e9e542c24e3a68599",
        "height": 32,
        "width": 32,
        "num_tokens": 64,
        "bits_per_token": 24,
        "codes": bytes(range(192)),
    }
    return TokenFile(**values | changes)


def signed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return body + struct.pack(">I", zlib.crc32(body))


def read_or_refuse(data: bytes) -> TokenFile | None:
    """Nothing but a `ValueError`, and memory for no more than the data and its parts."""
    tracemalloc.start()
    try:
        return TokenFile.from_bytes(data)
    except ValueError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(data) + 20_000  # the constant is what an exception and its traceback take


@settings(always, max_examples=300)
@given(token_files())
def test_round_trip(file):
    """A field that is lost or changed on the way; bytes beyond the codes and the name but the documented ones."""
    data = file.to_bytes()
    assert TokenFile.from_bytes(data) == file
    assert len(data) == OVERHEAD + len(file.name.encode()) + len(file.codes)
    assert b"".join(file.packed) == file.codes and len(file.packed) == file.num_rows


@settings(always, max_examples=4000)
@given(st.one_of(st.binary(max_size=600), st.binary(max_size=600).map(lambda rest: MAGIC + b"\1" + rest)))
def test_random_bytes_are_refused(data):
    """Also behind the right magic and version; a checksum is right by chance once in four billion cases."""
    assert read_or_refuse(data) is None


@settings(always, max_examples=1500)
@given(token_files(), st.data())
def test_damage_is_noticed(file, data):
    """Bytes changed, put in or taken out anywhere, in a burst that the checksum is sure to notice."""
    good = file.to_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    count = data.draw(st.integers(0, 4))
    bad = good[:place] + data.draw(st.binary(max_size=4)) + good[place + count :]
    found = read_or_refuse(bad)
    assert (found == file) if bad == good else (found is None)


@settings(always, max_examples=1000)
@given(token_files(), st.data())
def test_cut_off_and_continued_files_are_refused(file, data):
    """A download that broke off, and one with something behind it."""
    good = file.to_bytes()
    assert read_or_refuse(good[: data.draw(st.integers(0, len(good) - 1))]) is None
    assert read_or_refuse(good + data.draw(st.binary(min_size=1, max_size=50))) is None


@settings(always, max_examples=3500)
@given(
    st.lists(st.one_of(st.sampled_from([0, 1, 2, 65535]), sides), min_size=7, max_size=7),
    st.integers(0, 255),
    st.binary(max_size=300),
)
def test_a_forged_header_is_refused_or_canonical(numbers, length, rest):
    """Any sizes whatever with a right checksum: what is read at all is written back as the very same bytes."""
    body = struct.pack(">7sB16s7HB", MAGIC, 1, bytes(16), *numbers, length) + rest
    data = signed(body)
    found = read_or_refuse(data)
    assert found is None or found.to_bytes() == data


def test_documented_layout():
    """Another program's view of a file, by the table of docs/tokens.md alone."""
    data = starter_like(name="starter").to_bytes()
    assert len(data) == 242
    assert data[:8] == b"\x89FLOWMO\x01"
    assert data[8:24].hex() == "6bdb010e641ced8e9e542c24e3a68599"
    numbers = [int.from_bytes(data[i : i + 2], "big") for i in range(24, 38, 2)]
    assert numbers == [32, 32, 64, 24, 1, 0, 0]
    assert data[38] == 7 and data[39:46] == b"starter"
    assert data[46:-4] == bytes(range(192))
    assert int.from_bytes(data[-4:], "big") == zlib.crc32(data[:-4])


@pytest.mark.parametrize(
    ("size", "tokens", "bits"),
    [(192, 64, 24), (576, 256, 18), (1792, 256, 56)],
)
def test_sizes_of_known_tokenizers(size, tokens, bits):
    """The starter's, FlowMo-Lo's and FlowMo-Hi's codes, and 43 bytes around them."""
    file = starter_like(num_tokens=tokens, bits_per_token=bits, codes=bytes(size))
    assert len(file.to_bytes()) == size + 43


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "abc"}, "tokenizer='abc' must be 32 hex digits"),
        ({"height": 0}, "height=0 must be a whole number from 1 to 65535"),
        ({"width": 65536}, "width=65536"),
        ({"height": 65535, "width": 65535}, "must be at most 134217728 pixels"),
        ({"num_tokens": True}, "num_tokens=True"),
        ({"codes": bytes(191)}, "codes have 191 bytes; 1 rows of 192 expected"),
        ({"overlap": 4}, "overlap=4 must be 0 and num_rows=1 must be 1 where window is 0"),
        ({"num_rows": 2, "codes": bytes(384)}, "num_rows=2 must be 1 where window is 0"),
        ({"window": 16, "overlap": 16}, "overlap=16 must be less than window=16"),
        ({"window": 16}, "num_rows=1 must be 4, the windows of 16 pixels that share 0 in an image of 32 x 32"),
        ({"window": 16, "overlap": 1, "num_rows": 4, "codes": bytes(768)}, "num_rows=4 must be 9"),
        ({"window": 33, "num_rows": 4, "codes": bytes(768)}, "num_rows=4 must be 1"),
        ({"window": 11586}, "window=11586 must be at most 134217728 pixels"),
        (
            {"window": 1, "height": 65535, "num_rows": 65535, "codes": bytes(192 * 65535)},
            "num_rows=65535 must be 2097",
        ),
        ({"num_tokens": 65535, "bits_per_token": 65535}, f"must be at most {MAX_CODE_BYTES}"),
        ({"num_tokens": 1, "bits_per_token": 3, "codes": b"\x10"}, "bits set behind the last of the 3 bits"),
        ({"name": "a\x1b[31m"}, "printable"),
        ({"name": "n" * 256}, "at most 255 bytes"),
    ],
)
def test_impossible_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        starter_like(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"\x89PNG\r\n\x1a\n" + data, "not a FlowMo token file"),
        (lambda data: b"", "not a FlowMo token file"),
        (lambda data: data[:7] + b"\2" + data[8:], "token file of version 2; this program reads version 1"),
        (lambda data: data[:5], "cut off: 5 bytes, less than the header's 39"),
        (lambda data: data[:-1], "cut off: 234 bytes of 235"),
        (lambda data: data + b"\0", "1 bytes more than the 235"),
        (lambda data: data[:100] + b"?" + data[101:], "damaged"),
        (lambda data: signed(data[:38] + b"\1\xff" + data[39:-4]), "the tokenizer's name is no UTF-8"),
        (lambda data: signed(data[:38] + b"\1\x1b" + data[39:-4]), "name=.* printable"),
    ],
)
def test_files_are_refused_by_name_and_reason(tmp_path, change, message):
    """A refusal that does not say which file it is of, or why."""
    path = tmp_path / "a.flowmo"
    path.write_bytes(change(starter_like().to_bytes()))
    with pytest.raises(ValueError, match=f"a.flowmo: {message}"):
        TokenFile.read(path)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 16), (1, 1), (5, 100), (64, 48)])
@pytest.mark.parametrize("overlap", [0, 1, 4, 15])
def test_rows_are_the_windows(size, overlap):
    """Files that the windows of the pipeline do not fit, also of images that are smaller than a window or just one."""
    count = len(Windows(*size, 16, overlap))
    fields = {"height": size[0], "width": size[1], "window": 16, "overlap": overlap}
    file = starter_like(**fields, num_rows=count, codes=bytes(192 * count))
    assert TokenFile.from_bytes(file.to_bytes()).windows == {"window_size": 16, "window_overlap": overlap}
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match="num_rows="):
            starter_like(**fields, num_rows=wrong, codes=bytes(192 * wrong))
    assert starter_like().windows == {}


def test_forged_windows_are_not_laid_out():
    """A header of 2^27 windows of a pixel each, in a file of the right length and checksum."""
    numbers = 1 << 14, 1 << 13, 1, 8, 65535, 1, 0
    data = signed(struct.pack(">7sB16s7HB", MAGIC, 1, bytes(16), *numbers, 0) + bytes(65535))
    assert read_or_refuse(data) is None  # which measures memory


def test_files(tmp_path):
    """Written whole and read back; what is no file is an `OSError`, and is not waited for."""
    path = tmp_path / "folder" / "a.flowmo"
    starter_like().write(path)
    assert TokenFile.read(path) == starter_like()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.flowmo"]
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "absent"):
        with pytest.raises(OSError, match=name):
            TokenFile.read(tmp_path / name)


def test_a_large_foreign_file_is_not_read(tmp_path):
    """A header that declares 2^45 bytes, and a file of 2^33 that is none."""
    path = tmp_path / "large"
    for start in (struct.pack(">7sB16s7HB", MAGIC, 1, bytes(16), *[65535] * 7, 0), b"RIFF"):
        path.write_bytes(start)
        os.truncate(path, 1 << 33)  # a hole: nothing is stored
        tracemalloc.start()
        with pytest.raises(ValueError, match="large: "):
            TokenFile.read(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000
        tracemalloc.stop()


def test_tokens_of_another_tokenizer_are_refused():
    """Also with the same sizes; and sizes that are not those of the digest's tokenizer."""
    identity = {"digest": starter_like().tokenizer, "num_tokens": 64, "token_groups": 3, "group_bits": 8}
    starter_like().check_tokenizer(identity)
    with pytest.raises(ValueError, match=r"another tokenizer: 6bdb010e641ced8e9e542c24e3a68599 \(starter\), not 00"):
        starter_like(name="starter").check_tokenizer(identity | {"digest": "0" * 32})
    with pytest.raises(ValueError, match="64 tokens of 24 bits; its tokenizer has 32 of 24"):
        starter_like().check_tokenizer(identity | {"num_tokens": 32})
