"""FlowMoPipeline: images to tokens to images, loading and saving, and what is said when something does not fit."""

import copy
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import flowmo_diffusers
from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler


def pictures(count: int = 2, height: int = 16, width: int = 16) -> np.ndarray:
    """Random 8-bit pictures (count, height, width, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def tensors(count: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    """The same pictures (count, 3, height, width) in [-1, 1]."""
    return torch.tensor(pictures(count, height, width)).permute(0, 3, 1, 2) / 255 * 2 - 1


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def noise(count: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def calls(tiny_pipeline):
    """What the model was asked by `tiny_pipeline`: batch size, dtype and time of every forward pass."""
    recorded = []

    def record(module, args, kwargs, output):
        recorded.append((len(args[0]), args[0].dtype, torch.as_tensor(args[1])))

    tiny_pipeline.autoencoder.register_forward_hook(record, with_kwargs=True)
    return recorded


def tiny_unet() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    return UNet2DModel(sample_size=4, norm_num_groups=2, **blocks)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# The package


def test_import_is_lazy():
    """Would catch an import of the package that takes the seconds of importing torch, or hides what it would load."""
    code = "import sys, flowmo_diffusers; print(*dir(flowmo_diffusers), *sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(flowmo_diffusers.__all__) <= set(names)
    assert not {"torch", "diffusers", "numpy"} & set(names)


def test_public_names():
    """Would catch a public name that cannot be imported."""
    for name in flowmo_diffusers.__all__:
        assert getattr(flowmo_diffusers, name) is not None


def test_unknown_name_is_an_attribute_error():
    """Would catch a lazy import that breaks `hasattr` and misspelt imports."""
    assert not hasattr(flowmo_diffusers, "FlowMoPipelin")
    with pytest.raises(AttributeError, match="'flowmo_diffusers' has no attribute 'FlowMoPipelin'"):
        flowmo_diffusers.FlowMoPipelin  # noqa: B018


# Sampling


def test_guidance_in_six_of_25_steps(tiny_pipeline, calls):
    """Would catch guidance outside its interval, or a second pass in place of a doubled batch."""
    tiny_pipeline(tensors(), generator=generators())
    assert len(calls) == 25
    doubled = [i for i, (batch, _, _) in enumerate(calls) if batch == 4]
    assert [batch for batch, _, _ in calls if batch != 4] == [2] * 19
    assert doubled == [4, 5, 6, 7, 8, 9]  # t = (21/25)^4 ... (16/25)^4, within (0.145, 0.505)


def test_guidance_scale_one_never_doubles(tiny_pipeline, calls):
    """Would catch the cost of guidance where there is none."""
    tiny_pipeline(tensors(), guidance_scale=1.0, generator=generators())
    assert [batch for batch, _, _ in calls] == [2] * 25


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.25, 0.25), [0.2]),
        ((0.25, 1.5), [0.6, 0.4, 0.2]),
        ((2 / 3, 4.0), [0.8, 0.6, 0.4]),
        ((0.0, float("inf")), [1.0, 0.8, 0.6, 0.4, 0.2]),
        ((0.0, 0.0), []),
    ],
)
def test_guidance_interval_includes_its_ends(tiny_pipeline, calls, interval, guided):
    """Would catch an end lost to rounding (t = 0.2 is 0.200000003 in float32) or an infinite one that guides none."""
    tiny_pipeline.scheduler = FlowMoScheduler(rho=1.0)
    tiny_pipeline(tensors(), num_inference_steps=5, guidance_interval=interval, generator=generators())
    assert [round(t.item(), 3) for batch, _, t in calls if batch == 4] == guided


def test_sampling_by_hand(tiny_pipeline):
    """Would catch a wrong time, a wrong step, guidance with the wrong sign, or codes dropped in the wrong half."""
    model = tiny_pipeline.autoencoder
    images, z = tensors(), noise()
    codes = model.encode(images).codes
    times, x_t = [1.0, (2 / 3) ** 4, (1 / 3) ** 4, 0.0], z
    with torch.no_grad():
        for t, t_next in zip(times, times[1:], strict=False):
            v = model(x_t, t, codes=codes).velocity
            if 0.17 <= t / (1 - t + 1e-12) <= 1.02:
                null = model(x_t, t, codes=codes, code_mask=torch.zeros(2)).velocity
                v = null + 3.0 * (v - null)
            x_t = x_t - (t - t_next) * v
    found = tiny_pipeline(images, num_inference_steps=3, guidance_scale=3.0, latents=z, output_type="latent").images
    torch.testing.assert_close(found, x_t.clamp(-1, 1), rtol=0, atol=1e-4)
    unguided = tiny_pipeline(images, num_inference_steps=3, guidance_scale=1.0, latents=z, output_type="latent").images
    assert (found - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [(1.0, (0.0, 9.0)), (1.5, (0.17, 1.02)), (2.0, (0.0, math.inf))])
def test_forwards_are_counted(tiny_pipeline, calls, solver, guidance):
    """Catches guided steps that count once, or an interval that is counted otherwise than it is sampled in."""
    tiny_pipeline.scheduler = FlowMoScheduler(solver=solver)
    options = {"num_inference_steps": 7, "guidance_scale": guidance[0], "guidance_interval": guidance[1]}
    expected = tiny_pipeline.num_forwards(**options)
    calls.clear()
    tiny_pipeline(tensors(1), **options)
    assert sum(batch for batch, *_ in calls) == expected


def test_the_scheduler_has_the_recipe(tiny_pipeline):
    """Catches steps or guidance that come from somewhere else than the configuration of the model's scheduler."""
    options = {"latents": noise(), "output_type": "latent"}
    expected = tiny_pipeline(
        tensors(), num_inference_steps=3, guidance_scale=2.0, guidance_interval=(0.0, 0.5), **options
    ).images
    recipe = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}
    tiny_pipeline.scheduler = FlowMoScheduler.from_config(tiny_pipeline.scheduler.config, **recipe)
    assert torch.equal(tiny_pipeline(tensors(), **options).images, expected)
    assert tiny_pipeline.num_timesteps == 3 and tiny_pipeline.guidance_scale == 2.0
    others = tiny_pipeline(tensors(), num_inference_steps=2, guidance_scale=1.0, **options).images
    assert tiny_pipeline.num_timesteps == 2 and not torch.equal(others, expected)


