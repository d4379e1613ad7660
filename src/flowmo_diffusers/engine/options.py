"""Command lines: defaults from a YAML file, and kinds of values."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, section: str | None = None
) -> argparse.Namespace:
    """
    Parses options whose defaults come from `--config file.yaml`; flags override the file.

    Args:
        parser: Every key of the file must be one of its options, but for "base": another file, by its path from this
            one, whose settings hold where this one says nothing. A key without a value leaves the option's default.
        section: Name of the option whose value (say, "pretrain") names a section of the file; the keys of that
            section override those at the top, and the file's other sections are for other runs.

    Raises:
        SystemExit: With the option's name and what is wrong, as argparse does.
    """
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    parser.add_argument("--config", type=Path, help="YAML file with defaults for these options; flags override it")
    early = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    early.add_argument("--config", type=Path)
    if section:
        early.add_argument(f"--{section}")
    given, _ = early.parse_known_args(argv)
    if given.config is not None:
        if not given.config.is_file():
            parser.error(f"--config {given.config} does not exist")
        try:
            values = read_config_file(given.config)
            if section:
                names = options[section].choices or ()
                chosen = getattr(given, section) or values.get(section) or parser.get_default(section)
                own = _mapping(values.get(chosen), chosen) if chosen in names else {}
                values = {key: value for key, value in values.items() if key not in names} | own
            if unknown := sorted(str(key) for key in values if key not in options):
                raise ValueError(f"unknown keys {unknown}")
            for key, value in values.items():
                if value is not None:
                    parser.set_defaults(**{key: _default(options[key], value)})
                    options[key].required = False
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(f"--config {given.config}: {error}")
    return parser.parse_args(argv)


def read_config_file(path: Path) -> dict[str, Any]:
    """
    What a YAML file says, and where it says nothing, what the file says that it names as its "base".

    Raises:
        ValueError: If it is no mapping, or its own base.
        OSError: If there is no such file.
    """
    values, seen = {}, []
    while path is not None:
        if path.resolve() in seen:
            raise ValueError(f"{path} is its own base")
        seen.append(path.resolve())
        own = _mapping(yaml.safe_load(path.read_text()), "the file")
        base = own.pop("base", None)
        values = _joined(own, values)
        path = None if base is None else path.parent / base
    return values


def _joined(base: dict, values: dict) -> dict:
    """Both, `values` before `base`; mappings in them likewise."""
    joined = base | values
    for name, value in joined.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            joined[name] = _joined(base[name], value)
    return joined


def resolution(text: str) -> tuple[int, int]:
    """ "256" or "256x512" as (height, width)."""
    sides = text.split("x") if "x" in text else [text, text]
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be a side in pixels, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[1])


def _mapping(value: Any, name: str) -> dict:
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must be a mapping of options to values, not {value!r}")
    return value or {}


def _default(action: argparse.Action, value: Any) -> Any:
    """What the file says as this option's default: a string, which argparse converts as if it were a flag's, a switch
    (true or false), values where the option takes several, or a list or mapping where it has no type."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{action.dest}={value!r} must be true or false")
        return value
    if isinstance(value, bool):
        raise ValueError(f"{action.dest}={value!r} is no switch: quote a word that YAML reads as one, such as 'no'")
    if action.nargs in ("+", "*"):
        return [_single(action, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list | dict) and action.type is None and action.choices is None:
        return value
    if isinstance(value, list | dict):
        raise ValueError(f"{action.dest}={value!r} must be a single value")
    _check_choice(action, value)
    return str(value)


def _single(action: argparse.Action, value: Any) -> Any:
    """One of several values of an option; argparse converts strings only where they are a whole default."""
    _check_choice(action, value)
    try:
        return action.type(str(value)) if action.type else str(value)
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{action.dest}: {value!r} is no value of it ({error})") from None


def _check_choice(action: argparse.Action, value: Any) -> None:
    if action.choices is not None and str(value) not in map(str, action.choices):
        raise ValueError(f"{action.dest}={value!r} must be one of {list(action.choices)}")
