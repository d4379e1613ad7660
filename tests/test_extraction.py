"""Rows of numbers of the images of a source."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from processes import on_processes, own_accelerators

from flowmo_diffusers.data.measuring import describe_bad, measure_images
from flowmo_diffusers.data.sources import FolderImages
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.metrics.extraction import image_features, moments
from flowmo_diffusers.metrics.features import FeatureNetwork


class MeanColours(FeatureNetwork):
    """A network of three features."""

    def __init__(self, scale: float = 1.0):
        super().__init__("_mean", 3, {"network": "mean", "scale": scale})
        self.scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": images.mean((2, 3)) * self.scale}


@pytest.fixture
def folder(tmp_path):
    """Eleven images of which number 3 is damaged."""
    path = tmp_path / "images"
    path.mkdir()
    random = np.random.default_rng(0)
    for number in range(11):
        PIL.Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).save(path / f"{number:02}.png")
    file = path / "03.png"
    file.write_bytes(file.read_bytes()[:60])
    return path


@pytest.fixture
def accelerator():
    with own_accelerators():
        yield Accelerator(cpu=True)


def features(folder, cache, accelerator, **options):
    source = FolderImages([folder])
    return image_features(source, ImageTransform(8), MeanColours(), cache, accelerator, **{"chunk_size": 4} | options)


def test_features_are_those_of_each_image(folder, tmp_path, accelerator):
    """In order, the damaged one left out, whatever batches and chunks."""
    source, transform = FolderImages([folder]), ImageTransform(8)
    good = [number for number in range(11) if number != 3]
    expected = torch.stack([transform(source[number]).mean((1, 2)) for number in good])
    for number, options in enumerate(({"batch_size": 3}, {"batch_size": 100, "chunk_size": 5}, {"chunk_size": 1})):
        found = features(folder, tmp_path / f"cache{number}", accelerator, **options)
        rows = found.read("pool", "number")
        assert rows["number"].tolist() == good
        torch.testing.assert_close(rows["pool"], expected)
        ours = moments(found, "pool")
        assert ours.count == 10
        torch.testing.assert_close(ours.covariance, expected.double().T.cov())


def test_features_are_computed_once(folder, tmp_path, accelerator, monkeypatch):
    """Until an image, its crop, its rounding or the network changes: each has a folder of its own."""
    first = features(folder, tmp_path, accelerator)
    forwards = []
    monkeypatch.setattr(MeanColours, "extract", lambda self, images: forwards.append(len(images)))
    assert features(folder, tmp_path, accelerator).folder == first.folder and not forwards
    monkeypatch.undo()

    source = FolderImages([folder])
    folders = {first.folder}
    for transform, network, rounding in (
        (ImageTransform(8, interpolation="bicubic"), MeanColours(), "nearest"),
        (ImageTransform(8), MeanColours(2.0), "nearest"),
        (ImageTransform(8), MeanColours(), "float"),
    ):
        folders.add(image_features(source, transform, network, tmp_path, accelerator, rounding, chunk_size=4).folder)
    folders.add(
        image_features(source.select(range(10)), ImageTransform(8), MeanColours(), tmp_path, accelerator).folder
    )
    PIL.Image.new("RGB", (9, 9)).save(folder / "05.png")
    folders.add(features(folder, tmp_path, accelerator).folder)
    assert len(folders) == 6


def test_a_killed_run_continues(folder, tmp_path, accelerator):
    """Chunks that are there are not measured again."""
    source, transform = FolderImages([folder]), ImageTransform(8)
    chunks = Chunks(tmp_path / "rows", {}, len(source), 4)
    measured = []

    def measure(images, numbers):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(list(numbers))
        return {"mean": images.mean((1, 2, 3))}

    with pytest.raises(KeyboardInterrupt):
        measure_images(source, transform, chunks, measure, accelerator, batch_size=3)
    assert chunks.missing() == [1, 2]
    measured = [[], [], []]
    measure_images(source, transform, chunks, measure, accelerator, batch_size=3)
    assert measured[3:] == [[4, 5, 6], [7], [8, 9, 10]]
    assert chunks.read("number")["number"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_bad_images_are_named_and_counted(folder, tmp_path, accelerator, caplog):
    """They are left out only up to a share of all."""
    found = features(folder, tmp_path, accelerator)
    with caplog.at_level(logging.WARNING):
        ((name, reason),) = describe_bad(found, max_fraction=0.1)
    assert name.endswith("03.png") and reason
    assert "1 of 11 images are left out" in caplog.text and "03.png" in caplog.text
    with pytest.raises(OSError, match=r"1 of 11 images cannot be used: .*03.png"):
        describe_bad(found, max_fraction=0.05)


def test_a_set_without_a_good_image_is_an_error(folder, tmp_path, accelerator):
    """However many bad ones are allowed."""
    bad = FolderImages([folder]).select([3])
    found = image_features(bad, ImageTransform(8), MeanColours(), tmp_path, accelerator)
    with pytest.raises(OSError, match="1 of 1 images cannot be used"):
        describe_bad(found, max_fraction=1.0)
    with pytest.raises(ValueError, match="no column 'pool'"):
        moments(found, "pool")


def test_workers_load_the_same(folder, tmp_path, accelerator):
    alone, helped = (features(folder, tmp_path / str(n), accelerator, num_workers=n) for n in (0, 2))
    assert torch.equal(alone.read("pool")["pool"], helped.read("pool")["pool"])
    assert alone.notes() == helped.notes()


def _on_each(folder, cache):
    accelerator = Accelerator(cpu=True)
    found = features(folder, cache, accelerator, chunk_size=2)
    return accelerator.process_index, found.read("pool")["pool"]


@pytest.mark.slow
def test_processes_share_the_work(folder, tmp_path, accelerator):
    """Two processes give what one does, and each can read all of it when they are done."""
    alone = features(folder, tmp_path / "one", accelerator, chunk_size=2).read("pool")["pool"]
    results = on_processes(2, _on_each, folder, tmp_path / "two")
    assert [index for index, _ in results] == [0, 1]
    for _, pool in results:
        assert torch.equal(pool, alone)
