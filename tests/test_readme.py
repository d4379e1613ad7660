"""The README's code, run."""

import re
from pathlib import Path

import PIL.Image


README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    """A snippet that a newcomer copies and that does not run."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    offline = [block for block in blocks if "flowmo-lo" not in block]  # the published checkpoints are not here
    assert len(offline) == 3 and len(blocks) == 4
    PIL.Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(offline), str(README), "exec"), {})
    assert PIL.Image.open("reconstruction.png").size == PIL.Image.open("restored.png").size == (32, 32)
    assert Path("photo.bin").stat().st_size == 192


def test_linked_files_exist():
    """A link to a file that was moved or never written."""
    for page in [README, *(README.parent / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