def test_heun_asks_the_model_2n_minus_1_times(tiny_pipeline, calls):
    """Would catch a solver the pipeline cannot drive, or one that changes nothing."""
    euler = tiny_pipeline(tensors(), num_inference_steps=4, latents=noise(), output_type="latent").images
    tiny_pipeline.scheduler = FlowMoScheduler.from_config(tiny_pipeline.scheduler.config, solver="heun")
    calls.clear()
    heun = tiny_pipeline(tensors(), num_inference_steps=4, latents=noise(), output_type="latent").images
    assert len(calls) == tiny_pipeline.num_timesteps == 7
    assert not torch.allclose(euler, heun, atol=1e-3)


@pytest.mark.parametrize("quantizer", ["lfq", "kl"])
def test_batch_with_generators_equals_singles(tiny_pipeline, tiny_config, quantizer):
    """Would catch an image that depends on its neighbours: shared noise, or a Gaussian drawn for the whole batch."""
    if quantizer == "kl":
        tiny_pipeline = FlowMoPipeline(FlowMoAutoencoder(**tiny_config, quantizer="kl").eval(), FlowMoScheduler())
    options = {"num_inference_steps": 3, "output_type": "pt"}
    batch = tiny_pipeline(tensors(3), generator=generators(3), **options).images
    for i, generator in enumerate(generators(3)):
        single = tiny_pipeline(tensors(3)[i], generator=generator, **options).images
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=1e-5)
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)


def test_given_noise_is_used(tiny_pipeline):
    """Would catch `latents` that are ignored, scaled or written over, in the call or in `decode`."""
    drawn = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    kept = drawn.clone()
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = tiny_pipeline(tensors(), generator=torch.Generator().manual_seed(3), **options).images
    assert torch.equal(tiny_pipeline(tensors(), latents=drawn, **options).images, expected)
    tokens = tiny_pipeline.encode(tensors())
    assert torch.equal(tiny_pipeline.decode(tokens, latents=drawn, **options), expected)
    assert torch.equal(drawn, kept)


def test_encode_and_decode_are_the_two_halves_of_the_call(tiny_pipeline):
    """Would catch tokens that cannot be stored and decoded later, in any of their forms."""
    options = {"num_inference_steps": 2, "latents": noise(), "output_type": "pt"}
    result = tiny_pipeline(tensors(), **options)
    tokens = tiny_pipeline.encode(tensors())
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 8, 2)
    assert torch.equal(tokens, result.indices) and not torch.equal(tokens[0], tokens[1])
    codes = tiny_pipeline.autoencoder.indices_to_codes(tokens)
    packed = tiny_pipeline.autoencoder.pack_codes(codes)
    small = tokens.numpy().astype(np.uint16)
    small.flags.writeable = False
    for form in (tokens, tokens.int(), small, codes, codes.numpy(), packed):
        assert torch.equal(tiny_pipeline.decode(form, **options), result.images)
    one = tiny_pipeline.decode(packed[0], num_inference_steps=2, latents=noise()[:1], output_type="pt")
    torch.testing.assert_close(one, result.images[:1], rtol=0, atol=1e-5)


