"""Data sets for evaluation: each in the form in which it is downloaded, by one word, and by presets."""

import functools
import http.server
import io
import json
import tarfile
import threading
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml

from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.images import load_dataset_images, load_images
from flowmo_diffusers.data.nuscenes import _VALIDATION
from flowmo_diffusers.data.streams import ImageStream
from flowmo_diffusers.data.transforms import ImageTransform


PRESETS = Path(__file__).parents[1] / "training" / "configs" / "evaluation"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` waits for 5 seconds after each pass over parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def load(tmp_path):
    """`load_dataset_images` with a cache that the test throws away."""
    return functools.partial(load_dataset_images, cache_dir=tmp_path / "cache")


def encoded(shade: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 9), (shade, shade, shade)).save(file, format)
    return file.getvalue()


def write(folder, files: dict[str, int | str | None]) -> None:
    """Images of one shade, texts, or files of no image."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value, "JPEG") if isinstance(value, int) else (value or "no image").encode())


def write_tar(path, shades: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for shade in shades:
            info = tarfile.TarInfo(f"{shade:03d}.png")
            info.size = len(encoded(shade))
            tar.addfile(info, io.BytesIO(encoded(shade)))


def shades(source) -> list[int]:
    return [np.asarray(source[i])[0, 0, 0].item() for i in range(len(source))]


def splits(folder, **options) -> dict[str, list[int]]:
    found = load_images(data_dir=folder, cache_dir=folder.parent / "cache", **options)
    return {name: shades(source) for name, source in found.items()}


FOOD = {"images/pie/1.jpg": 1, "images/pie/2.jpg": 2, "images/soup/3.jpg": 3, "images/soup/4.jpg": 4}
FOOD_LISTS = {"meta/train.txt": "soup/3\npie/1\n", "meta/test.txt": "pie/2\nsoup/4", "meta/classes.txt": "pie\nsoup"}


def test_food101(tmp_path):
    """Catches the lists' splits ignored, an order other than theirs, and images in none of them."""
    write(tmp_path / "set", FOOD | FOOD_LISTS | {"images/pie/5.jpg": 5, "meta/train.json": "{}", "README.txt": "food"})
    expected = {"train": [3, 1], "test": [2, 4]}
    assert splits(tmp_path / "set") == expected
    assert shades(load_dataset_images(tmp_path / "set")) == [2, 4]
    (tmp_path / "set" / "meta" / "train.txt").unlink()
    assert splits(tmp_path / "set", split="test") == {"test": [2, 4]}
    with pytest.raises(ValueError, match=r"split='train' does not exist: this dataset has \['test'\]"):
        splits(tmp_path / "set")


def test_food101_incomplete(tmp_path):
    """Catches an unpacking that broke off and whose missing images are left out of a published figure."""
    write(tmp_path / "set", FOOD | FOOD_LISTS)
    for name in ("2.jpg", "1.jpg"):
        (tmp_path / "set" / "images" / "pie" / name).unlink()
    with pytest.raises(OSError, match="set lacks 1 of the 2 images that it lists as 'train', .*first is .*pie/1.jpg"):
        splits(tmp_path / "set")
    (tmp_path / "set" / "meta" / "train.txt").write_text("\n")
    with pytest.raises(OSError, match=r"set lacks 0 of the 0 images that it lists as 'train'$"):
        splits(tmp_path / "set")


def test_openimages(tmp_path):
    """Catches a split of flat JPEGs that is mixed with another, and tables or archives beside them taken for data."""
    images = {"train/00a.jpg": 1, "validation/00b.jpg": 2, "validation/00c.jpg": 3, "test/00d.jpg": 4}
    others = {"validation-annotations-bbox.csv": None, "train_0.tar.gz": None, "class-descriptions.csv": None}
    write(tmp_path / "set", images | others)
    assert splits(tmp_path / "set") == {"train": [1], "validation": [2, 3], "test": [4]}
    assert shades(load_dataset_images(tmp_path / "set")) == [2, 3]
    assert shades(load_dataset_images(tmp_path / "set" / "test")) == [4]


@pytest.mark.parametrize("classes", ["", "n01440764/"])
def test_imagenet_unpacked(tmp_path, classes):
    """Catches the validation images, flat or in folders of classes, not found by the folder above or by their own."""
    images = {f"val/{classes}ILSVRC2012_val_{i:08d}.JPEG": i for i in (1, 2)}
    write(tmp_path / "set", images | {"train/n01440764/n01440764_10.JPEG": 9, "meta.bin": None})
    assert splits(tmp_path / "set") == {"train": [9], "validation": [1, 2]}
    for place in ("set", "set/val"):
        assert shades(load_dataset_images(tmp_path / place)) == [1, 2]
        assert shades(load_dataset_images(tmp_path / place, "validation")) == [1, 2]


def test_only_the_split_is_opened(tmp_path, load):
    """Catches the headers of ImageNet's training set (140 GB) read for the sake of its validation images."""
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", range(2))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"not to be read")
    assert shades(load(tmp_path)) == [0, 1]


def nuscenes(version: str, scenes: dict[str, list[str]]) -> dict[str, str | int]:
    """
    Files as they are downloaded: of each scene one sample for each name given, with images of all cameras at its
    moment and a little later. Shades count the keyframes.
    """
    rows = {"scene": [], "sample": [], "sample_data": []}
    files, shade = {}, 0
    for scene, samples in scenes.items():
        rows["scene"].append({"token": f"token of {scene}", "name": scene, "nbr_samples": len(samples)})
        for sample in samples:
            rows["sample"].append({"token": sample, "scene_token": f"token of {scene}", "timestamp": 1})
            for sensor in ("CAM_FRONT", "CAM_BACK_LEFT", "LIDAR_TOP"):
                for key_frame, folder in ((True, "samples"), (False, "sweeps")):
                    camera = sensor.startswith("CAM")
                    name = f"{folder}/{sensor}/{version}-{sample}." + ("jpg" if camera else "pcd.bin")
                    row = {"sample_token": sample, "filename": name, "is_key_frame": key_frame, "prev": ""}
                    rows["sample_data"].append({"token": name, **row})
                    shade += camera and key_frame
                    files[name] = (shade if key_frame else 200) if camera else None
    return files | {f"{version}/{name}.json": json.dumps(table, indent=0) for name, table in rows.items()}


def test_nuscenes(tmp_path):
    """Catches sweeps, maps and point clouds among the images, cameras left out, and splits that are not the authors',
    so that a model is measured on scenes it was trained on."""
    scenes = {"scene-0001": ["a", "b"], "scene-0003": ["c"], "scene-0796": ["d"]}
    files = nuscenes("v1.0-trainval", scenes) | {"maps/36092f.png": 250, "v1.0-trainval/log.json": "[]"}
    write(tmp_path / "set", files)
    # Sorted by path: first all of CAM_BACK_LEFT, whose numbers are even.
    assert splits(tmp_path / "set") == {"train": [2, 4, 1, 3], "validation": [6, 8, 5, 7]}
    found = load_dataset_images(tmp_path / "set")
    assert found.name(0) == str(tmp_path / "set" / "samples" / "CAM_BACK_LEFT" / "v1.0-trainval-c.jpg")

    write(
        tmp_path / "set", nuscenes("v1.0-test", {"scene-0003": ["e"]}) | nuscenes("v1.0-mini", {"scene-0001": ["f"]})
    )
    assert splits(tmp_path / "set")["test"] == [2, 1]
    assert {name: len(images) for name, images in splits(tmp_path / "set").items()} == {
        "train": 4,
        "validation": 4,
        "test": 2,
    }


def test_nuscenes_mini(tmp_path):
    """Catches the mini set split as the full one, in which two scenes of its training are validation."""
    scenes = {"scene-0796": ["a"], "scene-0916": ["b"], "scene-0103": ["c"], "scene-0061": ["d"]}
    write(tmp_path / "set", nuscenes("v1.0-mini", scenes))
    assert splits(tmp_path / "set") == {"train": [2, 8, 1, 7], "validation": [4, 6, 3, 5]}


def test_nuscenes_without_tables(tmp_path):
    """Catches camera images that cannot be used for want of tables, or a split made up for them."""
    files = nuscenes("v1.0-mini", {"scene-0103": ["a"]}) | {"maps/36092f.png": 250}
    write(tmp_path / "set", {name: value for name, value in files.items() if not name.startswith("v1.0")})
    assert splits(tmp_path / "set", split="any") == {"any": [2, 1]}


def test_nuscenes_damaged(tmp_path):
    """Catches a table or a part of the images that was not downloaded, found out late or not at all."""
    write(tmp_path / "set", nuscenes("v1.0-trainval", {"scene-0003": ["a"]}))
    image = tmp_path / "set" / "samples" / "CAM_FRONT" / "v1.0-trainval-a.jpg"
    image.unlink()
    with pytest.raises(OSError, match="set lacks 1 of the 2 images that it lists as 'validation'.*CAM_FRONT"):
        splits(tmp_path / "set")
    tables = tmp_path / "set" / "v1.0-trainval"
    for name, damage in (("sample", "[]"), ("scene", "[1]"), ("sample_data", '[{"token": 1}]'), ("scene", "[")):
        original = (tables / f"{name}.json").read_text()
        (tables / f"{name}.json").write_text(damage)
        with pytest.raises(OSError, match="tables of nuScenes in .*v1.0-trainval are damaged"):
            splits(tmp_path / "set")
        (tables / f"{name}.json").write_text(original)
    (tables / "scene.json").unlink()
    with pytest.raises(OSError, match="scene.json"):
        splits(tmp_path / "set")


def test_nuscenes_scenes():
    """Catches a mistake in the numbers of the official validation scenes, of which there are 150 (their sum was taken
    from the list of nuscenes-devkit)."""
    numbers = [number for first, last in _VALIDATION for number in range(first, last + 1)]
    assert len(numbers) == 150 and numbers == sorted(set(numbers)) and sum(numbers) == 88948


def test_one_word(tmp_path, load, monkeypatch):
    """Catches a path taken for a Hub id or the other way round, and a wrong path looked for on the Hub."""
    assert len(load("emoji")) == 256 and len(load("emoji", "train", num_images=10)) == 10
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        write(tmp_path, {f"owner/name/{i}.png": i, "emoji/a.png": 9})
        write_tar(tmp_path / "shards" / f"{i}.tar", range(i, i + 1))
    assert shades(load("owner/name")) == [0, 1, 2, 3] and load("owner/name").name(3) == "owner/name/3.png"
    assert shades(load("owner/name", num_images=2)) == [0, 2] and len(load("owner/name", num_images=9)) == 4
    assert shades(load("emoji", num_images=1)) != [9] and shades(load("./emoji")) == [9]
    assert shades(load("shards/{1..2}.tar")) == shades(load(f"{tmp_path}/shards/[12].tar")) == [1, 2]
    for path in ("/nowhere/images", "./images", "../images", "a/b/c"):
        with pytest.raises(OSError, match=f"{path} does not exist"):
            load(path)
    with pytest.raises(Exception, match="owner/other"):
        load("owner/other")
    with pytest.raises(ValueError, match="https://host/a.tar is not on this machine: stream it"):
        load("https://host/a.tar")


def test_split_that_is_evaluated(tmp_path, load):
    """Catches training images evaluated unasked, and a choice between splits made for the user."""
    for name in ("train", "val", "test"):
        write(tmp_path / "three", {f"{name}/a.png": len(name)})
    assert shades(load(tmp_path / "three")) == [3]
    assert shades(load(tmp_path / "three", "test")) == [4] and shades(load(tmp_path / "three", "train")) == [5]
    with pytest.raises(ValueError, match=r"split='dev' does not exist: .*\['test', 'train', 'validation'\]"):
        load(tmp_path / "three", "dev")
    write(tmp_path / "one", {"train/a.png": 1})
    assert shades(load(tmp_path / "one")) == [1]
    for name in ("a", "b"):
        rows = {"image": [{"bytes": encoded(1), "path": None}]}
        features = datasets.Features({"image": datasets.Image()})
        (tmp_path / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{name}.parquet")
    assert len(load(tmp_path / "hub")) == len(load(tmp_path / "hub", "fold_a")) == 2


def test_split_of_several(load, monkeypatch):
    """Catches the first of several folds taken for all."""
    folds = {name: datasets.Dataset.from_dict({"image": [encoded(1)]}) for name in ("fold2", "fold1")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: folds)
    with pytest.raises(ValueError, match=r"split \(--split\) must be one of \['fold1', 'fold2'\]"):
        load("owner/name")
    assert len(load("owner/name", "fold1")) == 1


def test_stored_stream(tmp_path, load, monkeypatch):
    """Catches a stream that is read as a whole, read again at every start, or whose images are not the first ones, in
    their order; and images of shards that were written anew since."""
    for i in range(3):
        write_tar(tmp_path / "shards" / f"val-{i}.tar", range(10 * i, 10 * i + 10))
    source = load(tmp_path / "shards", num_images=15, streaming=True)
    assert shades(source) == list(range(15)) and shades(source.select([12, 3])) == [12, 3]
    fingerprint, names = source.fingerprint(), {source.name(i) for i in range(15)}
    assert len(names) == 15 and any("012.png" in name for name in names)
    with monkeypatch.context() as patch:
        patch.setattr(ImageStream, "_stored", None)
        again = load(tmp_path / "shards", num_images=15, streaming=True)
        assert shades(again) == list(range(15)) and again.fingerprint() == fingerprint
    assert shades(load(tmp_path / "shards", num_images=2, streaming=True)) == [0, 1]
    assert len(load(tmp_path / "shards", num_images=99, streaming=True)) == 30
    write_tar(tmp_path / "shards" / "val-0.tar", range(100, 110))
    assert shades(load(tmp_path / "shards", num_images=2, streaming=True)) == [100, 101]


def test_stored_parts(tmp_path, load):
    """Catches images of another split or column than the one asked for, stored before under the same name."""
    for name, shade in (("train", 1), ("val", 3)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for field, content in (("input.png", encoded(shade)), ("output.png", encoded(shade + 1))):
                info = tarfile.TarInfo(f"a.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = [
        shades(load(f"{tmp_path}/*.tar", split, image_column=column, num_images=1, streaming=True))
        for split in ("train", "validation")
        for column in ("input.png", "output.png")
    ]
    assert found == [[1], [2], [3], [4]]


def test_stored_embedded_stream(load):
    """Catches a stream of parquet files that differs from the files read in place."""
    streamed = load("emoji", "train", num_images=3, streaming=True)
    whole = load("emoji", "train")
    assert len(streamed) == 3 and all(np.array_equal(streamed[i], whole[i]) for i in range(3))


def test_stored_addresses(tmp_path):
    """Catches images elsewhere of which only the address is kept, and missing ones that end the storing."""
    (tmp_path / "a.png").write_bytes(encoded(5))
    images = [{"path": f"file://{tmp_path}/{name}.png", "bytes": None} for name in "ab"] + [None]
    images += [{"path": "c.png", "bytes": encoded(6)}, {"path": str(tmp_path / "a.png"), "bytes": None}]
    features = datasets.Features({"image": datasets.Image()})
    stream = ImageStream(datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset())
    source = stream.store(tmp_path / "cache" / "some.arrow", 10)
    assert len(source) == 5 and shades(source.select([0, 3, 4])) == [5, 6, 5]
    for number in (1, 2):
        with pytest.raises(BadImage):
            source[number]
    (tmp_path / "a.png").write_bytes(encoded(7))
    assert shades(source.select([0, 4])) == [5, 7]


def test_storing_breaks_off(tmp_path):
    """Catches half of the images taken for all after a run was killed while they were stored."""

    def images():
        yield {"image": encoded(1)}
        raise ConnectionError("gone")

    features = datasets.Features({"image": datasets.Value("binary")})
    stream = ImageStream(datasets.IterableDataset.from_generator(images, features=features))
    with pytest.raises(ConnectionError):
        stream.store(tmp_path / "some.arrow", 10)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_memory_of_storing(tmp_path):
    """Catches a stream held in memory until all of it is stored."""

    def images():
        for i in range(600):
            yield {"image": bytes([i % 256]) * 100_000}

    features = datasets.Features({"image": datasets.Value("binary")})
    stream = ImageStream(datasets.IterableDataset.from_generator(images, features=features))
    tracemalloc.start()
    try:
        stream.store(tmp_path / "some.arrow", 600)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert (tmp_path / "some.arrow").stat().st_size > 60_000_000


def test_address(tmp_path, load):
    """Catches an address that is taken for a Hub id or a path, and whose images are fetched at every start."""
    pytest.importorskip("aiohttp", reason="fsspec[http] is not installed")
    write_tar(tmp_path / "shards" / "0.tar", range(5))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "shards")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/0.tar"
        assert shades(load(address, num_images=4, streaming=True)) == [0, 1, 2, 3]
    finally:
        server.shutdown()
        server.server_close()


def test_stream_errors(tmp_path, load):
    """Catches a stream without an end that is stored, and an error without the option's name."""
    with pytest.raises(ValueError, match="--num_images.* how many images of a stream"):
        load("emoji", streaming=True)
    with pytest.raises(ValueError, match=r"split='dev' does not exist: .*\['test', 'train'\]"):
        load("emoji", "dev", num_images=1, streaming=True)
    write(tmp_path / "images", {"a.png": 1})
    with pytest.raises(ValueError, match="images is no stream: read it in place, without --streaming"):
        load(tmp_path / "images", num_images=1, streaming=True)


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets(preset):
    """Catches a preset of values that are no transform, or of another split than that of published figures."""
    values = yaml.safe_load(preset.read_text())
    assert set(values) <= {"split", "resolution", "interpolation", "crop", "num_images", "batch_size"}
    assert values["split"] == {"food101_256": "test"}.get(preset.stem, "validation")
    transform = ImageTransform(values["resolution"], interpolation=values["interpolation"], crop=values["crop"])
    image = PIL.Image.new("RGB", (1600, 900))
    assert transform(image).shape == (3, 256, 256)


def test_there_is_a_preset():
    """Catches presets that were moved, so that none is tested."""
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {
        "imagenet_256",
        "openimages_256",
        "food101_256",
        "nuscenes",
    }
