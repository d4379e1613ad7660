"""Arrays of images: read in place, whoever wrote them, and written as `numpy.savez` does, whatever their size."""

import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from flowmo_diffusers.data.arrays import ArrayImages, write_npz
from flowmo_diffusers.data.images import load_images, load_streams


@pytest.fixture
def pixels() -> np.ndarray:
    """5 images of 6 x 7 pixels, none like another."""
    return np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)


def content(source) -> np.ndarray:
    return np.stack([np.asarray(source[i]) for i in range(len(source))])


def peak(function) -> int:
    """The most bytes of Python objects and arrays alive at once."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def save(path, pixels: np.ndarray, how: str) -> None:
    if path.suffix == ".npy":
        np.save(path, np.asfortranarray(pixels) if how == "fortran" else pixels)
    elif how == "compressed":
        np.savez_compressed(path, pixels, np.arange(len(pixels)))
    elif how == "named second":
        np.savez(path, labels=np.arange(1000), arr_0=pixels)
    else:
        np.savez(path, pixels, np.arange(len(pixels)))


@pytest.mark.parametrize(
    ["name", "how"],
    [("a.npy", ""), ("a.npy", "fortran"), ("a.npz", ""), ("a.npz", "compressed"), ("a.npz", "named second")],
)
def test_numpys_files(tmp_path, pixels, name, how):
    """Catches an offset that is off by a header, another array taken for the images, and rows taken for columns."""
    save(tmp_path / name, pixels, how)
    found = load_images(data_dir=tmp_path / name, split="samples", cache_dir=tmp_path / "cache")
    source = found["samples"]
    assert list(found) == ["samples"] and np.array_equal(content(source), pixels)
    assert source[0].mode == "RGB" and source.name(3) == f"{tmp_path / name} row 3"
    assert np.array_equal(content(source.select([4, 0])), pixels[[4, 0]])
    assert np.array_equal(content(pickle.loads(pickle.dumps(source))), pixels)
    assert len(pickle.dumps(source)) < 2000
    assert (tmp_path / "cache").exists() == (how == "compressed")


def test_compressed_is_unpacked_once(tmp_path, pixels, monkeypatch):
    """Catches gigabytes unpacked at every start, the array of an older file, or older ones that pile up."""
    path, cache = tmp_path / "a.npz", tmp_path / "cache"
    np.savez_compressed(path, pixels)
    ArrayImages(path, cache)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", None)
        assert np.array_equal(content(ArrayImages(path, cache)), pixels)
    np.savez_compressed(path, pixels[::-1])
    assert np.array_equal(content(ArrayImages(path, cache)), pixels[::-1])
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 1


def test_memory_of_reading(tmp_path):
    """Catches an array that is loaded as a whole, compressed or not."""
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1000, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 1000 * 256 * 256 * 3)  # zeros that take no disk
    assert peak(lambda: ArrayImages(tmp_path / "a.npy")[999]) < 2_000_000
    np.savez_compressed(tmp_path / "a.npz", np.zeros((100, 256, 256, 3), np.uint8))
    assert peak(lambda: ArrayImages(tmp_path / "a.npz", tmp_path / "cache")[99]) < 5_000_000


@pytest.mark.parametrize(
    ["array", "message"],
    [
        (np.zeros((2, 4, 4, 3)), r"must hold images \(n, height, width, 3\) of uint8, not \(2, 4, 4, 3\) of float64"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"of uint8, not \(2, 3, 4, 4\) of uint8"),
        (np.zeros((4, 4, 3), np.uint8), r"not \(4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"not \(0, 4, 4, 3\)"),
        (np.array([{}], object), "of uint8, not .* of object"),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_no_images(tmp_path, array, message, name):
    """Catches an array of something else that fails at the first image, is shown as noise, or is unpickled."""
    save(tmp_path / name, array, "")
    with pytest.raises(ValueError, match=f"{name} {message}|{name} must hold.*{message}"):
        ArrayImages(tmp_path / name)


def test_other_files(tmp_path, pixels):
    """Catches statistics taken for images, and an error that does not tell what is in the file."""
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"fid.npz holds statistics, not images: it has \['mu', 'sigma'\]"):
        ArrayImages(tmp_path / "fid.npz")
    np.savez(tmp_path / "named.npz", images=pixels)
    with pytest.raises(ValueError, match=r"named.npz holds no array 'arr_0' of images: it has \['images'\]"):
        ArrayImages(tmp_path / "named.npz")
    np.savez(tmp_path / "both.npz", pixels, mu=np.zeros(4), sigma=np.eye(4))
    assert len(ArrayImages(tmp_path / "both.npz")) == 5
    with pytest.raises(OSError, match=r"nowhere.npz"):
        ArrayImages(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="both.npz is no stream: read it in place"):
        load_streams(data_dir=tmp_path / "both.npz")
    with pytest.raises(ValueError, match="must be a single array, not .*both.npz"):
        load_images(data_dir=f"{tmp_path}/*.npz")


@pytest.mark.parametrize(["name", "how"], [("a.npy", ""), ("a.npz", ""), ("a.npz", "compressed")])
def test_damaged_files(tmp_path, pixels, name, how):
    """Catches a file whose writing broke off and whose missing images are found out in the middle of a run."""
    path = tmp_path / name
    save(path, pixels, how)
    data = path.read_bytes()
    for length in (0, 5, 60, 150, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(OSError, match=f"{name} (is|holds).*(truncated|damaged|no NumPy array)"):
            ArrayImages(path, tmp_path / "cache")


@pytest.mark.parametrize("damage", [slice(59, 70), slice(100, 200)])
def test_damaged_compression(tmp_path, pixels, damage):
    """Catches noise unpacked from a damaged file and kept in the cache."""
    np.savez_compressed(tmp_path / "a.npz", pixels)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[damage] = b"\xff" * len(data[damage])
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(OSError, match="a.npz is .*damaged"):
        ArrayImages(tmp_path / "a.npz", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("labels", [None, [3, 1, 4, 1, 5]])
def test_write_npz(tmp_path, pixels, labels):
    """Catches a file that NumPy or this package reads otherwise, labels that are lost, and files that differ although
    their images do not."""
    for name in ("a", "b"):
        write_npz(tmp_path / f"{name}.npz", iter(pixels[:, :, ::-1]), len(pixels), labels)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
        assert np.array_equal(file["arr_0"], pixels[:, :, ::-1]) and file["arr_0"].dtype == np.uint8
        if labels is not None:
            assert file["arr_1"].tolist() == labels and file["arr_1"].dtype == np.int64
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    assert np.array_equal(content(ArrayImages(tmp_path / "a.npz")), pixels[:, :, ::-1])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert {member.date_time for member in zipfile.ZipFile(tmp_path / "a.npz").infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_memory_of_writing(tmp_path):
    """Catches samples that are held in memory until the last one is made."""
    images = (np.full((128, 128, 3), i % 256, np.uint8) for i in range(400))
    assert peak(lambda: write_npz(tmp_path / "a.npz", images, 400)) < 1_000_000
    assert (tmp_path / "a.npz").stat().st_size > 400 * 128 * 128 * 3


def test_write_errors(tmp_path, pixels):
    """Catches a file with another number of images than its header tells, or whose images were cast or cut, and a
    failed one left behind."""
    for images, count, labels, message in (
        (pixels, 6, None, "there are 5 images, not count=6"),
        (pixels, 4, None, "there are more images than count=4"),
        (pixels, 0, None, "count=0 must be at least 1"),
        (pixels[:0], 1, None, "there are 0 images, not count=1"),
        (pixels, 5, [1, 2], "there are 2 labels for count=5 images"),
        (pixels / 255, 5, None, r"image 0 must be .* of uint8, not \(6, 7, 3\) of float64"),
        (pixels[..., 0], 5, None, r"image 0 must be \(height, width, 3\) of uint8, not \(6, 7\)"),
        (pixels[..., :2], 5, None, r"image 0 must be \(height, width, 3\) of uint8, not \(6, 7, 2\)"),
        ([pixels[0], pixels[1, :5]], 2, None, r"image 1 must be \(6, 7, 3\) of uint8, not \(5, 7, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_npz(tmp_path / "a.npz", images, count, labels)
    assert not list(tmp_path.iterdir())
