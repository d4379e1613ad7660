"""Command lines of the documentation, checked by the parsers of the programs that they name."""

import configparser
import contextlib
import importlib
import io
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from pages import ROOT
from scripts import load_script


class WrongCommand(Exception):
    """What is wrong with a command line of the documentation."""


class Script:
    """
    A script or module of this repository with its arguments.

    Args:
        module: Has `parse_args()`, or `build_parser()`.
        arguments: Of the command line. A bare `...` stands for those of the page's command before.
    """

    def __init__(self, module: ModuleType, arguments: list[str]):
        self.module, self.arguments = module, arguments

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]

    def parse(self) -> Namespace:
        """Raises [`WrongCommand`] with the message of the script's parser."""
        said = io.StringIO()
        with mock.patch.object(sys, "argv", [self.name, *self.arguments]), contextlib.redirect_stderr(said):
            try:
                if hasattr(self.module, "parse_args"):
                    return self.module.parse_args()
                return self.module.build_parser().parse_args()
            except SystemExit:
                raise WrongCommand(_error(said)) from None

    def run(self, *more: str) -> None:
        """With more arguments, of which argparse takes the last where an option stands twice."""
        self.arguments = [*self.arguments, *more]
        arguments = self.parse()
        self.module.main(arguments if hasattr(self.module, "parse_args") else self.arguments)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without comments."""
    text = re.sub(r"(^|\s)#[^\n]*", r"\1", text).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;&|")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("\n;&|"):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def check(words: list[str]) -> Script | None:
    """
    The script that a command starts, whose arguments are yet to be parsed; `None` if it is another program, whose
    arguments are right.

    Raises:
        WrongCommand: If it is not known or its arguments are wrong.
    """
    while words and re.match(r"\w+=", words[0]):  # of the environment
        words = words[1:]
    if not words:
        return None
    program, *arguments = words
    if program in PROGRAMS:
        return PROGRAMS[program](arguments)
    for script in entry_points(group="console_scripts", name=program):
        if script.module.startswith("flowmo_diffusers"):
            return Script(importlib.import_module(script.module), arguments)
    raise WrongCommand(f"{program}: nothing here knows how to check it")


def _error(said: io.StringIO) -> str:
    """What argparse says, without the usage before it."""
    return said.getvalue().strip().splitlines()[-1]


def _accelerate(arguments: list[str]) -> Script:
    if arguments[:1] != ["launch"]:
        raise WrongCommand(f"accelerate {arguments}: only `accelerate launch` is known here")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            launch = launch_command_parser().parse_args(arguments[1:])
        except SystemExit:
            raise WrongCommand(_error(said)) from None
    if launch.config_file is not None and not (ROOT / launch.config_file).is_file():
        raise WrongCommand(f"accelerate launch: --config_file {launch.config_file} does not exist")
    return _script(launch.training_script, launch.training_script_args)


def _python(arguments: list[str]) -> Script | None:
    first, *rest = arguments
    if first != "-m":
        return _script(first, rest)
    module, *rest = rest
    if module == "pytest":
        markers = re.findall(r'"(\w+):', (ROOT / "pyproject.toml").read_text())
        if rest and rest[0] == "-m":
            if rest[1].removeprefix("not ") not in markers:
                raise WrongCommand(f"pytest {rest}: the markers are {markers}")
        elif missing := [path for path in rest if not (ROOT / path).exists()]:
            raise WrongCommand(f"pytest {rest}: there is no {missing}")
        return None
    if module == "sphinx":
        if not (ROOT / rest[-2] / "conf.py").is_file():
            raise WrongCommand(f"sphinx {rest}: {rest[-2]} has no conf.py")
        return None
    if not module.startswith("flowmo_diffusers"):
        raise WrongCommand(f"python -m {module}: nothing here knows how to check it")
    return Script(importlib.import_module(module), rest)


def _script(path: str, arguments: list[str]) -> Script:
    folder, _, name = path.rpartition("/")
    if folder not in ("training", "benchmarks") or not (ROOT / path).is_file():
        raise WrongCommand(f"{path} is no script of this repository")
    with mock.patch.object(sys, "path", [str(ROOT / folder), *sys.path]):  # as Python does for a script
        return Script(load_script(Path(name).stem, folder), arguments)


def _make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, equals, _ = word.partition("=")
        pattern = rf"\$\({variable}\)" if equals else rf"(?m)^{word}:"
        if not re.search(pattern, makefile):
            raise WrongCommand(f"make {word}: the Makefile does not know it")


def _pip(arguments: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    makefile = (ROOT / "Makefile").read_text()
    options = {"-e", "--no-deps", "-c"}
    command, *words = arguments
    if command != "install":
        raise WrongCommand(f"pip {command}: only `pip install` is known here")
    for word in words:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if extras:
            if unknown := set((extras[1] or "").split(",")) - {"", *setup["options.extras_require"]}:
                raise WrongCommand(f"pip install {word}: setup.cfg has no extra {sorted(unknown)}")
        elif word not in options and not (ROOT / word).is_file() and word not in makefile.split():
            raise WrongCommand(f"pip install {word}: the Makefile installs no such package")


def _srun(arguments: list[str]) -> Script | None:
    if arguments[:2] != ["bash", "-c"]:
        raise WrongCommand(f"srun {arguments}: only `srun bash -c` is known here")
    (inner,) = commands(arguments[2])
    return check(inner)


def _nothing(arguments: list[str]) -> None:
    pass


PROGRAMS: dict[str, Callable[[list[str]], Script | None]] = {
    "accelerate": _accelerate,
    "export": _nothing,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "srun": _srun,
}
