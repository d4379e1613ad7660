"""Command lines with defaults from a YAML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, section: str | None = None
) -> argparse.Namespace:
    """
    Parses options whose defaults come from `--config file.yaml`; flags override the file.

    Args:
        parser: Every key of the file must be one of its options.
        section: Name of the option whose value (say, "pretrain") names a section of the file; the keys of that
            section override those at the top, and the file's other sections are for other runs.

    Raises:
        SystemExit: With the option's name and what is wrong, as argparse does.
    """
    parser.add_argument("--config", type=Path, help="YAML file with defaults for these options; flags override it")
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", type=Path)
    choices = next((a.choices for a in parser._actions if a.dest == section), None) or ()
    if section:
        early.add_argument(f"--{section}", default=parser.get_default(section))
    given, _ = early.parse_known_args(argv)
    if given.config is not None:
        if not given.config.is_file():
            parser.error(f"--config {given.config} does not exist")
        values = yaml.safe_load(given.config.read_text()) or {}
        chosen = values.get(getattr(given, section), {}) if section else {}
        values = {key: value for key, value in values.items() if key not in choices} | chosen
        known = {action.dest: action for action in parser._actions}
        if unknown := sorted(set(values) - set(known)):
            parser.error(f"--config {given.config} has unknown keys {unknown}")
        for key, value in values.items():
            action = known[key]
            if action.choices is not None and value not in action.choices:
                parser.error(f"--config {given.config}: {key}={value!r} must be one of {list(action.choices)}")
            # argparse converts defaults that are strings by the option's own type.
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            parser.set_defaults(**{key: str(value) if number and action.type is not None else value})
            action.required = False
    return parser.parse_args(argv)
