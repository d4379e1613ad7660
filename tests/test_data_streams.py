"""Streams: every image once an epoch whoever reads, and a run that goes on where it was."""

import functools
import http.server
import io
import tarfile
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.images import hold_out, load_streams, stack_images
from flowmo_diffusers.data.loading import StreamedImages, image_batches
from flowmo_diffusers.data.streams import ImageStream
from flowmo_diffusers.data.transforms import ImageTransform


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` waits for 5 seconds after each pass over parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def encoded(shade: int) -> bytes:
    """An image of one grey."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_tars(folder, count: int, each: int, bad: tuple[int, ...] = (), name: str = "train-{:03d}.tar") -> None:
    """Image i of all is of shade i; bad ones are no images."""
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        with tarfile.open(folder / name.format(shard), "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                for field, content in (("png", b"rubbish" if i in bad else encoded(i)), ("cls", b"7")):
                    info = tarfile.TarInfo(f"{i:05d}.{field}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_parquets(folder, count: int, each: int) -> None:
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(count):
        images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(shard * each, (shard + 1) * each)]
        rows = {"image": images, "label": [7] * each}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard:03d}.parquet")


def shades(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def batches_of(stream, first, last, num_processes=1, num_workers=0, batch_size=3, **options) -> list[dict]:
    """Those of all processes, process by process."""
    images = StreamedImages(stream, ImageTransform(8), shuffle_buffer=5, **options)
    return [
        batch
        for process in range(num_processes)
        for batch in image_batches(images, batch_size, first, last, process, num_processes, num_workers)
    ]


def seen(batches: list[dict]) -> dict[int, int]:
    """The shade at each visit, of which none may come twice."""
    visits = torch.cat([batch["visits"] for batch in batches]).tolist()
    assert len(set(visits)) == len(visits)
    return dict(sorted(zip(visits, shades(torch.cat([batch["images"] for batch in batches])), strict=True)))


@pytest.fixture
def load(tmp_path):
    return lambda **kwargs: load_streams(cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.mark.parametrize("write", [write_tars, write_parquets])
@pytest.mark.parametrize(["num_shards", "num_workers"], [(4, 0), (4, 2), (1, 0), (3, 2)])
def test_epoch_has_each_image_once(tmp_path, load, write, num_shards, num_workers):
    """Catches an image left out or seen twice by two processes and their workers, shared out by shards or one by one,
    gaps in the numbers of visits, and an order that is the files' or that of another epoch or seed."""
    write(tmp_path / "shards", num_shards, 24 // num_shards)
    stream = load(data_dir=tmp_path / "shards")["train"]
    orders = set()
    for epoch in range(2):
        visits = seen(batches_of(stream, 4 * epoch, 4 * (epoch + 1), 2, num_workers))
        assert list(visits) == list(range(24 * epoch, 24 * (epoch + 1)))
        assert sorted(visits.values()) == list(range(24))
        orders.add(tuple(visits.values()))
    orders.add(tuple(seen(batches_of(stream, 0, 4, 2, num_workers, seed=1)).values()))
    assert len(orders) == 3 and tuple(range(24)) not in orders


def test_readers_own_shards(tmp_path, load):
    """Catches shards that are read by more than one reader although there are enough, or by none."""
    write_tars(tmp_path / "shards", 5, 4)
    stream = load(data_dir=tmp_path / "shards")["train"]
    shares = [{stream.name(item).split("/")[-2] for item in stream.read(reader, 3, (0, 0), 2)} for reader in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1] and len(set.union(*shares)) == 5
    items = [stream.name(item) for reader in range(3) for item in stream.read(reader, 3, (0, 0), 2)]
    assert len(items) == len(set(items)) == 20


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_resume_at_a_batch(tmp_path, load, num_workers):
    """Catches a resumed run that sees other images, crops or visits than the uninterrupted one, whichever worker comes
    first, within the first epoch or long after."""
    write_tars(tmp_path / "shards", 2, 7, bad=(4,))
    stream = load(data_dir=tmp_path / "shards")["train"]
    transform = ImageTransform(4, random_crop=True, random_flip=True)
    images = StreamedImages(stream, transform, seed=2, shuffle_buffer=4)
    whole = list(image_batches(images, 3, 0, 20, 1, 2, num_workers))
    for first in (1, 2, 5, 18):
        rest = list(image_batches(images, 3, first, 20, 1, 2, num_workers))
        assert len(rest) == 20 - first
        for batch, expected in zip(rest, whole[first:], strict=True):
            assert torch.equal(batch["images"], expected["images"])
            assert torch.equal(batch["visits"], expected["visits"]) and batch["bad"] == expected["bad"]


def test_skipping_is_cheap(tmp_path, load, monkeypatch):
    """Catches a resume that decodes what it passes over, or that reads all epochs before it."""
    write_tars(tmp_path / "shards", 2, 6)
    stream = load(data_dir=tmp_path / "shards")["train"]
    epochs, decoded = [], []
    read, decode = ImageStream.read, ImageStream.decode
    monkeypatch.setattr(ImageStream, "read", lambda self, *args: epochs.append(args[2][1]) or read(self, *args))
    monkeypatch.setattr(ImageStream, "decode", lambda self, item: decoded.append(item) or decode(self, item))
    visits = seen(batches_of(stream, 4 * 1000 + 1, 4 * 1000 + 4))
    assert len(decoded) == 9 and epochs == [0, 1000]
    assert list(visits) == list(range(12_003, 12_012)) and len(set(visits.values())) == 9


def test_bad_image_is_replaced(tmp_path, load):
    """Catches a bad image that stops the stream, goes unreported or moves all later images, and one whose name does
    not lead to it."""
    for folder, bad in (("good", ()), ("bad", (0, 3, 4, 11))):
        write_tars(tmp_path / folder, 2, 6, bad)
    good, with_bad = (load(data_dir=tmp_path / folder)["train"] for folder in ("good", "bad"))
    expected, batches = seen(batches_of(good, 0, 8)), batches_of(with_bad, 0, 8)
    actual = seen(batches)
    for visit in reversed(expected):
        if visit == 23 and expected[visit] in (0, 3, 4, 11):
            continue
        assert actual[visit] == (actual[visit + 1] if expected[visit] in (0, 3, 4, 11) else expected[visit])
    reported = [bad for batch in batches for bad in batch["bad"]]
    names = {f"{tmp_path}/bad/train-{i // 6:03d}.tar/{i:05d}.png" for i in (0, 3, 4, 11)}
    assert {name for name, _ in reported} == names and {reason for _, reason in reported} == {
        "no image of a known format"
    }
    assert 7 <= len(reported) <= 8


def test_only_bad_images(tmp_path, load):
    """Catches a stream read forever for a good image."""
    write_tars(tmp_path / "shards", 1, 6, tuple(range(6)))
    with pytest.raises(OSError, match="100 images in a row cannot be used, among them .*/0000"):
        batches_of(load(data_dir=tmp_path / "shards")["train"], 0, 1)


def test_more_readers_than_images(tmp_path, load):
    """Catches a reader without images that waits forever."""
    write_tars(tmp_path / "shards", 1, 2)
    with pytest.raises(OSError, match="no images for reader 2 of 3: use fewer workers"):
        batches_of(load(data_dir=tmp_path / "shards")["train"], 0, 1, num_processes=3)


@pytest.mark.parametrize("num_processes", [1, 4])
def test_held_out_of_a_stream(tmp_path, load, num_processes):
    """Catches training on held-out images or on copies of them, in whatever order they come."""
    write_tars(tmp_path / "shards", 2, 6)
    write_tars(tmp_path / "shards", 1, 4, name="copies-train-{:03d}.tar")
    train, held_out = hold_out(load(data_dir=tmp_path / "shards"), "train", None, 5)
    originals = stack_images(held_out, 8)
    assert shades(originals) == [0, 1, 2, 3, 0]
    visits = seen(batches_of(train, 0, 8 // num_processes, num_processes, batch_size=1))
    assert sorted(visits.values()) == list(range(4, 12))
    with pytest.raises(ValueError, match="17 images cannot be held out of 16: lower --num_validation_images"):
        hold_out(load(data_dir=tmp_path / "shards"), "train", None, 17)


def test_held_out_split(tmp_path, load):
    """Catches a training stream shortened although there are held-out images, or read into memory as a whole."""
    write_tars(tmp_path / "shards", 1, 6)
    write_tars(tmp_path / "shards", 1, 3, name="val-{}.tar")
    train, held_out = hold_out(load(data_dir=tmp_path / "shards"), "train", None, 2)
    assert shades(stack_images(held_out, 8)) == [0, 1]
    assert sorted(seen(batches_of(train, 0, 2)).values()) == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards(tmp_path, load, num_workers):
    """Catches addresses that are taken for paths, a pattern in them, connections that a fork breaks, and shards that
    are stored."""
    pytest.importorskip("aiohttp", reason="fsspec[http] is not installed")
    write_tars(tmp_path / "shards", 4, 3)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "shards")
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/train-{{000..003}}.tar"
        stream, held_out = hold_out(load(data_dir=address), "train", None, 2)
        assert stream.num_shards == 4 and len(held_out) == 2
        visits = seen(batches_of(stream, 0, 12, num_workers=num_workers, batch_size=1))
    finally:
        server.shutdown()
        server.server_close()
    assert set(visits.values()) == set(range(2, 12))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def test_images_elsewhere(tmp_path):
    """Catches a stream of addresses of images that are not fetched, a missing one that stops the run, and names that
    do not tell images apart."""
    (tmp_path / "a.png").write_bytes(encoded(5))
    images = [{"path": f"file://{tmp_path}/{name}.png", "bytes": None} for name in "ab"]
    images += [{"path": "c.png", "bytes": encoded(shade)} for shade in (6, 7)] + [None]
    features = datasets.Features({"image": datasets.Image()})
    stream = ImageStream(datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset())
    items = {stream.name(item): item for item in stream.read(0, 1, (0, 0), 1)}
    assert len(items) == 5
    shown = {}
    for name, item in items.items():
        try:
            shown[name.split("/")[-1].split(" ")[0]] = np.asarray(stream.decode(item))[0, 0, 0].item()
        except BadImage as error:
            shown[name.split("/")[-1].split(" ")[0]] = str(error).split(":")[0]
    assert {name: shown[name] for name in ("a.png", "b.png", "image")} == {
        "a.png": 5,
        "b.png": "not found",
        "image": "missing",
    }
    assert shown["c.png"] in (6, 7)


def test_embedded_images(load):
    """Catches the embedded set that cannot be streamed."""
    found = load(dataset_name="emoji")
    assert set(found) == {"train", "test"} and len(found["test"].pick(3)) == 3


def test_errors(tmp_path, load):
    """Catches a mistake in the options that surfaces in a worker, or without the option's name."""
    with pytest.raises(ValueError, match="exactly one of .*--dataset_name.*--train_data_dir"):
        load()
    write_tars(tmp_path / "shards", 1, 2)
    with pytest.raises(ValueError, match=r"split=.other. does not exist: this dataset has \[.test., .train.\]"):
        load(dataset_name="emoji", split="other")
    with pytest.raises(ValueError, match=r"image_column='jpg' is no column of images: those are \['png'\]"):
        load(data_dir=tmp_path / "shards", image_column="jpg")
    (tmp_path / "images").mkdir()
    with pytest.raises(
        ValueError, match="--train_data_dir.*images is no stream: read it in place, without --streaming"
    ):
        load(data_dir=tmp_path / "images")
    with pytest.raises(ValueError, match="shuffle_buffer=0 must be at least 1"):
        StreamedImages(load(data_dir=tmp_path / "shards")["train"], ImageTransform(8), shuffle_buffer=0)


def test_uneven_shards_are_told(tmp_path, load, caplog):
    """Catches workers that each read the whole stream, or shares of unequal size, without a word."""
    write_tars(tmp_path / "shards", 2, 4)
    images = StreamedImages(load(data_dir=tmp_path / "shards")["train"], ImageTransform(8))
    image_batches(images, 1, 0, 1, 0, 2)
    assert not caplog.records
    image_batches(images, 1, 0, 1, 0, 3)
    assert "2 shards cannot be divided evenly among 3 readers (workers), so each has to read everything" in caplog.text
