"""What saves memory: offloading, float8 storage and slicing reach every weight and give the plain results."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from scripts import load_script
from token_models import build_generator

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.assets import starter
from flowmo_diffusers.data.images import load_images, stack_images
from flowmo_diffusers.metrics.reconstruction import psnr


FLOAT8 = torch.float8_e4m3fn
# Of pixels in [0, 1]: batches are multiplied otherwise than single images, and weights read from a file lie unaligned.
ROUNDING = 1e-5
Pipeline = FlowMoPipeline | FlowMoGenerationPipeline

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
both_levels = pytest.mark.parametrize("level", ["block_level", "leaf_level"])


@pytest.fixture(params=["tokenizer", "masked", "autoregressive"])
def pipe(request, tiny_autoencoder: FlowMoAutoencoder, tiny_pipeline: FlowMoPipeline) -> Pipeline:
    if request.param == "tokenizer":
        return tiny_pipeline
    generator = build_generator(order=request.param)
    pipe = FlowMoGenerationPipeline(generator, FlowMoTokenScheduler(), tiny_autoencoder, FlowMoScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(pipe: Pipeline) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def answers(pipe: Pipeline, between: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """What the entries of a pipeline give on two images, guided in the second of three steps."""
    if isinstance(pipe, FlowMoGenerationPipeline):
        steps = {"num_inference_steps": 3} if pipe.generator.config.order == "masked" else {}
        options = {**steps, "decoder_num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
        given = []
        for seed in range(2):
            between()
            output = pipe(class_labels=[0, 2], generator=torch.Generator().manual_seed(seed), **options)
            given += [output.images, output.indices]
        return [part.cpu() for part in given]
    options = {"num_inference_steps": 3, "latents": noise(), "output_type": "pt"}
    between()
    tokens = pipe.encode(pictures())
    packed = pipe.autoencoder.pack_codes(pipe.autoencoder.indices_to_codes(tokens))
    between()
    decoded = pipe.decode(packed, **options)
    between()
    encoded_after = pipe.encode(pictures().flip(0))
    between()
    output = pipe(pictures(), **options)
    return [part.cpu() for part in (tokens, decoded, encoded_after, output.images, output.indices)]


def assert_same(given: list[torch.Tensor], expected: list[torch.Tensor], atol: float = ROUNDING) -> None:
    """Tokens exactly, pixels in [0, 1] to `atol`."""
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=atol if right.is_floating_point() else 0)


def in_memory(device: str) -> float:
    """The same weights at the same addresses give the same pixels; a copy on a GPU may be multiplied by another
    kernel."""
    return 0 if device == "cpu" else ROUNDING


def plain_answers(pipe: Pipeline, device: str) -> list[torch.Tensor]:
    expected = answers(pipe.to(device))
    pipe.to("cpu")
    return expected


# Offloading


@every_device
def test_model_offloading(pipe, device):
    """Catches a model that is asked where it is not, or is left on the accelerator."""
    expected = plain_answers(pipe, device)
    pipe.enable_model_cpu_offload(device=device)
    assert_same(answers(pipe), expected, in_memory(device))
    assert {parameter.device.type for model in models(pipe) for parameter in model.parameters()} == {"cpu"}


@every_device
def test_sequential_offloading(pipe, device):
    """Catches weights read outside of their module's forward, where there are none, and codes made on the device of
    weights that have none."""
    expected = plain_answers(pipe, device)
    if device == "cpu":
        for model in models(pipe):  # as the pipeline does it, but for the name "cpu:0", which accelerate fails on
            cpu_offload(model, torch.device("cpu"))
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    assert_same(answers(pipe), expected, in_memory(device))
    assert {parameter.device.type for model in models(pipe) for parameter in model.parameters()} == {"meta"}


@every_device
@both_levels
def test_group_offloading(pipe, level, device):
    """Catches a layer that computes with weights of the other device."""
    expected = plain_answers(pipe, device)
    for model in models(pipe):
        model.enable_group_offload(torch.device(device), offload_type=level, num_blocks_per_group=1)
    assert_same(answers(pipe), expected, in_memory(device))


@every_device
@both_levels
def test_group_offloading_to_disk(pipe, level, device, tmp_path):
    """Catches a weight read without its group being loaded: until then it is NaN. `encode`, which is no forward, is
    asked before and after a decoding."""
    expected = plain_answers(pipe, device)
    for number, model in enumerate(models(pipe)):
        folder = str(tmp_path / str(number))
        apply_group_offloading(
            model,
            torch.device(device),
            offload_type=level,
            num_blocks_per_group=1,
            offload_to_disk_path=folder,
        )

    def spoil():
        for model in models(pipe):
            for parameter in model.parameters():
                assert parameter.device.type == "cpu"
                parameter.data.fill_(float("nan"))

    assert_same(answers(pipe, between=spoil), expected)


def test_groups_are_small(pipe, monkeypatch):
    """Catches blocks that are not found, so that a whole model is one group; and groups that are never let go."""
    loaded, most = set(), 0

    def follow(change: Callable, loads: bool) -> Callable:
        def followed(group):
            nonlocal most
            names = {*group.parameters, *(p for module in group.modules for p in module.parameters())}
            loaded.update(names) if loads else loaded.difference_update(names)
            most = max(most, sum(p.numel() for p in loaded))
            change(group)

        return followed

    for model in models(pipe):
        model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    monkeypatch.setattr(ModuleGroup, "onload_", follow(ModuleGroup.onload_, True))
    monkeypatch.setattr(ModuleGroup, "offload_", follow(ModuleGroup.offload_, False))
    answers(pipe)
    trunks = [pipe.autoencoder.encoder, pipe.autoencoder.decoder, *(m for m in models(pipe) if hasattr(m, "blocks"))]
    block = max(sum(p.numel() for p in block.parameters()) for trunk in trunks for block in trunk.blocks)
    outside = max(
        sum(p.numel() for name, p in trunk.named_parameters() if not name.startswith("blocks.")) for trunk in trunks
    )
    assert 0 < most <= block + outside
    assert not loaded


def test_every_child_is_a_group(tiny_autoencoder):
    """Catches a child that is left over: with streams, its group would trace the trunks that trace themselves, which
    is an error."""
    children = {name for name, _ in tiny_autoencoder.named_children()}
    assert children == set(FlowMoAutoencoder._group_offload_block_modules)
    assert not list(tiny_autoencoder.parameters(recurse=False)) and not list(tiny_autoencoder.buffers(recurse=False))


@needs_cuda
@both_levels
@pytest.mark.parametrize("options", [{}, {"record_stream": True}, {"low_cpu_mem_usage": True}])
def test_group_offloading_with_streams(pipe, level, options):
    """Catches weights that are used before they have arrived, or not fetched again once the order is known."""
    expected = plain_answers(pipe, "cuda")
    for model in models(pipe):
        model.enable_group_offload(
            torch.device("cuda"), offload_type=level, num_blocks_per_group=1, use_stream=True, **options
        )
    for _ in range(2):  # the order is traced in the first call
        assert_same(answers(pipe), expected)


@needs_cuda
@both_levels
def test_group_offloading_to_disk_with_streams(pipe, level, tmp_path):
    """As without streams: catches groups read from the files of others, or computed with before they are read."""
    expected = plain_answers(pipe, "cuda")
    for number, model in enumerate(models(pipe)):
        model.enable_group_offload(
            torch.device("cuda"),
            offload_type=level,
            num_blocks_per_group=1,
            use_stream=True,
            offload_to_disk_path=str(tmp_path / str(number)),
        )
    for _ in range(2):
        assert_same(answers(pipe), expected)


@needs_cuda
@both_levels
@pytest.mark.parametrize("use_stream", [False, True])
def test_streams_after_a_decoding(tiny_pipeline, level, use_stream):
    """Catches an encoder that is lost when the order of the layers was traced on a decoding."""
    expected = plain_answers(tiny_pipeline, "cuda")
    tiny_pipeline.autoencoder.enable_group_offload(
        torch.device("cuda"), offload_type=level, num_blocks_per_group=1, use_stream=use_stream
    )
    for _ in range(2):
        tiny_pipeline.decode(expected[0], num_inference_steps=1)
        assert_same(answers(tiny_pipeline), expected)


@needs_cuda
@pytest.mark.parametrize("how", ["block_level", "leaf_level", "sequential"])
def test_offloading_saves_memory(tiny_config, how):
    """Catches offloading that has the whole model on the accelerator at some time."""
    depth = {"encoder_num_layers": 8, "decoder_num_layers": 8}
    width = {"encoder_hidden_size": 512, "decoder_hidden_size": 512, "num_attention_heads": 16}
    pipe = FlowMoPipeline(FlowMoAutoencoder(**{**tiny_config, **depth, **width}).eval(), FlowMoScheduler())
    pipe.set_progress_bar_config(disable=True)
    weights = sum(p.numel() * p.element_size() for p in pipe.autoencoder.parameters())
    assert weights > 2e8
    if how == "sequential":
        pipe.enable_sequential_cpu_offload(device="cuda")
    else:
        pipe.autoencoder.enable_group_offload(torch.device("cuda"), offload_type=how, num_blocks_per_group=1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipe(pictures(), num_inference_steps=1, latents=noise())
    assert torch.cuda.max_memory_allocated() - before < weights / 3


# Float8 storage


def in_float8(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == FLOAT8}


def test_what_is_stored_in_float8(pipe):
    """Catches norms, inputs, heads or conditions of the class in float8, or blocks that are not."""
    for model in models(pipe):
        before = {parameter.dtype for parameter in model.parameters()}
        kept = ["norm", *(["modulation"] if not isinstance(model, FlowMoAutoencoder) else [])]
        expected = {
            name
            for name, _ in model.named_parameters()
            if "blocks." in name and not any(part in name for part in kept)
        }
        model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
        assert in_float8(model) == expected
        assert {p.dtype for name, p in model.named_parameters() if name not in expected} == before == {torch.float32}
        assert model.dtype == torch.float32


@every_device
def test_float8_is_rounding_once(pipe, device):
    """Catches activations rounded with the weights, weights rounded again at each step, and a layer left in float8
    after its forward or computing in it: all is as if the weights had been rounded beforehand."""
    for model in models(pipe):
        model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
    stored = [in_float8(model) for model in models(pipe)]
    given = answers(pipe.to(device))
    assert [in_float8(model) for model in models(pipe)] == stored
    twins = {
        name: type(part).from_config(part.config).eval() if isinstance(part, torch.nn.Module) else part
        for name, part in pipe.components.items()
    }
    for name, twin in twins.items():
        if isinstance(twin, torch.nn.Module):
            twin.load_state_dict({k: v.float() for k, v in pipe.components[name].state_dict().items()})
    rounded = type(pipe)(**twins)
    rounded.set_progress_bar_config(disable=True)
    assert_same(given, answers(rounded.to(device)))


@every_device
@both_levels
def test_everything_together(pipe, level, device, tmp_path):
    """Catches hooks that undo each other: float8 weights that are offloaded to disk, images one by one."""
    for model in models(pipe):
        model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
    expected = plain_answers(pipe, device)
    pipe.autoencoder.enable_slicing()
    for number, model in enumerate(models(pipe)):
        folder = str(tmp_path / str(number))
        model.enable_group_offload(
            torch.device(device), offload_type=level, num_blocks_per_group=1, offload_to_disk_path=folder
        )
    assert_same(answers(pipe), expected)


def test_float8_keeps_the_starters_pictures(tmp_path):
    """Catches a part that must not be cast: a trained model's pictures stay as good, and close to what they were,
    in less than a third of the memory."""
    images = stack_images(load_images("emoji", cache_dir=str(tmp_path))["test"].select(range(8)), 32)
    outputs, sizes = [], []
    for cast in (False, True):
        pipe = FlowMoPipeline.from_pretrained(starter())
        pipe.set_progress_bar_config(disable=True)
        if cast:
            pipe.autoencoder.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        outputs.append(pipe(images, num_inference_steps=8, generator=generator, output_type="latent"))
        sizes.append(sum(p.numel() * p.element_size() for p in pipe.autoencoder.parameters()))
    plain, cast = outputs
    assert sizes[1] < sizes[0] / 3
    assert psnr(images, cast.images).mean() > psnr(images, plain.images).mean() - 0.3
    assert psnr(plain.images, cast.images).mean() > 36
    assert (plain.indices == cast.indices).float().mean() > 0.85  # groups of 8 bits


# Slicing


@every_device
def test_slicing_is_the_batch(pipe, device):
    """Catches images or guided pairs that are not split, that get each other's codes or times, and slicing that
    cannot be switched off."""
    sizes = []
    for trunk in (pipe.autoencoder.encoder, pipe.autoencoder.decoder):
        trunk.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    expected = answers(pipe.to(device))
    asked = list(sizes)
    assert {2, 4} == set(asked)  # guided steps have twice the batch

    pipe.autoencoder.enable_slicing()
    sizes.clear()
    assert_same(answers(pipe), expected)
    assert sizes == [1] * sum(asked)

    pipe.autoencoder.disable_slicing()
    sizes.clear()
    assert_same(answers(pipe), expected)
    assert sizes == asked


@pytest.mark.parametrize("times", [0.3, torch.tensor([0.9, 0.5, 0.1])])
@pytest.mark.parametrize("quantizer", ["lfq", "kl"])
def test_sliced_forward(tiny_config, times, quantizer):
    """Catches slices with the time, the mask or the draw of another image."""
    torch.manual_seed(0)
    model = FlowMoAutoencoder(**{**tiny_config, "quantizer": quantizer}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    mask = torch.tensor([1.0, 0.0, 1.0])

    def ask():
        generator = torch.Generator().manual_seed(5)
        return model(noise(3), times, images=pictures(3), code_mask=mask, generator=generator)

    expected = ask()
    model.enable_slicing()
    given = ask()
    torch.testing.assert_close(given.velocity, expected.velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.codes, expected.codes, rtol=1e-5, atol=1e-5)


# The benchmark


@pytest.fixture
def benchmark(tiny_config, tmp_path, monkeypatch):
    """`benchmarks/memory.py` as a module, with a preset of the tiny model on its command line."""
    preset = tmp_path / "tiny.yaml"
    preset.write_text(json.dumps({"pretrain": {"model_config": tiny_config}}))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--config", str(preset), "--json", str(tmp_path / "out.json")])
    return load_script("memory", "benchmarks")


def test_benchmark_in_processes_of_their_own(benchmark, tiny_autoencoder, tmp_path, capsys):
    """Catches figures that are not those of the mode, are in other units, or leave out what Python takes."""
    sys.argv += ["--dtype", "bfloat16", "--modes", "slicing, 4 images"]
    benchmark.main()
    result = json.loads((tmp_path / "out.json").read_text())["results"][0]
    figures = result["figures"]
    assert result["name"] == "slicing, 4 images" and figures["batch"] == 4 and figures["seconds"] > 0
    assert figures["weights_gb"] == pytest.approx(tiny_autoencoder.num_parameters() * 2 / 1e9)
    assert 0.05 < figures["imports_gb"] <= figures["peak_gb"] < 5
    head, line, row = capsys.readouterr().out.splitlines()[-3:]
    assert row.startswith("| slicing, 4 images | 4 | ") and head.count("|") == line.count("|") == row.count("|")


@pytest.mark.parametrize("name", ["float8 weights, slicing", "block offload, disk, float8 weights, slicing"])
def test_benchmark_modes_do_what_they_say(benchmark, name, monkeypatch):
    """Catches a mode that measures the plain model under another name."""
    made = []
    build = benchmark.build_pipeline
    monkeypatch.setattr(benchmark, "build_pipeline", lambda *args: made.append(build(*args)) or made[0])
    benchmark.measure(benchmark.parse_args(), benchmark.MODES[name])
    model = made[0].autoencoder
    assert in_float8(model) and model.use_slicing
    hooks = [getattr(block, "_diffusers_hook", None) for block in model.decoder.blocks]
    assert all(hook and hook.get_hook("group_offloading") for hook in hooks) == ("offload" in name)


def test_benchmark_says_what_failed(benchmark, tmp_path, monkeypatch, capsys):
    """Catches modes that are lost in silence, take the others with them, or cannot be had on a CPU."""
    monkeypatch.setattr(benchmark, "measure_apart", lambda name: None if name == "plain" else {"batch": 1})
    with pytest.raises(SystemExit, match="failed"):
        benchmark.main()
    out = capsys.readouterr().out
    assert "| plain | failed |" in out and "| slicing | 1 |" in out and "model offload" not in out
    sys.argv += ["--modes", "model offload"]
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "'model offload': on a CPU there is nowhere to offload to but files" in capsys.readouterr().err
