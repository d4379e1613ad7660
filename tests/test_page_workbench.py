"""What the demo page computes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from token_models import build_generator

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.page.bits import pack
from flowmo_diffusers.page.workbench import WINDOW_BATCH_SIZE, Sampling, Workbench
from flowmo_diffusers.pipelines.images import images_to_tensor


SAMPLING = Sampling(num_inference_steps=4, guidance_scale=1.5, rho=2.0, seed=3)


def build_workbench(pipeline: FlowMoPipeline, order: str = "masked") -> Workbench:
    generator = build_generator(order=order, id2label={0: "cat", 1: "tree", 2: "dog"})
    return Workbench(
        pipeline, FlowMoGenerationPipeline(generator, FlowMoTokenScheduler(), *pipeline.components.values())
    )


@pytest.fixture
def workbench(tiny_pipeline: FlowMoPipeline) -> Workbench:
    return build_workbench(tiny_pipeline)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures of the model's size, which come back from disk as they are."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return paths


def test_reconstruction_is_the_pipeline_s(workbench: Workbench, tiny_pipeline: FlowMoPipeline, files: list[Path]):
    """Another image, other tokens or other settings than the user sees; figures of something else."""
    done = []
    result = workbench.reconstruct(files[0], 16, SAMPLING, lambda step, total: done.append((step, total)))
    original = PIL.Image.open(files[0])
    tiny_pipeline.scheduler = FlowMoScheduler(rho=2.0)
    output = tiny_pipeline(original, num_inference_steps=4, generator=torch.Generator().manual_seed(3))
    assert result.original.tobytes() == original.tobytes()
    assert result.image.tobytes() == output.images[0].tobytes()
    codes = tiny_pipeline.autoencoder.indices_to_codes(output.indices)
    assert tiny_pipeline.autoencoder.pack_codes(codes) == [pack(result.bits)]
    figures = result.figures
    assert (figures.bits, figures.num_bytes, figures.bits_per_pixel) == (48, 6, 48 / 256)
    assert figures.forwards == tiny_pipeline.num_forwards(4, 1.5) > 4
    assert figures.psnr == psnr(images_to_tensor(original), images_to_tensor(output.images[0])).item()
    assert figures.seconds > 0 and figures.changed is None
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_any_image_at_any_side(workbench: Workbench, tmp_path: Path):
    """An image that is squashed, or of a size that is not the one asked for."""
    picture = PIL.Image.new("RGB", (90, 30), "white")
    picture.paste("red", (30, 0, 60, 30))
    picture.save(tmp_path / "wide.png")
    result = workbench.reconstruct(tmp_path / "wide.png", 24, SAMPLING)
    assert result.original.size == result.image.size == (24, 24)
    assert (np.asarray(result.original)[:, 2:-2] == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(40, 27), (16, 16), (5, 9)])
def test_the_whole_image_is_the_pipeline_s(workbench: Workbench, tiny_pipeline: FlowMoPipeline, tmp_path: Path, size):
    """Pixels that are cut off or resized, other settings than the user sees, figures of one window."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    original = PIL.Image.fromarray(pixels)
    original.save(tmp_path / "photo.png")
    done = []
    result = workbench.reconstruct_whole(tmp_path / "photo.png", SAMPLING, lambda *step: done.append(step))
    tiny_pipeline.scheduler = FlowMoScheduler(rho=2.0)
    output = tiny_pipeline(
        original,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        window_size=16,
        window_batch_size=WINDOW_BATCH_SIZE,
    )
    assert result.original.tobytes() == original.tobytes() and result.bits is None
    assert result.image.size == size and result.image.tobytes() == output.images[0].tobytes()
    figures, windows = result.figures, output.indices.shape[1]
    assert (figures.windows, figures.bits, figures.num_bytes) == (windows, 48 * windows, 6 * windows)
    assert figures.bits_per_pixel == 48 * windows / (size[0] * size[1])
    assert figures.psnr == psnr(images_to_tensor(original), images_to_tensor(output.images[0])).item()
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        ((128, 128), (128, 128)),
        ((300, 300), (128, 128)),
        ((400, 100), (256, 64)),
        ((3000, 3), (1024, 1)),
        ((17, 963), (17, 963)),
    ],
)
def test_large_images_are_made_smaller(workbench: Workbench, tmp_path: Path, size, taken):
    """An upload that keeps the page busy for hours, also a long strip; or one that is squashed."""
    PIL.Image.new("RGB", size, "orange").save(tmp_path / "large.png")
    result = workbench.reconstruct_whole(tmp_path / "large.png", Sampling(1, 1.0, 1.0))
    assert result.original.size == result.image.size == taken
    assert result.original.getpixel((0, 0)) == (255, 165, 0)
    assert result.figures.windows <= 170


