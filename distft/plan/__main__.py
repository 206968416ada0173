"""`python -m distft.plan`."""

import sys

from distft.plan.command import main

sys.exit(main())