def test_continuous_codes_are_tokens_too(tiny_config):
    """Would catch a model without indices whose `encode` returns nothing that `decode` takes."""
    model = FlowMoAutoencoder(**{**tiny_config, "quantizer": "none"}).eval()
    pipe = FlowMoPipeline(model, FlowMoScheduler())
    tokens = pipe.encode(tensors())
    assert tokens.shape == (2, 8, 6) and tokens.is_floating_point()
    options = {"num_inference_steps": 2, "latents": noise(), "output_type": "pt"}
    result = pipe(tensors(), **options)
    assert result.indices is None
    assert torch.equal(pipe.decode(5 * tokens / 5, **options), result.images)


def test_output_types_are_one_image(tiny_pipeline):
    """Would catch an output type with another range, layout or rounding."""
    options = {"num_inference_steps": 2, "latents": noise()}
    latent, pt, array, pil = (
        tiny_pipeline(tensors(), output_type=kind, **options).images for kind in ("latent", "pt", "np", "pil")
    )
    assert latent.shape == (2, 3, 16, 16) and latent.min() < 0 and latent.abs().max() <= 1
    assert torch.equal(pt, latent / 2 + 0.5)
    assert array.shape == (2, 16, 16, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(pil, list) and pil[0].size == (16, 16)
    assert np.array_equal(np.stack([np.array(image) for image in pil]), (array * 255).round().astype(np.uint8))


def test_tuple_output(tiny_pipeline):
    """Would catch a tuple in another order than the output class."""
    images, indices = tiny_pipeline(tensors(), num_inference_steps=1, return_dict=False)
    assert isinstance(images[0], PIL.Image.Image) and indices.shape == (2, 8, 2)


def test_any_size(tiny_pipeline):
    """Would catch height and width exchanged, or sizes other than the training size refused."""
    image = PIL.Image.fromarray(pictures(1, 12, 20)[0])
    result = tiny_pipeline(image, num_inference_steps=1)
    assert result.images[0].size == (20, 12)
    assert tiny_pipeline.decode(result.indices, 12, 20, num_inference_steps=1)[0].size == (20, 12)
    assert tiny_pipeline.decode(result.indices, num_inference_steps=1)[0].size == (16, 16)


def test_interrupt_and_callback(tiny_pipeline, calls):
    """Would catch a callback without its tensors, whose changes are lost, or that cannot end the sampling."""
    seen = []

    def callback(pipe, i, timestep, kwargs):
        assert pipe is tiny_pipeline and set(kwargs) == {"latents"}
        seen.append((i, timestep.item()))
        pipe._interrupt = i == 2
        return {"latents": torch.full_like(kwargs["latents"], 0.25)} if i == 2 else {}

    options = {"num_inference_steps": 5, "output_type": "pt", "callback_on_step_end": callback}
    images = tiny_pipeline(tensors(), guidance_scale=1.25, **options).images
    assert [i for i, _ in seen] == [0, 1, 2] and len(calls) == 3
    assert [timestep for _, timestep in seen] == tiny_pipeline.scheduler.timesteps[:3].tolist()
    assert (images == 0.625).all()
    assert tiny_pipeline.guidance_scale == 1.25 and tiny_pipeline.num_timesteps == 5 and tiny_pipeline.interrupt
    tiny_pipeline(tensors(), num_inference_steps=5)
    assert len(calls) == 8 and not tiny_pipeline.interrupt


def test_a_callback_changes_guidance(tiny_pipeline):
    """Would catch a callback whose `_guidance_scale` is read by nothing."""

    def callback(pipe, i, timestep, kwargs):
        pipe._guidance_scale = 1.0
        return {}

    options = {"latents": noise(), "output_type": "latent", "num_inference_steps": 2}
    options["guidance_interval"] = (0.0, float("inf"))
    mixed = tiny_pipeline(tensors(), guidance_scale=4.0, **options, callback_on_step_end=callback).images
    first = []
    keep = {"callback_on_step_end": lambda pipe, i, timestep, kwargs: first.append(kwargs["latents"]) or {}}
    guided = tiny_pipeline(tensors(), guidance_scale=4.0, **options, **keep).images
    codes = tiny_pipeline.autoencoder.encode(tensors()).codes
    t = tiny_pipeline.scheduler.times[1]
    v = tiny_pipeline.autoencoder(first[0], t, codes=codes).velocity
    torch.testing.assert_close(mixed, (first[0] - t * v).clamp(-1, 1))
    assert not torch.allclose(mixed, guided, atol=1e-3)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_progress_bar_counts_steps(tiny_pipeline, monkeypatch, solver):
    """Would catch a bar that never fills, or that counts the model's answers instead of the steps."""
    totals, updates = [], []

    class Bar:
        def update(self):
            updates.append(1)

    @contextmanager
    def progress_bar(iterable=None, total=None):
        totals.append(total)
        yield Bar()

    monkeypatch.setattr(tiny_pipeline, "progress_bar", progress_bar)
    tiny_pipeline.scheduler = FlowMoScheduler(solver=solver)
    tiny_pipeline(tensors(), num_inference_steps=3)
    assert totals == [3] and len(updates) == 3


# Images in


def test_kinds_of_images_are_one_image(tiny_pipeline):
    """Would catch a kind of input with another range, layout or order."""
    arrays = pictures()
    pil = [PIL.Image.fromarray(array) for array in arrays]
    forms = {
        "PIL": pil,
        "tuple": tuple(pil),
        "uint8": arrays,
        "flipped view": np.flip(np.flip(arrays, 1).copy(), 1),
        "float": arrays / 255,
        "arrays": list(arrays / np.float32(255)),
        "tensor": tensors(),
        "tensors": list(tensors()),
        "batches": [tensors()[:1], tensors()[1:]],
        "double": tensors().double(),
    }
    expected = tensors()
    for name, form in forms.items():
        found = tiny_pipeline._images(form, None, None)
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
    assert torch.equal(tiny_pipeline._images(pil[0], None, None), tiny_pipeline._images(arrays[0], None, None))


def test_large_batches_of_arrays_join(tiny_pipeline):
    """Would catch a list of batches of which only the first image of each is taken."""
    assert tiny_pipeline.encode([tensors(2), tensors(3)]).shape[0] == 5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pil_modes_become_rgb(tiny_pipeline, mode):
    """Would catch a picture that is refused, or read with its alpha as a colour, because it is not RGB."""
    image = PIL.Image.fromarray(pictures(1)[0]).convert(mode)
    expected = torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255 * 2 - 1
    torch.testing.assert_close(tiny_pipeline._images(image, None, None), expected)


def test_one_channel_models_take_grey_pictures(tiny_config):
    """Would catch a pipeline that only knows models of three channels."""
    pipe = FlowMoPipeline(FlowMoAutoencoder(**tiny_config, in_channels=1).eval(), FlowMoScheduler())
    image = pipe(PIL.Image.fromarray(pictures(1)[0]), num_inference_steps=1).images[0]
    assert image.mode == "L" and image.size == (16, 16)


def test_images_shrink_to_whole_patches(tiny_pipeline):
    """Would catch pictures that are cropped or refused because their sides are not multiples of the patch size."""
    array = pictures(1, 18, 23)[0]
    image = PIL.Image.fromarray(array)
    expected = torch.tensor(np.array(image.resize((20, 16), PIL.Image.Resampling.LANCZOS)))
    found = tiny_pipeline._images(image, None, None)
    torch.testing.assert_close(found, expected.permute(2, 0, 1)[None] / 255 * 2 - 1)
    for form in (array, tensors(1, 18, 23)):
        assert tiny_pipeline._images(form, None, None).shape == (1, 3, 16, 20)


def test_height_and_width_resize(tiny_pipeline):
    """Would catch a size that is ignored for a kind of image, or a batch of mixed sizes that cannot be given one."""
    mixed = [pictures(1, 12, 20)[0], pictures(1, 16, 16)[0], pictures(1, 3, 30)[0]]
    forms = (mixed, [PIL.Image.fromarray(array) for array in mixed])
    for form in forms:
        assert tiny_pipeline._images(form, 8, 24).shape == (3, 3, 8, 24)
        with pytest.raises(ValueError, match="different sizes"):
            tiny_pipeline._images(form, 8, None)
    assert tiny_pipeline._images(mixed[0], None, 8).shape == (1, 3, 12, 8)
    assert tiny_pipeline(mixed, 8, 24, num_inference_steps=1).images[2].size == (24, 8)


# What does not fit


def nan_image() -> torch.Tensor:
    image = tensors()
    image[1, 0, 3, 3] = float("nan")
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIL.Image.new("RGB", (40, 3)), r"\(3, 40\) is smaller than a patch of 4 x 4"),
        (torch.zeros(3, 16, 2), r"\(16, 2\) is smaller than a patch of 4 x 4"),
        (torch.zeros(1, 1, 16, 16), "expected .*3"),
        (np.zeros((16, 16, 4), np.float32), "expected .*3"),
        (np.zeros((16, 16), np.float32), "three dimensions, or four"),
        (torch.full((3, 16, 16), 1.5), r"1.5 to 1.5: a tensor image lies in \[-1, 1\]"),
        (torch.full((3, 16, 16), -1.01), r"a tensor image lies in \[-1, 1\]"),
        (tensors()[0] * 255, r"a tensor image lies in \[-1, 1\]"),
        (np.full((16, 16, 3), 128.0), r"128 to 128: a float NumPy image lies in \[0, 1\]"),
        (np.full((16, 16, 3), 128), r"128 to 128: a float NumPy image lies in \[0, 1\]"),
        (np.full((16, 16, 3), -0.1), r"a float NumPy image lies in \[0, 1\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "dtype torch.uint8; expected floats"),
        (nan_image(), "not finite"),
        (np.full((16, 16, 3), np.inf), "not finite"),
        (torch.zeros(0, 3, 16, 16), "empty"),
        ([], "must be PIL images"),
        ("picture.png", r"must be PIL images.*got \['str'\]"),
        (None, r"must be PIL images.*got \['NoneType'\]"),
        ([tensors()[0], pictures()[0]], "a list of one kind"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 16, 20)], "different sizes"),
        ([PIL.Image.new("RGB", (16, 16)), PIL.Image.new("RGB", (20, 16))], "different sizes"),
    ],
)
def test_bad_images_are_refused(tiny_pipeline, calls, image, message):
    """Would catch an image that is encoded as something else, or an error from deep inside torch."""
    for method in (tiny_pipeline, tiny_pipeline.encode):
        with pytest.raises(ValueError, match=message):
            method(image)
    assert not calls


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 8, 3, dtype=torch.int64), r"shape \(1, 8, 3\); expected \(batch, 8, 2\)"),
        (torch.zeros(8, 2, dtype=torch.int64), r"shape \(8, 2\)"),
        (np.zeros((1, 7, 2), np.int32), r"shape \(1, 7, 2\)"),
        (torch.full((1, 8, 2), 8), r"8 to 8.*\[0, 8\)"),
        (torch.full((1, 8, 2), -1), r"-1 to -1.*\[0, 8\)"),
        (torch.zeros(1, 8, 2, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(1, 8, 2), r"shape \(1, 8, 2\); expected \(batch, 8, 6\)"),
        (torch.full((1, 8, 6), 3.0), r"3 to 3: codes lie in \[-1, 1\]"),
        (torch.full((1, 8, 6), float("nan")), "not finite"),
        (b"12345", "5 bytes; expected 6"),
        ([b"123456", b"1234567"], "7 bytes; expected 6"),
        (torch.zeros(1, 8, 2).long().tolist(), "tokens must be"),
        ("123456", "tokens must be"),
        ([], "tokens are empty"),
        (torch.zeros(0, 8, 2, dtype=torch.int64), "tokens are empty"),
    ],
)
def test_bad_tokens_are_refused(tiny_pipeline, calls, tokens, message):
    """Would catch tokens of another model, or damaged ones, that decode to some picture."""
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.decode(tokens)
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 18}, "height=18 and width=16 must be positive multiples of the patch size 4"),
        ({"height": 0}, "height=0"),
        ({"guidance_interval": (1.02, 0.17)}, "the lower one first"),
        ({"guidance_interval": (-1.0, 1.0)}, "guidance_interval"),
        ({"guidance_interval": (0.17,)}, "guidance_interval"),
        ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval"),
        ({"generator": generators(3)}, "list of 3; expected one for each of 2 images"),
        ({"generator": generators(1)}, "list of 1; expected one for each of 2 images"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\); expected \(2, 3, 16, 16\)"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"expected \(2, 3, 16, 16\)"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["codes"]}, r"\['codes'\]; known are \['latents'\]"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(tiny_pipeline, monkeypatch, arguments, message):
    """Would catch a mistake that is reported only after a batch was encoded, or not at all."""
    tokens = tiny_pipeline.encode(tensors())
    monkeypatch.setattr(tiny_pipeline.autoencoder, "encode", None)
    monkeypatch.setattr(tiny_pipeline.autoencoder, "forward", None)
    for method, given in ((tiny_pipeline, tensors()), (tiny_pipeline.decode, tokens)):
        with pytest.raises(ValueError, match=message):
            method(given, **arguments)


