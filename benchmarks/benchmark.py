#!/usr/bin/env python
"""
Speed and memory of encoding, decoding, training and generating, beside the published code if it is there.

    python benchmarks/benchmark.py --config training/configs/flowmo_lo.yaml --device cuda --dtype bfloat16 \
        --operations encode decode pretrain_step --batch_size 8 --reference path/of/the/published/code --json out.json

Weights and images are random. Each operation is warmed up and repeated; times are medians between the quartiles, each
waiting for the device once, at its end. FLOPs are those of the model, counted from its configuration, and the share is
of the fastest of several products of large square matrices in the same run and dtype. Memory is what an operation
holds (weights, gradients, moments, averages) and the most it takes beside that: on a GPU of PyTorch's allocator, on a
CPU of the process.

With `--reference` the published code runs on the same weights and inputs, in turns with this one; before that, what
the two compute is compared, and a difference ends the command with status 1. Its inference runs as it does there,
under autocast over float32 weights, while this library has weights of the dtype: `--autocast` does so here too. One
training step in ten updates the averages, on either side, so that medians are of steps that do not.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from operations import COMPILE_MODES, OPERATIONS, Operation, Workload, let_go
from published import REFERENCE, Published
from timing import Measurement, matmul_flops_per_second, measure, peak_memory, synchronize
from torch.profiler import ProfilerActivity

from flowmo_diffusers.metrics.report import environment, write_json


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, THEIRS = "flowmo_diffusers", "published"
GIBI, TERA = 2**30, 1e12

# Largest relative deviation from the published code: in float32, and where products are rounded to less.
TOLERANCES = {
    "latents": (2e-5, 5e-2),
    "velocity": (2e-5, 5e-2),
    "images": (1e-4, 1e-1),
    "loss": (5e-6, 2e-2),
    "gradient_norm": (5e-5, 5e-2),
    "gradient_norms": (1e-4, 1e-1),
    "entropy_loss": (1e-4, 1e-4),
    "gradient": (1e-4, 1e-2),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser)
    add = parser.add_argument
    add("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="NAME")
    add("--reference", type=Path, help="checkout of the published code; needs einops")
    add("--reference_compile", choices=["none", "as-shipped"], default="none")
    add("--profile", action="store_true", help="also show what the time of this library's calls is made of")
    args = parser.parse_args(argv)
    apply_workload_options(parser, args)
    if "generator_step" in args.operations or "generator_sample" in args.operations:
        if args.generator_config is None:
            parser.error("--generator_config is missing: the operations of a token generator need its preset")
    return args


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """What is measured and how, for every benchmark of these operations."""
    add = parser.add_argument
    add("--config", type=Path, required=True, help="preset of train_flowmo.py, whose model_config is measured")
    add("--model_config", help="JSON file or text with FlowMoAutoencoder's fields, over the preset's")
    add("--generator_config", type=Path, help="preset of train_generator.py")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--matmul_precision", choices=["highest", "high", "medium"], default="highest", help="of float32 products")
    add("--autocast", action="store_true", help="inference with float32 weights under autocast too")
    add("--batch_size", type=int, default=1)
    add("--image_size", type=int, help="default: the model's sample_size")
    add("--num_inference_steps", type=int, default=25)
    add("--guidance_scale", type=float, default=1.5)
    add("--chain_steps", type=int, default=8)
    add("--perceptual", default="none", help="none, pooled (means of 4 x 4 pixels) or a name that training takes")
    add("--lfq_bits", type=int, help="of the LFQ loss; default: the model's codebook_bits")
    add("--compile", choices=["none", "regional", *COMPILE_MODES], default="none")
    add("--activation_memory_budget", type=float, default=1.0, help="of compiled training steps")
    add("--attention_backend", help="one of diffusers', e.g. native, flash")
    add("--warmup", type=int, default=2, help="calls that do not count")
    add("--repetitions", type=int, default=5, help="counted calls, at least")
    add("--min_seconds", type=float, default=1.0, help="of counted calls, at least")
    add("--json", type=Path, help="also write the figures into this file")


def apply_workload_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot be, and sets what is of the whole process."""
    positive = ("batch_size", "num_inference_steps", "chain_steps", "repetitions", "image_size", "lfq_bits")
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    for name in ("warmup", "min_seconds"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)} must be at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that PyTorch can use")
    if args.dtype == "float32" and args.autocast:
        parser.error("--autocast belongs to --dtype bfloat16")
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # it would take a GPU that is there
    torch.set_float32_matmul_precision(args.matmul_precision)


