"""Images in: every source gives what it holds, and what a training visit shows depends on seed and visit alone."""

import io
import json
import logging
import os
import signal

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import get_worker_info

from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.images import hold_out, load_images, stack_images
from flowmo_diffusers.data.loading import BadImages, ShuffledImages, image_batches
from flowmo_diffusers.data.sources import DatasetImages
from flowmo_diffusers.data.transforms import ImageTransform


def write_image(path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (10, 8), (shade, shade, shade)).save(path)


def shaded(count: int, bad: tuple[int, ...] = (), **columns) -> datasets.Dataset:
    """Image i is uniformly of shade i, so that its one value tells which image it is; bad ones are no images."""
    images = []
    for i in range(count):
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (i, i, i)).save(file, "PNG")
        images.append({"bytes": b"rubbish" if i in bad else file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("int64") for name in columns}})
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


def source(count: int, bad: tuple[int, ...] = ()) -> DatasetImages:
    return DatasetImages(shaded(count, bad))


def of_images(*images: PIL.Image.Image) -> DatasetImages:
    features = datasets.Features({"image": datasets.Image()})
    return DatasetImages(datasets.Dataset.from_dict({"image": list(images)}, features=features))


def shades(images) -> list[int]:
    return [np.asarray(images[i])[0, 0, 0].item() for i in range(len(images))]


def shade(pixels: torch.Tensor) -> int:
    """Which image of `shaded` a tensor shows."""
    assert pixels.min() == pixels.max()
    return round((pixels[0, 0, 0].item() + 1) * 127.5)