def test_encode_refuses_a_wrong_number_of_generators(tiny_config):
    """Would catch images of a "kl" model that are drawn from their neighbours' generators."""
    pipe = FlowMoPipeline(FlowMoAutoencoder(**tiny_config, quantizer="kl").eval(), FlowMoScheduler())
    with pytest.raises(ValueError, match="list of 3; expected one for each of 2"):
        pipe.encode(tensors(), generator=generators(3))


# The conventions of DiffusionPipeline


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_latents_in_float32(tiny_pipeline, calls, dtype):
    """Would catch latents or times in half precision, which blur the late steps, or inputs the model cannot take."""
    kinds = set()

    def callback(pipe, i, timestep, kwargs):
        kinds.add(kwargs["latents"].dtype)
        return kwargs

    options = {"num_inference_steps": 6, "latents": noise(), "output_type": "pt"}
    tokens = tiny_pipeline.encode(tensors())
    expected = tiny_pipeline.decode(tokens, **options)
    calls.clear()
    assert tiny_pipeline.to(dtype) is tiny_pipeline
    assert tiny_pipeline.dtype == tiny_pipeline.autoencoder.dtype == dtype
    images = tiny_pipeline.decode(tokens, callback_on_step_end=callback, **options)
    assert kinds == {torch.float32} and images.dtype == torch.float32
    assert {kind for _, kind, _ in calls} == {dtype} and {t.dtype for _, _, t in calls} == {torch.float32}
    torch.testing.assert_close(images, expected, rtol=0, atol=0.05)
    assert tiny_pipeline(tensors(), **options).indices.dtype == torch.int64


