"""`python -m flowmo_diffusers` is the command `flowmo`."""

import sys

from flowmo_diffusers.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
