"""
What a token file or a model is.

    flowmo inspect photo.flowmo
    flowmo inspect starter
    flowmo inspect my_generator --json

Of a token file it shows the header, once the file has proved whole, and how many windows there are, down and across.
Of a model (a folder, a Hub id, or the embedded "starter" and "starter_generator") its size, its tokens, how it
samples, and its work: FLOPs of matrix products and of attention for one image.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inspected", metavar="FILE|MODEL")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from flowmo_diffusers.data.token_file import SUFFIX

    path = Path(args.inspected)
    if path.is_file() or path.suffix == SUFFIX:
        facts = describe_file(args.inspected)
    else:
        from flowmo_diffusers.cli.describing import describe_model

        facts = describe_model(args.inspected)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else "\n".join(lines(facts)))
    return 0


def describe_file(path: str) -> dict[str, Any]:
    """Of a token file, as plain JSON values. Raises as [`TokenFile.read`]."""
    from flowmo_diffusers.data.token_file import VERSION, TokenFile
    from flowmo_diffusers.models.window_layout import count_along

    file = TokenFile.read(path)
    windows = {}
    if file.window:
        sides = [count_along(side, file.window, file.overlap) for side in (file.height, file.width)]
        windows = {"windows": f"{sides[0]} x {sides[1]} of {file.window} x {file.window} pixels"}
    names = ("name", "tokenizer", "height", "width", "num_tokens", "bits_per_token", "num_rows", "window", "overlap")
    return {
        "kind": "token file",
        "version": VERSION,
        **{name: getattr(file, name) for name in names},
        **windows,
        "code_bytes": len(file.codes),
        "file_bytes": Path(path).stat().st_size,
    }


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """A line for each fact, large numbers in groups of three digits."""
    found = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += [f"{indent}{name}:", *lines(value, indent + "  ")]
        else:
            found.append(f"{indent}{name}: {f'{value:,}' if type(value) is int else value}")
    return found
