"""Images in tar files: found by headers alone, read in place, and never confused with what lies beside them."""

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import PIL.Image
import pytest
import torch

from flowmo_diffusers.data import tars
from flowmo_diffusers.data.images import load_images
from flowmo_diffusers.data.loading import ShuffledImages, image_batches
from flowmo_diffusers.data.sources import READ_RUN
from flowmo_diffusers.data.tars import TarImages, tar_members
from flowmo_diffusers.data.transforms import ImageTransform


def encoded(shade: int, format: str = "PNG") -> bytes:
    """An image of one grey."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, format)
    return file.getvalue()


def tar_of(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_shards(folder, count: int, each: int, name: str = "train-{:03d}.tar") -> list:
    """Image i of all is of shade i; each has a label beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(count):
        members = {}
        for i in range(shard * each, (shard + 1) * each):
            members |= {f"{i:05d}.png": encoded(i), f"{i:05d}.cls": b"7"}
        paths.append(folder / name.format(shard))
        paths[-1].write_bytes(tar_of(members))
    return paths


def shades(source) -> list[int]:
    return [np.asarray(source[i])[0, 0, 0].item() for i in range(len(source))]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load(cache):
    return lambda path, **kwargs: load_images(data_dir=path, cache_dir=cache, **kwargs)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members(tmp_path, cache, format):
    """Catches an offset that is off by a header, long and non-ASCII names, and folders or links taken for images."""
    long = "/".join(["folder" * 8] * 4) + "/image.png"
    contents = {"plain.png": b"1", long: b"2" * 5000, "größe.jpg": b"", "notes.txt": b"3" * 512, "./a/b.cls": b"4"}
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of(contents, format))
    with tarfile.open(path, "a", format=format) as tar:
        folder, link = tarfile.TarInfo("folder.png"), tarfile.TarInfo("link.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "plain.png"
        tar.addfile(folder)
        tar.addfile(link)
    data = path.read_bytes()
    rows = tar_members(path, cache).to_pylist()
    assert {row["name"]: data[row["offset"] :][: row["size"]] for row in rows} == contents


def test_shards_in_place(tmp_path, load, cache):
    """Catches an image lost between shards, labels or hidden files taken for images, a name that does not lead to the
    image, and anything written beside the shards."""
    paths = write_shards(tmp_path / "shards", 3, 4)
    paths[0].write_bytes(tar_of({f"{i:05d}.PNG": encoded(i) for i in range(4)} | {"._00000.png": b"mac", ".png": b""}))
    (tmp_path / "shards" / ".hidden.tar").write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    source = load(tmp_path / "shards")["train"]
    assert shades(source) == list(range(12))
    assert source.name(0) == f"{paths[0]}/00000.PNG" and source.name(5) == f"{paths[1]}/00005.png"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before
    assert sum(path.stat().st_size for path in cache.rglob("*")) < 50_000 and not list(cache.rglob("*.png"))


@pytest.mark.parametrize("official", [True, False])
def test_imagenet(tmp_path, load, official):
    """Catches ImageNet's training set (a tar of a tar for each class) read at offsets within the inner tar, its splits
    mixed up, or the download's other archives taken for images."""
    classes = {f"n0144{c}": [f"n0144{c}_{i}.JPEG" for i in (3, 10)] for c in range(3)}
    shade = iter(range(10))
    inner = {
        f"{name}.tar": tar_of({file: encoded(next(shade), "JPEG") for file in files})
        for name, files in classes.items()
    }
    train = tmp_path / "ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of(inner))
    val = tar_of({f"ILSVRC2012_val_{i:08d}.JPEG": encoded(100 + i, "JPEG") for i in range(1, 4)})
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(val)
    for other in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train_t3.tar", "ILSVRC2012_img_test_v10102019.tar"):
        (tmp_path / other).write_bytes(b"not to be read")
    found = (
        load(tmp_path)
        if official
        else {**load(train), **load(tmp_path / "ILSVRC2012_img_val.tar", split="validation")}
    )
    assert {name: shades(source) for name, source in found.items()} == {
        "train": list(range(6)),
        "validation": [101, 102, 103],
    }
    assert found["train"].name(3) == f"{train}/n01441.tar/n01441_10.JPEG"
    assert len(list(tmp_path.glob("*.tar*"))) == 5


@pytest.mark.parametrize(
    ["names", "splits"],
    [
        (["imagenet-val-000.tar", "imagenet-val-001.tar", "imagenet-train-000.tar"], {"train": 1, "validation": 2}),
        (["train-0001.tar", "Test.tar", "dev_3.tar"], {"train": 1, "test": 1, "validation": 1}),
        (["00000.tar", "trainer.tar", "contest.tar"], {"train": 3}),
    ],
)
def test_splits_by_name(tmp_path, load, names, splits):
    """Catches shards whose names tell a split and that are trained on all the same, or words that only look so."""
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(tar_of({"a.png": encoded(i)}))
    assert {name: len(source) for name, source in load(tmp_path).items()} == splits


def test_patterns(tmp_path, load):
    """Catches a pattern that leaves out shards, a missing one that goes unnoticed, and splits in folders lost."""
    tmp_path = tmp_path / "shards"
    for folder in ("train", "val"):
        write_shards(tmp_path / folder, 3, 2, "{:03d}.tar")
    assert shades(load(f"{tmp_path}/train/*.tar")["train"]) == list(range(6))
    assert shades(load(f"{tmp_path}/train/{{000..001}}.tar")["train"]) == list(range(4))
    assert shades(load(f"{tmp_path}/train/{{002,000}}.tar")["train"]) == [4, 5, 0, 1]
    assert {name: len(source) for name, source in load(f"{tmp_path}/*/00[01].tar").items()} == {
        "train": 4,
        "validation": 4,
    }
    with pytest.raises(OSError, match=r"--train_data_dir.*train/003.tar does not exist"):
        load(f"{tmp_path}/train/{{000..003}}.tar")
    with pytest.raises(OSError, match=r"no images in .*a pattern, as 'folder/\*/\*.tar'"):
        load(tmp_path)


def test_several_images_in_a_sample(tmp_path, load):
    """Catches masks trained on as images, and a choice that is made for the user."""
    members = {}
    for i in range(3):
        members |= {
            f"dir.v1/{i}.input.png": encoded(i),
            f"dir.v1/{i}.SEG.png": encoded(100 + i),
            f"dir.v1/{i}.json": b"{}",
        }
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    for column, expected in (("input.png", [0, 1, 2]), ("seg.png", [100, 101, 102]), ("i*.png", [0, 1, 2])):
        assert shades(load(tmp_path, image_column=column)["train"]) == expected
    assert len(load(tmp_path, image_column="*")["train"]) == 6
    with pytest.raises(ValueError, match=r"choose image_column \(--image_column\) among \['input.png', 'seg.png'\]"):
        load(tmp_path)
    for column in ("png", "json", "picture"):
        with pytest.raises(
            ValueError, match=rf"image_column='{column}' is no field of images: those are \['input.png'"
        ):
            load(tmp_path, image_column=column)


def test_one_image_in_a_sample(tmp_path, load):
    """Catches images left out because samples differ in their formats, or because a name has several dots."""
    members = {
        "a.png": encoded(0),
        "b.JPEG": encoded(1, "JPEG"),
        "c.2020.webp": encoded(2),
        "a.txt": b"",
        "x/a.jpg": encoded(3),
    }
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert shades(load(tmp_path)["train"]) == [0, 1, 2, 3]
    assert shades(load(tmp_path, image_column="jpeg")["train"]) == [1]


def test_refused(tmp_path, load):
    """Catches a compressed archive that is unpacked in secret or read as rubbish, and an error without the file."""
    plain = tar_of({"a.png": encoded(0)})
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.tar.gz").write_bytes(gzip.compress(plain))
    for path in (tmp_path / "one", tmp_path / "one" / "train.tar.gz"):
        with pytest.raises(OSError, match="train.tar.gz is compressed.*make it a .tar file"):
            load(path)
    (tmp_path / "one" / "val.tar").write_bytes(plain)
    with pytest.raises(OSError, match="train.tar.gz is compressed"):
        load(tmp_path / "one")
    (tmp_path / "gzip.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(OSError, match="gzip.tar.*is compressed by gzip"):
        load(tmp_path / "gzip.tar")
    (tmp_path / "inner.tar").write_bytes(tar_of({"n01.tar": gzip.compress(plain)}))
    with pytest.raises(OSError, match="inner.tar: n01.tar/is compressed by gzip"):
        load(tmp_path / "inner.tar")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "nothing.tar").write_bytes(b"")
    for name in ("text.tar", "nothing.tar"):
        with pytest.raises(OSError, match=f"{name} is no tar file"):
            load(tmp_path / name)
    (tmp_path / "labels.tar").write_bytes(tar_of({"a.cls": b"1"}))
    with pytest.raises(OSError, match="no images in .*labels.tar"):
        load(tmp_path / "labels.tar")
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.parquet"):
        (tmp_path / "mixed" / name).write_bytes(plain)
    with pytest.raises(ValueError, match="a.tar.*b.parquet.*one kind"):
        load(tmp_path / "mixed")


@pytest.mark.parametrize("nested", [False, True])
def test_truncated_anywhere(tmp_path, load, cache, nested):
    """Catches a shard whose download broke off and whose rest is silently missing, and an index of it that stays."""
    data = tar_of({f"{i}.png": encoded(i) for i in range(3)})
    if nested:
        data = tar_of({"n01.tar": data, "n02.tar": data})
    path = tmp_path / "shard.tar"
    members = tarfile.open(fileobj=io.BytesIO(data)).getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    for length in (1, 511, 512, 700, 1024, 1536, 2000, end // 2, end - 513, end - 512, end - 1, end, end + 511):
        path.write_bytes(data[:length])
        with pytest.raises(OSError, match="shard.tar is no tar file, truncated or damaged"):
            load(path)
        assert not list(cache.rglob("*"))[1:]
    path.write_bytes(data[: end + 512])
    assert len(load(path)["train"]) == (6 if nested else 3)


def test_damaged_header(tmp_path, load):
    """Catches the images behind a damaged header lost without a word (`tarfile` takes it for the end)."""
    data = bytearray(tar_of({f"{i}.png": encoded(i) for i in range(3)}))
    second = data.index(b"1.png")
    data[second + 148 : second + 156] = b"x" * 8  # the checksum
    (tmp_path / "shard.tar").write_bytes(data)
    with pytest.raises(OSError, match=f"shard.tar is .*damaged: .*at byte {second}"):
        load(tmp_path / "shard.tar")


def test_inner_tar_without_end(tmp_path, load):
    """Catches the outer tar's headers taken for the inner's, and images listed twice."""
    inner = tar_of({"a.png": encoded(0)})
    end = inner.index(b"IEND") // 512 * 512 + 512
    (tmp_path / "shard.tar").write_bytes(tar_of({"n01.tar": inner[:end], "n02.tar": inner}))
    with pytest.raises(OSError, match="shard.tar is .*damaged"):
        load(tmp_path / "shard.tar")


def test_index_is_kept(tmp_path, cache, monkeypatch):
    """Catches headers read at every start, and offsets that outlive the file they were for."""
    (path,) = write_shards(tmp_path, 1, 2)
    assert shades(TarImages([path], cache_dir=cache)) == [0, 1]
    reads, original = [], tars._members
    monkeypatch.setattr(tars, "_members", lambda *args: reads.append(args) or original(*args))
    assert shades(TarImages([path], cache_dir=cache)) == [0, 1] and not reads

    status = path.stat()
    path.write_bytes(tar_of({"b.png": encoded(9), "b.txt": bytes(20_000)}))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the size tells
    assert shades(TarImages([path], cache_dir=cache)) == [9] and len(reads) == 1
    path.write_bytes(tar_of({"c.txt": bytes(20_000), "c.png": encoded(5)}))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # only the time tells
    assert shades(TarImages([path], cache_dir=cache)) == [5] and len(reads) == 2
    assert len(list(cache.rglob("*.parquet"))) == 1


def test_file_changed_under_use(tmp_path, cache):
    """Catches garbage read at the old offsets of a file that was written anew."""
    (path,) = write_shards(tmp_path, 1, 2)
    source = TarImages([path], cache_dir=cache)
    path.write_bytes(tar_of({"b.png": encoded(9)}))
    with pytest.raises(OSError, match="train-000.tar has changed"):
        source[0]


def test_memory(tmp_path, cache):
    """Catches an object for each of a million members, while they are looked up or afterwards."""
    count = 8_000
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({f"{i:06d}.png": b"" for i in range(count)}))
    tracemalloc.start()
    try:
        tar_members(path, cache)
        assert tracemalloc.get_traced_memory()[1] < 350 * count
    finally:
        tracemalloc.stop()
    assert len(pickle.dumps(TarImages([path], cache_dir=cache))) < 60 * count


def test_many_shards(tmp_path, cache, monkeypatch):
    """Catches a process that runs out of open files, or reads from a file that it closed."""
    monkeypatch.setattr(tars, "_MAX_OPEN", 2)
    source = TarImages(write_shards(tmp_path, 5, 2), cache_dir=cache)
    for _ in range(2):
        assert shades(source) == list(range(10))
        assert len(source._open) == 2


def test_open_files_are_not_pickled(tmp_path, cache):
    """Catches a source that cannot be sent to workers where they are not forked."""
    source = TarImages(write_shards(tmp_path, 2, 2), cache_dir=cache)
    assert shades(source) == shades(pickle.loads(pickle.dumps(source))) == [0, 1, 2, 3]


def test_forked_workers(tmp_path, cache):
    """Catches workers that move each other's place in a file they inherited."""
    source = TarImages(write_shards(tmp_path, 1, 40), cache_dir=cache)
    source[0]  # opens the file before the fork
    images = ShuffledImages(source, ImageTransform(8))
    alone, together = (
        torch.cat([batch["images"] for batch in image_batches(images, 4, 0, 30, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, together)
    assert [file.tell() for file in source._open.values()] == [0]


def test_order_of_windows(tmp_path):
    """Catches reads all over the disk, windows that are not mixed or stay the same, or an image left out or repeated;
    the images are named only, none is read."""
    count, buffer = 20 * READ_RUN + 17, 4 * READ_RUN
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i:06d}.png": b"" for i in range(count)}))
    source = TarImages([tmp_path / "a.tar"], cache_dir=tmp_path / "cache")
    orders = [source.order(seed, epoch, buffer) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(count))
        for start in range(0, count - buffer, buffer):
            window = order[start : start + buffer]
            # As many stretches without a gap as a window has runs, and one more where the short last run shifts them.
            assert (np.diff(np.sort(window)) > 1).sum() <= 5
            assert (np.abs(np.diff(window)) == 1).mean() < 0.1
    firsts = {tuple(np.sort(order[:buffer])) for order in orders}
    assert len(firsts) == 4
    assert np.array_equal(orders[0], source.order(0, 0, buffer))
    # Of a part, in any order of selection, the same holds: what lies side by side is read together.
    part = source.select(np.random.default_rng(0).permutation(count)[: 10 * READ_RUN])
    order = part.order(0, 0, buffer)
    assert np.array_equal(np.sort(order), np.arange(10 * READ_RUN))
    stored = np.sort(part._rows)
    places = np.searchsorted(stored, part._rows[order[:buffer]])
    assert (np.diff(np.sort(places)) > 1).sum() <= 4


def test_buffer_is_the_sources(tmp_path, cache):
    """Catches tars shuffled over the whole disk unless asked, a window of all images that is not any order, or the
    user's window ignored."""
    count = 300
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i:06d}.png": encoded(0) for i in range(count)}))
    source = TarImages([tmp_path / "a.tar"], cache_dir=cache)
    assert ShuffledImages(source, ImageTransform(8)).shuffle_buffer == 10_000
    assert np.array_equal(source.order(3, 1, count), source.order(3, 1, None))
    windowed = ShuffledImages(source, ImageTransform(8), seed=3, shuffle_buffer=16)
    windowed[0]
    assert np.array_equal(windowed._order, source.order(3, 0, 16))


def test_labels_are_the_field_cls(tmp_path, cache):
    """Found by the sample's key, whatever the order; missing ones are -1, and words are sorted names."""
    members = {f"x/{i}.png": encoded(i) for i in range(3)}
    (tmp_path / "a.tar").write_bytes(tar_of({"x/2.cls": b"4\n", **members, "x/0.cls": b"1"}))
    (tmp_path / "b.tar").write_bytes(tar_of({**members, "x/1.cls": b"0", "x/1.word": b"dog", "x/2.word": b"cat"}))
    images = TarImages([tmp_path / "a.tar", tmp_path / "b.tar"], cache_dir=cache)
    labels = images.labels()
    assert (labels.ids.tolist(), labels.names) == ([1, -1, 4, -1, 0, -1], None)
    assert images.select([4, 0]).labels().ids.tolist() == [0, 1]
    words = images.labels("word")
    assert (words.ids.tolist(), words.names) == ([-1, -1, -1, -1, 1, 0], ["cat", "dog"])
    with pytest.raises(ValueError, match="label_column='kind' .*does not exist"):
        images.labels("kind")


def test_labels_are_the_folders_where_there_are_several(tmp_path, cache):
    """Tars inside a tar are folders too, as in ImageNet's training set; one folder alone is no class."""
    inner = {name: tar_of({f"{name}_{i}.png": encoded(i) for i in range(2)}) for name in ("n2", "n1")}
    (tmp_path / "outer.tar").write_bytes(tar_of({f"{name}.tar": content for name, content in inner.items()}))
    labels = TarImages([tmp_path / "outer.tar"], cache_dir=cache).labels()
    assert (labels.ids.tolist(), labels.names) == ([1, 1, 0, 0], ["n1", "n2"])
    (tmp_path / "one.tar").write_bytes(tar_of({f"x/{i}.png": encoded(i) for i in range(2)}))
    assert TarImages([tmp_path / "one.tar"], cache_dir=cache).labels() is None