def test_components_and_devices(tiny_pipeline):
    """Would catch a pipeline that `from_pipe`, offloading or `to` cannot work with."""
    assert set(tiny_pipeline.components) == {"autoencoder", "scheduler"}
    assert tiny_pipeline._optional_components == [] and tiny_pipeline._callback_tensor_inputs == ["latents"]
    assert tiny_pipeline.model_cpu_offload_seq == "autoencoder"
    assert tiny_pipeline._execution_device == tiny_pipeline.device == torch.device("cpu")
    assert FlowMoPipeline.from_pipe(tiny_pipeline).autoencoder is tiny_pipeline.autoencoder
    assert FlowMoPipeline(**tiny_pipeline.components).components == tiny_pipeline.components


def test_model_offload_is_freed_after_every_entry(tiny_pipeline, monkeypatch):
    """Would catch a model that stays on the accelerator after a call, `encode` or `decode`."""
    options = {"num_inference_steps": 2, "latents": noise(), "output_type": "pt"}
    expected = tiny_pipeline(tensors(), **options)
    tiny_pipeline.enable_model_cpu_offload(device="cpu")
    assert tiny_pipeline._execution_device == torch.device("cpu:0")
    assert torch.equal(tiny_pipeline(tensors(), **options).images, expected.images)

    freed = []
    monkeypatch.setattr(tiny_pipeline, "maybe_free_model_hooks", lambda: freed.append(1))
    for entry in (tiny_pipeline, tiny_pipeline.encode):
        entry(tensors())
        assert freed.pop() and not freed
    tiny_pipeline.decode(expected.indices, num_inference_steps=1)
    assert freed == [1]


