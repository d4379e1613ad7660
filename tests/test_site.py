"""The pages hang together, on GitHub and as a site."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import PAGES, ROOT, anchors, blocks, code_spans, name, targets


DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_arrive(page):
    """A link to a file, picture or heading that was moved, renamed or never written."""
    for target in targets(page):
        if re.match(r"[a-z]+:", target):
            continue  # another site's
        path, _, anchor = unquote(target).partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}: there are {sorted(anchors(file))}"


def test_anchors_are_github_s(tmp_path):
    """Links that are checked against names of headings that no site gives them."""
    page = tmp_path / "page.md"
    page.write_text("# One GPU, many: `--flags` & *more*\n\n## FSDP2\n\n## FSDP2\n\nno heading\n")
    assert anchors(page) == {"one-gpu-many---flags--more", "fsdp2", "fsdp2-1"}


def test_every_page_is_in_the_menu():
    """A page that a reader of the site does not find."""
    listed = set()
    for page in PAGES[1:]:
        for block in blocks(page):
            if block.language == "{toctree}":
                entries = [line for line in block.text.splitlines() if line and not line.startswith(":")]
                listed |= {page.parent / f"{entry}.md" for entry in entries}
    assert listed == set(PAGES[1:]) - {DOCS / "index.md"}


def test_messages_are_those_of_the_code():
    """A message in the troubleshooting that the library no longer has."""
    sources = [path for folder in ("src", "pipelines", "training") for path in (ROOT / folder).rglob("*.py")]
    said = "\n".join(text for path in sources for text in _strings(ast.parse(path.read_text())))
    quoted = _first_column(DOCS / "troubleshooting.md")
    assert len(quoted) > 20
    for message in quoted:
        pattern = "[^\n]*?".join(re.escape(part) for part in message.split("…"))
        assert re.search(pattern, said), message


def _first_column(page: Path) -> list[str]:
    rows = re.findall(r"^\| `([^`]*)` \|", page.read_text(), flags=re.MULTILINE)
    assert set(rows) <= set(code_spans(page))
    return rows


def _strings(tree: ast.AST) -> list[str]:
    """Each string of the code on a line, with … for what is put into it; code in backticks is shown without them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text.replace("\n", " ").replace("`", "") for text in found]


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """A docstring's reference to nothing, or what else Sphinx warns of; a site that loads something from another."""
    pytest.importorskip("sphinx", reason="needs Python >= 3.11 and the extra `docs`")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("generated"))
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "docs", "site"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipeline = tmp_path / "site/api/generated/flowmo_diffusers.pipelines.pipeline_flowmo.html"
    assert 'id="flowmo_diffusers.pipelines.pipeline_flowmo.FlowMoPipeline.__call__"' in pipeline.read_text()
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name
