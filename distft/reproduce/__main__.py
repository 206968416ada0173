"""`python -m distft.reproduce`."""

import sys

from distft.reproduce.command import main

if __name__ == "__main__":
    sys.exit(main())
