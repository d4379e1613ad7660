"""
A published checkpoint to a folder of this library, and back.

    flowmo convert flowmo_lo.pth flowmo-lo
    flowmo convert flowmo-lo flowmo_lo.pth

What is there is replaced.
"""

import argparse

from flowmo_diffusers.hub.convert_options import add_arguments as add_arguments


def run(args: argparse.Namespace) -> int:
    from flowmo_diffusers.hub.convert import convert

    convert(args)
    return 0
