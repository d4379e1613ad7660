"""Images in: every source gives what it holds, and what a training visit shows depends on seed and visit alone."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from torch.utils.data import DataLoader

from flowmo_diffusers.data.images import ImageTransform, ShuffledImages, hold_out, load_images, stack_images


def write_image(path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (10, 8), (shade, shade, shade)).save(path)


def shaded(count: int, **columns) -> datasets.Dataset:
    """Image i is uniformly of shade i, so that its one value tells which image it is."""
    images = [PIL.Image.new("RGB", (8, 8), (i, i, i)) for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("int64") for name in columns}})
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


def shades(dataset: datasets.Dataset) -> list[int]:
    return sorted(np.asarray(image)[0, 0, 0].item() for image in dataset["image"])


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
    """Catches images of a class folder that are lost, classes that are no labels, or `split` ignored."""
    for i, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png")):
        write_image(tmp_path / "images" / name, i)
    found = load(data_dir=tmp_path / "images")
    assert list(found) == ["train"] and shades(found["train"]) == [0, 1, 2]
    assert found["train"].features["label"].names == ["cat", "dog"]
    assert list(load(data_dir=tmp_path / "images", split="validation")) == ["validation"]


@pytest.mark.parametrize("names", [("cat/a.png", "cat/crash-test.png"), ("a.png", "train_station.png", "b.png")])
def test_names_that_hold_a_split(tmp_path, load, names):
    """Catches `datasets` taking "test" in the name of one image for a split, and dropping every other image."""
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
    assert shades(load(data_dir=tmp_path / "test.parquet")["train"]) == [0, 1, 2]
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
    assert {name: shades(split) for name, split in found.items()} == {"train": [0, 2, 3], "test": [4, 5]}


def test_embedded_images(load):
    """Catches the embedded set losing a split, or needing the network."""
    found = load("emoji")
    assert {name: len(split) for name, split in found.items()} == {"train": 3018, "test": 256}
    assert isinstance(found["train"][0]["image"], PIL.Image.Image)


def test_source_errors(tmp_path, load):
    """Catches a mistake in the options that surfaces far from them, or without the option's name."""
    with pytest.raises(ValueError, match="exactly one of .*--dataset_name.*--train_data_dir"):
        load()
    with pytest.raises(ValueError, match="exactly one of .*--dataset_name.*--train_data_dir"):
        load("emoji", data_dir=tmp_path)
    with pytest.raises(OSError, match="--train_data_dir.*nowhere does not exist"):
        load(data_dir=tmp_path / "nowhere")
    write_image(tmp_path / "one.png", 0)
    with pytest.raises(OSError, match="--train_data_dir.*one.png does not exist as a folder or a .parquet file"):
        load(data_dir=tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="--train_data_dir.*empty holds no images"):
            load(data_dir=tmp_path / "empty")
        (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"split='validation' does not exist: this dataset has \['test', 'train'\]"):
        load("emoji", split="validation")


@pytest.mark.parametrize("named", [None, "test"])
def test_hold_out_from_a_split(named):
    """Catches held-out images that change with the length of training, or a split that is shortened for nothing."""
    found = datasets.DatasetDict(train=shaded(5), test=shaded(4), other=shaded(2))
    train, held_out = hold_out(found, "train", named, 3)
    assert (shades(train), shades(held_out)) == ([0, 1, 2, 3, 4], [0, 1, 2])
    assert len(hold_out(found, "train", named, 100)[1]) == 4
    assert shades(hold_out(found, "train", "other", 1)[1]) == [0]


def test_hold_out_from_the_end():
    """Catches training on held-out images, where the training split is all there is."""
    for split in ("train", "test"):
        train, held_out = hold_out(datasets.DatasetDict({split: shaded(10)}), split, None, 4)
        assert (shades(train), shades(held_out)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])


def test_hold_out_errors():
    """Catches a training split left empty, and a split that cannot be held out replaced by another one unasked."""
    found = datasets.DatasetDict(train=shaded(3))
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
    images = [PIL.Image.fromarray(pixels)] * 50
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    for random_flip, least, most in ((True, 150, 250), (False, 0, 0)):
        visits = ShuffledImages(dataset, ImageTransform(8, random_flip=random_flip), seed=1)
        corners = torch.stack([visits[v][0, 0, [0, -1]] for v in range(400)])
        assert (corners.sum(1) == 0).all()
        assert least <= (corners[:, 1] == 1).sum() <= most


