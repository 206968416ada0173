"""`python -m distft.advise`."""

import sys

from distft.advise.command import main

sys.exit(main())
