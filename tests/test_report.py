"""Figures for people."""

import json
import platform

import PIL.Image
import pytest
import torch
from matplotlib.axes import Axes

from flowmo_diffusers.metrics import report
from flowmo_diffusers.metrics.report import environment, markdown_table, plot_figures, write_json


RESULTS = [
    {"name": "ours, 8 steps", "group": "ours", "figures": {"psnr": 21.376, "bits_per_pixel": 0.0703, "dead_bits": 2}},
    {"name": "jpeg", "group": "jpeg", "figures": {"psnr": 19.0, "bits_per_pixel": 0.15, "rfid_mobilenet_v2": 12.3456}},
]


def test_a_table_has_a_column_for_each_figure():
    """In a fixed order, rounded, with the better direction; other networks' figures keep their names."""
    lines = markdown_table(RESULTS).splitlines()
    assert lines[0] == "| | bits_per_pixel | rfid_mobilenet_v2 ↓ | psnr ↑ |"
    assert lines[2] == "| ours, 8 steps | 0.0703 |  | 21.38 |"
    assert lines[3] == "| jpeg | 0.1500 | 12.346 | 19.00 |"
    assert len(lines) == 4


def test_psnr_official_is_no_psnr_of_another_network():
    """A figure whose name begins as another one is not mistaken for it."""
    table = markdown_table([{"name": "x", "figures": {"psnr_official": 1.0, "psnr": 2.0, "inception_score_std": 0.5}}])
    assert table.splitlines()[0] == "| | inception_score_std | psnr ↑ | psnr_official ↑ |"


def test_a_plot_is_a_picture_with_a_panel_for_each_distortion(tmp_path):
    plot_figures(RESULTS, tmp_path / "plot.png")
    with PIL.Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and picture.width > 1.8 * picture.height
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_a_plot_against_steps_begins_at_none(tmp_path, monkeypatch):
    """Catches a logarithm of zero, figures that were not asked for, and points out of order."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *points, **style: drawn.extend(plot(axes, *points, **style)))
    steps = [{"name": "x", "group": "x", "figures": {"steps": s, "psnr": 20.0 + s, "fid": -s}} for s in (5, 0, 9)]
    plot_figures(steps, tmp_path / "plot.png", "steps", ("fid",))
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn] == [([0, 5, 9], [0, -5, -9])]


def test_json_is_whole_and_readable(tmp_path):
    write_json(tmp_path / "metrics.json", {"a": 1.5, "b": ["ä"]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.5, "b": ["ä"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "metrics.json", {"a": torch.ones(1)})
    assert json.loads((tmp_path / "metrics.json").read_text())["a"] == 1.5


def test_the_environment_names_hardware_and_versions():
    found = environment(torch.device("cpu"))
    assert found["device"].startswith("cpu: ") and found["packages"]["torch"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in found["device"]
    json.dumps(found)


def test_a_cpu_is_named_with_what_makes_bfloat16_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(report, "cpu_has", lambda feature: feature == "amx_tile")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    report.CPU_INFO.write_text("processor\t: 0\nmodel name\t: Some CPU: 2\nmodel name\t: Some CPU: 2\n")
    assert environment(torch.device("cpu"))["device"] == "cpu: Some CPU: 2 (AVX512, AMX)"
    report.CPU_INFO.unlink()
    architecture = platform.processor() or platform.machine()
    assert environment(torch.device("cpu"))["device"] == f"cpu: {architecture} (AVX512, AMX)"
