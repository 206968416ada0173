"""`python -m distft.doctor`, one process alone or as many as a launcher starts."""

import sys

from distft.core.hard_exit import hard_exit
from distft.doctor.command import main

hard_exit(main(sys.argv[1:]))
