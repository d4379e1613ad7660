"""The command line as a whole: which commands there are, and how each ends."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import flowmo_diffusers
from flowmo_diffusers.cli import convert, decode, encode, generate, inspect, reconstruct
from flowmo_diffusers.page import demo


# Each has `add_arguments(parser)` and `run(args) -> int`, its exit code; its docstring is its help, the first line the
# summary. What takes time to import (torch, diffusers) they import when they run, so that help comes at once.
COMMANDS = (reconstruct, encode, decode, generate, convert, inspect, demo)

INTERRUPTED = 130
BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowmo",
        description="FlowMo, an image tokenizer: images to tokens and back. `flowmo COMMAND --help` has examples.",
        epilog="Exit codes: 0 all done, 1 some of it failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"flowmo_diffusers {flowmo_diffusers.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        summary, _, details = module.__doc__.strip().partition("\n")
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=summary,
            description=f"{summary}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command and returns its exit code.

    Raises:
        SystemExit: With 2 if the arguments are wrong, and with 0 after `--help`, as argparse does.
    """
    args = build_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be of bytes that are no text
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")  # they are for programmers
            code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("flowmo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"flowmo {args.command}: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
