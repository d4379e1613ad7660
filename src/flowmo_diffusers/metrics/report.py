"""Figures for people: a table, a plot, and what they were measured with."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.models.attention import cpu_has


CPU_INFO = Path("/proc/cpuinfo")
CPU_FEATURES = {"AVX512-BF16": "avx512_bf16", "AMX": "amx_tile"}  # what makes bfloat16 fast

PACKAGES = ("flowmo_diffusers", "torch", "diffusers", "transformers", "datasets", "numpy", "pillow")

# Columns of a table by their figure: digits, and which way is better.
FIGURES = {
    "images": (0, ""),
    "windows": (0, ""),
    "bits_per_pixel": (4, ""),
    "bytes_per_image": (1, ""),
    "fid": (3, "↓"),
    "sfid": (3, "↓"),
    "inception_score": (2, "↑"),
    "inception_score_std": (2, ""),
    "rfid": (3, "↓"),
    "psnr": (2, "↑"),
    "psnr_official": (2, "↑"),
    "ssim": (4, "↑"),
    "lpips_vgg": (4, "↓"),
    "lpips_alex": (4, "↓"),
    "colour_shift": (2, "↓"),
    "seam_ratio": (2, "↓"),
    "precision": (3, "↑"),
    "recall": (3, "↑"),
    "forwards": (0, ""),
    "images_per_second": (2, ""),
    "seconds": (1, ""),
}
DISTORTIONS = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "rfid")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as plain JSON values. Of a CPU also the vector instructions that PyTorch uses on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    name = platform.processor() or platform.machine()
    if CPU_INFO.exists():  # Linux, where Python knows the architecture at most
        lines = CPU_INFO.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    features = [torch.backends.cpu.get_cpu_capability()]
    features += [label for label, feature in CPU_FEATURES.items() if cpu_has(feature)]
    return f"{name} ({', '.join(features)})"


def write_json(path: Path, value: Any) -> None:
    """Plain JSON values, infinities by their names."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """
    One row for each result, one column for each figure that any of them has.

    Args:
        results: Each {"name": str, "figures": {name: number}}.
    """
    given = {name for result in results for name in result["figures"]}
    columns = [name for figure in FIGURES for name in sorted(given) if _figure(name) == figure]
    lines = ["| | " + " | ".join(f"{name} {FIGURES[_figure(name)][1]}".strip() for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for result in results:
        cells = [_cell(result["figures"].get(name), FIGURES[_figure(name)][0]) for name in columns]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(name: str) -> str | None:
    """The known figure that a name is or, with a network's suffix, begins with."""
    return max((known for known in FIGURES if f"{name}_".startswith(f"{known}_")), key=len, default=None)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# What figures are drawn against: label, and whether in powers of 2.
AXES = {
    "bits_per_pixel": ("bits per pixel", True),
    "forwards": ("forwards of the decoder", True),
    "minutes": ("minutes of training", True),
    "steps": ("steps of training", False),
}


def plot_figures(
    results: Sequence[Mapping[str, Any]],
    path: Path,
    against: str = "bits_per_pixel",
    figures: Sequence[str] = DISTORTIONS,
) -> None:
    """
    Those of the figures that were measured, one plot each, against another figure that all results have, as a PNG.
    Results of one "group" have one colour, and a line if they differ in that figure.

    Args:
        results: As for [`markdown_table`], each with a "group" besides.
        against: A name of AXES.
        figures: Names of FIGURES; all that begin with one are shown, of every network.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    given = {name for result in results for name in result["figures"]}
    shown = [name for figure in figures for name in sorted(given) if _figure(name) == figure]
    label, powers = AXES[against]
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    groups = list(dict.fromkeys(result["group"] for result in results))
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, group in enumerate(groups):
            points = [r["figures"] for r in results if r["group"] == group and name in r["figures"]]
            points.sort(key=lambda point: point[against])
            places = [point[against] for point in points]
            line = "-" if len(set(places)) == len(places) else ""  # settings of one model share a rate: no curve
            marker = "osD^v<>PX*"[number % 10]
            axes.plot(places, [point[name] for point in points], line + marker, color=f"C{number}", label=group)
        axes.set_xlabel(label)
        if powers:
            places = [result["figures"][against] for result in results]
            axes.set_xscale("log", base=2)
            axes.set_xlim(min(places) / 1.6, max(places) * 1.6)  # wide enough for a tick
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name} {FIGURES[_figure(name)][1]}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
