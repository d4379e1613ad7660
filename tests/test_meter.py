"""The meter of a run: figures that a clock confirms, and none that are not known."""

import time

import pytest
import torch

from flowmo_diffusers.engine import meter as module
from flowmo_diffusers.engine.meter import PEAK_TFLOPS, Meter, peak_tflops


CPU = torch.device("cpu")


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Gpu:
    """A GPU as far as the meter asks one: its name and its memory."""

    def __init__(self, monkeypatch, name: str):
        self.peak = self.allocated = 0
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device) -> None:
        self.peak = self.allocated

    def uses(self, gib: float) -> None:
        """For a moment."""
        self.peak = max(self.peak, int(gib * 2**30))


def test_rates_and_shares(clock):
    """Catches images counted per process, waits counted twice, or a pause that slows the figures down."""
    meter = Meter(CPU, flops_per_image=2e12, num_processes=4)
    for _ in range(5):
        with meter.waiting():
            clock.passes(0.5)
        clock.passes(1.5)
        meter.step(8)
        with meter.paused():
            clock.passes(100)
    figures = meter.read()
    memory = figures.pop("peak_memory_gib")
    assert figures == pytest.approx(
        {"images_per_second": 4, "seconds_per_step": 2, "data_wait_share": 0.25, "tflops_per_second": 2}
    )
    assert 0.05 < memory < 64


def test_reading_starts_anew(clock):
    """Catches figures that average over the whole run, or that keep the waits of the last reading."""
    meter = Meter(CPU)
    with meter.waiting():
        clock.passes(10)
    meter.step(1)
    assert meter.read()["images_per_second"] == pytest.approx(0.1)
    assert meter.read() == {}
    clock.passes(1)
    meter.step(7)
    figures = meter.read()
    assert figures["images_per_second"] == pytest.approx(7)
    assert figures["data_wait_share"] == 0


def test_a_wait_that_ends_in_an_error_counts(clock):
    """Catches a clock that an exhausted or failing loader leaves running."""
    meter = Meter(CPU)
    with pytest.raises(StopIteration), meter.waiting():
        clock.passes(3)
        raise StopIteration
    clock.passes(1)
    meter.step(1)
    assert meter.read()["data_wait_share"] == pytest.approx(0.75)


def test_work_follows_the_freezing_of_the_encoder(clock):
    """Catches work of a whole interval counted at the rate of its last step."""
    meter = Meter(CPU, flops_per_image=3e12)
    clock.passes(1)
    meter.step(2)
    meter.flops_per_image = 1e12
    clock.passes(1)
    meter.step(2)
    assert meter.read()["tflops_per_second"] == pytest.approx((2 * 3 + 2 * 1) / 2)


def test_unknown_work_is_not_reported(clock):
    """Catches FLOP/s of a part of the steps passed off as those of all."""
    meter = Meter(CPU, flops_per_image=None)
    clock.passes(1)
    meter.step(2)
    meter.flops_per_image = 1e12
    meter.step(2)
    assert "tflops_per_second" not in meter.read()
    clock.passes(1)
    meter.step(2)
    assert meter.read()["tflops_per_second"] == pytest.approx(2)


def test_utilization_is_of_the_peak_of_the_dtype(clock, monkeypatch):
    """Catches a share of another format's peak, of the joint peak of all devices, or a guess for an unknown device."""
    Gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    meter = Meter(torch.device("cuda"), flops_per_image=989.4e12, dtype=torch.bfloat16, num_processes=2)
    clock.passes(2)
    meter.step(2)
    figures = meter.read()
    assert figures["tflops_per_second"] == pytest.approx(989.4 / 2)
    assert figures["flops_utilization"] == pytest.approx(0.5)
    Gpu(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    meter = Meter(torch.device("cuda"), flops_per_image=1e12, dtype=torch.bfloat16)
    clock.passes(1)
    meter.step(1)
    assert "flops_utilization" not in meter.read()


def test_gpu_memory_is_that_of_training_since_the_last_reading(clock, monkeypatch):
    """Catches the peak of a validation reported as training's, or one that never falls again."""
    gpu = Gpu(monkeypatch, "NVIDIA A100-SXM4-80GB")
    meter = Meter(torch.device("cuda"))

    def step(gib: float) -> None:
        gpu.uses(gib)
        clock.passes(1)
        meter.step(1)

    step(20)
    with meter.paused():
        gpu.uses(70)
    step(10)
    assert meter.read()["peak_memory_gib"] == pytest.approx(20)
    with meter.paused():
        gpu.uses(70)
    step(10)
    assert meter.read()["peak_memory_gib"] == pytest.approx(10)


def test_peaks_are_of_whole_names():
    """Catches a slower sibling (laptop, PCIe, a slice) or a missing format that is given the peak of its namesake."""
    assert peak_tflops("NVIDIA A100-SXM4-40GB", torch.bfloat16) == 312
    assert peak_tflops("NVIDIA A100 80GB PCIe", torch.bfloat16) == 312
    assert peak_tflops("NVIDIA H100 PCIe", torch.float16) == 756
    assert peak_tflops("Tesla V100-SXM2-32GB", torch.float16) == 125
    for unknown in (
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100",
        "cpu",
    ):
        assert peak_tflops(unknown, torch.float16) is None
    assert peak_tflops("Tesla T4", torch.bfloat16) is None
    assert peak_tflops("NVIDIA L40S", torch.float64) is None


def test_float32_peak_is_of_the_precision_chosen():
    """Catches TF32's peak held against a run that does not use it, and the other way round."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_tflops("NVIDIA L40S", torch.float32) == 91.6
        torch.set_float32_matmul_precision("high")
        assert peak_tflops("NVIDIA L40S", torch.float32) == 183
        assert peak_tflops("Tesla T4", torch.float32) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_peaks_are_dense():
    """Catches a data sheet's figure with sparsity: tensor cores are twice as fast in half precision as in TF32."""
    for name, peaks in PEAK_TFLOPS.items():
        if "tf32" in peaks:
            assert peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=0.03), name
        assert peaks["fp16"] > peaks["fp32"], name


def test_metering_costs_next_to_nothing():
    """Catches a meter that slows what it measures."""
    meter = Meter(CPU, flops_per_image=1e9)
    started = time.perf_counter()
    for _ in range(1000):
        with meter.waiting():
            pass
        meter.step(1)
    assert time.perf_counter() - started < 0.1