def test_each_epoch_has_each_image_once():
    """Catches an image left out or shown twice, and an order that repeats over epochs or seeds."""
    dataset = shaded(11)
    orders = set()
    for seed in (0, 1):
        visits = ShuffledImages(dataset, ImageTransform(8), seed)
        assert len(visits) == 11
        for epoch in range(4):
            order = [shade(visits[v]) for v in range(11 * epoch, 11 * (epoch + 1))]
            assert sorted(order) == list(range(11))
            orders.add(tuple(order))
    assert len(orders) == 8


def test_augmentation_changes_between_epochs_and_seeds(noise_image):
    """Catches crops drawn from an image's place in the dataset, or the same crops whatever the seed."""
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": [noise_image]}, features=features)
    transform = ImageTransform(16, random_crop=True, random_flip=True, max_scale=1.5)
    runs = [ShuffledImages(dataset, transform, seed) for seed in (0, 1)]
    assert len({visits[v].numpy().tobytes() for visits in runs for v in range(10)}) == 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_visits_depend_on_seed_and_visit_alone(noise_image, num_workers):
    """Catches data that depend on the workers, or on where the run was started or resumed."""
    features = datasets.Features({"image": datasets.Image()})
    images = [noise_image.crop((i, i, i + 20, i + 17)) for i in range(7)]
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    transform = ImageTransform(16, random_crop=True, random_flip=True, max_scale=1.5)
    expected = torch.stack([ShuffledImages(dataset, transform, seed=5)[v] for v in reversed(range(24))]).flip(0)
    for start in (0, 8):
        visits = ShuffledImages(dataset, transform, seed=5)
        loader = DataLoader(visits, batch_size=4, sampler=range(start, 24), num_workers=num_workers)
        assert torch.equal(torch.cat(list(loader)), expected[start:])
    assert not torch.equal(ShuffledImages(dataset, transform, seed=6)[0], expected[0])


def _save_visits(folder) -> None:
    torch.set_num_threads(1)  # the pool of threads did not survive the fork
    accelerator = Accelerator(cpu=True)
    visits = ShuffledImages(shaded(7), ImageTransform(8))
    loader = accelerator.prepare(DataLoader(visits, batch_size=3, sampler=range(6, 24)))
    torch.save(list(loader), folder / f"{accelerator.process_index}.pt")


def test_two_processes_share_the_visits(tmp_path):
    """Catches processes that train on the same images, leave some out, or take them in another order than one does."""
    debug_launcher(_save_visits, (tmp_path,), num_processes=2)
    steps = zip(*(torch.load(tmp_path / f"{process}.pt") for process in (0, 1)), strict=True)
    visits = ShuffledImages(shaded(7), ImageTransform(8))
    assert [shade(x) for step in steps for batch in step for x in batch] == [shade(visits[v]) for v in range(6, 24)]


@pytest.mark.parametrize("use", [lambda data, name: ShuffledImages(data, ImageTransform(8), 0, name), None])
def test_column_errors(use):
    """Catches a wrong --image_column that surfaces inside a worker, or an empty dataset inside an index."""
    use = use or (lambda data, name: stack_images(data, 8, name))
    dataset = shaded(2, label=[0, 1])
    for name in ("picture", "label"):
        with pytest.raises(ValueError, match=rf"image_column='{name}' is no column of images: those are \['image'\]"):
            use(dataset, name)
    with pytest.raises(ValueError, match="the dataset is empty"):
        use(dataset.select([]), "image")


def test_stack_images(noise_image):
    """Catches held-out images that are augmented, out of order, or of another column."""
    features = datasets.Features({"image": datasets.Image(), "picture": datasets.Image()})
    pictures = [noise_image, noise_image.transpose(PIL.Image.Transpose.ROTATE_180)]
    dataset = datasets.Dataset.from_dict({"image": pictures[::-1], "picture": pictures}, features=features)
    expected = torch.stack([ImageTransform(16)(picture) for picture in pictures])
    assert torch.equal(stack_images(dataset, 16, "picture"), expected)
    assert torch.equal(stack_images(dataset, 16), expected.flip(0))