def test_no_gradients(tiny_pipeline):
    """Would catch a graph kept over all steps by one of the three entries."""
    assert not tiny_pipeline(tensors(), num_inference_steps=1, output_type="pt").images.requires_grad
    tokens = torch.ones(1, 8, 6, requires_grad=True)
    assert not tiny_pipeline.decode(tokens, num_inference_steps=1, output_type="pt").requires_grad


# Saving and loading


def same_pipeline(a: FlowMoPipeline, b: FlowMoPipeline) -> bool:
    options = {"num_inference_steps": 2, "latents": noise(), "output_type": "pt"}
    # Weights read from a file lie unaligned in memory, where the last bit of a product may differ; a copy does not.
    b = FlowMoPipeline(copy.deepcopy(b.autoencoder), b.scheduler)
    left, right = a(tensors(), **options), b(tensors(), **options)
    return (
        same_weights(a.autoencoder, b.autoencoder)
        and torch.equal(left.images, right.images)
        and torch.equal(left.indices, right.indices)
        and not b.autoencoder.training
    )


def weight_files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "autoencoder").iterdir() if file.name != "config.json")


def hub_cache(folder: Path, cache: Path) -> str:
    """Lays a saved pipeline out as the Hub's cache does, and returns its name there."""
    repository = cache / "models--someone--flowmo"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return "someone/flowmo"


def test_model_index_names_the_package(tiny_pipeline, tmp_path):
    """Would catch deep module paths in checkpoints, which break when a file moves: diffusers may drop the table."""
    tiny_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FlowMoPipeline"
    assert index["autoencoder"] == ["flowmo_diffusers", "FlowMoAutoencoder"]
    assert index["scheduler"] == ["flowmo_diffusers", "FlowMoScheduler"]
    assert {key for key in index if not key.startswith("_")} == {"autoencoder", "scheduler"}


