"""Image datasets for training: where they come from, and how one image becomes a tensor."""

import re
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from flowmo_diffusers.assets import asset_path


EMBEDDED_DATASET = "emoji"

# Folders and parquet files named so, alone or before a digit or a delimiter, are splits (`datasets` reads them alike).
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def load_images(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
) -> datasets.DatasetDict:
    """
    A dataset of images by `datasets`, with all the splits its source has.

    Args:
        dataset_name: A Hub id, a local dataset folder, or "emoji" for the set embedded in this package.
        data_dir: A folder of images (nested folders are classes), a parquet file or a folder of parquet files. If
            the folder's folders or parquet files are named after splits, they are these; else all are `split`.
        split: The split that must be there.
        dataset_config_name: Configuration of a Hub dataset.
        cache_dir: Cache of `datasets`.

    Raises:
        ValueError: If not exactly one source is given, the split does not exist, or only some names are of splits.
        OSError: If there is no such folder or parquet file, or the folder holds no images.
    """
    if (dataset_name is None) == (data_dir is None):
        raise ValueError("give exactly one of `dataset_name` (--dataset_name) and `data_dir` (--train_data_dir)")
    if dataset_name == EMBEDDED_DATASET:
        files = {name: str(asset_path("emoji", f"{name}.parquet")) for name in ("train", "test")}
        found = datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir)
    elif dataset_name is not None:
        found = datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    else:
        path = Path(data_dir)
        if path.is_dir():
            kind, files = _files_by_split(path, split)
            try:
                found = datasets.load_dataset(kind, data_dir=str(path), data_files=files, cache_dir=cache_dir)
            except ValueError as error:
                raise OSError(f"data_dir (--train_data_dir) {path} holds no images to be read: {error}") from error
        elif path.is_file() and path.suffix == ".parquet":
            found = datasets.load_dataset("parquet", data_files={split: str(path)}, cache_dir=cache_dir)
        else:
            raise OSError(f"data_dir (--train_data_dir) {path} does not exist as a folder or a .parquet file")
    if split not in found:
        raise ValueError(f"split={split!r} does not exist: this dataset has {sorted(found)}")
    return found


def _files_by_split(path: Path, split: str) -> tuple[str, dict[str, list[str]]]:
    """
    The builder of `datasets` for a folder, and its files by split. Left to guess, `datasets` takes any file or class
    that has "train" or "test" in its name for a split and drops all other images without a word.
    """
    parquet = sorted(file.name for file in path.glob("*.parquet"))
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    files, others = {}, []
    for name in parquet or folders:
        word = re.match("[a-z]*", name.lower())[0]
        named = next((key for key, words in SPLIT_NAMES.items() if word in words), None)
        if named is None:
            others.append(name)
        else:
            files.setdefault(named, []).append(name if parquet else f"{name}/**")
    if files and others:
        raise ValueError(
            f"data_dir (--train_data_dir) {path} holds splits {sorted(files)} by name, but also {others[:5]}: give "
            f"one split's folder, or move classes and files that are no splits into {path / split}"
        )
    kind = "parquet" if parquet else "imagefolder"
    return kind, files or {split: others if parquet else ["**"]}


def hold_out(
    found: datasets.DatasetDict, split: str, validation_split: str | None, count: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The training images and `count` held-out ones, none of which is trained on.

    Held-out images come from `validation_split`, by default "validation" or "test" where the source has one, else
    from the end of the training split, which is shortened by them.

    Raises:
        ValueError: If the split does not exist or holds too few images.
    """
    names = [validation_split] if validation_split else ["validation", "test"]
    train = found[split]
    for name in names:
        if name in found and name != split:
            return train, found[name].select(range(min(count, len(found[name]))))
    if validation_split:
        others = sorted(set(found) - {split})
        raise ValueError(f"validation_split={validation_split!r} must be a split beside {split!r}: there are {others}")
    if len(train) <= count:
        raise ValueError(f"{count} images cannot be held out of {len(train)}: lower --num_validation_images")
    last = len(train) - count
    return train.select(range(last)), train.select(range(last, len(train)))


class ImageTransform:
    """
    An image to a tensor (3, resolution, resolution) in [-1, 1], as the published training did it: the shorter side
    resized to the resolution (bilinear), then a crop.

    Args:
        resolution: Side of the square in pixels.
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror half of the images.
        max_scale: Resize the shorter side to the resolution times a factor drawn from [1, max_scale], so that random
            crops differ also where images are square. 1 is the published training.
    """

    def __init__(self, resolution: int, random_crop: bool = False, random_flip: bool = False, max_scale: float = 1.0):
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.max_scale = max_scale

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """`generator` makes scale, crop and flip; it may be left out where none is random."""
        side = self.resolution
        image = image.convert("RGB")
        scale = side / min(image.size)
        if self.max_scale > 1:
            scale *= 1 + (self.max_scale - 1) * torch.rand((), generator=generator).item()
        width, height = (round(length * scale) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        if self.random_crop:
            left, top = (_draw(0, length - side, generator) for length in (width, height))
        else:
            left, top = (width - side) // 2, (height - side) // 2
        pixels = np.asarray(image.crop((left, top, left + side, top + side)))
        if self.random_flip and _draw(0, 1, generator):
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class ShuffledImages(Dataset):
    """
    Endless training order over a dataset: item v is the v-th image ever visited. Visits v = e n ... (e + 1) n - 1 are
    one epoch, each image once, in an order drawn from (seed, e); crop and flip are drawn from (seed, v).

    What visit v shows is thus a function of seed and v alone, whatever the number of workers or processes, and a run
    continues at the data it had reached by starting its range of visits there:
    `DataLoader(images, batch_size, sampler=range(first, last))`.

    Args:
        dataset: Items with an image column.
        transform: See [`ImageTransform`].
        seed: Of order, crop and flip.
        image_column: Name of the column.

    Raises:
        ValueError: If the dataset is empty or has no such column of images.
    """

    def __init__(
        self, dataset: datasets.Dataset, transform: ImageTransform, seed: int = 0, image_column: str = "image"
    ):
        self.dataset = _only_images(dataset, image_column)
        self.transform = transform
        self.seed = seed
        self.image_column = image_column
        self._epoch = None
        self._order = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, visit: int) -> torch.Tensor:
        epoch, position = divmod(visit, len(self.dataset))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        image = self.dataset[int(self._order[position])][self.image_column]
        key = np.random.SeedSequence([self.seed, visit]).generate_state(1, np.uint64)[0]
        return self.transform(image, torch.Generator().manual_seed(int(key >> 1)))


def stack_images(dataset: datasets.Dataset, resolution: int, image_column: str = "image") -> torch.Tensor:
    """
    All images of a small dataset, centre-cropped: (n, 3, resolution, resolution) in [-1, 1].

    Raises:
        ValueError: If the dataset is empty or has no such column of images.
    """
    transform = ImageTransform(resolution)
    return torch.stack([transform(item[image_column]) for item in _only_images(dataset, image_column)])


def _only_images(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column not in images:
        raise ValueError(f"image_column={image_column!r} is no column of images: those are {images}")
    return dataset.select_columns(image_column)


def _draw(low: int, high: int, generator: torch.Generator | None) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