def test_trajectory_is_of_the_reconstruction(workbench: Workbench, files: list[Path]):
    """An animation of another run than the one beside it."""
    trajectory = workbench.trajectory(files[0], 16, SAMPLING)
    assert trajectory.times == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    last = trajectory.frames()[-1].crop((0, 0, 16, 16))
    assert last.tobytes() == workbench.reconstruct(files[0], 16, SAMPLING).image.tobytes()


def test_flip(workbench: Workbench, files: list[Path]):
    """An edit of other tokens, or compared with an image from another noise."""
    plain = workbench.reconstruct(files[0], 16, SAMPLING)
    edit = workbench.flip(files[0], 16, SAMPLING, count=5, first=2, last=4, seed=0)
    assert np.array_equal(edit.marked, edit.bits != plain.bits)
    assert edit.marked[2:5].sum() == edit.marked.sum() == edit.figures.changed == 5
    assert np.abs(np.asarray(edit.images[0], int) - np.asarray(plain.image, int)).max() <= 1  # of a larger batch
    assert edit.image.tobytes() != edit.images[0].tobytes() and edit.figures.psnr < 60
    nothing = workbench.flip(files[0], 16, SAMPLING, count=0, first=0, last=7, seed=0)
    assert nothing.image.tobytes() == nothing.images[0].tobytes() and nothing.figures.psnr == float("inf")


def test_mix(workbench: Workbench, files: list[Path]):
    """Tokens of the wrong image, or a random choice where the last ones were asked for."""
    first, second = (workbench.reconstruct(file, 16, SAMPLING) for file in files)
    edit = workbench.mix(*files, 16, SAMPLING, count=3)
    assert np.array_equal(edit.bits, np.concatenate([first.bits[:5], second.bits[5:]]))
    assert edit.figures.changed == (first.bits != edit.bits).sum()
    drawn = workbench.mix(*files, 16, SAMPLING, count=3, seed=1)
    assert drawn.marked.sum() == 3 and not np.array_equal(drawn.marked, edit.marked)
    everything = workbench.mix(*files, 16, SAMPLING, count=8)
    assert everything.image.tobytes() == everything.images[1].tobytes()


@pytest.mark.parametrize("order", ["masked", "autoregressive"])
def test_generate(tiny_pipeline: FlowMoPipeline, order: str):
    """Images that are not those of their bits, that depend on how many are made, or of no class for a class."""
    workbench = build_workbench(tiny_pipeline, order)
    assert workbench.class_names == ["cat", "tree", "dog"]
    images, bits, figures = workbench.generate(2, 3, 4, 2.0, SAMPLING)
    assert len(images) == len(bits) == 3 and figures.num_bytes == 6 and figures.psnr is None
    assert len({image.tobytes() for image in images}) == 3
    one, one_bits, _ = workbench.generate(2, 1, 4, 2.0, SAMPLING)
    assert np.array_equal(one_bits[0], bits[0])
    assert np.abs(np.asarray(one[0], int) - np.asarray(images[0], int)).max() <= 1
    assert not np.array_equal(workbench.generate(None, 1, 4, 2.0, SAMPLING)[1][0], bits[0])


def test_calls_do_not_meet(workbench: Workbench, files: list[Path]):
    """Two users at once, one of whom gets the other's schedule."""
    settings = [Sampling(steps, 1.5, rho, seed) for steps, rho, seed in ((3, 1, 0), (9, 4, 1), (5, 2, 2), (7, 3, 3))]
    alone = [workbench.reconstruct(files[0], 16, one).image.tobytes() for one in settings]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda one: workbench.reconstruct(files[0], 16, one).image.tobytes(), settings)
            assert list(together) == alone


def test_refused(workbench: Workbench, tiny_pipeline: FlowMoPipeline, tiny_config: dict, tmp_path: Path):
    """A model that has no bits, or an error that says nothing."""
    with pytest.raises(ValueError, match="quantizer='kl'"):
        Workbench(FlowMoPipeline(FlowMoAutoencoder(**tiny_config | {"quantizer": "kl"}), FlowMoScheduler()))
    with pytest.raises(ValueError, match="in_channels=1"):
        Workbench(FlowMoPipeline(FlowMoAutoencoder(**tiny_config | {"in_channels": 1}), FlowMoScheduler()))
    with pytest.raises(ValueError, match="no generator"):
        Workbench(tiny_pipeline).generate(0, 1, 4, 1.0, SAMPLING)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="no image of a known format"):
        workbench.reconstruct(tmp_path / "text.png", 16, SAMPLING)
