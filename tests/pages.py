"""The pages of the documentation, as Markdown is parsed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_MARKDOWN = MarkdownIt().enable("table")


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    Args:
        page: From the root of the repository.
        line: Of its first line, counted from 1.
        language: What stands behind the opening fence.
        text: Without the fences.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    fences = [token for token in _MARKDOWN.parse(page.read_text()) if token.type == "fence"]
    return [Block(name(page), token.map[0] + 2, token.info.strip(), token.content) for token in fences]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    tokens = _MARKDOWN.parse(page.read_text())
    found: set[str] = set()
    for opening, heading in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = [slug, *(f"{slug}-{number}" for number in range(1, len(tokens)))]
            found.add(next(candidate for candidate in repeats if candidate not in found))
    return found


def targets(page: Path) -> list[str]:
    """Of links and pictures."""
    inline = _inline(_MARKDOWN.parse(page.read_text()))
    addresses = (token.attrs.get("href") or token.attrs.get("src") for token in inline)
    return [str(address) for address in addresses if address]


def code_spans(page: Path) -> list[str]:
    return [token.content for token in _inline(_MARKDOWN.parse(page.read_text())) if token.type == "code_inline"]


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield from token.children or ()
