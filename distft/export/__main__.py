"""`python -m distft.export` is `distft export`."""

import sys

from distft.export_formats.command import main

sys.exit(main())
