"""`python -m distft.report`."""

import sys

from distft.report.command import main

if __name__ == "__main__":
    sys.exit(main())
