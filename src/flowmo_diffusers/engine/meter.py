"""How fast a run goes, what it waits for, and how much of the device it uses."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


TERA, GIBI = 1e12, 2**30

# Peak dense TFLOP/s by the name the driver gives a device (a pattern): from the maker's documents named below, halved
# where one gives the figure "with sparsity". "tf32" is float32 with reduced products. A half precision that a device
# computes without tensor cores is left out, and a device whose whole name does not match has no peak, not a guess.
PEAK_TFLOPS = {
    # NVIDIA HGX B200 and H200, H100, A100 data sheets
    "NVIDIA B200": {"bf16": 2250, "fp16": 2250, "tf32": 1100, "fp32": 75},
    "NVIDIA H200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "NVIDIA H200 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "NVIDIA H100 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "NVIDIA H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51.2},
    r"(NVIDIA )?(A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe)": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    # NVIDIA L40S and L4 data sheets
    "NVIDIA L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "NVIDIA L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    # NVIDIA Ada and GA102 white papers; half precision with float32 accumulation, as PyTorch asks for
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "NVIDIA GeForce RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    # NVIDIA V100 and T4 data sheets
    r"Tesla V100-SXM2-(16|32)GB": {"fp16": 125, "fp32": 15.7},
    r"Tesla V100-PCIE-(16|32)GB": {"fp16": 112, "fp32": 14},
    "Tesla T4": {"fp16": 65, "fp32": 8.1},
}


def peak_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """
    Peak dense TFLOP/s of a device for matrix products in `dtype`, `None` where it is not known. For float32 it is that
    of the precision `torch.set_float32_matmul_precision` has chosen.
    """
    reduced = torch.get_float32_matmul_precision() != "highest"
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32" if reduced else "fp32"}
    for pattern, peaks in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, device_name):
            return peaks.get(formats.get(dtype))
    return None


class Meter:
    """
    Measures a training loop between two calls of [`~Meter.read`] by the clock of its process: nothing is synchronised
    with the device. Where a loop reads something from its device every step, as ours do, the two clocks agree.

    Args:
        device: What trains.
        flops_per_image: Model FLOPs of training on one image; may be set anew at any step. `None` where not known.
        dtype: Of the matrix products, the autocast one under mixed precision.
        num_processes: That share the images of a step, one device each.
    """

    def __init__(
        self,
        device: torch.device,
        flops_per_image: float | None = None,
        dtype: torch.dtype = torch.float32,
        num_processes: int = 1,
    ):
        self.device = torch.device(device)
        self.flops_per_image = flops_per_image
        self.num_processes = num_processes
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self.peak_tflops = peak_tflops(name, dtype)
        self._reset()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around getting the next batch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training (validation, saving): neither its time nor, on a GPU, its memory counts."""
        self._peak_bytes = self._peak_memory()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started
            self._reset_peak_memory()

    def step(self, num_images: int) -> None:
        """After each optimiser step, with the number of images of all processes."""
        self._steps += 1
        self._images += num_images
        if self._flops is not None:
            self._flops = None if self.flops_per_image is None else self._flops + num_images * self.flops_per_image

    def read(self) -> dict[str, float]:
        """
        Figures since the last call, empty if there was no step: "images_per_second" of all processes,
        "seconds_per_step", "data_wait_share" of the time in [0, 1], "peak_memory_gib" (on a GPU the most that PyTorch
        had allocated, elsewhere the most this process ever held); "tflops_per_second" of one device and
        "flops_utilization", its share of the device's peak, where they are known.
        """
        figures = {}
        if self._steps:
            seconds = time.perf_counter() - self._started - self._paused
            figures = {
                "images_per_second": self._images / seconds,
                "seconds_per_step": seconds / self._steps,
                "data_wait_share": self._waited / seconds,
                "peak_memory_gib": self._peak_memory() / GIBI,
            }
            if self._flops is not None:
                figures["tflops_per_second"] = self._flops / seconds / self.num_processes / TERA
                if self.peak_tflops is not None:
                    figures["flops_utilization"] = figures["tflops_per_second"] / self.peak_tflops
        self._reset()
        return figures

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = self._images = self._peak_bytes = 0
        self._flops: float | None = 0.0
        self._reset_peak_memory()

    def _peak_memory(self) -> int:
        """In bytes, of what counted since the last reading."""
        if self.device.type == "cuda":
            return max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
