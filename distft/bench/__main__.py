"""`python -m distft.bench`."""

import sys

from distft.bench.command import main

sys.exit(main())