def test_round_trip_through_a_folder(tiny_pipeline, tmp_path):
    """Would catch a weight, a config value or the solver that is not saved, or weights outside of safetensors."""
    tiny_pipeline.scheduler = FlowMoScheduler(rho=2.0, solver="heun")
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = FlowMoPipeline.from_pretrained(tmp_path)
    assert same_pipeline(tiny_pipeline, loaded)
    assert isinstance(loaded.scheduler, FlowMoScheduler)
    assert loaded.scheduler.config.rho == 2.0 and loaded.scheduler.order == 2
    assert {k: v for k, v in loaded.autoencoder.config.items() if k[0] != "_"} == {
        k: v for k, v in tiny_pipeline.autoencoder.config.items() if k[0] != "_"
    }
    loaded.save_pretrained(tmp_path / "again")
    for config in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in config.read_text(), "says where it was loaded from"
    shutil.rmtree(tmp_path / "again")
    assert weight_files(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    assert (
        load_file(tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors").keys()
        == dict(tiny_pipeline.autoencoder.named_parameters()).keys()
        | dict(tiny_pipeline.autoencoder.named_buffers()).keys()
    )


def test_round_trip_through_the_offline_hub_cache(tiny_pipeline, tmp_path):
    """Would catch loading by Hub id that needs the network, or an import the Hub's loader cannot find."""
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    name = hub_cache(tmp_path / "saved", tmp_path / "cache")
    loaded = FlowMoPipeline.from_pretrained(name, cache_dir=tmp_path / "cache")
    assert same_pipeline(tiny_pipeline, loaded)
    alone = FlowMoAutoencoder.from_pretrained(name, subfolder="autoencoder", cache_dir=tmp_path / "cache")
    assert same_weights(tiny_pipeline.autoencoder, alone)


@pytest.mark.parametrize("max_shard_size", [None, "50KB"])
def test_fp16_variant(tiny_pipeline, tmp_path, max_shard_size):
    """Would catch a variant that is saved under the usual name, or loaded as another one, sharded or not."""
    tiny_pipeline.to(torch.float16)
    tiny_pipeline.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size=max_shard_size)
    assert all(".fp16" in name for name in weight_files(tmp_path / "saved"))
    loaded = FlowMoPipeline.from_pretrained(tmp_path / "saved", variant="fp16", dtype=torch.float16)
    assert same_pipeline(tiny_pipeline, loaded)
    name = hub_cache(tmp_path / "saved", tmp_path / "cache")
    options = {"cache_dir": tmp_path / "cache", "variant": "fp16", "dtype": torch.float16}
    assert same_pipeline(tiny_pipeline, FlowMoPipeline.from_pretrained(name, **options))
    with pytest.raises((ValueError, OSError)):
        FlowMoPipeline.from_pretrained(tmp_path / "saved")


def test_sharded_round_trip(tiny_pipeline, tmp_path):
    """Would catch shards that are not written, not found, or lose a weight."""
    tiny_pipeline.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    files = weight_files(tmp_path / "saved")
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert "diffusion_pytorch_model.safetensors.index.json" in files
    assert same_pipeline(tiny_pipeline, FlowMoPipeline.from_pretrained(tmp_path / "saved"))
    name = hub_cache(tmp_path / "saved", tmp_path / "cache")
    assert same_pipeline(tiny_pipeline, FlowMoPipeline.from_pretrained(name, cache_dir=tmp_path / "cache"))


def test_loading_in_another_dtype(tiny_pipeline, tmp_path):
    """Would catch `dtype=` that is not passed on to the model."""
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = FlowMoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same_weights(loaded.autoencoder, tiny_pipeline.autoencoder.to(torch.bfloat16))


def test_pickles_are_never_read_or_written(tiny_pipeline, tmp_path, monkeypatch):
    """Would catch diffusers' fallback to a `.bin` file, which can run any code when it is opened."""
    tiny_pipeline.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert weight_files(tmp_path / "saved") == ["diffusion_pytorch_model.safetensors"]
    weights = tmp_path / "saved" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        FlowMoPipeline.from_pretrained(tmp_path / "saved")
    name = hub_cache(tmp_path / "saved", tmp_path / "cache")
    with pytest.raises(OSError):
        FlowMoPipeline.from_pretrained(name, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="safetensors only"):
        FlowMoPipeline.from_pretrained(tmp_path / "saved", use_safetensors=False)


def test_another_pipelines_checkpoint_is_refused(tmp_path):
    """Would catch a foreign checkpoint of which whatever has a known name is loaded, the rest passed over."""
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint of a DDPMPipeline, not of a FlowMoPipeline"):
        FlowMoPipeline.from_pretrained(tmp_path)


def test_a_subclass_loads_its_parents_checkpoint(tiny_pipeline, tmp_path):
    """Would catch a check of the class name that forbids deriving from the pipeline."""

    class OwnPipeline(FlowMoPipeline):
        pass

    tiny_pipeline.save_pretrained(tmp_path)
    assert isinstance(OwnPipeline.from_pretrained(tmp_path), OwnPipeline)


def test_a_folder_without_a_pipeline_is_refused(tiny_autoencoder, tmp_path):
    """Would catch a lone model's folder that is taken for a pipeline."""
    tiny_autoencoder.save_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match="model_index.json"):
        FlowMoPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError):
        FlowMoPipeline.from_pretrained("someone/not-there", cache_dir=tmp_path / "cache")