@pytest.fixture
def load(tmp_path):
    """`load_images` with a cache that the test throws away."""
    return lambda *args, **kwargs: load_images(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.fixture
def noise_image() -> PIL.Image.Image:
    """50 x 30 pixels, none like its neighbour."""
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


def test_class_folders(tmp_path, load):
    """Catches images of a nested folder that are lost, hidden files or others taken for images, a name that is not the
    path, or `split` ignored."""
    folder = tmp_path / "images"
    for i, name in enumerate(("a.png", "cat/b.PNG", "cat/deep/er/c.jpg", "dog/d.webp", "dog/e.tiff")):
        write_image(folder / name, i)
    for name in (".hidden.png", ".cache/f.png", "dog/._g.png"):
        write_image(folder / name, 99)
    (folder / "notes.txt").touch()
    found = load(data_dir=folder)
    assert list(found) == ["train"] and shades(found["train"]) == [0, 1, 2, 3, 4]
    assert found["train"].name(1) == str(folder / "cat" / "b.PNG")
    assert list(load(data_dir=folder, split="validation")) == ["validation"]


def test_linked_folders(tmp_path, load):
    """Catches a data folder put together by links that seems empty."""
    write_image(tmp_path / "elsewhere" / "a.png", 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    assert shades(load(data_dir=tmp_path / "images")["train"]) == [1]


@pytest.mark.parametrize(
    "names", [("cat/crash-test.png", "crash-test/b.png"), ("a.png", "b.png", "train_station.png")]
)
def test_names_that_hold_a_split(tmp_path, load, names):
    """Catches "test" in the name of an image or class taken for a split, and every other image dropped."""
    for i, name in enumerate(names):
        write_image(tmp_path / "images" / name, i)
    found = load(data_dir=tmp_path / "images")
    assert list(found) == ["train"] and shades(found["train"]) == list(range(len(names)))


def test_split_folders(tmp_path, load):
    """Catches train, val and test folders that are taken for classes, or mixed."""
    for i, name in enumerate(("train/cat/a.png", "train/dog/test-b.png", "val2017/c.png", "test/cat/d.png")):
        write_image(tmp_path / "images" / name, i)
    found = load(data_dir=tmp_path / "images")
    assert {name: shades(split) for name, split in found.items()} == {"train": [0, 1], "validation": [2], "test": [3]}


def test_class_named_like_a_split(tmp_path, load):
    """Catches a class "train" beside others for which all others are dropped; the error tells what to do."""
    for i, name in enumerate(("boat/a.png", "train/b.png")):
        write_image(tmp_path / "images" / name, i)
    with pytest.raises(ValueError, match=r"data_dir .*holds splits \['train'\] by name, but also \['boat'\]"):
        load(data_dir=tmp_path / "images")


def test_parquet_file(tmp_path, load):
    """Catches a file that is not read as the split asked for, or that its name turns into another split."""
    shaded(3).to_parquet(tmp_path / "test.parquet")
    found = load(data_dir=tmp_path / "test.parquet")
    assert shades(found["train"]) == [0, 1, 2] and found["train"].name(2) == "train row 2"
    assert found["train"].select([2, 0]).name(0) == "train row 2"
    assert list(load(data_dir=tmp_path / "test.parquet", split="validation")) == ["validation"]


def test_folder_of_parquet_files(tmp_path, load):
    """Catches shards that are left out, or splits that their names give and that are lost."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "split").mkdir()
    images = shaded(6)
    for i, folder, name in ((0, "plain", "a"), (1, "plain", "b"), (2, "split", "train-0"), (4, "split", "test-0")):
        images.select(range(i, i + 2)).to_parquet(tmp_path / folder / f"{name}.parquet")
    images.select([0]).to_parquet(tmp_path / "split" / "train-1.parquet")
    assert shades(load(data_dir=tmp_path / "plain")["train"]) == [0, 1, 1, 2]
    found = load(data_dir=str(tmp_path / "split"))
    assert {name: shades(split) for name, split in found.items()} == {"train": [2, 3, 0], "test": [4, 5]}


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_of_others(tmp_path, load, kind):
    """Catches encoded images that other programs wrote, without `datasets`' description of the column."""
    encoded = [row["bytes"] for row in shaded(3).cast_column("image", datasets.Image(decode=False))["image"]]
    values = (
        pa.array([{"bytes": data} for data in encoded]) if kind == "struct" else pa.array(encoded, getattr(pa, kind)())
    )
    pq.write_table(pa.table({"id": [1, 2, 3], "picture": values}), tmp_path / "a.parquet")
    for column in ("image", "picture"):
        assert shades(load(data_dir=tmp_path / "a.parquet", image_column=column)["train"]) == [0, 1, 2]


def test_local_dataset(tmp_path, load):
    """Catches a dataset folder (or Hub id) that goes another way than by `datasets`."""
    shaded(3).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    assert shades(load(str(tmp_path / "set"))["train"]) == [0, 1, 2]


def test_embedded_images(load):
    """Catches the embedded set losing a split, or needing the network."""
    found = load("emoji")
    assert {name: len(split) for name, split in found.items()} == {"train": 3018, "test": 256}
    assert isinstance(found["train"][0], PIL.Image.Image) and found["train"].labels() is not None


def test_embedded_birds(load):
    """Catches a rebuild of the photos that loses some, or has one in both splits."""
    found = load("birds")
    assert {name: len(split) for name, split in found.items()} == {"train": 819, "test": 100}
    photos = [source[number].tobytes() for source in found.values() for number in range(len(source))]
    assert {len(photo) for photo in photos} == {120 * 120 * 3} and len(set(photos)) == 919
    credits = asset_path("birds", "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC BY 2.0" in credits and credits.count('\n- "') == 919


def test_embedded_sets_together(load):
    """Catches a joint set that has other images or proportions than its parts, or labels of one for all."""
    both, emoji, birds = load("emoji+birds"), load("emoji"), load("birds")
    assert len(both["train"]) == 3018 + 3 * 819 and len(both["test"]) == 256 + 100
    for number, part in ((17, emoji["train"][17]), (3018, birds["train"][0]), (3018 + 819 + 5, birds["train"][5])):
        assert both["train"][number].tobytes() == part.tobytes()
    assert both["test"][256].tobytes() == birds["test"][0].tobytes()
    assert both["train"].labels() is None


def test_source_errors(tmp_path, load):
    """Catches a mistake in the options that surfaces far from them, or without the option's name."""
    with pytest.raises(ValueError, match="exactly one of .*--dataset_name.*--train_data_dir"):
        load()
    with pytest.raises(ValueError, match="exactly one of .*--dataset_name.*--train_data_dir"):
        load("emoji", data_dir=tmp_path)
    with pytest.raises(OSError, match="--train_data_dir.*nowhere does not exist"):
        load(data_dir=tmp_path / "nowhere")
    write_image(tmp_path / "one.png", 0)
    with pytest.raises(OSError, match="--train_data_dir.*must be a folder, .tar .*, not .*one.png"):
        load(data_dir=tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="no images in .*empty"):
            load(data_dir=tmp_path / "empty")
        (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"split='validation' does not exist: this dataset has \['test', 'train'\]"):
        load("emoji", split="validation")
    with pytest.raises(ValueError, match="--train_data_dir.*not on this machine: stream it"):
        load(data_dir="https://somewhere/train-000.tar")


def test_column_errors():
    """Catches a wrong --image_column that surfaces inside a worker, labels taken for images, and a choice made for the
    user."""
    dataset = shaded(2, label=[0, 1])
    for name in ("picture", "label"):
        with pytest.raises(ValueError, match=rf"image_column='{name}' is no column of images: those are \['image'\]"):
            DatasetImages(dataset, name)
    assert len(DatasetImages(dataset.rename_column("image", "img"))) == 2
    features = datasets.Features({name: datasets.Image() for name in ("a", "b")})
    two = datasets.Dataset.from_dict({"a": dataset["image"], "b": dataset["image"]}, features=features)
    with pytest.raises(ValueError, match=r"image_column='image' is no column of images: those are \['a', 'b'\]"):
        DatasetImages(two)


def test_missing_image():
    """Catches an empty place in a column, or a file that is gone, ending the run."""
    features = datasets.Features({"image": datasets.Image()})
    rows = [None, {"bytes": None, "path": "nowhere.png"}]
    images = DatasetImages(datasets.Dataset.from_dict({"image": rows}, features=features))
    for i, (name, reason) in enumerate((("dataset row 0", "missing"), ("nowhere.png", "FileNotFoundError"))):
        with pytest.raises(BadImage, match=reason):
            images[i]
        assert images.name(i) == name


def test_order_of_a_source():
    """Catches an order that is the same for all epochs or seeds, has gaps, or is not what its arguments say; and a
    buffer that has no effect where images are not in tar files."""
    images = source(192)
    assert images.shuffle_buffer is None
    orders = [images.order(seed, epoch, buffer) for seed in (0, 1) for epoch in (0, 1) for buffer in (None, 16)]
    assert all(np.array_equal(np.sort(order), np.arange(192)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8
    assert np.array_equal(images.order(1, 1, 16), orders[-1])
    assert all(np.ptp(orders[1][start : start + 16]) == 15 for start in range(0, 192, 16))


@pytest.mark.parametrize("named", [None, "test"])
def test_hold_out_from_a_split(named):
    """Catches held-out images that change with the length of training, or a split that is shortened for nothing."""
    found = {"train": source(5), "test": source(4), "other": source(2)}
    train, held_out = hold_out(found, "train", named, 3)
    assert (shades(train), shades(held_out)) == ([0, 1, 2, 3, 4], [0, 1, 2])
    assert len(hold_out(found, "train", named, 100)[1]) == 4
    assert shades(hold_out(found, "train", "other", 1)[1]) == [0]
    assert shades(hold_out({"train": source(5), "test": source(100)}, "train", None, 4)[1]) == [0, 25, 50, 75]


def test_hold_out_of_training():
    """Catches training on held-out images where the training split is all there is, and held-out images of one class
    where it is sorted."""
    for split in ("train", "test"):
        train, held_out = hold_out({split: source(10)}, split, None, 4)
        assert (shades(train), shades(held_out)) == ([1, 3, 4, 6, 8, 9], [0, 2, 5, 7])


def test_hold_out_errors():
    """Catches a training split left empty, and a split that cannot be held out replaced by another one unasked."""
    found = {"train": source(3)}
    with pytest.raises(ValueError, match="3 images cannot be held out of 3: lower --num_validation_images"):
        hold_out(found, "train", None, 3)
    for name in ("val", "train"):
        with pytest.raises(ValueError, match=f"validation_split='{name}' must be a split beside 'train'"):
            hold_out(found, "train", name, 1)


def test_transform_equals_pillow(noise_image):
    """Catches another filter, a resize of the longer side, or a crop that is off the centre."""
    wide = np.asarray(noise_image.resize((27, 16), PIL.Image.Resampling.BILINEAR).crop((5, 0, 21, 16)))
    assert torch.equal(ImageTransform(16)(noise_image), torch.tensor(wide).permute(2, 0, 1) / 127.5 - 1)
    tall = noise_image.transpose(PIL.Image.Transpose.ROTATE_90)
    expected = np.asarray(tall.resize((16, 27), PIL.Image.Resampling.BILINEAR).crop((0, 5, 16, 21)))
    assert torch.equal(ImageTransform(16)(tall), torch.tensor(expected).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_interpolations(noise_image, name):
    """Catches a name that stands for another of Pillow's filters."""
    expected = noise_image.resize((27, 16), PIL.Image.Resampling[name.upper()]).crop((5, 0, 21, 16))
    assert_shows(ImageTransform(16, interpolation=name)(noise_image), expected)


@pytest.mark.parametrize(
    ["size", "halves", "resized", "corner"],
    [
        ((80, 70), [(40, 35), (20, 17)], (19, 16), (1, 0)),
        ((70, 129), [(35, 64), (17, 32)], (16, 30), (0, 7)),
        ((64, 32), [(32, 16)], (32, 16), (8, 0)),
        ((31, 200), [], (16, 103), (0, 43)),
    ],
)
def test_adm(size, halves, resized, corner):
    """Catches a halving too many or too few, by another filter, or one after which proportions are the image's and not
    those of the halved one, as guided-diffusion has it."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    expected = image
    for half in halves:
        # The mean of 2 x 2 pixels, a last odd row or column being shared by its neighbours.
        expected = expected.resize(half, PIL.Image.Resampling.BOX)
    expected = expected.resize(resized, PIL.Image.Resampling.BICUBIC)
    left, top = corner
    expected = expected.crop((left, top, left + 16, top + 16))
    assert_shows(ImageTransform(16, interpolation="adm")(image), expected)


def assert_shows(actual: torch.Tensor, expected: PIL.Image.Image) -> None:
    assert torch.equal(actual, torch.tensor(np.asarray(expected)).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize(
    ["size", "resized", "corner"],
    [
        ((50, 30), (26, 16), (5, 0)),  # 26.67 x 16
        ((51, 30), (27, 16), (6, 0)),  # 27.2 x 16, at 5.5
        ((30, 53), (16, 28), (0, 6)),  # 16 x 28.27
        ((30, 55), (16, 29), (0, 6)),  # 16 x 29.33, at 6.5, to the even
        ((30, 30), (16, 16), (0, 0)),
    ],
)
def test_crop_of_torchvision(size, resized, corner):
    """Catches crops that are a pixel away from those that published figures were measured on."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    left, top = corner
    expected = image.resize(resized, PIL.Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16))
    assert_shows(ImageTransform(16, crop="torchvision")(image), expected)


def test_size_of_torchvision(monkeypatch):
    """Catches a longer side that is off by one where the quotient is whole but its factors are not (as 49 / 98)."""
    sizes = []
    monkeypatch.setattr(
        PIL.Image.Image, "resize", lambda image, size, *args: sizes.append(size) or PIL.Image.new("RGB", size)
    )
    for shorter in range(20, 60):
        for longer in range(shorter, 90):
            ImageTransform(15, crop="torchvision")(PIL.Image.new("RGB", (longer, shorter)))
            assert sizes.pop() == (15 * longer // shorter, 15)


@pytest.mark.parametrize("crop", ["center", "torchvision"])
def test_rectangles(noise_image, crop):
    """Catches height taken for width, and a crop that the image does not cover or that shows less than it could."""
    covers = noise_image.resize((24, 14), PIL.Image.Resampling.BILINEAR).crop((0, 3, 24, 11))
    assert_shows(ImageTransform((8, 24), crop=crop)(noise_image), covers)
    covers = noise_image.transpose(PIL.Image.Transpose.ROTATE_90)
    expected = covers.resize((14, 24), PIL.Image.Resampling.BILINEAR).crop((3, 0, 11, 24))
    assert_shows(ImageTransform((24, 8), crop=crop)(covers), expected)
    assert torch.equal(ImageTransform((16, 16), crop=crop)(noise_image), ImageTransform(16, crop=crop)(noise_image))


def test_rectangle_of_adm():
    """Catches an image halved although one of its sides is needed in full."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 40, 3), np.uint8))
    expected = image.resize((24, 38), PIL.Image.Resampling.BICUBIC).crop((0, 15, 24, 23))
    assert_shows(ImageTransform((8, 24), interpolation="adm")(image), expected)


def test_without_crop(noise_image):
    """Catches a part of the image cut off, and a limit on elongated images where nothing is elongated."""
    expected = noise_image.resize((24, 8), PIL.Image.Resampling.LANCZOS)
    assert_shows(ImageTransform((8, 24), interpolation="lanczos", crop="none")(noise_image), expected)
    assert ImageTransform(16, crop="none")(PIL.Image.new("RGB", (1, 60_000))).shape == (3, 16, 16)


def test_transform_errors():
    """Catches a word that is not known and stands for the default, and a random crop that is none."""
    for options, message in (
        ({"interpolation": "nearest"}, r"interpolation='nearest' must be one of \['bilinear', .*'adm'\]"),
        ({"crop": "centre"}, r"crop='centre' must be one of \['center', 'torchvision', 'none'\]"),
        ({"crop": "none", "random_crop": True}, "crop='none' has no place for random_crop=True"),
        ({"crop": "torchvision", "max_scale": 1.5}, "crop='torchvision' has no place for .*max_scale=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTransform(16, **options)


def test_transform_as_json():
    """Catches a setting left out of what cached results are named after, or two ways to say the same that differ."""
    plain = ImageTransform(16).to_dict()
    assert json.loads(json.dumps(plain)) == plain == ImageTransform((16, 16)).to_dict()
    others = [
        ImageTransform(17),
        ImageTransform((16, 17)),
        ImageTransform(16, random_crop=True),
        ImageTransform(16, random_flip=True),
        ImageTransform(16, max_scale=2.0),
        ImageTransform(16, interpolation="adm"),
        ImageTransform(16, crop="none"),
    ]
    assert len({json.dumps(other.to_dict()) for other in others} | {json.dumps(plain)}) == 8


def test_transform_range():
    """Catches black or white that is not exactly -1 or 1, or pixels that are rescaled where nothing needs it."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    result = ImageTransform(16)(PIL.Image.fromarray(pixels))
    assert (result.dtype, result.shape) == (torch.float32, (3, 16, 16))
    assert (result.min(), result.max()) == (-1, 1)
    assert torch.equal(((result[0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 3), (40, 20)])
def test_any_image(mode, size):
    """Catches a mode that does not become three channels, or a small image that does not fill the square."""
    image = PIL.Image.new("RGB", size, (255, 255, 255)).convert(mode)
    for transform in (ImageTransform(8), ImageTransform(8, random_crop=True, random_flip=True, max_scale=1.5)):
        assert torch.equal(transform(image, torch.Generator().manual_seed(0)), torch.ones(3, 8, 8))


def test_elongated(monkeypatch):
    """Catches a line of pixels that is resized to a picture of gigabytes, and a limit that the random scale passes."""
    with pytest.raises(BadImage, match="1 x 60000 pixels are too elongated to be resized to 256"):
        ImageTransform(256)(PIL.Image.new("RGB", (1, 60_000)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 16 * 32)
    for scale, good in ((1.0, True), (1.1, False)):
        transform, image = ImageTransform(16, max_scale=scale), PIL.Image.new("RGB", (4, 8))
        if good:
            transform(image)
        else:
            with pytest.raises(BadImage, match="elongated"):
                transform(image, torch.Generator())


def test_random_transform_is_the_generators(noise_image):
    """Catches a draw from the global generator, which no resumed run repeats."""
    transform = ImageTransform(16, random_crop=True, random_flip=True, max_scale=1.5)
    results = []
    for seed in (0, 0, *range(1, 20)):
        torch.manual_seed(len(results))
        results.append(transform(noise_image, torch.Generator().manual_seed(seed)))
    assert torch.equal(results[0], results[1])
    assert len({result.numpy().tobytes() for result in results}) == 20
    assert all(result.shape == (3, 16, 16) and -1 <= result.min() and result.max() <= 1 for result in results)


def test_random_crop_reaches_everything(noise_image):
    """Catches a crop that never touches an edge, leaves the image, or is resized although nothing asked for it."""
    image = noise_image.crop((0, 0, 20, 16))
    expected = {np.asarray(image.crop((left, 0, left + 16, 16))).tobytes() for left in range(5)}
    transform, generator = ImageTransform(16, random_crop=True), torch.Generator().manual_seed(0)
    results = [((transform(image, generator) + 1) * 127.5).round().byte() for _ in range(60)]
    assert {result.permute(1, 2, 0).contiguous().numpy().tobytes() for result in results} == expected


def test_random_scale_enlarges():
    """Catches a scale outside [1, max_scale]: a cut-off square would show another share of a horizontal ramp."""
    ramp = PIL.Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    transform, generator = ImageTransform(64, max_scale=2.0), torch.Generator().manual_seed(0)
    results = [transform(ramp, generator)[0, 0] for _ in range(40)]
    shares = torch.stack([(result[-1] - result[0]) / 2 for result in results])
    assert 0.48 < shares.min() < 0.56 and 0.9 < shares.max() <= 1


def test_flips_are_half():
    """Catches mirroring that never, always or rarely happens, or that is an upside-down image."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = 255
    images = of_images(*[PIL.Image.fromarray(pixels)] * 50)
    for random_flip, least, most in ((True, 150, 250), (False, 0, 0)):
        visits = ShuffledImages(images, ImageTransform(8, random_flip=random_flip), seed=1)
        corners = torch.stack([visits[v]["images"][0, 0, [0, -1]] for v in range(400)])
        assert (corners.sum(1) == 0).all()
        assert least <= (corners[:, 1] == 1).sum() <= most


@pytest.mark.parametrize("shuffle_buffer", [None, 3])
def test_each_epoch_has_each_image_once(shuffle_buffer):
    """Catches an image left out or shown twice, and an order that repeats over epochs or seeds."""
    orders = set()
    for seed in (0, 1):
        visits = ShuffledImages(source(11), ImageTransform(8), seed, shuffle_buffer)
        assert len(visits) == 11
        for epoch in range(4):
            order = [shade(visits[v]["images"]) for v in range(11 * epoch, 11 * (epoch + 1))]
            assert sorted(order) == list(range(11))
            orders.add(tuple(order))
    assert len(orders) == 8


def test_augmentation_changes_between_epochs_and_seeds(noise_image):
    """Catches crops drawn from an image's place in the dataset, or the same crops whatever the seed."""
    transform = ImageTransform(16, random_crop=True, random_flip=True, max_scale=1.5)
    runs = [ShuffledImages(of_images(noise_image), transform, seed) for seed in (0, 1)]
    assert len({visits[v]["images"].numpy().tobytes() for visits in runs for v in range(10)}) == 20


def noise_source(noise_image) -> DatasetImages:
    return of_images(*(noise_image.crop((i, i, i + 20, i + 17)) for i in range(7)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_visits_depend_on_seed_and_visit_alone(noise_image, num_workers):
    """Catches data that depend on the workers, or on where the run was started or resumed."""
    transform = ImageTransform(16, random_crop=True, random_flip=True, max_scale=1.5)
    images = ShuffledImages(noise_source(noise_image), transform, seed=5)
    expected = torch.stack([images[v]["images"] for v in reversed(range(24))]).flip(0)
    for first in (0, 2):
        images = ShuffledImages(noise_source(noise_image), transform, seed=5)
        loader = image_batches(images, 4, first, 6, num_workers=num_workers)
        assert len(loader) == 6 - first
        batches = list(loader)
        assert torch.equal(torch.cat([batch["images"] for batch in batches]), expected[4 * first :])
        assert torch.cat([batch["visits"] for batch in batches]).tolist() == list(range(4 * first, 24))
        assert {batch["visits"].dtype for batch in batches} == {torch.int64}
    other = ShuffledImages(noise_source(noise_image), transform, seed=6)
    assert not torch.equal(other[0]["images"], expected[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_processes_share_the_visits(num_workers):
    """Catches processes that train on the same images, leave some out, or take them in another order than one does."""
    images = ShuffledImages(source(7), ImageTransform(8))
    alone = list(image_batches(images, 6, 1, 5))
    parts = [image_batches(images, 3, 1, 5, process, 2, num_workers) for process in (0, 1)]
    for joint, *batches in zip(alone, *parts, strict=True):
        assert torch.equal(joint["images"], torch.cat([batch["images"] for batch in batches]))
        assert torch.equal(joint["visits"], torch.cat([batch["visits"] for batch in batches]))


def test_shuffled_images_errors():
    """Catches a run over nothing that ends in a division, and a buffer of nothing."""
    with pytest.raises(ValueError, match="the dataset is empty"):
        ShuffledImages(source(3).select([]), ImageTransform(8))
    with pytest.raises(ValueError, match="shuffle_buffer=0 must be at least 1"):
        ShuffledImages(source(3), ImageTransform(8), shuffle_buffer=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_is_replaced(num_workers):
    """Catches a bad image that stops the run, goes unreported, disturbs other visits, or is replaced by always the
    same image or one that depends on the workers."""
    good, with_bad = (ShuffledImages(source(9, bad), ImageTransform(8)) for bad in ((), (2, 5)))
    replacements, names = [], []
    batches = image_batches(with_bad, 3, 0, 30, num_workers=num_workers)
    for batch in batches:
        shown = {visit: shade(pixels) for visit, pixels in zip(batch["visits"].tolist(), batch["images"], strict=True)}
        for visit, actual in shown.items():
            expected = shade(good[visit]["images"])
            if expected in (2, 5):
                replacements.append(actual)
                assert actual == shade(with_bad[visit]["images"])
            else:
                assert actual == expected
        names += batch["bad"]
    assert len(replacements) == 20 and len(set(replacements)) == 7
    assert set(names) == {(f"dataset row {i}", "no image of a known format") for i in (2, 5)} and len(names) >= 20


def test_only_bad_images():
    """Catches a loader that looks for a good image forever, and an error that names none of the bad ones."""
    images = ShuffledImages(source(5, tuple(range(5))), ImageTransform(8))
    with pytest.raises(OSError, match=r"100 images in a row cannot be used, among them dataset row \d \(no image"):
        next(iter(image_batches(images, 2, 0, 1)))


def test_elongated_image_is_replaced(monkeypatch):
    """Catches an image that only the transform refuses, and that nothing replaces."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 8 * 40)
    images = ShuffledImages(of_images(PIL.Image.new("RGB", (1, 50)), PIL.Image.new("RGB", (8, 8))), ImageTransform(8))
    bad = [item for v in range(2) for item in images[v]["bad"]]
    assert set(bad) == {("dataset row 0", "1 x 50 pixels are too elongated to be resized to 8")}


class Worker:
    """A transform that does something to the worker process it runs in."""

    def __init__(self, action):
        self.action = action

    def __call__(self, image, generator):
        return self.action()


def test_worker_fails():
    """Catches a run that hangs, or goes on without a part of its images, when a worker raises or is killed."""

    def raise_error():
        raise RuntimeError("on purpose")

    for action, message in (
        (raise_error, "on purpose"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker.*(killed|exited)"),
    ):
        images = ShuffledImages(source(9), Worker(action))
        with pytest.raises(RuntimeError, match=message):
            list(image_batches(images, 1, 0, 20, num_workers=2))


def test_workers_have_one_thread():
    """Catches workers that fight each other for the cores."""
    images = ShuffledImages(source(9), Worker(lambda: torch.tensor([torch.get_num_threads(), get_worker_info().id])))
    batches = list(image_batches(images, 1, 0, 4, num_workers=2))
    assert torch.cat([batch["images"] for batch in batches]).tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]


def test_bad_images_are_counted_once(caplog):
    """Catches a bad image that counts in every epoch, a log flooded by them, and a count that a resume forgets."""
    bad = BadImages(0.5, 1000)
    with caplog.at_level(logging.WARNING):
        for count in (5, 250, 250):
            bad.add([(f"image {i}", "damaged") for i in range(count)])
    assert len(bad) == 250
    assert len(caplog.records) == 20 + 2 and "bad image number 1: image 0: damaged" in caplog.text
    resumed = BadImages(0.5, 1000)
    resumed.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    resumed.add([("image 3", "damaged"), ["image 250", "damaged"]])
    assert len(resumed) == 251 and len(bad) == 250


@pytest.mark.parametrize(["num_images", "seen", "allowed"], [(1000, 0, 10), (None, 10, 10), (None, 5000, 50)])
def test_too_many_bad_images(num_images, seen, allowed):
    """Catches a run that goes on with more bad images than allowed, one that stops at exactly as many or at the first
    images of a stream, and an error without the list."""
    bad = BadImages(0.01, num_images)
    bad.add((f"image {i}", "damaged") for i in range(allowed))
    bad.check(seen)
    bad.add([("another", "empty")])
    with pytest.raises(
        OSError, match=rf"{allowed + 1} of \d+ .*--max_bad_fraction\) 0.01: image 0 \(damaged\), image 1"
    ):
        bad.check(seen)
    strict = BadImages(0.0, 10)
    strict.check()
    strict.add([("one", "empty")])
    with pytest.raises(OSError, match=r"1 of 10 .*: one \(empty\)$"):
        strict.check()


def test_stack_images(noise_image, caplog):
    """Catches held-out images that are augmented or out of order, a bad one that stops the run, and one left out in
    silence."""
    pictures = [noise_image, noise_image.transpose(PIL.Image.Transpose.ROTATE_180)]
    expected = torch.stack([ImageTransform(16)(picture) for picture in pictures])
    assert torch.equal(stack_images(of_images(*pictures), 16), expected)
    assert [shade(pixels) for pixels in stack_images(source(4, bad=(1,)), 8)] == [0, 2, 3]
    assert "held-out image dataset row 1 is left out: no image of a known format" in caplog.text
    for images in (source(2, bad=(0, 1)), source(1).select([])):
        with pytest.raises(ValueError, match=r"none of \d held-out images can be read"):
            stack_images(images, 8)
