"""The benchmarks run, count and compare as they say; the library's closed forms are faster than what they replace."""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import benchmark  # noqa: E402
import operations  # noqa: E402
import scaling  # noqa: E402
import timing  # noqa: E402
import windows  # noqa: E402
from published import published_config  # noqa: E402

from flowmo_diffusers.models.flops import decoder_flops, encoder_flops  # noqa: E402
from flowmo_diffusers.models.quantizers import lfq_entropies  # noqa: E402


CPU = torch.device("cpu")
REFERENCE = os.environ.get("FLOWMO_REFERENCE")
ONCE = ["--device", "cpu", "--warmup", "1", "--repetitions", "2", "--min_seconds", "0"]


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    """No precision, device or backend of an earlier Accelerator, nor one for later tests."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    gc.freeze()  # what the session has imported need not be searched after every operation
    yield
    gc.unfreeze()
    reset()


@pytest.fixture
def presets(tmp_path, tiny_config):
    """A tokenizer's and a generator's preset, as options."""
    model = tmp_path / "tokenizer.yaml"
    model.write_text(json.dumps({"pretrain": {"model_config": tiny_config}}))  # JSON is YAML
    generator = tmp_path / "generator.yaml"
    tiny = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    generator.write_text(json.dumps({"model_config": tiny}))
    return ["--config", str(model), "--generator_config", str(generator)]


@pytest.fixture
def short_sampling(monkeypatch):
    monkeypatch.setattr(operations, "GENERATOR_STEPS", 2)
    monkeypatch.setattr(operations, "NUM_PHOTOS", 2)
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 128, "cuda": 128})


class Clock:
    """Seconds that pass only while something works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float):
        """A call that takes so long, the last of them from then on."""
        remaining = list(seconds)

        def call():
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return call


def test_medians_are_of_counted_calls_in_turns():
    """Warm-up that counts, a mean in the place of a median, or the time of one side on the other's account."""
    clock = Clock()
    calls = {"a": clock.work(100, 100, 1, 2, 3, 4, 50), "b": clock.work(1000, 1000, 10)}
    measured = timing.measure(calls, CPU, warmup=2, repetitions=5, min_seconds=0, clock=clock)
    assert measured["a"].seconds == [1, 2, 3, 4, 50]
    assert (measured["a"].median, measured["a"].quartiles) == (3, (2, 4))
    assert measured["b"].seconds == [10] * 5
    assert timing.Measurement([7.0]).quartiles == (7, 7)


def test_calls_are_repeated_for_long_enough():
    """Repetitions or seconds that one call has enough of, while another has not."""
    clock = Clock()
    measured = timing.measure({"short": clock.work(1)}, CPU, 0, repetitions=3, min_seconds=7, clock=clock)
    assert len(measured["short"].seconds) == 7
    both = {"short": clock.work(1), "long": clock.work(9)}
    measured = timing.measure(both, CPU, 0, repetitions=3, min_seconds=5, clock=clock)
    assert [len(m.seconds) for m in measured.values()] == [5, 5]


def test_held_bytes_count_each_storage_once():
    """A gradient left out, or views that count as often as they are seen."""
    weight = torch.ones(100, requires_grad=True)
    assert timing.held_bytes([weight, weight.detach()[:3]]) == 400
    weight.sum().backward()
    assert timing.held_bytes([weight]) == 800


def test_peak_memory_is_of_the_call():
    """A peak of an earlier call, memory that others hold, or one that is seen only if it stays."""
    others = torch.ones(32, 2**20)  # 128 MiB that are no part of it
    torch.ones(64, 2**20)
    held = [torch.ones(8, 2**20)]
    peak = timing.peak_memory(lambda: torch.ones(16, 2**20).sum(), CPU, lambda: held)
    if peak is None:
        pytest.skip("this platform does not tell a process its peak memory")
    assert others.numel() and 0.9 < peak / (24 * 2**22) < 1.5