def test_weights_of_other_shapes_are_refused(tiny_pipeline, tiny_config, tmp_path):
    """Would catch a checkpoint whose config and weights belong to two models, loaded in part."""
    tiny_pipeline.save_pretrained(tmp_path)
    other = FlowMoAutoencoder(**{**tiny_config, "encoder_hidden_size": 64})
    other.save_config(tmp_path / "autoencoder")
    with pytest.raises((ValueError, RuntimeError), match="(?i)shape|size mismatch"):
        FlowMoPipeline.from_pretrained(tmp_path)


def test_another_models_weights_are_refused(tiny_pipeline, tmp_path):
    """Would catch a pipeline of an autoencoder that was never loaded, because the folder holds another model."""
    tiny_pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "autoencoder")
    tiny_unet().save_pretrained(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="checkpoint of a UNet2DModel, not of a FlowMoAutoencoder"):
        FlowMoPipeline.from_pretrained(tmp_path)


def test_missing_weights_are_refused(tiny_pipeline, tmp_path):
    """Would catch a damaged checkpoint that loads with a warning and fails, or samples nonsense, later."""
    tiny_pipeline.save_pretrained(tmp_path)
    file = tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["encoder.latent_token"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing.*encoder.latent_token"):
        FlowMoPipeline.from_pretrained(tmp_path)
    save_file(weights | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected.*extra"):
        FlowMoAutoencoder.from_pretrained(tmp_path / "autoencoder", low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        FlowMoAutoencoder.from_pretrained(tmp_path / "autoencoder", use_safetensors=False)


def test_threads_can_load_at_once(tiny_pipeline, tmp_path, monkeypatch):
    """Catches two models that are built at once by diffusers, after which no new module in the process has memory."""
    tiny_pipeline.save_pretrained(tmp_path)
    from_config, together = FlowMoAutoencoder.from_config, threading.Barrier(2)

    def slow(*args, **kwargs):
        with suppress(threading.BrokenBarrierError):
            if together.wait(timeout=0.5) == 1:
                time.sleep(0.2)  # who came later leaves later
        return from_config(*args, **kwargs)

    monkeypatch.setattr(FlowMoAutoencoder, "from_config", slow)
    monkeypatch.setattr(torch.nn.Module, "register_parameter", torch.nn.Module.register_parameter)  # set back after
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(FlowMoPipeline.from_pretrained, [tmp_path] * 2))
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"
    assert all(same_pipeline(tiny_pipeline, pipeline) for pipeline in loaded)


def test_components_can_be_given_to_from_pretrained(tiny_pipeline, tmp_path):
    """Would catch a loader that reads a component it was given, or that needs one it was told to leave out."""
    tiny_pipeline.save_pretrained(tmp_path)
    scheduler = FlowMoScheduler(solver="heun")
    assert FlowMoPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler
    assert FlowMoPipeline.from_pretrained(tmp_path, autoencoder=None).autoencoder is None


def test_compiled_blocks_serve_every_step(tiny_pipeline: FlowMoPipeline) -> None:
    """Catches graph breaks, widths taken for variable, and kinds of blocks that use up each other's compiled versions:
    once guided and unguided steps have been seen, nothing is compiled again, whatever the batch."""
    pipe, options = tiny_pipeline, {"output_type": "pt", "num_inference_steps": 4}
    expected = pipe(tensors(3), latents=noise(3), **options).images
    torch._dynamo.reset()
    pipe.autoencoder.compile_repeated_blocks(backend="eager", fullgraph=True)
    for count in (2, 3):
        pipe(tensors(count), latents=noise(count), **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe(tensors(5), latents=noise(5), **options)
        compiled = pipe(tensors(3), latents=noise(3), **options).images
    torch.testing.assert_close(compiled, expected)
    torch._dynamo.reset()