def build_workload(args: argparse.Namespace, **changes) -> Workload:
    """The workload that the options describe, with some of its fields changed."""
    names = ("config", "generator_config", "batch_size", "image_size", "autocast", "compile", "attention_backend")
    names += ("activation_memory_budget", "perceptual", "num_inference_steps", "guidance_scale", "chain_steps")
    names += ("lfq_bits",)
    fields = {name: getattr(args, name) for name in names}
    fields |= {"device": torch.device(args.device), "dtype": DTYPES[args.dtype], "overrides": args.model_config}
    return Workload(**{**fields, **changes})


def describe(args: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """Hardware, versions and settings, as plain JSON values."""
    return {
        **environment(work.device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "model_config": work.model_config,
    }


def profile(operation: Operation, device: torch.device, rows: int = 20) -> dict[str, float]:
    """Share of one call's time by operator of PyTorch, on the device itself; the largest, and "all else"."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        operation.run()
        synchronize(device)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, field) for event in profiler.key_averages()}
    whole = sum(times.values())
    shares = {key: time / whole for key, time in sorted(times.items(), key=lambda item: -item[1])[:rows]}
    return {**shares, "all else": 1 - sum(shares.values())}


def figures(operation: Operation, measured: Measurement, flops: float | None) -> dict[str, Any]:
    """One side's, as plain JSON values. `flops` are of our operation, whatever the other side does on the way."""
    return {
        **measured.record(),
        "precision": operation.precision,
        "images_per_second": operation.images / measured.median,
        "flops": flops,
        "flops_per_second": None if flops is None else flops / measured.median,
    }


def add_shares(results: dict[str, dict], peak: float) -> None:
    for result in results.values():
        for side in result.keys() & {OURS, THEIRS}:
            rate = result[side]["flops_per_second"]
            result[side]["share_of_peak"] = None if rate is None else rate / peak


def deviations(ours: Operation, theirs: Operation) -> dict[str, float]:
    """|a - b| / |b| in the Euclidean norm, of each output."""
    a, b = ours.outputs(), theirs.outputs()
    return {name: ((a[name].float() - b[name].float()).norm() / b[name].float().norm()).item() for name in b}


def exact(work: Workload) -> bool:
    """Whether products are of float32 throughout."""
    return work.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def run(name: str, args: argparse.Namespace, work: Workload, reference: Published | None) -> dict[str, Any]:
    """Everything that is measured of one operation."""
    ours = OPERATIONS[name](work)
    sides, result = {OURS: ours}, {}
    if reference is not None and name in REFERENCE:
        sides[THEIRS] = reference.build(name, work, ours.model)
        result["deviations"] = deviations(ours, sides[THEIRS])
    calls = {side: operation.run for side, operation in sides.items()}
    device = ours.device or work.device
    measured = measure(calls, device, args.warmup, args.repetitions, args.min_seconds)
    for side, operation in sides.items():
        measured[side].peak_bytes = peak_memory(operation.run, device, operation.held)
        result[side] = figures(operation, measured[side], ours.flops)
    if THEIRS in sides:
        pairs = {"time": "median_seconds", "memory": "peak_bytes"}
        both = {kind: (result[OURS][key], result[THEIRS][key]) for kind, key in pairs.items()}
        result["ratios"] = {kind: a / b for kind, (a, b) in both.items() if a and b}
    if args.profile:
        result["profile"] = profile(ours, device)
    return result


def table(results: dict[str, dict]) -> str:
    heads = (
        "operation",
        "code",
        "precision",
        "ms",
        "quartiles",
        "images/s",
        "peak GiB",
        "TFLOP",
        "TFLOP/s",
        "of peak",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * 3 + "|---:" * (len(heads) - 3) + "|"]
    for name, result in results.items():
        for side in (OURS, THEIRS):
            if side not in result:
                continue
            one = result[side]
            low, high = one["quartile_seconds"]
            cells = [name, side, one["precision"], f"{1e3 * one['median_seconds']:.4g}"]
            cells += [f"{1e3 * low:.4g}-{1e3 * high:.4g}", f"{one['images_per_second']:.4g}"]
            cells += ["not measurable" if one["peak_bytes"] is None else f"{one['peak_bytes'] / GIBI:.3f}"]
            if one["flops"] is None:
                cells += ["", "", ""]
            else:
                cells += [f"{one['flops'] / TERA:.4g}", f"{one['flops_per_second'] / TERA:.4g}"]
                cells += [f"{100 * one['share_of_peak']:.1f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison(results: dict[str, dict], allowed: int) -> tuple[str, list[str]]:
    """
    Ratios and deviations as a table, and what deviates too much.

    Args:
        allowed: Which of TOLERANCES.
    """
    lines = ["| ours / published | time | as fast | peak memory | relative deviation |", "|---|---:|---:|---:|---|"]
    wrong = []
    for name, result in results.items():
        if "ratios" not in result:
            continue
        time, memory = result["ratios"]["time"], result["ratios"].get("memory")
        found = []
        for output, value in result["deviations"].items():
            found.append(f"{output} {value:.1e}")
            if not value <= TOLERANCES[output][allowed]:
                wrong.append(f"{name}: {output} deviates by {value:.3g}, allowed {TOLERANCES[output][allowed]:g}")
        cells = [name, f"{time:.3f}", f"{1 / time:.2f} x", "" if memory is None else f"{memory:.3f}", ", ".join(found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", wrong


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    work = build_workload(args)
    reference = None
    if args.reference is not None:
        compiled = args.reference_compile == "as-shipped"
        reference = Published(args.reference, work.device, work.dtype, compiled)
        for name in args.operations:
            reference.check(name, work)
    settings = describe(args, work)
    size = f"{work.batch_size} x {work.image_size} x {work.image_size}"
    print(f"{settings['device']}, {settings['threads']} threads, images {size}, {args.dtype}", end="")
    print(f", float32 products of precision {settings['float32_matmul_precision']!r}\n")

    results = {}
    # Before each operation and after the last: a device that is shared has its peak only now and then.
    peaks = [matmul_flops_per_second(work.device, work.dtype)]
    for name in args.operations:
        results[name] = run(name, args, work, reference)
        times = [
            f"{side} {1e3 * results[name][side]['median_seconds']:.4g} ms"
            for side in (OURS, THEIRS)
            if side in results[name]
        ]
        print(f"{name}: {', '.join(times)}", file=sys.stderr, flush=True)
        let_go(work.device)
        peaks.append(matmul_flops_per_second(work.device, work.dtype))
    peak = max(peaks)
    add_shares(results, peak)
    print(f"product of large matrices: {peak / TERA:.4g} TFLOP/s\n")
    print(table(results))
    wrong = []
    if reference is not None:
        text, wrong = comparison(results, 0 if exact(work) else 1)
        print(text)
    for name, result in results.items():
        if "profile" in result:
            print(
                f"{name}: "
                + ", ".join(f"{key} {100 * share:.1f} %" for key, share in result["profile"].items())
                + "\n"
            )
    if args.json:
        write_json(args.json, {"environment": settings, "peak_flops_per_second": peak, "operations": results})
    for message in wrong:
        print(f"differs from the published code: {message}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
