"""`python -m flowmo_diffusers.page`."""

import sys

from flowmo_diffusers.page.demo import main


if __name__ == "__main__":
    sys.exit(main())
