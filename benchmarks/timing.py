"""Time and memory of calls on one device, and what the device can do at most."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


PROCESS = Path("/proc/self")
PEAK_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product is the peak


@dataclass
class Measurement:
    """
    Args:
        seconds: Of each counted call.
        peak_bytes: What the call's side holds and the most that a call takes beside it; `None` where not measurable.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which the middle half of the calls lies."""
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "median_seconds": self.median,
            "quartile_seconds": list(self.quartiles),
            "repetitions": len(self.seconds),
            "peak_bytes": self.peak_bytes,
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    warmup: int = 2,
    repetitions: int = 5,
    min_seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """
    Times calls that take turns: a device that grows hot, or is shared, is so for all of them.

    Args:
        calls: By name. Each is followed by a wait for the device, the only one inside what is timed.
        warmup: Calls of each that do not count.
        repetitions: Counted calls of each, at least.
        min_seconds: Of counted calls of each, at least.
        clock: Seconds from some moment on.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    measured = {name: Measurement() for name in calls}
    while any(len(m.seconds) < repetitions or sum(m.seconds) < min_seconds for m in measured.values()):
        for name, call in calls.items():
            synchronize(device)
            started = clock()
            call()
            synchronize(device)
            measured[name].seconds.append(clock() - started)
    return measured


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors and of their gradients, each storage once."""
    storages = {}
    for tensor in tensors:
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None:
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def peak_memory(
    call: Callable[[], Any], device: torch.device, held: Callable[[], Iterable[torch.Tensor]]
) -> int | None:
    """
    The peak memory of one more call: what `held` names before it, and the most that is taken beyond what there was.
    So the memory of another side that is present does not count.

    Args:
        held: The tensors that stay between calls: weights, gradients, moments, averages.

    Returns:
        Bytes: on a GPU of PyTorch's allocator, on a CPU of the process; `None` where the platform cannot tell.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        kept, before = held_bytes(held()), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return kept + torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back_freed()
        kept, before = held_bytes(held()), _resident("VmRSS")
        (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    except (OSError, AttributeError):  # no Linux, no glibc, or not allowed
        return None
    call()
    return kept + max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _give_back_freed() -> None:
    """What earlier calls freed, and the C library still holds, would hide as much of the next call's memory."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@torch.no_grad()
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two large square matrices, the fastest of several: the peak that shares refer to."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = measure({"": lambda: torch.mm(a, b, out=out)}, device, warmup=2, repetitions=5, min_seconds=0.2)[""]
    return 2 * side**3 / min(product.seconds)
