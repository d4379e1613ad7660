#!/usr/bin/env python
"""
Peak memory and time of reconstructing images, for each way to save memory and some of them together.

    python benchmarks/memory.py --config training/configs/flowmo_lo.yaml --device cuda --dtype bfloat16 --json out.json

Each mode runs in a process of its own, with random weights unless `--pretrained_model_name_or_path` names a pipeline,
and with guidance, which doubles the batch, at every step: memory does not depend on the number of steps. GB are 10^9
bytes. "peak" is what PyTorch had allocated on a GPU, and all that the process held on a CPU, "imports", which is
Python with its libraries, and the building of the model included; "running" is the peak once the model was built,
which only Linux tells. On a GPU the time is that of a second call, on a CPU of the first one.

On a CPU, groups in files leave placeholders of their size in the heap. With MALLOC_MMAP_THRESHOLD_=1048576 in the
environment glibc gives each its own pages, which are never touched and take no memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.metrics.report import environment, write_json


DTYPES = ("float32", "bfloat16", "float16")
GB = 1e9
STORAGE_DTYPE = torch.float8_e4m3fn
# Columns by their figure: digits.
COLUMNS = {
    "batch": 0,
    "weights_gb": 2,
    "imports_gb": 2,
    "peak_gb": 2,
    "running_gb": 2,
    "reserved_gb": 2,
    "host_peak_gb": 2,
    "seconds": 2,
}


@dataclass(frozen=True)
class Mode:
    """
    Args:
        batch: Images at once.
        slicing: Whether the model sees them one by one.
        casting: Whether weights are stored in float8.
        offload: "model", "sequential", "block" (group offloading, block level) or "leaf"; `None` is none.
        disk: Whether groups are offloaded to files.
        stream: Whether the next group is loaded while one computes.
    """

    batch: int = 1
    slicing: bool = False
    casting: bool = False
    offload: str | None = None
    disk: bool = False
    stream: bool = False

    def runs_on(self, device: torch.device) -> bool:
        """On a CPU there is nowhere to offload to but files."""
        return device.type != "cpu" or self.offload is None or (self.disk and not self.stream)

    def apply(self, pipe: FlowMoPipeline, device: torch.device, folder: str) -> None:
        model = pipe.autoencoder
        if self.slicing:
            model.enable_slicing()
        if self.casting:
            model.enable_layerwise_casting(storage_dtype=STORAGE_DTYPE, compute_dtype=model.dtype)
        if self.offload is None:
            pipe.to(device)
        elif self.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            model.enable_group_offload(
                onload_device=device,
                offload_type=f"{self.offload}_level",
                num_blocks_per_group=1 if self.offload == "block" else None,
                use_stream=self.stream,
                offload_to_disk_path=folder if self.disk else None,
            )


MODES = {
    "plain": Mode(),
    "slicing": Mode(slicing=True),
    "plain, 4 images": Mode(batch=4),
    "slicing, 4 images": Mode(batch=4, slicing=True),
    "float8 weights": Mode(casting=True),
    "float8 weights, slicing": Mode(casting=True, slicing=True),
    "model offload": Mode(offload="model"),
    "sequential offload": Mode(offload="sequential"),
    "block offload": Mode(offload="block"),
    "block offload, stream": Mode(offload="block", stream=True),
    "leaf offload": Mode(offload="leaf"),
    "leaf offload, stream": Mode(offload="leaf", stream=True),
    "block offload, disk": Mode(offload="block", disk=True),
    "leaf offload, disk": Mode(offload="leaf", disk=True),
    "block offload, slicing": Mode(offload="block", slicing=True),
    "block offload, float8 weights, slicing": Mode(offload="block", casting=True, slicing=True),
    "block offload, disk, float8 weights, slicing": Mode(offload="block", disk=True, casting=True, slicing=True),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = Path(__file__).parents[1] / "training/configs/flowmo_lo.yaml"
    parser.add_argument("--config", type=Path, default=preset, help="training preset, for its pretrain.model_config")
    parser.add_argument("--pretrained_model_name_or_path", help="saved pipeline to load in place of random weights")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--num_inference_steps", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help=f"default: all of {list(MODES)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)  # one mode, in this very process
    args = parser.parse_args()
    for name in args.modes or []:
        if not MODES[name].runs_on(args.device):
            parser.error(f"--modes {name!r}: on a CPU there is nowhere to offload to but files")
    return args


def build_pipeline(args: argparse.Namespace, dtype: torch.dtype) -> FlowMoPipeline:
    if args.pretrained_model_name_or_path:
        return FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype)
    config = yaml.safe_load(args.config.read_text())["pretrain"]["model_config"]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # converted afterwards, the weights would be held twice
    try:
        model = FlowMoAutoencoder(**config)
    finally:
        torch.set_default_dtype(usual)
    return FlowMoPipeline(model.eval(), FlowMoScheduler())


def peak_rss() -> float:
    """The most that this process has held so far, or since [`reset_peak_rss`], in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def reset_peak_rss() -> bool:
    """Whether the platform could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(args: argparse.Namespace, mode: Mode) -> dict[str, float]:
    """The figures of one mode, in a fresh process."""
    device, cuda = args.device, args.device.type == "cuda"
    imports = peak_rss()
    pipe = build_pipeline(args, getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    side, channels = pipe.autoencoder.config.sample_size, pipe.autoencoder.config.in_channels
    images = torch.rand(mode.batch, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def reconstruct() -> float:
        started = time.perf_counter()
        pipe(
            images,
            num_inference_steps=args.num_inference_steps,
            guidance_interval=(0.0, float("inf")),
            generator=torch.Generator().manual_seed(1),
            output_type="np",  # on the CPU, so the device has been waited for
        )
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        mode.apply(pipe, device, folder)
        weights = sum(p.numel() * p.element_size() for p in pipe.autoencoder.parameters()) / GB
        building, told = peak_rss(), reset_peak_rss()
        seconds = reconstruct()
        if cuda:
            seconds = reconstruct()
    running = peak_rss()
    figures = {"batch": mode.batch, "weights_gb": weights, "imports_gb": imports, "seconds": seconds}
    host = max(building, running)
    if not cuda:
        return figures | {"peak_gb": host} | ({"running_gb": running} if told else {})
    return figures | {
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / GB,
        "host_peak_gb": host,
    }


def measure_apart(name: str) -> dict[str, float] | None:
    """[`measure`] in a process of its own, with this one's arguments; `None` if it fails, having said why."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(results: Sequence[Mapping]) -> str:
    columns = [name for name in COLUMNS if any(name in (result["figures"] or {}) for result in results)]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for result in results:
        figures = result["figures"]
        cells = ["failed" if figures is None else _cell(figures.get(name), COLUMNS[name]) for name in columns]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    if args.measure:
        print(json.dumps(measure(args, MODES[args.measure])))
        return
    results = []
    for name in args.modes or [name for name, mode in MODES.items() if mode.runs_on(args.device)]:
        results.append({"name": name, "figures": measure_apart(name)})
        print(f"{name}: {results[-1]['figures'] or 'failed'}", file=sys.stderr, flush=True)
    settings = {
        "model": args.pretrained_model_name_or_path or args.config.stem,
        "dtype": args.dtype,
        "num_inference_steps": args.num_inference_steps,
        "threads": torch.get_num_threads(),
    }
    about = environment(args.device)
    print(f"{settings['model']}, {args.dtype}, {args.num_inference_steps} steps; {about['device']}\n")
    print(table(results))
    if args.json:
        write_json(args.json, {"environment": about, "settings": settings, "results": results})
    if any(result["figures"] is None for result in results):
        sys.exit("some modes failed, see above")


if __name__ == "__main__":
    main()
