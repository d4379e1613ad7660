#!/usr/bin/env python
"""
How time and memory grow with batch, image size, tokens, depth and width.

    python benchmarks/scaling.py --config training/configs/flowmo_lo.yaml --device cuda --dtype bfloat16 \
        --operations encode decode pretrain_step --factors 0.25 0.5 1 2 --json scaling.json --plot scaling.png

Of the preset one thing at a time is multiplied by each factor: "batch" the batch, "image_size" the side, "tokens" the
latent tokens, "depth" the blocks of both trunks, "width" the channels and the heads of both, so that heads stay as
wide as they are. Time and memory are those of `benchmark.py`; an exponent is the slope of a straight line through them
on logarithmic scales, by least squares. That of the counted FLOPs stands beside it: time that grows more slowly is
time that does not go into matrix products.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import GIBI, add_workload_options, apply_workload_options, build_workload, describe
from operations import OPERATIONS, Workload, let_go
from timing import measure, peak_memory

from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.metrics.report import write_json


# Fields of the model that an axis multiplies; the two first are the workload's.
AXES: dict[str, tuple[str, ...]] = {
    "batch": (),
    "image_size": (),
    "tokens": ("num_latent_tokens",),
    "depth": ("encoder_num_layers", "decoder_num_layers"),
    "width": ("encoder_hidden_size", "decoder_hidden_size", "num_attention_heads"),
}
QUANTITIES = {"seconds": "seconds", "bytes": "peak GiB", "flops": "FLOPs"}
SCALED = ("encode", "decode", "pretrain_step")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser)
    add = parser.add_argument
    add("--operations", nargs="+", choices=SCALED, default=list(SCALED), metavar="NAME")
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS")
    add("--factors", nargs="+", type=float, default=[1, 2, 4], help="at least two")
    add("--plot", type=Path, help="PNG of the measurements and their lines")
    args = parser.parse_args(argv)
    apply_workload_options(parser, args)
    if len(set(args.factors)) < 2 or min(args.factors) <= 0:
        parser.error(f"--factors {args.factors} must be at least two different positive numbers")
    return args


def times_factor(name: str, value: int, factor: float) -> int:
    """Raises `ValueError` if the product is no whole number."""
    product = value * factor
    if product != round(product) or product < 1:
        raise ValueError(f"{name}={value} times a factor of {factor:g} is no whole number of at least 1")
    return round(product)


def scaled(args: argparse.Namespace, base: Workload, axis: str, factor: float) -> Workload:
    """The workload with one axis multiplied. Raises `ValueError` if there is no such model."""
    if axis == "batch":
        return build_workload(args, batch_size=times_factor("batch_size", base.batch_size, factor))
    if axis == "image_size":
        return build_workload(args, image_size=times_factor("image_size", base.image_size, factor))
    fields = {name: times_factor(name, base.model_config[name], factor) for name in AXES[axis]}
    return build_workload(args, overrides={**base.model_config, **fields}, image_size=base.image_size)


def exponent(factors: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """p and c of values = c factors^p, the straight line through the logarithms by least squares."""
    slope, intercept = np.polyfit(np.log(factors), np.log(values), 1)
    return float(slope), float(np.exp(intercept))


def point(name: str, args: argparse.Namespace, work: Workload) -> dict[str, float | None]:
    """One measurement of one operation."""
    operation = OPERATIONS[name](work)
    measured = measure({name: operation.run}, work.device, args.warmup, args.repetitions, args.min_seconds)[name]
    peak = peak_memory(operation.run, work.device, operation.held)
    return {"seconds": measured.median, "bytes": peak, "flops": operation.flops}


def fitted(points: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Exponent and coefficient of each quantity that every point has."""
    factors = [one["factor"] for one in points]
    fits = {}
    for quantity in QUANTITIES:
        values = [one[quantity] for one in points]
        if all(values):
            power, coefficient = exponent(factors, values)
            fits[quantity] = {"exponent": power, "coefficient": coefficient}
    return fits


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| operation | axis | time | memory | FLOPs |", "|---|---|---:|---:|---:|"]
    for name, axes in results.items():
        for axis, result in axes.items():
            fits = result["fits"]
            cells = [f"{fits[quantity]['exponent']:.2f}" if quantity in fits else "" for quantity in QUANTITIES]
            lines.append(f"| {name} | {axis} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Time and memory against each axis, one row each, as a PNG. Raises `ImportError` without matplotlib."""
    from matplotlib.figure import Figure

    axes = list(next(iter(results.values())))
    figure = Figure(figsize=(3.2 * len(axes), 6.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for row, (quantity, unit) in enumerate((("seconds", 1.0), ("bytes", GIBI))):
        for column, axis in enumerate(axes):
            panel = grid[row][column]
            for number, (name, found) in enumerate(results.items()):
                result = found[axis]
                if quantity not in result["fits"]:
                    continue
                fit = result["fits"][quantity]
                factors = np.array([one["factor"] for one in result["points"]])
                values = np.array([one[quantity] for one in result["points"]]) / unit
                label = f"{name}: {fit['exponent']:.2f}"
                panel.plot(factors, values, "o", color=f"C{number}", label=label)
                panel.plot(factors, fit["coefficient"] / unit * factors ** fit["exponent"], "-", color=f"C{number}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both")
            if panel.has_data():
                panel.legend(fontsize="x-small", title="exponents", title_fontsize="x-small")
        grid[row][0].set_ylabel(QUANTITIES[quantity])
    for column, axis in enumerate(axes):
        grid[0][column].set_title(axis)
        grid[1][column].set_xlabel("times the preset's")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    base = build_workload(args)
    # All of them before the first is measured: what cannot be built is said now.
    works = {axis: {factor: scaled(args, base, axis, factor) for factor in args.factors} for axis in args.axes}
    results: dict[str, dict[str, Any]] = {}
    for name in args.operations:
        results[name] = {}
        for axis, by_factor in works.items():
            points = []
            for factor, work in by_factor.items():
                print(f"{name}, {axis} x {factor:g}", file=sys.stderr, flush=True)
                points.append({"factor": factor, **point(name, args, work)})
                let_go(work.device)
            results[name][axis] = {"points": points, "fits": fitted(points)}
    settings = describe(args, base)
    print(f"{settings['device']}, {settings['threads']} threads, {args.dtype}: exponents\n")
    print(table(results))
    if args.plot:
        plot(results, args.plot)
    if args.json:
        write_json(args.json, {"environment": settings, "results": results})


if __name__ == "__main__":
    main()
