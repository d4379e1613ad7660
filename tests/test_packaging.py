"""The package as it is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PIPELINE_MODULE = "flowmo_diffusers.pipelines.pipeline_flowmo"
IMPORT = """
import flowmo_diffusers
from flowmo_diffusers import FlowMoPipeline, starter
from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.objectives.perceptual import load_perceptual_network
pipeline = FlowMoPipeline.from_pretrained(starter())
load_perceptual_network("lpips-alex")
asset_path("emoji", "train.parquet")
print(flowmo_diffusers.__file__, FlowMoPipeline.__module__)
"""


@pytest.mark.slow
def test_wheel(tmp_path):
    """A module, the mapped pipelines folder or an asset missing from the wheel, which an editable install hides."""
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        f"flowmo_diffusers/{path.relative_to(ROOT / 'src/flowmo_diffusers')}" for path in (ROOT / "src").rglob("*.py")
    }
    sources |= {f"flowmo_diffusers/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")}
    assert sources <= names
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # The wheel first, and no finder of an editable install before it; the printed path shows what was imported.
    prepare = f"""
import sys
sys.path.insert(0, {str(site)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
"""
    command = [sys.executable, "-c", prepare + IMPORT]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(site / "flowmo_diffusers" / "__init__.py"), PIPELINE_MODULE]