def test_every_operation_runs_and_is_counted(presets, short_sampling, tmp_path, capsys):
    """An operation that fails, a column or a figure that is missing, or FLOPs of another number of passes."""
    path = tmp_path / "out.json"
    options = [*presets, *ONCE, "--batch_size", "2", "--num_inference_steps", "4", "--chain_steps", "2"]
    assert benchmark.main([*options, "--json", str(path), "--profile"]) == 0
    record = json.loads(path.read_text())
    found = record["operations"]
    assert "aten::addmm" in found["encode"]["profile"] and sum(found["encode"]["profile"].values()) == pytest.approx(1)
    assert list(found) == list(operations.OPERATIONS)
    assert record["environment"]["packages"]["torch"] == torch.__version__
    config = record["environment"]["model_config"]
    once, again = encoder_flops(config, 16, 16), decoder_flops(config, 16, 16)
    assert found["encode"][benchmark.OURS]["flops"] == 2 * once
    assert found["decode"][benchmark.OURS]["flops"] == 2 * again
    passes = 4 + 1  # of t = 1, 0.316, 0.063, 0.004 one is guided
    assert found["reconstruct"][benchmark.OURS]["flops"] == 2 * (once + passes * again)
    table = capsys.readouterr().out
    for name, result in found.items():
        one = result[benchmark.OURS]
        assert one["median_seconds"] > 0 and one["repetitions"] == 2, name
        assert one["images_per_second"] == pytest.approx(2 / one["median_seconds"])
        if one["flops"]:
            rate = one["flops"] / one["median_seconds"]
            assert one["share_of_peak"] == pytest.approx(rate / record["peak_flops_per_second"])
        assert f"| {name} | {benchmark.OURS} |" in table


def test_half_precision_is_of_weights_or_of_autocast(presets):
    """A comparison of two precisions under one name."""
    args = benchmark.parse_args([*presets, "--device", "cpu", "--dtype", "bfloat16"])
    work = benchmark.build_workload(args)
    plain, cast = operations.encode(work), operations.encode(benchmark.build_workload(args, autocast=True))
    assert (plain.precision, cast.precision) == ("bfloat16 weights", "float32 weights, bfloat16 autocast")
    assert (plain.model.dtype, cast.model.dtype) == (torch.bfloat16, torch.float32)
    assert cast.outputs()["latents"].dtype == torch.bfloat16
    assert work.training_args("pretrain").mixed_precision == "bf16"


@pytest.mark.parametrize(
    "options",
    [
        ["--batch_size", "0"],
        ["--device", "tpu"],
        ["--autocast"],
        ["--operations", "train"],
        ["--warmup", "-1"],
    ],
)
def test_bad_options_are_refused(options, presets, capsys):
    """An option that is passed over until work is lost."""
    with pytest.raises(SystemExit):
        benchmark.parse_args([*presets, *options])
    assert options[0] in capsys.readouterr().err


def test_bad_workloads_are_refused(presets):
    """An image of half a patch; a generator without its preset."""
    args = benchmark.parse_args([*presets, "--device", "cpu"])
    with pytest.raises(ValueError, match="image_size=18 must be a positive multiple of patch_size=4"):
        benchmark.build_workload(args, image_size=18)
    with pytest.raises(ValueError, match="generator_config is missing"):
        operations.generator_step(benchmark.build_workload(args, generator_config=None))


def test_models_that_the_published_code_cannot_have_are_named(presets):
    """A comparison that fails deep inside the other code, or names one obstacle at a time."""
    work = benchmark.build_workload(benchmark.parse_args([*presets, "--device", "cpu"]))
    with pytest.raises(
        ValueError, match="num_attention_heads=2 must be 12.*encoder_hidden_size=32 must be a multiple"
    ):
        published_config({}, work)


def test_a_deviation_is_an_error():
    """Outputs that differ, or are not numbers, and pass."""
    result = {"ratios": {"time": 0.5, "memory": 0.25}, "deviations": {"latents": 1e-7}}
    text, wrong = benchmark.comparison({"encode": result}, 0)
    assert "| encode | 0.500 | 2.00 x | 0.250 |" in text and not wrong
    for value in (1e-2, float("nan")):
        _, wrong = benchmark.comparison({"encode": {**result, "deviations": {"latents": value}}}, 0)
        assert len(wrong) == 1 and "encode: latents" in wrong[0]


def dense_entropies(vectors: torch.Tensor) -> torch.Tensor:
    """The LFQ loss by its definition: a softmax over all 2^K codes for each vector."""
    bits = vectors.shape[1]
    codes = ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1
    logits = 2 * vectors @ codes.T / 0.1
    q = logits.softmax(-1)
    mean = q.mean(0)
    return -(q * logits.log_softmax(-1)).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


