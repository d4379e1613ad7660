"""Windows: they cover an image of any size, their velocities blend into one, and tokens of any size come back."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.assets import starter
from flowmo_diffusers.data.images import load_images
from flowmo_diffusers.metrics.seams import seam_ratio
from flowmo_diffusers.models.window_layout import count_windows
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.pipelines.images import images_to_tensor


SIZES = [(16, 16), (17, 31), (40, 16), (1, 1), (5, 100), (64, 48)]


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("overlap", [0, 4, 15])
@pytest.mark.parametrize("size", SIZES)
def test_windows_cover_the_image_with_their_overlap(size, overlap):
    """Would catch a pixel that no window holds, a window that leaves the image, and neighbours that share too little
    or are more than needed."""
    windows = Windows(*size, 16, overlap)
    for length, starts in zip(windows.canvas, zip(*windows.boxes, strict=True), strict=True):
        starts = sorted(set(starts))
        assert starts[0] == 0 and starts[-1] == length - 16
        assert all(0 < after - before <= 16 - overlap for before, after in zip(starts, starts[1:], strict=False))
        assert len(starts) == 1 + -(-(length - 16) // (16 - overlap))
    assert (windows.weights > 0).all()
    assert len(windows) == count_windows(*size, 16, overlap)


@pytest.mark.parametrize("overlap", [0, 4, 15])
@pytest.mark.parametrize("size", SIZES)
def test_blending_keeps_what_all_windows_agree_on(size, overlap):
    """Would catch weights that do not sum to 1, an extension that shows, and crops put back elsewhere."""
    x = images(*size)
    windows = Windows(*size, 16, overlap)
    canvas = windows.extend(x)
    total = torch.zeros_like(canvas)
    for first in range(0, len(windows), 3):
        some = range(first, min(first + 3, len(windows)))
        windows.add(total, windows.crop(canvas, some), some)
    torch.testing.assert_close(windows.cut(total), x, rtol=0, atol=1e-5)


def test_the_blend_is_continuous():
    """Would catch a seam in the weights: one window of ones among zeros has to rise and fall in small steps."""
    windows = Windows(16, 32, 16, 8)
    total = torch.zeros(1, 1, 16, 40)
    for i in range(len(windows)):
        windows.add(total, torch.full((1, 1, 1, 16, 16), float(i == 1)), range(i, i + 1))
    assert total.max() > 0.9
    assert total[0, 0, 0].diff().abs().max() < 0.13  # a ramp of 8 pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 16, 16, 4), "height=0"), ((16, 16, 0, 0), "window_size=0"), ((16, 16, 16, 16), "window_overlap=16")],
)
def test_bad_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows(*arguments)


# The pipeline


def test_one_window_is_the_plain_call(tiny_pipeline):
    """Would catch a window path that computes anything else than the plain one."""
    x = images(16, 16)
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    plain = tiny_pipeline(x, generator=torch.Generator().manual_seed(0), **arguments)
    windowed = tiny_pipeline(x, generator=torch.Generator().manual_seed(0), window_size=16, **arguments)
    torch.testing.assert_close(plain.images, windowed.images, rtol=0, atol=1e-6)
    assert torch.equal(plain.indices[:, None], windowed.indices)


@pytest.mark.parametrize("size", SIZES)
def test_any_size_comes_back_from_its_bytes(tiny_pipeline, size):
    """Would catch a size that cannot be encoded, tokens of the wrong number, and bytes that decode to another image
    than the call."""
    x = images(*size)
    sampling = {"num_inference_steps": 2, "output_type": "pt", "window_size": 16, "window_overlap": 4}
    called = tiny_pipeline(x, generator=torch.Generator().manual_seed(0), **sampling)
    tokens = tiny_pipeline.encode(x, window_size=16, window_overlap=4)
    model, windows = tiny_pipeline.autoencoder, Windows(*size, 16, 4)
    assert torch.equal(tokens, called.indices) and tokens.shape[:2] == (2, len(windows))
    packed = [b"".join(model.pack_codes(model.indices_to_codes(image))) for image in tokens]
    assert {len(one) for one in packed} == {len(windows) * model.bytes_per_image}
    for form in (tokens, tokens.numpy(), packed):
        restored = tiny_pipeline.decode(form, *size, generator=torch.Generator().manual_seed(0), **sampling)
        assert torch.equal(restored, called.images) and restored.shape[-2:] == size


def test_a_batch_is_its_images_and_any_window_batch(tiny_pipeline):
    """Would catch images or windows that leak into each other: mixed codes, one noise for all, order of windows."""
    x = images(24, 40, count=2)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "window_size": 16}

    def sample(x, seeds, **more):
        return tiny_pipeline(
            x, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **arguments, **more
        ).images

    both = sample(x, [0, 1])
    singles = torch.cat([sample(x[:1], [0]), sample(x[1:], [1])])
    torch.testing.assert_close(both, singles, rtol=0, atol=1e-5)
    torch.testing.assert_close(both, sample(x, [0, 1], window_batch_size=4), rtol=0, atol=1e-5)


def test_tokens_do_not_depend_on_the_window_batch(tiny_pipeline):
    """Would catch windows that are put back in another order than they were encoded in."""
    x = images(24, 40, count=2)
    one, four = (tiny_pipeline.encode(x, window_size=16, window_batch_size=size) for size in (1, 4))
    assert one.shape == four.shape and (one == four).float().mean() > 0.99  # but for rounding
    with pytest.raises(ValueError, match="window_batch_size=0"):
        tiny_pipeline.encode(x, window_size=16, window_batch_size=0)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_draws_do_not_depend_on_the_window_batch(tiny_config, seeds):
    """Would catch noise of Gaussian codes that is another in another batch, or the same in every window."""
    torch.manual_seed(0)
    pipe = FlowMoPipeline(FlowMoAutoencoder(**tiny_config | {"quantizer": "kl"}), FlowMoScheduler())

    def codes(window_batch_size: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        generator = generators if len(seeds) == 2 else generators[0]
        return pipe.encode(
            torch.zeros(2, 3, 24, 40), generator=generator, window_size=16, window_batch_size=window_batch_size
        )

    one = codes(1)
    torch.testing.assert_close(one, codes(4), rtol=0, atol=1e-5)
    assert len(one.flatten(0, 1).flatten(1).unique(dim=0)) == one[..., 0, 0].numel()


def test_memory_is_bounded_by_the_window(tiny_pipeline):
    """Would catch a model that is shown more than the windows it is told, however large the image."""
    seen = []
    for trunk in (tiny_pipeline.autoencoder.encoder, tiny_pipeline.autoencoder.decoder):
        trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    tiny_pipeline(images(48, 80, 1), num_inference_steps=2, window_size=16, window_batch_size=2, guidance_scale=1.0)
    patches = (16 // tiny_pipeline.autoencoder.config.patch_size) ** 2
    assert {shape[1] for shape in seen} == {patches} and {shape[0] for shape in seen} <= {1, 2}


def test_the_extension_of_a_small_image_never_shows(tiny_pipeline):
    """Would catch a result that holds pixels of the extension, or is resized from it."""
    x = images(9, 13)
    windows = Windows(9, 13, 16)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "window_size": 16}
    small = tiny_pipeline(x, generator=torch.Generator().manual_seed(0), **arguments).images
    extended = tiny_pipeline(windows.extend(x), generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(small, extended[..., :9, :13])


def test_sizes_of_pil_images_are_kept(tiny_pipeline):
    """Would catch the rounding to patches that holds without windows."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 33, 3), dtype=np.uint8))
    assert tiny_pipeline(image, num_inference_steps=1, window_size=16).images[0].size == (33, 19)
    assert tiny_pipeline(image, 21, 18, num_inference_steps=1, window_size=16).images[0].size == (18, 21)
    assert tiny_pipeline(image, num_inference_steps=1).images[0].size == (32, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe(images(16, 16), window_size=18), "window_size=18 must be a multiple"),
        (lambda pipe: pipe(images(16, 16), window_overlap=4), "window_overlap=4 needs a window_size"),
        (lambda pipe: pipe(images(16, 16), window_size=16, window_batch_size=0), "window_batch_size=0"),
        (lambda pipe: pipe(images(16, 16), window_size=16, window_overlap=-1), "window_overlap=-1"),
        (lambda pipe: pipe.decode(pipe.encode(images(16, 16)), 16, 16, window_size=16), "1 windows, tokens"),
        (lambda pipe: pipe.decode(b"abc", 16, 40, window_size=16), "bytes of 3 windows"),
        (lambda pipe: pipe.decode([3], 16, 40, window_size=16), "bytes"),
        (lambda pipe: pipe.encode(images(16, 16)[:, :1], window_size=16), r"expected \(batch, 3, height, width\)"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(tiny_pipeline, call, message):
    """Would catch a window argument that is ignored or fails deep in the model."""
    with pytest.raises(ValueError, match=message):
        call(copy.copy(tiny_pipeline))


# Seams


def test_seam_ratio():
    """Would catch a measure that does not see a step of brightness at a seam, or sees one elsewhere."""
    original = torch.zeros(1, 3, 32, 32)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    tiled = noise.clone()
    tiled[..., 16:] += 0.2
    assert seam_ratio(original + noise, original, [], [16]) == pytest.approx(1, abs=0.2)
    assert seam_ratio(tiled, original, [], [16]) > 4
    assert seam_ratio(tiled.mT, original, [16], []) > 4
    assert seam_ratio(tiled, original, [], [8]) < 1
    with pytest.raises(ValueError, match="no seam"):
        seam_ratio(tiled, original, [], [])


def test_blended_windows_of_the_starter_have_no_seams(tmp_path):
    """Would catch windows that are denoised apart: at their borders the error must jump no more than elsewhere, while
    that of tiles does."""
    pipe = FlowMoPipeline.from_pretrained(starter())
    pipe.set_progress_bar_config(disable=True)
    x = images_to_tensor(load_images("birds", cache_dir=str(tmp_path))["test"][0])
    assert x.shape == (1, 3, 120, 120)

    def ratio(overlap: int) -> float:
        layout = {"window_size": 32, "window_overlap": overlap, "window_batch_size": 16}
        y = pipe(x, generator=torch.Generator().manual_seed(0), output_type="latent", **layout).images
        return seam_ratio(y, x, *Windows(120, 120, 32, overlap).borders())

    assert ratio(8) < 1.1 < 1.4 < ratio(0)