def test_lfq_loss_costs_less_than_its_definition():
    """A closed form that forms all codes for each vector after all. Only ratios: a machine is as fast as it is."""
    vectors = torch.randn(1024, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def backward(loss):
        def call():
            vectors.grad = None
            loss().backward()

        return call

    ours = backward(lambda: torch.sub(*lfq_entropies(vectors)))
    dense = backward(lambda: dense_entropies(vectors))
    ours()
    gradient = vectors.grad
    dense()
    assert torch.allclose(gradient, vectors.grad, rtol=1e-3, atol=1e-6)
    measured = timing.measure({"ours": ours, "dense": dense}, CPU, warmup=1, repetitions=5, min_seconds=0)
    assert measured["dense"].median > 2 * measured["ours"].median
    peaks = [timing.peak_memory(call, CPU, lambda: [vectors]) for call in (ours, dense)]
    if None not in peaks:
        assert peaks[1] > 2 * peaks[0]


def test_exponents_of_power_laws():
    """A slope on other scales, or of the values against their place in the list."""
    factors = [0.5, 1, 3, 4]
    assert scaling.exponent(factors, [5 * f**1.7 for f in factors]) == pytest.approx((1.7, 5))
    points = [{"factor": f, "seconds": 2 * f, "bytes": None, "flops": f**2} for f in factors]
    fits = scaling.fitted(points)
    assert fits.keys() == {"seconds", "flops"}
    assert (fits["seconds"]["exponent"], fits["flops"]["exponent"]) == pytest.approx((1, 2))


def test_scaling_of_a_tiny_model(presets, tmp_path, capsys):
    """An axis that scales something else: FLOPs of the encoder are known to grow with each as they do here."""
    paths = {"--json": tmp_path / "scaling.json", "--plot": tmp_path / "scaling.png"}
    options = [text for option, path in paths.items() for text in (option, str(path))]
    once = [*ONCE, "--factors", "1", "2", "--operations", "encode"]
    scaling.main([*presets, *once, *options])
    fits = {axis: r["fits"] for axis, r in json.loads(paths["--json"].read_text())["results"]["encode"].items()}
    flops = {axis: fit["flops"]["exponent"] for axis, fit in fits.items()}
    assert list(flops) == list(scaling.AXES)
    assert flops["batch"] == pytest.approx(1)
    assert 1.8 < flops["width"] < 2 and 1.5 < flops["image_size"] < 2  # patches alone grow, tokens do not
    assert 0 < flops["tokens"] < 1 < flops["depth"] < 2  # the last block is a smaller one
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")
    assert "| encode | width |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_latent_tokens=8 times a factor of 0.3"):
        scaling.main([*presets, *ONCE, "--factors", "1", "0.3", "--axes", "tokens"])


def test_windows_of_an_image(tmp_path, capsys):
    """Would catch a benchmark that does not run, does not count the windows' bits, or loses a row of its picture."""
    image = np.random.default_rng(0).integers(0, 256, (130, 150, 3), dtype=np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "noise.png")
    options = ["--overlaps", "0", "8", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    windows.main(windows.parse_args([str(tmp_path / "noise.png"), *options]))
    results = json.loads((tmp_path / "out" / "windows.json").read_text())["results"]
    assert [result["name"] for result in results] == ["tiles", "overlap 8"]
    assert [result["figures"]["windows"] for result in results] == [5 * 5, 6 * 6]
    assert results[0]["figures"]["bits_per_pixel"] == pytest.approx(25 * 192 * 8 / (130 * 150))
    assert "| overlap 8 | 36 |" in capsys.readouterr().out
    assert PIL.Image.open(tmp_path / "out" / "windows.png").height > 3 * 3 * 128


@pytest.mark.skipif(not REFERENCE, reason="FLOWMO_REFERENCE names no checkout of the published code")
@pytest.mark.parametrize(("dtype", "perceptual"), [("float32", "pooled"), ("bfloat16", "none")])
def test_published_code_agrees(dtype, perceptual, presets, short_sampling, tmp_path):
    """A comparison on other weights, inputs or draws than ours; figures of one side only."""
    names = ["encode", "decode", "reconstruct", "pretrain_step", "posttrain_step", "lfq_loss"]
    shape = {"encoder_hidden_size": 384, "decoder_hidden_size": 384, "num_attention_heads": 12}
    shape |= {"rope_axes": [8, 28, 28]}
    options = [*presets, *ONCE, "--dtype", dtype, "--model_config", json.dumps(shape), "--operations", *names]
    options += ["--perceptual", perceptual, "--batch_size", "5", "--num_inference_steps", "3", "--chain_steps", "2"]
    path = tmp_path / "out.json"
    assert benchmark.main([*options, "--reference", REFERENCE, "--json", str(path)]) == 0
    for name, result in json.loads(path.read_text())["operations"].items():
        assert result["deviations"] and result["ratios"]["time"] > 0, name
